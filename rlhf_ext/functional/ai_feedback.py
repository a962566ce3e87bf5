"""From a judge's log-probabilities to a soft label.

Shapes: N pairs, M principles, 2 options. A label is P(first completion is better), from 0 to 1.
"""

import torch

from . import _checks as checks


def judge_probabilities(option_logps: torch.Tensor) -> torch.Tensor:
    """What a judge says when it can only say (A) or (B): p_A = exp(log p(A)) / (exp(log p(A)) + exp(log p(B))).

    Bai et al. 2022, Sec. 4.1 (https://huggingface.co/papers/2212.08073).

    Args:
        option_logps (`torch.Tensor`):
            Shape `(..., 2)`, log-probability of the two options as continuations of one question, in nats.

    Returns:
        `torch.Tensor`: shape `(...)`, probability of option (A).

    Raises:
        ValueError: If the last dimension is not 2 or the dtype is not floating.
    """
    checks.check_tensor("option_logps", option_logps)
    if option_logps.dim() == 0 or option_logps.shape[-1] != 2:
        raise ValueError(
            f"`option_logps` has shape {tuple(option_logps.shape)}, expected (..., 2): options (A) and (B)."
        )
    return option_logps.softmax(dim=-1)[..., 0]


def swap_average(first_as_a: torch.Tensor, second_as_a: torch.Tensor) -> torch.Tensor:
    """P(first is better) = (p_A with the first as (A) + 1 - p_A with the second as (A)) / 2: no position is preferred.

    Args:
        first_as_a, second_as_a (`torch.Tensor`):
            Same shape, probability of option (A) with the first, and with the second completion in its place.

    Raises:
        ValueError: If shapes differ, a dtype is not floating or a probability is outside [0, 1].
    """
    for name, value in (("first_as_a", first_as_a), ("second_as_a", second_as_a)):
        _check_probability(name, value, first_as_a.shape)
    return (first_as_a + 1 - second_as_a) / 2


def position_bias(first_as_a: torch.Tensor, second_as_a: torch.Tensor) -> torch.Tensor:
    """How much more often a judge takes (A) than chance, 0-d in [-0.5, 0.5]: mean of both orders' p_A, less one half.

    A judge without the bias gives p and 1 - p in the two orders, whose mean is one half whatever p is.

    Raises:
        ValueError: As [`swap_average`].
    """
    for name, value in (("first_as_a", first_as_a), ("second_as_a", second_as_a)):
        _check_probability(name, value, first_as_a.shape)
    return ((first_as_a + second_as_a) / 2).mean() - 0.5


def swap_disagreement(first_as_a: torch.Tensor, second_as_a: torch.Tensor) -> torch.Tensor:
    """Share of questions whose winner depends on the order, 0-d: 1 where it turns round, 0.5 where one order is
    undecided, 0 where both say the same or are both undecided.

    Raises:
        ValueError: As [`swap_average`].
    """
    for name, value in (("first_as_a", first_as_a), ("second_as_a", second_as_a)):
        _check_probability(name, value, first_as_a.shape)
    return ((torch.sign(first_as_a - 0.5) - torch.sign(0.5 - second_as_a)).abs() / 2).mean()


def label_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """How undecided labels are, 0-d in nats: mean of -p log p - (1 - p) log(1 - p); log 2 where all are one half.

    Raises:
        ValueError: If a label is outside [0, 1].
    """
    _check_probability("probabilities", probabilities, probabilities.shape)
    return (torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)).mean()


def clamp_label(probabilities: torch.Tensor, *, low: float = 0.4, high: float = 0.6) -> torch.Tensor:
    """Labels between `low` and `high`: after a chain of thought a judge is sure of everything (Bai et al. 2022, 4.1).

    Raises:
        ValueError: If a label is outside [0, 1], or the bounds are not 0 <= low < high <= 1.
    """
    _check_probability("probabilities", probabilities, probabilities.shape)
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"low={low} and high={high} must be 0 <= low < high <= 1.")
    return probabilities.clamp(low, high)


def _check_probability(name: str, value: torch.Tensor, shape: torch.Size) -> None:
    checks.check_tensor(name, value, shape)
    if bool(((value < 0) | (value > 1)).any()):
        raise ValueError(f"`{name}` has values outside [0, 1]: pass probabilities, not log-probabilities.")
