"""Losses that stand beside the policy loss: value, entropy, language modelling.

Shapes: B batch, T completion tokens. Mask: True = a real completion token. Every loss is to be minimised and comes
with a dict of detached 0-d metrics, which are means over real tokens whatever the reduction.
"""

import torch

from . import _checks as checks
from ._checks import Metrics, Reduction
from .statistics import explained_variance


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    epsilon_value: float | None = None,
    reduction: Reduction = "mean",
) -> tuple[torch.Tensor, Metrics]:
    """Fit the critic to the returns, with a bounded step if asked.

    L = 0.5 mean_t max( (V - R)^2, (clip(V, V_old - epsilon_value, V_old + epsilon_value) - R)^2 )

    The squared error of Schulman et al. 2017, Eq. 9; the clip is in their code (`ppo2`) and in that of Ziegler et al.
    2019, not in a paper. Others keep the clipped error alone, which gives a token outside the range no gradient at
    all.

    Args:
        values (`torch.Tensor`):
            Shape `(B, T)`, V before token t now. Gradient. Masked positions may hold NaN.
        old_values (`torch.Tensor`):
            Shape `(B, T)`, V before token t at the rollout. Detached here.
        returns (`torch.Tensor`):
            Shape `(B, T)`, target of `compute_gae` or `discounted_returns`. Detached here.
        mask (`torch.Tensor`):
            Bool `(B, T)`.
        epsilon_value (`float`, *optional*):
            Clip range in the unit of the values, above 0. None: no clip.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` over real tokens, or `"sum"`.

    Returns:
        `tuple`: 0-d loss, and metrics over real tokens: `value_clip_fraction` = share where the clipped error is the
        larger one (0 without clip); `explained_variance` = 1 - var(R - V) / var(R), 0 if var(R) = 0; `value_mean`.

    Raises:
        ValueError: If shapes differ, a dtype is wrong, `epsilon_value` is not positive or the reduction is unknown.
    """
    checks.check_masked(mask, values=values, old_values=old_values, returns=returns)
    checks.check_reduction(reduction)
    values = checks.clear(values, mask)
    old_values, returns = checks.clear(old_values.detach(), mask), checks.clear(returns.detach(), mask)
    error = (values - returns).square()
    worst = error
    if epsilon_value is not None:
        checks.check_scalar("epsilon_value", epsilon_value, above=0.0)
        clipped = torch.clamp(values, min=old_values - epsilon_value, max=old_values + epsilon_value)
        worst = torch.max(error, (clipped - returns).square())
    loss = 0.5 * checks.reduce(worst, mask, reduction)

    return loss, {
        "value_clip_fraction": checks.share(worst.detach() > error.detach(), mask, error.dtype),
        "explained_variance": explained_variance(values.detach(), returns, mask),
        "value_mean": checks.mean(values.detach(), mask),
    }


def entropy_loss(
    entropy: torch.Tensor, mask: torch.Tensor, *, reduction: Reduction = "mean"
) -> tuple[torch.Tensor, Metrics]:
    """The entropy bonus as a loss: minimising it keeps the policy undecided.

    L = -mean_t H_t,   H_t = -sum_v pi(v | s_t) log pi(v | s_t)

    Schulman et al. 2017, Eq. 9, third term, with the sign of a loss.

    Args:
        entropy (`torch.Tensor`):
            Shape `(B, T)`, of the distribution token t was drawn from, in nats. Gradient. Masked positions may hold
            NaN.
        mask (`torch.Tensor`):
            Bool `(B, T)`.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` over real tokens, or `"sum"`.

    Returns:
        `tuple`: 0-d loss; metric `entropy`, the mean over real tokens.

    Raises:
        ValueError: If shapes differ, a dtype is wrong or the reduction is unknown.
    """
    checks.check_masked(mask, entropy=entropy)
    checks.check_reduction(reduction)
    entropy = checks.clear(entropy, mask)
    return -checks.reduce(entropy, mask, reduction), {"entropy": checks.mean(entropy.detach(), mask)}


def lm_loss(logps: torch.Tensor, mask: torch.Tensor, *, reduction: Reduction = "mean") -> tuple[torch.Tensor, Metrics]:
    """Negative log-likelihood of the preferred completion, which keeps a reward model a language model.

    L = -mean_t log r'(y_t | x, y_<t)   (or the sum over t)

    The second term of the loss the notes give for Askell et al. 2021, weighted there by beta (`lm_coef`). They print
    it with a plus, which would train the preferred completion to be unlikely.

    Args:
        logps (`torch.Tensor`):
            Shape `(B, T)`, log-probability of token t of the preferred completion under the kept LM head. Gradient.
            Masked positions may hold NaN.
        mask (`torch.Tensor`):
            Bool `(B, T)`.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` over real tokens, or `"sum"` over all of them (divide by B for the mean over completions).

    Returns:
        `tuple`: 0-d loss; metric `nll`, the mean over real tokens.

    Raises:
        ValueError: If shapes differ, a dtype is wrong or the reduction is unknown.
    """
    checks.check_masked(mask, logps=logps)
    checks.check_reduction(reduction)
    logps = checks.clear(logps, mask)
    return -checks.reduce(logps, mask, reduction), {"nll": -checks.mean(logps.detach(), mask)}
