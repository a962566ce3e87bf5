"""How far a share that was measured on a few rows may be from the true one."""

import math

from . import _checks as checks


def wilson_interval(successes: float, trials: float, *, z: float = 1.959963984540054) -> tuple[float, float]:
    r"""Interval of a share (Wilson 1927): \((p + z^2 / 2n \pm z \sqrt{p (1 - p) / n + z^2 / 4n^2}) / (1 + z^2 / n)\).

    Unlike p +- z sqrt(p (1 - p) / n) it stays within 0 and 1 and has a width where all rows agree.

    Args:
        successes (`float`): How many of the trials, from 0 to `trials`; a tie counts one half.
        trials (`float`): At least 1, independent of each other; an effective number where rows are not.
        z (`float`, *optional*): Quantile of the normal distribution; the default gives 95%.

    Raises:
        ValueError: If there is no trial, or `successes` is not between 0 and `trials`.
    """
    checks.check_scalar("trials", trials, minimum=1)
    checks.check_scalar("successes", successes, minimum=0.0)
    if successes > trials:
        raise ValueError(f"`successes` is {successes}, more than the {trials} `trials`. Pass a count of them.")
    share, spread = successes / trials, z * z / trials
    center = share + spread / 2
    margin = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, (center - margin) / (1 + spread)), min(1.0, (center + margin) / (1 + spread))
