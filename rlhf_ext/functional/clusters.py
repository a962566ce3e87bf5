"""Intervals of a share whose rows come in groups: several pairs of one prompt say less than as many prompts."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

from .intervals import wilson_interval


def effective_trials(credits: Sequence[float], groups: Sequence[Hashable]) -> float:
    r"""How many independent rows say as much as these: n / (design effect), Kish 1965.

    With p the mean credit and e_g = sum over the group of (credit - p), the mean has the variance
    v = G / (G - 1) sum_g e_g^2 / n^2 over G groups; n independent successes or failures would have p (1 - p) / n. The
    answer is p (1 - p) / v. Never more than n, nor than G where all credits agree and v is 0.

    Args:
        credits (`Sequence[float]`): From 0 to 1, one per row.
        groups (`Sequence[Hashable]`): What the rows share, such as their prompt.

    Raises:
        ValueError: If there is no row, lengths differ or a credit is outside [0, 1].
    """
    n = len(credits)
    if n == 0 or len(groups) != n:
        raise ValueError(f"`groups` has {len(groups)} entries for {n} `credits`: give one for each, and at least one.")
    wrong = [place for place, credit in enumerate(credits) if not 0.0 <= credit <= 1.0]
    if wrong:
        raise ValueError(f"`credits` is {credits[wrong[0]]} at {wrong[0]}: give numbers from 0 to 1.")
    mean = math.fsum(credits) / n
    sums: dict[Hashable, float] = defaultdict(float)
    for credit, group in zip(credits, groups, strict=True):
        sums[group] += credit - mean
    count = len(sums)
    variance = count / max(count - 1, 1) * math.fsum(e * e for e in sums.values()) / n**2
    if count == 1 or variance <= 1e-15:
        return float(count)
    return max(1.0, min(float(n), mean * (1 - mean) / variance))


def grouped_interval(credits: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float]:
    """95% Wilson interval of the mean credit, with [`effective_trials`] in the place of the number of rows.

    Credits of one half make it wider than it need be, never too narrow: of all credits in [0, 1] with one mean, those
    of 0 and 1 spread most, and Wilson's variance is theirs.

    Raises:
        ValueError: As [`effective_trials`].
    """
    trials = effective_trials(credits, groups)
    share = math.fsum(credits) / len(credits)
    return wilson_interval(min(share, 1.0) * trials, trials)


def grouped_standard_error(values: Sequence[float], group_size: int) -> float:
    """Of the mean, over groups of `group_size` values in a row: sd of the groups' means / sqrt(groups); NaN for one.

    Raises:
        ValueError: If the values do not divide into such groups, or there are none.
    """
    if group_size < 1 or not values or len(values) % group_size:
        raise ValueError(f"{len(values)} `values` are no groups of {group_size}.")
    means = [math.fsum(values[i : i + group_size]) / group_size for i in range(0, len(values), group_size)]
    center = math.fsum(means) / len(means)
    if len(means) == 1:
        return math.nan
    return math.sqrt(math.fsum((mean - center) ** 2 for mean in means) / (len(means) - 1) / len(means))


def grouped_mean_interval(values: Sequence[float], group_size: int = 1) -> tuple[float, float, float]:
    """Mean and its 95% interval, mean -+ 1.96 [`grouped_standard_error`]: for values that are no credits in [0, 1].

    Raises:
        ValueError: As [`grouped_standard_error`].
    """
    margin = 1.96 * grouped_standard_error(values, group_size)
    center = math.fsum(values) / len(values)
    return center, center - margin, center + margin
