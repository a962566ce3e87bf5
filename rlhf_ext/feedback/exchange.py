"""In and out of the label store: general rows, TRL pairs, JSONL, Parquet, `datasets`.

Rows are those of `rlhf_ext.data.preferences`, with columns that training passes over: `policies` (a list), `sampling`
(a list of JSON texts), `extra` (a JSON text), `annotator`, `seconds`, `comment`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datasets import Dataset, Features, List, Value

from ..data.loading import load_rows
from ..data.preferences import is_truncated, normalize_row
from .answers import COUNTING, answer_weights, merge_votes
from .records import Candidate, Comparison, Label, NewComparison, NewLabel, check_comparison
from .store import LabelStore


Votes = Literal["merged", "single"]

_TEXTS = ("prompt", "chosen", "rejected", "completions")
_LABELS = ("target", "best", "ranking", "incomparable")
_SIDE = ("truncated", "policies", "sampling", "extra", "annotator", "seconds", "comment", "overlap")
_OUT = ("comparison_id", "pool", "num_labels")  # written by an export, not read again
_FEATURES = {
    "best": Value("int64"),
    "target": List(Value("float64")),
    "ranking": List(Value("int64")),
    "incomparable": Value("bool"),
    "truncated": List(Value("bool")),
    "comparison_id": Value("int64"),
    "pool": Value("string"),
    "num_labels": Value("int64"),
    "policies": List(Value("string")),
    "sampling": List(Value("string")),
    "extra": Value("string"),
    "annotator": Value("string"),
    "seconds": Value("float64"),
    "comment": Value("string"),
}


class NewRows(NamedTuple):
    """What changed since a cursor: rows by `comparison_id`, which replace older ones, and ids that have none left."""

    rows: list[dict[str, Any]]
    withdrawn: list[int]
    cursor: int


class PairReport(NamedTuple):
    """What became of general rows on the way to pairs: how many pairs, and rows that hold none."""

    pairs: int
    ties: int
    incomparable: int


def import_rows(
    store: LabelStore,
    rows: str | Path | Iterable[Mapping[str, Any]],
    *,
    pool: str = "default",
    annotator: str = "imported",
    overlap: int = 1,
) -> list[int]:
    """
    Add rows to the store, with their labels if they have any.

    Rows with the same texts are one comparison if different annotators labelled them (column `annotator`), and
    otherwise comparisons of their own. Importing the same rows into the same pool again adds nothing.

    Args:
        store ([`LabelStore`]): where to.
        rows (`str`, `Path` or iterable): rows, a `Dataset`, or what `load_rows` reads: a JSONL or Parquet file, a
            folder, a Hub id. A row without a label is one to be labelled.
        pool, annotator, overlap (`str`, `str`, `int`, *optional*): for rows that do not say; `pool` for all.

    Returns:
        `list[int]`: the ids of the comparisons, each once.

    Raises:
        ValueError: naming row, field, value and remedy; nothing was added then.
    """
    if isinstance(rows, str | Path):
        try:
            rows = load_rows(str(rows))
        except ValueError as error:  # which names the flag that a data set usually comes from
            raise ValueError(str(error).replace("`dataset_name`", "`rows`")) from error
    # All are read before the first is added: a bad row at the end leaves no half import.
    found: dict[str, NewComparison] = {}
    for index, row in enumerate(rows):
        new = _read_row(row, index, annotator, overlap)
        while (known := found.get(new.fingerprint)) is not None:
            names = {label.annotator for label in known.labels}
            if new.labels and names and new.labels[0].annotator not in names:
                known.labels.extend(new.labels)
                break
            new = replace(new, copy=new.copy + 1)
        else:
            found[new.fingerprint] = new
    return store.add(found.values(), pool=pool)


def export_rows(
    store: LabelStore, *, pool: str | None = None, votes: Votes = "merged", since: int = 0
) -> Iterator[dict[str, Any]]:
    """
    General rows of everything that has a label. A generator: read once, so `list(...)` what is used twice.

    A pool that is not there (yet) has no rows; [`LabelStore.pools`] names those there are.

    `votes="merged"` gives one row per comparison, several labels joined by [`~feedback.answers.merge_votes`];
    `"single"` one row per label, with its annotator. The cross-entropy of a merged row is the mean over its single
    rows, rankings apart. `since` leaves out comparisons without a new row after that label id.
    """
    for comparison, labels in store.labelled(pool=pool, since=since):
        yield from _rows_of(comparison, labels, votes)


def rows_since(store: LabelStore, cursor: int = 0, *, pool: str | None = None) -> NewRows:
    """
    What a training loop has not seen yet: merged rows of every comparison with a new label, correction or undo.

    Pass the returned cursor next time. Keep rows by their `comparison_id`: one that comes again replaces the old one.
    """
    # First the cursor: a label that arrives in between comes twice rather than never.
    last = store.progress().last_label_id
    new = NewRows([], [], last)
    for comparison, labels in store.labelled(pool=pool, since=cursor):
        rows = list(_rows_of(comparison, labels, "merged"))
        new.rows.extend(rows)
        if not rows:
            new.withdrawn.append(comparison.id)
    return new


def to_dataset(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """
    Rows of [`export_rows`] or [`to_pairs`] as a `Dataset` whose columns have the same types whatever is in them.

    Raises:
        ValueError: without rows, or if text and messages, or rows with and without a prompt, are mixed.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("There are no rows to export: no comparison of this pool has a label yet.")
    for name in ("prompt", "completions"):
        texts = {id(row): row[name][0] if name == "completions" else row[name] for row in rows if name in row}
        if not texts:
            continue
        kinds = {type(text).__name__ for text in texts.values()}
        if len(texts) < len(rows) or len(kinds) > 1:
            raise ValueError(
                f"`{name}` is {sorted(kinds)} in {len(texts)} of {len(rows)} rows; a dataset has one kind of text. "
                "Export pool by pool."
            )
    if any("truncated" in row for row in rows):
        rows = [{**row, "truncated": row.get("truncated") or [False] * _size(row)} for row in rows]
    texts = Dataset.from_list([{name: row[name] for name in _TEXTS if name in row} for row in rows])
    known = {name: feature for name, feature in _FEATURES.items() if name in rows[0]}
    return Dataset.from_list(rows, features=Features({**texts.features, **known}))


def to_pairs(rows: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], PairReport]:
    """
    General rows as TRL pairs (`chosen`, `rejected`): what a pair cannot say is left out and counted.

    A ranking gives all its pairs, best first; everything else the candidate of the largest weight over each other
    one. Ties for the largest weight give none, and how large a soft weight was is lost.
    """
    pairs: list[dict[str, Any]] = []
    ties = incomparable = 0
    for row in rows:
        completions = row["completions"]
        if row["incomparable"]:
            incomparable += 1
            continue
        if row["ranking"] is not None:
            order = row["ranking"]
            chosen = [(a, b) for place, a in enumerate(order) for b in order[place + 1 :]]
        else:
            best = row["best"]
            weights = row["target"] if best is None else answer_weights("best", best, len(completions))
            first = max(range(len(weights)), key=weights.__getitem__)
            is_tie = list(weights).count(weights[first]) > 1
            ties += is_tie
            chosen = [] if is_tie else [(first, other) for other in range(len(weights)) if other != first]
        shared = {name: row[name] for name in ("prompt", "comparison_id") if name in row}
        for a, b in chosen:
            pair = {**shared, "chosen": completions[a], "rejected": completions[b]}
            cut = row.get("truncated")
            pairs.append(pair if cut is None else {**pair, "truncated": [cut[a], cut[b]]})
    return pairs, PairReport(len(pairs), ties, incomparable)


def write_rows(rows: Iterable[Mapping[str, Any]] | Dataset, path: str | Path) -> Path:
    """
    Write rows to a `.jsonl` or `.parquet` file, whole or not at all; `load_rows` and `import_rows` read it.

    Raises:
        ValueError: for another suffix, or rows that are no dataset.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"`path` is {path}. Give a name that ends in .jsonl or .parquet.")
    dataset = rows if isinstance(rows, Dataset) else to_dataset(rows)
    aside = path.with_name(f".{path.name}.unfinished")
    if path.suffix == ".jsonl":
        # `Dataset.to_json` rounds to ten digits: a third would come back as another number.
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in dataset)
    else:
        dataset.to_parquet(aside)
    aside.replace(path)
    return path


def _rows_of(comparison: Comparison, labels: list[Label], votes: Votes) -> Iterator[dict[str, Any]]:
    if votes not in ("merged", "single"):
        raise ValueError(f"`votes` is {votes!r}; use 'merged' or 'single'.")
    size = len(comparison.candidates)
    counting = [label for label in labels if label.kind in COUNTING]
    if votes == "single":
        for label in counting:
            person = {name: getattr(label, name) for name in ("annotator", "seconds", "comment")}
            yield {**_row(comparison, label.kind, label.value), "num_labels": 1, **person}
        return
    merged = merge_votes([(label.kind, label.value) for label in counting], size)
    if merged is not None:
        yield {**_row(comparison, *merged), "num_labels": len(counting)}


def _row(comparison: Comparison, kind: str, value: Any) -> dict[str, Any]:
    size = len(comparison.candidates)
    row: dict[str, Any] = {} if comparison.prompt is None else {"prompt": comparison.prompt}
    truncated = [candidate.truncated for candidate in comparison.candidates]
    if any(truncated):
        row["truncated"] = truncated
    return {
        **row,
        "completions": [candidate.completion for candidate in comparison.candidates],
        "best": value if kind == "best" else None,
        "target": answer_weights(kind, value, size) if kind in ("tie", "target") else None,
        "ranking": value if kind == "ranking" else None,
        "incomparable": kind == "incomparable",
        "comparison_id": comparison.id,
        "pool": comparison.pool,
        "policies": [candidate.policy for candidate in comparison.candidates],
        "sampling": [_to_json(candidate.sampling) for candidate in comparison.candidates],
        "extra": _to_json(comparison.extra),
    }


def _read_row(row: Mapping[str, Any], index: int, annotator: str, overlap: int) -> NewComparison:
    is_pair = "completions" not in row
    if is_pair and not {"chosen", "rejected"} <= set(row):
        raise ValueError(
            f"Row {index} of the import has the columns {sorted(row)}. It needs `chosen` and `rejected`, or "
            "`completions`."
        )
    labelled = is_pair or row.get("incomparable") or any(row.get(name) is not None for name in _LABELS[:3])
    texts = [row.get("chosen"), row.get("rejected")] if is_pair else row["completions"]
    labels = []
    if labelled:
        answer = _answer(normalize_row(row, index))
        name = row.get("annotator") or annotator
        labels = [NewLabel(name, *answer, seconds=row.get("seconds"), comment=row.get("comment"))]
    try:
        policies, sampling = row.get("policies"), row.get("sampling")
        new = NewComparison(
            _clean(row.get("prompt")),
            [
                Candidate(
                    _clean(text),
                    None if policies is None else policies[position],
                    None if sampling is None else _from_json(sampling[position]),
                    is_truncated(row, position),
                )
                for position, text in enumerate(texts)
            ],
            overlap=row.get("overlap") or overlap,
            extra=_extra(row),
            labels=labels,
        )
        check_comparison(new)
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"Row {index} of the import: {error}") from error
    return new


def _answer(row: dict[str, Any] | None) -> tuple[str, Any]:
    if row is None:
        return "incomparable", None
    if row["ranking"] is not None:
        return "ranking", row["ranking"]
    target = row["target"]
    top = [position for position, weight in enumerate(target) if weight > 0]
    if len(top) == 1:
        return "best", top[0]
    if len({target[position] for position in top}) == 1:
        return "tie", top
    return "target", target


def _extra(row: Mapping[str, Any]) -> dict[str, Any] | None:
    extra = dict(_from_json(row.get("extra")) or {})
    known = (*_TEXTS, *_LABELS, *_SIDE, *_OUT)
    extra.update({name: value for name, value in row.items() if name not in known and value is not None})
    return extra or None


def _clean(text: Any) -> Any:
    """Arrow gives every message of a column every field that one of them has; what is None was not there."""
    if isinstance(text, list) and all(isinstance(message, dict) for message in text):
        return [{name: value for name, value in message.items() if value is not None} for message in text]
    return text


def _size(row: Mapping[str, Any]) -> int:
    return len(row["completions"]) if "completions" in row else 2


def _to_json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True)


def _from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value
