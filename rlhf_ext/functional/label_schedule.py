"""How many labels to ask for while a policy trains: many at first, fewer later."""

from . import _checks as checks


def label_rate(frames: float, *, scale: float) -> float:
    """Rate of labels after `frames` frames, relative to the start: c / (T + c) (Christiano et al. 2017, App. A).

    Args:
        frames (`float`): T, from 0.
        scale (`float`): c, where the rate has fallen to one half; 2e6 (MuJoCo) or 5e6 (Atari) in the paper.

    Raises:
        ValueError: If `frames` is negative or `scale` is not positive.
    """
    checks.check_scalar("frames", frames, minimum=0.0)
    checks.check_scalar("scale", scale, above=0.0)
    return scale / (frames + scale)


def labels_due(share: float, *, total: int, initial_share: float = 0.25) -> float:
    """Labels asked for by the time that `share` of training is done: N (f + (1 - f) (1 - 0.01^share)).

    The schedule of the code beside the paper (nottombrown/rl-teacher): f of them before training, half of the rest in
    its first sixth. At the end it has asked for N less a hundredth of the rest.

    Args:
        share (`float`): Of training, from 0 to 1.
        total (`int`): N, labels of the whole run.
        initial_share (`float`, *optional*, defaults to 0.25): f, above 0 and at most 1.

    Raises:
        ValueError: If a number leaves its range.
    """
    checks.check_scalar("share", share, minimum=0.0, maximum=1.0)
    checks.check_scalar("total", total, minimum=0.0)
    checks.check_scalar("initial_share", initial_share, above=0.0, maximum=1.0)
    return total * (initial_share + (1.0 - initial_share) * (1.0 - 0.01**share))
