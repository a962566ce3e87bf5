"""Rows from local files, saved data sets or the Hub, through one name; splits that share no prompt."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.gz": "json",
    ".json.gz": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
TEXT_COLUMNS = ("prompt", "completion", "chosen", "rejected", "text", "source")
LIST_COLUMNS = ("completions", "target", "ranking", "messages")
ACCEPTED = (
    f"a file ({', '.join(FORMATS)}), a folder of such files named after their split (train.jsonl, test.jsonl), a "
    "folder written by `save_to_disk`, or a Hub id (`owner/name` or `owner/name:config`)"
)


def load_rows(name: str, *, split: str = "train", config: str | None = None) -> Dataset:
    """
    Load one split of a data set from wherever `name` points.

    A single file holds one split, `train`. In a folder a file belongs to the split whose name is a word of its path
    (`train.jsonl`, `pairs_train-00001.parquet`, `train/part.csv`); a folder without any such word is all `train`.

    Args:
        name (`str`):
            A `.jsonl`, `.json` (also `.gz`), `.csv`, `.tsv` or `.parquet` file, a folder of them, a folder written by
            `save_to_disk`, or a Hub id, optionally with its configuration as `owner/name:config`.
        split (`str`, *optional*, defaults to `"train"`):
            Split to load.
        config (`str`, *optional*):
            Configuration of a Hub data set; refused for local data, which has none.

    Returns:
        `Dataset`: at least one row.
    """
    path = Path(name).expanduser()
    if not name:
        raise ValueError(f"`dataset_name` is empty; give {ACCEPTED}.")
    if path.exists():
        if config is not None:
            raise ValueError(
                f"`dataset_config` is {config!r}, but `dataset_name` {name!r} is local data; leave it out."
            )
        dataset = _load_local(path, split)
    elif _looks_local(name):
        raise ValueError(f"`dataset_name` is {name!r}, and there is no such file or folder; give {ACCEPTED}.")
    else:
        dataset = _load_hub(name, split, config)
    if len(dataset) == 0:
        raise ValueError(f"`dataset_name` {name!r} has no rows in split {split!r}; give a data set with rows.")
    return dataset


def require_columns(dataset: Dataset, columns: Iterable[str], *, what: str = "this data set") -> None:
    """Raise a `ValueError` that names every column of `columns` that is missing, or empty in some row."""
    columns = list(columns)
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"Column {_join(missing)} is missing in {what}; it has {_join(dataset.column_names)}. Rename a column "
            "(`dataset.rename_column`) or write the missing one."
        )
    for column in columns:
        empty = [index for index, value in enumerate(dataset[column]) if is_empty(value)]
        if empty:
            shown = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            raise ValueError(
                f"Column {column!r} is empty in {len(empty)} of {len(dataset)} rows of {what} (row {shown}); fill or "
                "drop these rows."
            )


def holdout_by_prompt(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """
    Split rows by a hash of their prompt, so that no prompt stands on both sides.

    The side of a prompt depends on `seed` and the prompt alone: rows may be added, dropped or reordered, and several
    files of one project split alike. `fraction` is therefore met in expectation, not exactly.

    Args:
        dataset (`Dataset`):
            Rows with a `prompt` (text or messages), or with `messages` or `text`, or `chosen` and `rejected`.
        fraction (`float`):
            Share of the prompts that is held out, in (0, 1).
        seed (`int`, *optional*, defaults to `0`):
            Salt of the hash.

    Returns:
        `tuple[Dataset, Dataset]`: the rows kept and the rows held out, each in their old order.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"`eval_fraction` is {fraction}; it is a share of the prompts between 0 and 1.")
    keys = [prompt_key(row) for row in dataset]
    kept, held = [], []
    for index, key in enumerate(keys):
        (held if _unit_hash(key, seed) < fraction else kept).append(index)
    if not kept or not held:
        raise ValueError(
            f"`eval_fraction` is {fraction}, which leaves {len(kept)} rows to train on and {len(held)} to evaluate on "
            f"out of {len(set(keys))} different prompts; choose another fraction or give a test split."
        )
    return dataset.select(kept), dataset.select(held)


def without_prompts(rows: Iterable[dict[str, Any]], held: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose prompt, by [`prompt_key`], is not among those of `held`."""
    keys = {prompt_key(row) for row in held}
    return [row for row in rows if prompt_key(row) not in keys]


def prompt_key(row: dict[str, Any]) -> str:
    """What a row answers, as one string: its prompt, or the part that all of its candidates share."""
    if not is_empty(row.get("prompt")):
        return _canonical(row["prompt"])
    if not is_empty(row.get("messages")):
        turns = row["messages"]
        return _canonical(turns[:-1] if len(turns) > 1 else turns)
    if not is_empty(row.get("chosen")) and not is_empty(row.get("rejected")):
        return _canonical(shared_start(row["chosen"], row["rejected"]))
    if not is_empty(row.get("text")):
        return _canonical(row["text"])
    raise ValueError(f"No prompt in a row with columns {_join(row)}; it needs `prompt`, `messages`, `text` or pairs.")


def prompt_group(row: dict[str, Any], index: int) -> str:
    """What rows about one prompt have in common; a row without one stands alone."""
    try:
        return f"prompt {prompt_key(row)}"
    except ValueError:
        return f"row {index}"


def shared_start(first: Any, second: Any) -> Any:
    """The prompt of two texts, or two lists of messages, that hold it: what they begin with alike.

    In text two answers may begin with the same words, which are no prompt: it ends with the last `Assistant:` (the
    form of hh-rlhf), where there is none with the last line break, else with the last whole word.
    """
    shared = first[: common_prefix_length(first, second)]
    if isinstance(shared, str):
        for border in ("Assistant:", "\n", " "):
            if border in shared:
                return shared[: shared.rindex(border) + len(border)]
    return shared


def common_prefix_length(ids: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences begin with alike."""
    pairs = enumerate(zip(ids, other, strict=False))
    return next((position for position, (one, two) in pairs if one != two), min(len(ids), len(other)))


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: null, blank text, an empty list, or messages without any text."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list | tuple):
        messages = bool(value) and all(isinstance(turn, dict) for turn in value)
        return len(value) == 0 or (
            messages and all(is_empty(turn.get("content")) and not turn.get("tool_calls") for turn in value)
        )
    return False


def implicit_prompt(first: Any, second: Any) -> Any:
    """The prompt that a pair holds, `None` where none can be told: it leaves each side an answer, and as messages it
    has a turn of the user, without which many templates render nothing."""
    shared = shared_start(first, second)
    if isinstance(shared, str):
        return shared if shared and len(shared) < min(len(first), len(second)) else None
    if len(shared) == min(len(first), len(second)):  # one conversation goes on where the other ends
        shared = shared[:-1]
    return shared if any(turn.get("role") == "user" for turn in shared) else None


def _load_local(path: Path, split: str) -> Dataset:
    if path.is_file():
        if split != "train":
            raise ValueError(
                f"The split {split!r} was asked of {str(path)!r}, a single file, which holds `train` only; give a "
                "folder with one file per split, or hold rows out with `--eval_fraction`."
            )
        return _read_files([path])
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = load_from_disk(str(path))
        splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        if split not in splits:
            raise ValueError(f"The split {split!r} is not in {str(path)!r}, which has {_join(splits)}.")
        return splits[split]
    files = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in FORMATS)
    if not files:
        raise ValueError(f"`dataset_name` is {str(path)!r}, a folder without any data file; give {ACCEPTED}.")
    words = {file: set(_words(file.relative_to(path))) for file in files}
    unnamed = not any({"train", "test", "validation"} & found for found in words.values())
    chosen = files if unnamed and split == "train" else [file for file in files if split in words[file]]
    if not chosen:
        names = _join(str(file.relative_to(path)) for file in files)
        raise ValueError(f"No file of {str(path)!r} belongs to the split {split!r} by its name; it has {names}.")
    return _read_files(chosen)


def _read_files(files: list[Path]) -> Dataset:
    formats = {FORMATS.get(_suffix(file)) for file in files}
    if None in formats or len(formats) > 1:
        names = _join(file.name for file in files)
        raise ValueError(f"Cannot read {names} as one data set; use one format out of {', '.join(FORMATS)}.")
    blank = [file.name for file in files if _is_blank(file)]
    if blank:
        raise ValueError(f"The file {_join(blank)} is empty; write rows into it or take it away.")
    kind = formats.pop()
    try:
        if kind == "csv":
            return _read_csv(files)
        return load_dataset(kind, data_files=[str(file) for file in files], split="train")
    except Exception as error:
        names = _join(str(file) for file in files)
        raise ValueError(f"Cannot read {names} as {kind}: {_bad_line(files) or _root_cause(error)}") from error


def _read_csv(files: list[Path]) -> Dataset:
    """Cells of the text columns stay text ("NA" and "12" too); lists stand in their cells as JSON."""
    types = dict.fromkeys(TEXT_COLUMNS + LIST_COLUMNS, str)
    options = {"dtype": types, "keep_default_na": False, "na_values": [""]}
    frames = [pd.read_csv(file, sep="\t" if file.suffix == ".tsv" else ",", **options) for file in files]
    rows = pd.concat(frames, ignore_index=True).to_dict("records")
    for row in rows:
        for column, value in row.items():
            if isinstance(value, float) and value != value:
                row[column] = None
            elif isinstance(value, str) and value[:1] == "[":
                row[column] = _from_json(column, value)
    return Dataset.from_list(rows)


def _from_json(column: str, cell: str) -> Any:
    """The list in a cell of a list column, or the messages in any other one; other text is left alone."""
    try:
        value = json.loads(cell)
    except json.JSONDecodeError:
        return cell
    messages = isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value)
    return value if column in LIST_COLUMNS or messages else cell


def _load_hub(name: str, split: str, config: str | None) -> Dataset:
    identifier, _, suffix = name.partition(":")
    if suffix and config is not None and config != suffix:
        raise ValueError(f"`dataset_name` is {name!r} and `dataset_config` is {config!r}; name one configuration.")
    try:
        return load_dataset(identifier, name=config or suffix or None, split=split)
    except Exception as error:
        raise ValueError(
            f"Cannot load split {split!r} of `dataset_name` {name!r}: it is no local path, and as a Hub id it gave: "
            f"{_root_cause(error)}. Give {ACCEPTED}."
        ) from error


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or _suffix(Path(name)) in FORMATS or name.count("/") > 1


def _suffix(path: Path) -> str:
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def _words(path: Path) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in str(path)[: -len(_suffix(path))]).split()


def _open(path: Path):
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")


def _is_blank(path: Path) -> bool:
    if path.suffix == ".parquet":
        return path.stat().st_size == 0
    with _open(path) as file:
        return not file.read(4096).strip()


def _bad_line(files: list[Path]) -> str | None:
    """Where the first line stands that is no JSON object; the readers' own messages give a byte offset at best."""
    for file in files:
        if not _suffix(file).startswith(".jsonl"):
            continue
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    good = not line.strip() or isinstance(json.loads(line), dict)
                except json.JSONDecodeError:
                    good = False
                if not good:
                    return f"line {number} of {file.name} is no JSON object: {line.strip()[:80]!r}"
    return None


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:400]}{'...' if len(words) > 400 else ''}"


def _canonical(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _unit_hash(key: str, seed: int) -> float:
    """A number in [0, 1) that is the same on every machine; Python's own `hash` of a string is salted per process."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _join(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
