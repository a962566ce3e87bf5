"""Rows of text that take long to make, written chunk by chunk: a killed run keeps the chunks that are whole."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.jsonl import read_jsonl


def write_in_chunks(
    path: Path,
    inputs: Sequence[Any],
    make: Callable[[Sequence[Any], int], list[dict[str, Any]]],
    *,
    chunk_size: int,
    title: str,
) -> list[dict[str, Any]]:
    """
    One row for each input.

    Args:
        path (`Path`):
            JSONL file; whole chunks that it holds already are kept.
        make (`Callable`):
            Gets a chunk and its number, and returns its rows. What it draws at random depends on these alone.
    """
    rows = read_jsonl(path, may_be_cut=True) if path.exists() else []
    kept = len(inputs) if len(rows) == len(inputs) else len(rows) // chunk_size * chunk_size
    rows = rows[:kept]
    aside = path.with_name(f"_unfinished_{path.name}")
    _write(aside, rows, "w")
    os.replace(aside, path)
    for start in tqdm(range(kept, len(inputs), chunk_size), desc=title):
        found = make(inputs[start : start + chunk_size], start // chunk_size)
        _write(path, found, "a")
        rows += found
    return rows


def _write(path: Path, rows: Sequence[dict[str, Any]], mode: str) -> None:
    with open(path, mode, encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
