"""Which rows go through a model together: rows of like length, so that little of what is computed is padding."""

from collections.abc import Sequence


def length_chunks(lengths: Sequence[int], size: int) -> list[list[int]]:
    """
    Rows in chunks of `size`, the longest first.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each row.
        size (`int`):
            Rows of a chunk; the last one may have fewer.

    Returns:
        `list[list[int]]`: places of the rows, each once.

    Raises:
        ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"`size` is {size}; choose 1 or more.")
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + size] for start in range(0, len(order), size)]


def split_by_length(lengths: Sequence[int], num_parts: int, max_rows: int | None = None) -> list[list[int]]:
    """
    Rows in a given number of parts, such that the largest part is as small as it can be.

    The size of a part is rows x longest row, the tokens that are computed when it is padded. Parts are runs of the
    rows in order of length, which no other split beats.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each row.
        num_parts (`int`):
            Number of parts, none of them empty.
        max_rows (`int`, *optional*):
            Rows of a part at most.

    Returns:
        `list[list[int]]`: places of the rows, each once; the longest rows come first.

    Raises:
        ValueError: there are fewer rows than parts, more than they may hold, or no part is asked for.
    """
    if not 1 <= num_parts <= len(lengths):
        raise ValueError(f"`num_parts` is {num_parts} for {len(lengths)} rows; choose 1 to {len(lengths)}.")
    cap = len(lengths) if max_rows is None else max_rows
    if num_parts * cap < len(lengths):
        raise ValueError(f"`max_rows` is {max_rows}, too few for {len(lengths)} rows in {num_parts} parts.")
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    low, high = max(lengths), max(lengths) * len(lengths)
    while low < high:
        budget = (low + high) // 2
        if len(_within(order, lengths, budget, cap)) <= num_parts:
            high = budget
        else:
            low = budget + 1
    parts = _within(order, lengths, low, cap)
    while len(parts) < num_parts:  # fewer would do: halving the fullest keeps the largest as small as it is
        place = max(range(len(parts)), key=lambda part: len(parts[part]))
        half = (len(parts[place]) + 1) // 2
        parts[place : place + 1] = [parts[place][:half], parts[place][half:]]
    return parts


def _within(order: list[int], lengths: Sequence[int], budget: int, cap: int) -> list[list[int]]:
    """Rows from the longest on, a new part whenever the next row would not fit."""
    parts: list[list[int]] = []
    for row in order:
        if parts and len(parts[-1]) < cap and (len(parts[-1]) + 1) * max(lengths[parts[-1][0]], 1) <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts
