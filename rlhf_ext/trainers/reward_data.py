"""What a reward trainer does with rows before the first step: labels, ids, limits, and a count of what was lost."""

import copy

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import global_then_local_main_first

from ..data.candidates import (
    CANDIDATE_COLUMNS,
    check_candidate_ids,
    drop_overlong,
    pair_to_candidates,
    tokenize_candidates,
)
from ..data.preferences import (
    PreferenceReport,
    check_columns,
    check_preferences,
    column_names,
    normalize_preferences,
)
from .reward_config import PreferenceRewardConfig


logger = get_logger(__name__)


class PreferenceDataMixin:
    """The part of [`PreferenceRewardTrainer`] that reads rows."""

    _context_length: int | None
    preference_reports: dict[str, PreferenceReport]

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: PreferenceRewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        columns = column_names(dataset)
        if "candidate_ids" in columns:
            return self._check_ids(dataset, args, dataset_name)
        check_eos(processing_class)
        is_tokenized = {"chosen_ids", "rejected_ids"} <= set(columns)
        streams = isinstance(dataset, IterableDataset)
        options = {} if streams else {"num_proc": args.dataset_num_proc}
        with global_then_local_main_first():
            # The parent closes every text by the end of sequence, so rows that may be cut take our own path.
            closes = not streams and "truncated" not in columns
            if is_tokenized and args.lm_coef > 0.0 and not {"prompt", "chosen"} & set(columns):
                raise ValueError(
                    f"`lm_coef` is {args.lm_coef}, but rows of token ids alone do not say where a completion begins, "
                    "and the language-modelling term would train on prompts. Keep the texts beside the ids."
                )
            if is_tokenized or (check_columns(columns) and closes):
                # Text pairs are tokenised by the parent, so that they stay what TRL reads.
                rows = None
                report = PreferenceReport(max_candidates=2)
                if not is_tokenized:
                    labels, report = check_preferences(dataset)
                    rows = [index for index, label in enumerate(labels) if label is not None]
                    dataset = dataset.select(rows)
                elif not streams:
                    report.num_rows = len(dataset)
                unlimited = copy.copy(args)
                unlimited.max_length = None  # the parent drops long rows without a word; ours are counted below
                dataset = super()._prepare_dataset(dataset, processing_class, unlimited, dataset_name)
                dataset = dataset.map(
                    pair_to_candidates,
                    with_indices=True,
                    fn_kwargs={"processing_class": processing_class, "rows": rows},
                    **options,
                )
            else:
                dataset, report = normalize_preferences(dataset)
                dataset = dataset.map(tokenize_candidates, fn_kwargs={"processing_class": processing_class}, **options)
            limits = {"max_length": args.max_length, "context_length": self._context_length}
            dataset = drop_overlong(dataset, report, overlong=args.overlong, **limits)
        if streams and "margin" in columns:
            dataset = dataset.filter(_check_margin)  # a row at a time, as they come
        if not streams:
            report.num_prompt_mismatches = sum(dataset["prompt_mismatch"])
            self._check_options(dataset, args, dataset_name)
        self._report(dataset_name, report)
        names = column_names(dataset)
        return dataset.select_columns([name for name in CANDIDATE_COLUMNS if name in names])

    def _check_ids(
        self, dataset: Dataset | IterableDataset, args: PreferenceRewardConfig, dataset_name: str
    ) -> Dataset | IterableDataset:
        """Rows that come as token ids: nothing is tokenised, and all the rest is checked as of any others."""
        if isinstance(dataset, IterableDataset):
            return dataset
        report = PreferenceReport(num_rows=len(dataset))
        checked = dataset.map(check_candidate_ids, with_indices=True)
        limits = {"max_length": args.max_length, "context_length": self._context_length}
        checked = drop_overlong(checked, report, overlong=args.overlong, **limits)
        self._check_options(checked, args, dataset_name)
        self._report(dataset_name, report)
        is_prepared = {*CANDIDATE_COLUMNS} - {"margin"} <= {*dataset.column_names} <= {*CANDIDATE_COLUMNS}
        if is_prepared and len(checked) == len(dataset):
            return dataset
        return checked.select_columns([name for name in CANDIDATE_COLUMNS if name in checked.column_names])

    def _check_options(self, dataset: Dataset, args: PreferenceRewardConfig, dataset_name: str) -> None:
        wide = {row: len(ids) for row, ids in zip(dataset["row"], dataset["completion_starts"], strict=True)}
        wide = {row: size for row, size in wide.items() if size > 2}
        if wide and args.center_rewards_coefficient is not None:
            raise ValueError(
                f"`center_rewards_coefficient` is {args.center_rewards_coefficient} and works with two completions, "
                f"but {len(wide)} rows have more: {dict(list(wide.items())[:8])}. Leave it at None."
            )
        if "margin" in dataset.column_names:
            for row in dataset.select_columns(["row", "margin", "target"]):
                _check_margin(row)

        has_preferred = any(
            ranking is not None or max(target or [0.0]) == 1.0
            for target, ranking in zip(dataset["target"], dataset["ranking"], strict=True)
        )
        # Rows to evaluate on may be ties alone: the term is 0 there.
        if args.lm_coef > 0.0 and dataset_name == "train" and not has_preferred:
            raise ValueError(
                f"`lm_coef` is {args.lm_coef}, but no row of the dataset has one preferred completion, which the "
                "language-modelling term reads. Set it to 0.0, or add rows with `best`, `ranking` or a one-hot target."
            )

    def _report(self, dataset_name: str, report: PreferenceReport) -> None:
        self.preference_reports[dataset_name] = report
        lost = report.num_incomparable + report.num_overlong + report.num_prompt_mismatches
        (logger.warning if lost else logger.info)(f"Preference dataset {dataset_name!r}: {report}.")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in CANDIDATE_COLUMNS if name not in self._signature_columns]


def _check_margin(row: dict) -> bool:
    """
    Raises:
        ValueError: the margin is no number, or its row no pair whose first candidate is preferred.
    """
    margin, target = row["margin"], row["target"]
    if margin is None or list(target or ()) != [1.0, 0.0]:
        raise ValueError(
            f"Row {row['row']} has `margin` {margin} and the target {target}, but a margin is a number and works with "
            "pairs only. Remove the column, or give `chosen` and `rejected`."
        )
    return True


def check_eos(processing_class: PreTrainedTokenizerBase, eos_token: str | None = None) -> None:
    if processing_class.eos_token is None and eos_token is None:
        raise ValueError(
            "`processing_class.eos_token` is None, so a finished completion cannot be told from a cut one. Set "
            "`eos_token` of the tokenizer, or of the `PreferenceRewardConfig`."
        )
