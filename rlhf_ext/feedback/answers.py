"""What an annotator may answer, and how an answer reads as weights over the candidates."""

import math
import numbers
from collections.abc import Sequence
from typing import Any


KINDS = ("best", "tie", "target", "ranking", "incomparable", "skip")
"""Answers. `skip` is the only one that does not count as a label: the comparison still wants another annotator's."""

UNDO = "undo"
"""Kind of the row that takes a label back."""

COUNTING = ("best", "tie", "target", "ranking", "incomparable")

_TOLERANCE = 1e-4  # as for rows of data: what float32 leaves of a distribution


def check_answer(kind: str, value: Any, num_candidates: int) -> Any:
    """
    Check an answer and bring its value into the one form that is stored.

    Args:
        kind (`str`): `best` (value: position of the best candidate), `tie` (positions of those that are equally good
            and better than the rest; `None` for all), `target` (K weights that sum to 1), `ranking` (all positions,
            best first), `incomparable` or `skip` (no value).
        value (`Any`): as above; positions count from 0 in the stored order, whatever order was shown.
        num_candidates (`int`): K.

    Returns:
        `Any`: the value, as plain numbers and lists.

    Raises:
        ValueError: naming kind, value and what is expected.
    """
    positions = f"from 0 to {num_candidates - 1}"
    if kind in ("incomparable", "skip"):
        if value is None:
            return None
        raise _error(kind, value, "no value")
    if kind == "best":
        if _is_position(value, num_candidates):
            return int(value)
        raise _error(kind, value, f"a position {positions}")
    if kind == "tie":
        given = list(range(num_candidates)) if value is None else value
        if _are_positions(given, num_candidates) and len(set(given)) == len(given) >= 2:
            return sorted(int(position) for position in given)
        raise _error(kind, value, f"two or more different positions {positions}, or None for all")
    if kind == "ranking":
        if _are_positions(value, num_candidates) and sorted(value) == list(range(num_candidates)):
            return [int(position) for position in value]
        raise _error(kind, value, f"every position {positions} once, best first")
    if kind == "target":
        is_list = isinstance(value, Sequence) and all(_is_number(item) for item in value)
        if (
            is_list
            and len(value) == num_candidates
            and all(0.0 <= item <= 1.0 for item in value)
            and abs(math.fsum(value) - 1.0) <= _TOLERANCE
        ):
            return [float(item) for item in value]
        raise _error(kind, value, f"{num_candidates} numbers from 0 to 1 that sum to 1")
    raise ValueError(f"`kind` is {kind!r}; use one of {list(KINDS)}.")


def answer_weights(kind: str, value: Any, num_candidates: int) -> list[float] | None:
    """
    The vote of one answer as K weights that sum to 1, or `None` for an answer that prefers nothing.

    `best` is one-hot, `tie` is shared equally, `target` is itself, and a `ranking` votes for its first.
    """
    if kind == "best":
        return [float(position == value) for position in range(num_candidates)]
    if kind == "ranking":
        return [float(position == value[0]) for position in range(num_candidates)]
    if kind == "tie":
        return [float(position in value) / len(value) for position in range(num_candidates)]
    if kind == "target":
        return list(value)
    return None


def merge_votes(answers: Sequence[tuple[str, Any]], num_candidates: int) -> tuple[str, Any] | None:
    """
    One answer out of the answers of several people.

    Skips are left out. If more people could not compare than could, the result is `incomparable`; otherwise those who
    could not are left out too. Where the rest agree to the letter, theirs is the result, be it a ranking; else the
    result is a `target`: the mean of their votes ([`answer_weights`]), in which a ranking votes for its first.

    Returns:
        `tuple` or `None`: kind and value; `None` without any answer.
    """
    counting = [(kind, value) for kind, value in answers if kind in COUNTING]
    compared = [answer for answer in counting if answer[0] != "incomparable"]
    if not counting:
        return None
    if 2 * len(compared) < len(counting):
        return "incomparable", None
    if all(answer == compared[0] for answer in compared):
        return compared[0]
    votes = [answer_weights(kind, value, num_candidates) or [] for kind, value in compared]
    return "target", [math.fsum(column) / len(votes) for column in zip(*votes, strict=True)]


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_position(value: Any, num_candidates: int) -> bool:
    return _is_number(value) and float(value).is_integer() and 0 <= value < num_candidates


def _are_positions(value: Any, num_candidates: int) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(_is_position(item, num_candidates) for item in value)


def _error(kind: str, value: Any, wanted: str) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    return ValueError(f"`value` of a {kind!r} answer is {shown}, expected {wanted}.")
