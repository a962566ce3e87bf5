"""One preference loss for every kind of label.

Shapes: N prompts, K candidate completions of each. Mask: True = a real candidate.
"""

import math

import torch

from . import _checks as checks
from ._checks import Metrics, Reduction


def preference_loss(
    rewards: torch.Tensor,
    targets: torch.Tensor,
    *,
    prediction_noise: float = 0.0,
    mask: torch.Tensor | None = None,
    reduction: Reduction = "mean",
) -> tuple[torch.Tensor, Metrics]:
    """Cross-entropy between a label over K completions and the reward model's softmax over them.

    L = -mean_i sum_k target_ik log p_ik,   p_ik = (1 - prediction_noise) softmax(rewards_i)_k + prediction_noise / K_i

    Pairs are K = 2 with targets (1, 0), where L = -log sigmoid(r_w - r_l): Stiennon et al. 2020, Sec. 3.4, and Askell
    et al. 2021. Christiano et al. 2017, Eq. 1 and Sec. 2.2.3: ties are (.5, .5), `prediction_noise` .1. Ziegler et al.
    2019, Eq. 1: best of K is one-hot. Bai et al. 2022: AI labels are (p, 1 - p). The notes leave out the minus, as
    Ziegler's print does. For K = 2 without noise the value is that of `-logsigmoid(chosen - rejected).mean()`, bit for
    bit.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N, K)`, one number per completion (the score at its last token, or a sum over tokens). Gradient.
            Masked candidates may hold NaN.
        targets (`torch.Tensor`):
            Shape `(N, K)`, at least 0, summing to 1 over the real candidates of a row. Detached here.
        prediction_noise (`float`, *optional*, defaults to `0.0`):
            Chance, in [0, 1), that the labeller answers at random. It bounds the loss of a wrong label.
        mask (`torch.Tensor`, *optional*):
            Bool `(N, K)` for rows with fewer than K candidates; each has at least 2. None: all are real.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` over rows, or `"sum"`.

    Returns:
        `tuple`: 0-d loss, and metrics over rows: `accuracy`, where a row with one best target counts 1 if its reward
        is the only largest, 1/m if m rewards tie there, else 0, and a row whose target has no single best counts 0.5,
        for every K; `margin` = mean of sum_k target_k (reward_k - mean reward of the other real candidates), chosen
        minus rejected for a pair; `mean_reward`, `min_reward`, `max_reward` over real candidates.

    Raises:
        ValueError: If shapes differ, a dtype is wrong, a row has fewer than 2 candidates, or targets are no
        distribution.
    """
    checks.check_tensor("rewards", rewards)
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"`rewards` has shape {tuple(rewards.shape)}, expected (N, K), K >= 2: give two or more.")
    checks.check_reduction(reduction)
    checks.check_scalar("prediction_noise", prediction_noise, minimum=0.0, below=1.0)
    real = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    checks.check_masked(real, rewards=rewards, targets=targets)
    rewards, targets = checks.clear(rewards, real), checks.clear(targets.detach(), real)
    num_real = real.sum(dim=1)
    _check_rows(targets, num_real)

    logps = _log_probs(rewards, real)
    if prediction_noise > 0.0:
        uniform = (prediction_noise / num_real).log().to(logps.dtype).unsqueeze(1).expand_as(logps)
        logps = torch.logaddexp(logps + math.log1p(-prediction_noise), uniform)
    # A target of 0 takes its candidate out before the product: 0 * log 0 is NaN.
    logps = torch.where(targets > 0, logps, 0.0)
    rows = -(targets * logps).sum(dim=1)
    loss = rows.mean() if reduction == "mean" and rows.numel() > 0 else rows.sum()
    return loss, _metrics(rewards.detach(), targets, real)


def _check_rows(targets: torch.Tensor, num_real: torch.Tensor) -> None:
    few = num_real < 2
    if bool(few.any()):
        row = int(few.nonzero()[0])
        raise ValueError(f"`mask` leaves {int(num_real[row])} candidates in row {row}: drop rows with fewer than 2.")
    bad = ~((targets >= 0).all(dim=1) & ((targets.sum(dim=1) - 1.0).abs() <= 1e-4))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"`targets` row {row} is {targets[row].tolist()}: give numbers >= 0 that sum to 1 over real candidates."
        )


def _log_probs(rewards: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    if rewards.shape[1] == 2:
        # Two candidates are always both real. logsigmoid, as TRL computes it, so that the loss of a pair is the same
        # bits; softmax would round differently.
        difference = rewards[:, 0] - rewards[:, 1]
        logsigmoid = torch.nn.functional.logsigmoid
        return torch.stack((logsigmoid(difference), logsigmoid(-difference)), dim=1)
    return torch.where(real, rewards, -math.inf).log_softmax(dim=1)


@torch.no_grad()
def _metrics(rewards: torch.Tensor, targets: torch.Tensor, real: torch.Tensor) -> Metrics:
    if rewards.shape[0] == 0:
        names = ("accuracy", "margin", "mean_reward", "min_reward", "max_reward")
        return {name: rewards.new_zeros(()) for name in names}
    best = _is_largest(targets, real)
    top = _is_largest(rewards, real)
    found = (best & top).any(dim=1) / top.sum(dim=1)
    accuracy = torch.where(best.sum(dim=1) == 1, found.to(rewards.dtype), 0.5)
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (real.sum(dim=1, keepdim=True) - 1)
    return {
        "accuracy": accuracy.mean(),
        "margin": (targets * (rewards - others)).sum(dim=1).mean(),
        "mean_reward": checks.mean(rewards, real),
        "min_reward": torch.where(real, rewards, math.inf).min(),
        "max_reward": torch.where(real, rewards, -math.inf).max(),
    }


def _is_largest(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    x = torch.where(real, x, -math.inf)
    return real & (x == x.amax(dim=1, keepdim=True))
