"""Preference rows: what a label looks like, what is refused, and the one general form that everything becomes.

A row is either TRL's pair, `chosen` and `rejected` with an optional `prompt`, or the general row: `completions` (K of
them, K >= 2) with an optional `prompt` and exactly one of

- `target`: K numbers from 0 to 1 that sum to 1 (ties, votes, soft labels),
- `best`: the index of the best completion,
- `ranking`: all K indices, best first.

A row may say `truncated` (a bool, or one per completion): the text was cut, as a segment of a longer episode is
(Christiano et al. 2017), so it does not end and gets no end-of-sequence token. Its score is read, or summed, up to the
cut.

Texts are strings or messages. Label columns that do not apply to a row hold `None`. A row that the labeller could not
compare says `incomparable: true`, whatever its label columns hold; it is dropped and counted (Christiano et al. 2017,
section 2.2.2).
"""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value

from .loading import implicit_prompt


LABEL_COLUMNS = ("target", "best", "ranking")

IMPLICIT = "implicit_prompt"
"""Column of the prompt that a pair without one holds; `None` where none can be told."""

TARGET_TOLERANCE = 1e-4
"""How far a target may be from a sum of 1: what float32 leaves of a distribution, not a rounded percentage."""


@dataclass
class PreferenceReport:
    """
    What became of the rows of a preference dataset. Counts of a streamed dataset stay 0, because nobody has seen it.

    Attributes:
        num_rows (`int`): rows given.
        num_incomparable (`int`): rows dropped because the labeller could not compare.
        num_ties (`int`): kept rows whose target has more than one best completion.
        num_soft (`int`): kept rows with one best completion whose target is not one-hot.
        num_rankings (`int`): kept rows labelled by a ranking.
        max_candidates (`int`): largest K.
        num_truncated (`int`): completions that were cut and do not end.
        num_empty (`int`): completions that are empty texts: the end of sequence at once.
        num_overlong (`int`): rows dropped because a candidate is longer than `max_length`.
        num_prompt_mismatches (`int`): rows where the tokens of prompt + completion do not begin with the tokens of the
            prompt (huggingface/trl#1702): a policy that continues the prompt's tokens writes others.
    """

    num_rows: int = 0
    num_incomparable: int = 0
    num_ties: int = 0
    num_soft: int = 0
    num_rankings: int = 0
    max_candidates: int = 0
    num_truncated: int = 0
    num_empty: int = 0
    num_overlong: int = 0
    num_prompt_mismatches: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{value} {name.removeprefix('num_')}" for name, value in vars(self).items())


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """
    The columns of a dataset, also of a streamed one that does not know them.

    Raises:
        ValueError: if the dataset is empty.
    """
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError("The preference dataset has 0 rows. Pass at least one.")
    names = dataset.column_names
    return list(names) if names is not None else list(next(iter(dataset)))


def check_columns(columns: Iterable[str]) -> bool:
    """
    Whether the columns are TRL's pairs (`True`) or general rows (`False`).

    Raises:
        ValueError: if they are neither or both, naming what is missing.
    """
    columns = set(columns)
    pair, general = columns & {"chosen", "rejected"}, "completions" in columns
    labels = columns & set(LABEL_COLUMNS)
    if pair and general:
        raise ValueError(
            f"The preference dataset has both {sorted(pair)} and `completions`; a row is one or the other. Remove one."
        )
    if pair and labels:
        raise ValueError(
            f"The preference dataset has {sorted(pair)} and {sorted(labels)}, but a pair's label is its column names. "
            "For other labels use `completions=[a, b]`."
        )
    if pair and len(pair) < 2:
        missing = {"chosen", "rejected"} - pair
        raise ValueError(f"The preference dataset has {sorted(pair)} but no column {sorted(missing)}. Add it.")
    if general and not labels:
        raise ValueError(
            f"The preference dataset has `completions` but none of {list(LABEL_COLUMNS)}. Add one of these columns."
        )
    if not pair and not general:
        raise ValueError(
            f"The preference dataset has the columns {sorted(columns)}. It needs `chosen` and `rejected`, or "
            f"`completions` and one of {list(LABEL_COLUMNS)}."
        )
    return bool(pair)


def normalize_row(row: Mapping[str, Any], index: int) -> dict[str, Any] | None:
    """
    Check a pair or a general row and bring its label into one form.

    Args:
        row (`Mapping[str, Any]`):
            The row.
        index (`int`):
            Its place in the dataset, named in errors.

    Returns:
        `dict[str, Any]` or `None`: `completions`, and of `target` and `ranking` the one that is the label while the
        other is `None`; `prompt` and `truncated` (a list) if the row has them. `None` if the row is incomparable.

    Raises:
        ValueError: naming row, field, value and remedy.
    """
    if row.get("incomparable"):
        return None
    is_pair = "completions" not in row
    fields = ("chosen", "rejected") if is_pair else ("completions",)
    completions = [row[name] for name in fields] if is_pair else row["completions"]
    if not isinstance(completions, Sequence) or isinstance(completions, str):
        raise _error(index, "completions", completions, "a list of two or more", "Give each candidate an item.")
    if len(completions) < 2:
        raise _error(index, "completions", completions, "a list of two or more", "Drop the row or add candidates.")
    prompt = row.get("prompt")
    if "prompt" in row:
        _check_text(index, "prompt", prompt)
    # An empty answer is an answer (46 of 7,995 rows of real data hold one): the end comes at once. It needs
    # a prompt to follow, and something to be compared with.
    if "prompt" in row and not any(completions):
        raise _error(index, "completions", completions, "at least one that is not empty", "Drop the row.")
    for position, completion in enumerate(completions):
        name = fields[position] if is_pair else f"completions[{position}]"
        if not (completion == "" and "prompt" in row):
            _check_text(index, name, completion)
        if isinstance(completion, str) != isinstance(prompt if "prompt" in row else completions[0], str):
            raise _error(index, name, completion, "text or messages like the rest of its row", "Use one form.")
    target, ranking = ([1.0, 0.0], None) if is_pair else _label(row, index, len(completions))
    normalized = {"completions": list(completions), "target": target, "ranking": ranking}
    if is_pair and "prompt" not in row:
        normalized[IMPLICIT] = implicit_prompt(*completions)
    if "truncated" in row:
        normalized["truncated"] = _truncated(row["truncated"], index, completions)
    return {"prompt": prompt, **normalized} if "prompt" in row else normalized


def normalize_preferences(
    dataset: Dataset | IterableDataset,
) -> tuple[Dataset | IterableDataset, PreferenceReport]:
    """
    Check a preference dataset and turn it into general rows.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            TRL pairs or general rows, see above. Other columns are kept, except the label columns.

    Returns:
        `tuple`: the dataset with `completions`, `target`, `ranking` (the label and `None`), `row` (the place in
        `dataset`) and `prompt` if given, without incomparable rows; and a [`PreferenceReport`]. A streamed dataset is
        checked row by row as it is read.

    Raises:
        ValueError: for a wrong dataset or row, naming row, field, value and remedy.
    """
    names = column_names(dataset)
    is_pair = check_columns(names)
    drop = [name for name in ("chosen", "rejected", "best", "incomparable") if name in names]
    if isinstance(dataset, IterableDataset):
        stream = dataset.map(_normalize_or_mark, with_indices=True).filter(_is_kept)
        return stream.remove_columns(drop), PreferenceReport()

    # Two passes: counts taken inside `map` would be lost where `datasets` finds the result in its cache.
    labels, report = check_preferences(dataset)
    kept = [index for index, label in enumerate(labels) if label is not None]
    dataset = dataset.select(kept)
    if is_pair:
        dataset = dataset.map(_pair_to_completions, desc="Pairs to completions")
    dataset = dataset.remove_columns([name for name in (*drop, "target", "ranking", "row") if name in names])
    return add_labels(dataset, [labels[index] for index in kept], kept), report


def check_preferences(dataset: Dataset) -> tuple[list[dict[str, Any] | None], PreferenceReport]:
    """
    Check every row of a dataset without changing it.

    Returns:
        `tuple`: per row the label `{"target": ..., "ranking": ...}` or `None` if incomparable; and a
        [`PreferenceReport`].

    Raises:
        ValueError: for a wrong dataset or row, or if no row is left.
    """
    check_columns(column_names(dataset))
    report = PreferenceReport(num_rows=len(dataset))
    labels: list[dict[str, Any] | None] = []
    for index, row in enumerate(dataset):
        normalized = normalize_row(row, index)
        if normalized is None:
            report.num_incomparable += 1
            labels.append(None)
            continue
        target = normalized["target"]
        report.max_candidates = max(report.max_candidates, len(normalized["completions"]))
        report.num_rankings += target is None
        if target is not None:
            is_tie = target.count(max(target)) > 1
            report.num_ties += is_tie
            report.num_soft += not is_tie and max(target) < 1.0
        report.num_truncated += sum(normalized.get("truncated", []))
        report.num_empty += sum(completion == "" for completion in normalized["completions"])
        labels.append({"target": target, "ranking": normalized["ranking"]})
    for name in ("chosen", "rejected"):
        if name in column_names(dataset) and not any(dataset[name]):
            raise ValueError(
                f"Row 0 to {len(dataset) - 1} of the preference dataset: `{name}` is {dataset[0][name]!r}; the column "
                "is empty. Fill it in, or check which column holds the answers."
            )
    if report.num_incomparable == report.num_rows:
        raise ValueError(f"All {report.num_rows} rows of the preference dataset are incomparable. Add compared rows.")
    return labels, report


def add_labels(dataset: Dataset, labels: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> Dataset:
    """`dataset` with the columns `target`, `ranking` and `row`."""
    types = Features({"target": List(Value("float64")), "ranking": List(Value("int64")), "row": Value("int64")})
    columns = {
        "target": [label["target"] for label in labels],
        "ranking": [label["ranking"] for label in labels],
        "row": list(rows),
    }
    for name, values in columns.items():
        dataset = dataset.add_column(name, values, feature=types[name])
    return dataset


def _label(row: Mapping[str, Any], index: int, size: int) -> tuple[list[float] | None, list[int] | None]:
    given = [name for name in LABEL_COLUMNS if row.get(name) is not None]
    if len(given) != 1:
        labels = {name: row.get(name) for name in LABEL_COLUMNS}
        wanted = "exactly one of them set"
        raise _error(index, "target/best/ranking", labels, wanted, "Or mark the row `incomparable: true`.")
    name, value = given[0], row[given[0]]
    if name == "best":
        if not _is_integer(value) or not 0 <= value < size:
            raise _error(index, name, value, f"an index from 0 to {size - 1}", "Count from 0.")
        return [float(position == value) for position in range(size)], None
    if name == "ranking":
        is_list = isinstance(value, Sequence) and all(map(_is_integer, value))
        if not is_list or sorted(value) != list(range(size)):
            wanted = f"every index from 0 to {size - 1} once, best first"
            raise _error(index, name, value, wanted, "For tied or left-out completions use `target`.")
        return None, [int(position) for position in value]
    is_list = isinstance(value, Sequence) and all(isinstance(item, numbers.Real) for item in value)
    if not is_list or len(value) != size:
        raise _error(index, name, value, f"{size} numbers, one per completion", "Give each candidate its share.")
    if not all(0.0 <= item <= 1.0 for item in value) or abs(math.fsum(value) - 1.0) > TARGET_TOLERANCE:
        raise _error(index, name, value, "numbers from 0 to 1 that sum to 1", "Divide them by their sum.")
    return [float(item) for item in value], None


def is_truncated(row: Mapping[str, Any], position: int) -> bool:
    """Whether a completion of a checked row was cut, so that it does not end."""
    value = row.get("truncated")
    return bool(value[position] if isinstance(value, Sequence) else value)


def _truncated(value: Any, index: int, completions: Sequence[Any]) -> list[bool]:
    flags = value if isinstance(value, Sequence) and not isinstance(value, str) else [value] * len(completions)
    if len(flags) != len(completions) or not all(flag is None or isinstance(flag, bool) for flag in flags):
        wanted = f"true or false, or {len(completions)} of them"
        raise _error(index, "truncated", value, wanted, "Give each completion one, or the row one for all.")
    for position, (flag, completion) in enumerate(zip(flags, completions, strict=True)):
        if flag and not completion:
            name = f"completions[{position}]"
            raise _error(
                index, name, completion, "text, because it is `truncated`", "Without a token it has no score."
            )
    return [bool(flag) for flag in flags]


def _check_text(index: int, field: str, text: Any) -> None:
    if isinstance(text, str) and text:
        return
    is_messages = isinstance(text, Sequence) and not isinstance(text, str) and len(text) > 0
    if is_messages and all(isinstance(message, Mapping) and "role" in message for message in text):
        return
    raise _error(index, field, text, "a non-empty text or list of messages", "Fill it in or drop the row.")


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and float(value).is_integer()


def _error(index: int, field: str, value: Any, wanted: str, remedy: str) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    return ValueError(f"Row {index} of the preference dataset: `{field}` is {shown}, expected {wanted}. {remedy}")


def _normalize_or_mark(row: dict[str, Any], index: int) -> dict[str, Any]:
    normalized = normalize_row(row, index) or {"completions": None, "target": None, "ranking": None}
    return {**normalized, "row": index}


def _is_kept(row: dict[str, Any]) -> bool:
    return row["completions"] is not None


def _pair_to_completions(row: dict[str, Any]) -> dict[str, Any]:
    pair = [row["chosen"], row["rejected"]]
    return {"completions": pair} | ({} if "prompt" in row else {IMPLICIT: implicit_prompt(*pair)})
