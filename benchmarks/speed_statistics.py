"""Paired ratios of `speed.py`: median and an interval that assumes no distribution."""

import math
import statistics


def median_interval(values: list[float], level: float = 0.95) -> tuple[float, float, float, float]:
    """Median of `values`, the ends of its interval between two order statistics, and how often that covers it.

    The k-th smallest and k-th largest of n independent values enclose their distribution's median with probability
    1 - 2 sum_{i<k} C(n, i) / 2^n (David and Nagaraja 2003, Sec. 7.1). The narrowest interval that reaches `level` is
    given; with fewer than 6 values none reaches 0.95, and it is the smallest and the largest.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("values is empty; a median needs at least one.")
    ordered, count = sorted(values), len(values)
    k = 1
    while k < count / 2 and _coverage(count, k + 1) >= level:
        k += 1
    return statistics.median(ordered), ordered[k - 1], ordered[-k], _coverage(count, k)


def _coverage(count: int, k: int) -> float:
    return max(0.0, 1 - 2 * sum(math.comb(count, i) for i in range(k)) / 2**count)


def line(name: str, times: list[float], memories: list[float]) -> str:
    """`W3 time 5.2x [4.9, 5.6] memory 0.38x`: how much faster than the peer, and our memory over the peer's."""
    parts = [name]
    if times:
        middle, low, high, _ = median_interval(times)
        parts.append(f"time {middle:.2f}x [{low:.2f}, {high:.2f}]")
    if memories:
        parts.append(f"memory {statistics.median(memories):.2f}x")
    return " ".join(parts)


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)} if values else {}
