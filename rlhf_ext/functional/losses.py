"""Losses over the tokens of completions: policy, value, entropy.

Shapes: B batch, T completion tokens. Mask: True = a real completion token. Every loss is to be minimised and comes
with a dict of detached 0-d metrics, which are means over real tokens whatever the reduction.
"""

import math

import torch

from . import _checks as checks
from ._checks import Metrics, Reduction


def policy_gradient_loss(
    logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *, reduction: Reduction = "mean"
) -> tuple[torch.Tensor, Metrics]:
    """REINFORCE with a baseline, and actor-critic: raise the log-probability of what did better than expected.

    L = -mean_t( log pi(a_t | s_t) A_t ),   A constant

    Williams 1992 (A = G - b) and Sutton et al. 1999, Eq. 2 (A = Q - V, by any estimator). The notes print it without
    the minus, and the plain sample form without 1/N.

    Args:
        logps (`torch.Tensor`):
            Shape `(B, T)`, log pi of token t. Gradient. Masked positions may hold NaN.
        advantages (`torch.Tensor`):
            Shape `(B, T)`, or returns, of token t. Detached here.
        mask (`torch.Tensor`):
            Bool `(B, T)`.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` over real tokens, or `"sum"`.

    Returns:
        `tuple`: 0-d loss; metrics `logps_mean`, `advantages_mean`.

    Raises:
        ValueError: If shapes differ, a dtype is wrong or the reduction is unknown.
    """
    checks.check_masked(mask, logps=logps, advantages=advantages)
    checks.check_reduction(reduction)
    logps, advantages = checks.clear(logps, mask), checks.clear(advantages.detach(), mask)
    loss = -checks.reduce(logps * advantages, mask, reduction)
    return loss, {
        "logps_mean": checks.mean(logps.detach(), mask),
        "advantages_mean": checks.mean(advantages, mask),
    }


def log_ratio_of(logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    log_ratio = checks.clear(logps, mask) - checks.clear(old_logps.detach(), mask)
    # Far above any sane ratio (e^44 in float32): an infinite ratio would turn the gradient of a clipped token into
    # 0 * inf = NaN. Below the bound nothing changes.
    return log_ratio.clamp(max=0.5 * math.log(torch.finfo(log_ratio.dtype).max))


def ratio_metrics(log_ratio: torch.Tensor, mask: torch.Tensor) -> Metrics:
    log_ratio = log_ratio.detach()
    ratio = log_ratio.exp()
    some = mask.any()
    return {
        "approx_kl": checks.mean(torch.where(mask, torch.expm1(log_ratio) - log_ratio, 0.0), mask),
        "ratio_mean": checks.mean(torch.where(mask, ratio, 0.0), mask),
        "ratio_max": torch.where(some, _extreme(torch.where(mask, ratio, -math.inf), largest=True), 0.0),
        "ratio_min": torch.where(some, _extreme(torch.where(mask, ratio, math.inf), largest=False), 0.0),
    }


def _extreme(x: torch.Tensor, *, largest: bool) -> torch.Tensor:
    if x.numel() == 0:  # max() of nothing raises
        return x.new_zeros(())
    return x.max() if largest else x.min()


def ppo_clip_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    delta: float | None = None,
    reduction: Reduction = "mean",
) -> tuple[torch.Tensor, Metrics]:
    """PPO-Clip: no gain from moving the ratio out of its range in the direction of the advantage.

    L = -mean_t min( r_t A_t, clip(r_t, 1 - epsilon, 1 + epsilon_high) A_t ),   r_t = exp(logps_t - old_logps_t)

    Schulman et al. 2017, Eq. 7. The advantage stands inside the min; the notes put it outside, which loses the
    gradient for A < 0, r > 1 + epsilon and keeps one for A < 0, r < 1 - epsilon. With `delta` the first branch is
    min(r, delta) A, as in TRL's two-sided clip: it bounds the loss for A < 0. Mean over tokens, not over row means.

    Args:
        logps (`torch.Tensor`):
            Shape `(B, T)`, log pi of token t now. Gradient. Masked positions may hold NaN.
        old_logps (`torch.Tensor`):
            Shape `(B, T)`, log pi of token t at the rollout, same temperature. Detached here.
        advantages (`torch.Tensor`):
            Shape `(B, T)`, from any estimator. Detached here.
        mask (`torch.Tensor`):
            Bool `(B, T)`.
        epsilon (`float`):
            Clip range below 1, and above it unless `epsilon_high` is given. Above 0; 1 or more never binds below.
        epsilon_high (`float`, *optional*, defaults to `epsilon`):
            Clip range above 1. Above 0.
        delta (`float`, *optional*):
            Upper bound of the ratio in the unclipped branch, above 1; of use above `1 + epsilon_high`. None: no bound.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` over real tokens, or `"sum"`.

    Returns:
        `tuple`: 0-d loss, and metrics over real tokens: `approx_kl` = mean(r - 1 - log r), an estimate of KL(old ||
        new) (Stable-Baselines3's; OpenAI's is .5 mean(log r)^2); `clip_fraction` = share with r < 1 - epsilon or r > 1
        + epsilon_high, whatever the sign of A (`ppo2`: |r - 1| > epsilon); `clip_fraction_binding` = share where the
        clipped branch is the smaller one (Ziegler's); `ratio_mean`, `ratio_max`, `ratio_min`.

    Raises:
        ValueError: If shapes differ, a dtype is wrong, a scalar leaves its range or the reduction is unknown.
    """
    checks.check_masked(mask, logps=logps, old_logps=old_logps, advantages=advantages)
    checks.check_reduction(reduction)
    high = epsilon if epsilon_high is None else epsilon_high
    checks.check_scalar("epsilon", epsilon, above=0.0)
    checks.check_scalar("epsilon_high", high, above=0.0)
    if delta is not None:
        # At 1 or below it would clamp tokens the policy has not moved at all, and take their gradient.
        checks.check_scalar("delta", delta, above=1.0)

    log_ratio = log_ratio_of(logps, old_logps, mask)
    advantages = checks.clear(advantages.detach(), mask)
    ratio = log_ratio.exp()
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    unclipped = bounded * advantages
    clipped = ratio.clamp(1.0 - epsilon, 1.0 + high) * advantages
    # Masked positions have ratio 1 and advantage 0, hence add 0.
    loss = -checks.reduce(torch.min(unclipped, clipped), mask, reduction)

    outside = (ratio.detach() < 1.0 - epsilon) | (ratio.detach() > 1.0 + high)
    metrics = ratio_metrics(log_ratio, mask)
    metrics["clip_fraction"] = checks.share(outside, mask, ratio.dtype)
    metrics["clip_fraction_binding"] = checks.share(clipped.detach() < unclipped.detach(), mask, ratio.dtype)
    return loss, metrics


def ppo_penalty_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    kl: torch.Tensor,
    mask: torch.Tensor,
    *,
    penalty_coef: float,
    reduction: Reduction = "mean",
) -> tuple[torch.Tensor, Metrics]:
    """PPO-Penalty: the unclipped surrogate, less a penalty on the distance from the old policy.

    L = -( mean_t(r_t A_t) - penalty_coef mean_t KL(old || new)_t )

    Schulman et al. 2017, Eq. 8; the notes swap the arguments of the KL.

    Args:
        logps (`torch.Tensor`):
            Shape `(B, T)`, log pi of token t now. Gradient. Masked positions may hold NaN.
        old_logps (`torch.Tensor`):
            Shape `(B, T)`, log pi of token t at the rollout. Detached here.
        advantages (`torch.Tensor`):
            Shape `(B, T)`. Detached here.
        kl (`torch.Tensor`):
            Shape `(B, T)`, KL(old || new) at token t in nats, over the full vocabulary (`exact_kl`). Gradient.
        mask (`torch.Tensor`):
            Bool `(B, T)`.
        penalty_coef (`float`):
            At least 0; moved by `AdaptivePenaltyController`.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` over real tokens, or `"sum"` of both terms.

    Returns:
        `tuple`: 0-d loss, and metrics over real tokens: `surrogate` = mean(r A); `penalty_kl` = mean KL, what the
        controller reads; `approx_kl`, `ratio_mean`, `ratio_max`, `ratio_min` as in `ppo_clip_loss`.

    Raises:
        ValueError: If shapes differ, a dtype is wrong, `penalty_coef` is negative or the reduction is unknown.
    """
    checks.check_masked(mask, logps=logps, old_logps=old_logps, advantages=advantages, kl=kl)
    checks.check_reduction(reduction)
    checks.check_scalar("penalty_coef", penalty_coef, minimum=0.0)
    log_ratio = log_ratio_of(logps, old_logps, mask)
    surrogate = log_ratio.exp() * checks.clear(advantages.detach(), mask)
    kl = checks.clear(kl, mask)
    loss = -checks.reduce(surrogate, mask, reduction) + penalty_coef * checks.reduce(kl, mask, reduction)
    metrics = ratio_metrics(log_ratio, mask)
    metrics["surrogate"] = checks.mean(surrogate.detach(), mask)
    metrics["penalty_kl"] = checks.mean(kl.detach(), mask)
    return loss, metrics
