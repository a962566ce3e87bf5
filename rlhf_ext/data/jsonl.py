"""Rows in a JSONL file, as the steps of the pipelines write and read them. The standard library is all it needs."""

import json
from pathlib import Path
from typing import Any


def read_jsonl(path: str | Path, *, may_be_cut: bool = False) -> list[dict[str, Any]]:
    """
    The rows of a JSONL file; empty lines are passed over.

    Args:
        path (`str` or `Path`): the file.
        may_be_cut (`bool`, *optional*, defaults to `False`): leave out what follows the last line break, which a
            writer that was killed may have left.

    Raises:
        ValueError: a line is no JSON object; file and line are named.
    """
    rows = []
    # Not `splitlines`, which also breaks at characters that a text may hold.
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1] if may_be_cut else lines, 1):
        if line.strip():
            rows.append(parse_json(line, f"line {number} of {str(path)!r}"))
    return rows


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """
    A JSON object.

    Args:
        text (`bytes`): JSON.
        what (`str`): where it stands, for the message.

    Raises:
        ValueError: it is broken, or no object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:  # also bytes that are no text
        raise ValueError(f"{what} is broken JSON ({error}). Restore the file, or remove its step.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no JSON object. Restore the file, or remove its step.")
    return value
