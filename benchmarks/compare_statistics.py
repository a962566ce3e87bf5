"""Numbers of the comparison: intervals over seeds, area under a training curve, episodes to a level, verdicts."""

import math
from typing import Any


# Two-sided 95% quantiles of Student's t, by degrees of freedom.
T95 = (
    [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281]
    + [2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860]
    + [2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423]
)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of `values` and the ends of its 95% t-interval; of paired differences, one per seed, it is a paired one.

    With a single value the ends are NaN.

    Raises:
        ValueError: no value, or more than 31.
    """
    count = len(values)
    if not 1 <= count <= len(T95) + 1:
        raise ValueError(f"values has {count} entries; an interval needs 1 to {len(T95) + 1}.")
    centre = sum(values) / count
    if count == 1:
        return centre, math.nan, math.nan
    variance = sum((value - centre) ** 2 for value in values) / (count - 1)
    half = T95[count - 2] * math.sqrt(variance / count)
    return centre, centre - half, centre + half


def area(updates: list[dict[str, Any]]) -> float:
    """Mean gold of all training episodes: the area under the curve of gold against episodes, per episode."""
    return _mean_gold(updates)


def smoothed(updates: list[dict[str, Any]], window: int) -> list[tuple[int, float, float]]:
    """Per update: episodes so far, and the means of gold and KL over the rollouts that lie in the last `window`."""
    rows = []
    for row in updates:
        start = row["episodes"] - window
        if start < 0:
            continue
        inside = [r for r in updates if start < r["episodes"] <= row["episodes"]]
        rows.append((row["episodes"], _mean_gold(inside), sum(r["kl"] for r in inside) / len(inside)))
    return rows


def final_gold(updates: list[dict[str, Any]], window: int) -> float:
    """Mean gold of the last `window` training episodes."""
    return smoothed(updates, window)[-1][1]


def episodes_to(updates: list[dict[str, Any]], level: float, window: int) -> int | None:
    """Episodes until the mean gold of the last `window` of them is at least `level`; `None` if it never is."""
    return next((episodes for episodes, gold, _ in smoothed(updates, window) if gold >= level), None)


def verdict(low: float, high: float, bound: float) -> str:
    """Confirmed: the whole interval lies above `bound`. Refuted: the whole interval lies below."""
    if low > bound:
        return "confirmed"
    return "refuted" if high < bound else "undecided"


def _mean_gold(rows: list[dict[str, Any]]) -> float:
    return sum(row["gold"] for row in rows) / len(rows)
