"""What a data set holds, counted before training: sizes, ties, duplicates, leaks, and texts that are too long."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .lengths import candidates, measure_rows
from .loading import prompt_group
from .preferences import LABEL_COLUMNS, check_preferences


QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "max": 1.0}


@dataclass
class DataSummary:
    """
    Counts of one split.

    Parameters:
        kind (`str`):
            `"preferences"`, `"prompts"` or `"sft"`.
        rows (`int`), prompts (`int`):
            Rows, and different prompts among them.
        prompt_tokens (`dict[str, int]`), completion_tokens (`dict[str, int]`):
            Quantiles of the lengths in tokens; completions with the end-of-sequence token.
        candidates (`dict[int, int]`):
            Number of rows by number of completions K.
        ties (`int`), soft_labels (`int`), rankings (`int`), incomparable (`int`):
            Rows whose best target is shared; rows with one best completion and a target that is not one-hot; rows
            labelled by a ranking; rows that the labeller could not compare, which are in no other count.
        duplicate_rows (`int`):
            Rows that repeat an earlier one exactly (prompt, completions and label).
        leaked_prompts (`int`), leaked_rows (`int`):
            Prompts that also stand in the other split, and the rows of this one that have them.
        over_limit (`int`):
            Rows with a text longer than the limit that was asked about.
        boundary_mismatch_rate (`float`):
            Share of completions whose tokens, joined to the prompt's, are not the tokens of the joined text.
    """

    kind: str
    rows: int
    prompts: int = 0
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    completion_tokens: dict[str, int] = field(default_factory=dict)
    candidates: dict[int, int] = field(default_factory=dict)
    ties: int = 0
    soft_labels: int = 0
    rankings: int = 0
    incomparable: int = 0
    duplicate_rows: int = 0
    leaked_prompts: int = 0
    leaked_rows: int = 0
    over_limit: int = 0
    boundary_mismatch_rate: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A table of two columns, without the lines that do not apply to this kind of rows."""
        skipped = {"kind"}
        if self.kind != "preferences":
            skipped |= {"candidates", "ties", "soft_labels", "rankings", "incomparable"}
        if self.kind == "prompts":
            skipped |= {"completion_tokens", "boundary_mismatch_rate"}
        lines = [f"{self.kind}:"]
        for name, value in self.to_dict().items():
            if name in skipped:
                continue
            if isinstance(value, dict):
                value = "  ".join(f"{key}={count}" for key, count in value.items()) or "-"
            elif isinstance(value, float):
                value = f"{value:.4f}"
            lines.append(f"  {name.replace('_', ' '):<24}{value}")
        if self.leaked_prompts:
            lines.append("  WARNING: prompts stand in both splits; hold rows out by prompt with `eval_fraction`.")
        return "\n".join(lines)


def summarize_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    other: Dataset | None = None,
    max_length: int | None = None,
) -> DataSummary:
    """
    Count preference rows, pairs (`chosen`, `rejected`) or general ones (`completions` with a label).

    Args:
        dataset (`Dataset`), tokenizer (`PreTrainedTokenizerBase`):
            The rows, and the tokenizer they will be read by.
        other (`Dataset`, *optional*):
            The other split, to count prompts that stand in both.
        max_length (`int`, *optional*):
            Limit in tokens for prompt, completion and end-of-sequence token.

    Returns:
        [`DataSummary`]

    Raises:
        ValueError: for a row that is no preference, naming row, field, value and remedy.
    """
    labels, report = check_preferences(dataset)
    compared = dataset.select([index for index, label in enumerate(labels) if label is not None])
    summary = _summarize("preferences", compared, tokenizer, other, max_length)
    summary.rows = report.num_rows
    summary.candidates = dict(sorted(Counter(len(candidates(row)[1]) for row in compared).items()))
    summary.ties, summary.soft_labels = report.num_ties, report.num_soft
    summary.rankings, summary.incomparable = report.num_rankings, report.num_incomparable
    return summary


def summarize_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    other: Dataset | None = None,
    max_length: int | None = None,
) -> DataSummary:
    """Count PPO rows (`prompt`); `max_length` limits the prompt alone. Otherwise as [`summarize_preferences`]."""
    prompts = dataset.select_columns(["prompt"])
    return _summarize("prompts", prompts, tokenizer, other, max_length)


def summarize_sft(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    other: Dataset | None = None,
    max_length: int | None = None,
) -> DataSummary:
    """Count SFT rows (`prompt` and `completion`, `messages`, or `text`). Otherwise as [`summarize_preferences`]."""
    return _summarize("sft", dataset, tokenizer, other, max_length)


def check_context(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> None:
    """
    Raise a `ValueError` if prompt and completion of a row do not fit the model.

    The trainers for rewards and PPO check their rows themselves; this is for those of TRL, which do not.

    Args:
        dataset (`Dataset`), tokenizer (`PreTrainedTokenizerBase`):
            Rows of any kind, and the tokenizer they will be read by.
        max_positions (`int` or `None`):
            The model's `max_position_embeddings`; `None` (no such limit) checks nothing.
    """
    if max_positions is None:
        return
    lengths = measure_rows(dataset, tokenizer)
    over = [index for index, row in enumerate(lengths) if row.longest > max_positions]
    if over:
        shown = [f"row {index}: {lengths[index].prompt} + {max(lengths[index].completions)}" for index in over[:5]]
        raise ValueError(
            f"Prompt + completion exceed the model's `max_position_embeddings` of {max_positions} tokens in "
            f"{len(over)} of {len(dataset)} rows ({'; '.join(shown)}{'; ...' if len(over) > 5 else ''}); shorten or "
            "drop these rows, or set `max_length`."
        )


def drop_long_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int | None
) -> tuple[Dataset, int]:
    """The rows whose prompt has at most `max_prompt_length` tokens, and how many others there were."""
    if max_prompt_length is None:
        return dataset, 0
    lengths = [row.prompt for row in measure_rows(dataset.select_columns(["prompt"]), tokenizer)]
    kept = [index for index, length in enumerate(lengths) if length <= max_prompt_length]
    if not kept:
        raise ValueError(
            f"`max_prompt_length` is {max_prompt_length}, but the shortest of {len(dataset)} prompts has "
            f"{min(lengths)} tokens; raise it."
        )
    return dataset.select(kept), len(dataset) - len(kept)


def report_summaries(output_dir: str, **summaries: DataSummary) -> None:
    """Print the summary of each split, and keep them as `data_summary.json`; called on the main process."""
    for split, summary in summaries.items():
        print(f"{split} {summary}", flush=True)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    content = {split: summary.to_dict() for split, summary in summaries.items()}
    (Path(output_dir) / "data_summary.json").write_text(json.dumps(content, indent=2) + "\n")


def _summarize(
    kind: str, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, other: Dataset | None, max_length: int | None
) -> DataSummary:
    prompts = [prompt_group(row, index) for index, row in enumerate(dataset)]
    elsewhere = {prompt_group(row, -1) for row in other} if other is not None else set()
    lengths = measure_rows(dataset, tokenizer)
    completions = sum(len(row.completions) for row in lengths)
    return DataSummary(
        kind=kind,
        rows=len(dataset),
        prompts=len(set(prompts)),
        prompt_tokens=_quantiles([row.prompt for row in lengths]),
        completion_tokens=_quantiles([length for row in lengths for length in row.completions]),
        duplicate_rows=len(dataset) - len({_content(row) for row in dataset}),
        leaked_prompts=len(set(prompts) & elsewhere),
        leaked_rows=sum(prompt in elsewhere for prompt in prompts),
        over_limit=0 if max_length is None else sum(row.longest > max_length for row in lengths),
        boundary_mismatch_rate=sum(row.mismatches for row in lengths) / max(1, completions),
    )


def _content(row: dict[str, Any]) -> str:
    """Prompt, completions and label of a row; two rows that differ in an id or a source alone are duplicates."""
    labels = {column: row[column] for column in LABEL_COLUMNS if column in row}
    return json.dumps([*candidates(row), labels], sort_keys=True, ensure_ascii=False)


def _quantiles(values: list[int]) -> dict[str, int]:
    """Order statistics: lengths that occur, not numbers between them."""
    ordered = sorted(values)
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in QUANTILES.items()} if ordered else {}
