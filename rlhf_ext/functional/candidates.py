"""From the scores of a batch of candidates to one loss: targets, rankings, margins, centring.

Shapes: N rows, K candidates of the widest row, S sequences in all. What a label costs is `preference_loss` throughout.
"""

import torch

from . import _checks as checks
from .preference import preference_loss


def arrange_rewards(scores: torch.Tensor, candidate_mask: torch.Tensor) -> torch.Tensor:
    """
    Put flat scores in rows.

    Args:
        scores (`torch.Tensor` of shape `(S,)`):
            Scores ordered by candidate and then by row, as the collator does.
        candidate_mask (`torch.Tensor` of shape `(N, K)`, bool):
            Where a row has a candidate; S of them.

    Returns:
        `torch.Tensor` of shape `(N, K)`: rewards, 0 where there is no candidate.
    """
    by_candidate = candidate_mask.T
    return scores.new_zeros(by_candidate.shape).masked_scatter(by_candidate, scores).T


def candidates_loss(
    rewards: torch.Tensor,
    targets: torch.Tensor,
    rankings: torch.Tensor,
    candidate_mask: torch.Tensor,
    *,
    prediction_noise: float = 0.0,
    margin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""
    Mean over rows of the preference loss, whatever their labels.

    A row with a target is one softmax over its candidates. A row with a ranking of K is all its K(K-1)/2 pairs, each
    weighted \(1 / \binom{K}{2}\), so that a prompt counts once however many answers it has (Ouyang et al. 2022,
    equation 1). A margin (Touvron et al. 2023, equation 2) is taken from the first reward of a pair.

    Args:
        rewards (`torch.Tensor` of shape `(N, K)`):
            One reward per candidate.
        targets (`torch.Tensor` of shape `(N, K)`):
            Target of each row that has no ranking.
        rankings (`torch.Tensor` of shape `(N, K)`):
            Candidates best first, padded by -1; all -1 in rows with a target.
        candidate_mask (`torch.Tensor` of shape `(N, K)`, bool):
            Where a row has a candidate.
        prediction_noise (`float`, *optional*, defaults to `0.0`):
            Chance that the labeller answers at random.
        margin (`torch.Tensor` of shape `(N,)`, *optional*):
            How far apart the rewards of a pair should be; only with two candidates.

    Returns:
        `tuple`: the loss, and `accuracy` and `margin`, means over rows of detached rewards without the margin.
    """
    if margin is not None:
        # Not `rewards[:, 0] - margin`: TRL subtracts the margin last, and that rounds differently.
        difference = rewards[:, 0] - rewards[:, 1] - margin
        shifted = torch.stack([difference, torch.zeros_like(difference)], dim=1)
        loss, _ = preference_loss(shifted, targets, prediction_noise=prediction_noise, reduction="mean")
        _, metrics = preference_loss(rewards.detach(), targets, reduction="mean")
        return loss, metrics
    is_ranked = rankings[:, 0] >= 0
    if not is_ranked.any():
        # Pairs without a mask take the path that is TRL's bit for bit.
        mask = None if candidate_mask.all() else candidate_mask
        return preference_loss(rewards, targets, prediction_noise=prediction_noise, mask=mask, reduction="mean")

    parts = []
    if not is_ranked.all():
        rows = ~is_ranked
        loss, metrics = preference_loss(
            rewards[rows],
            targets[rows],
            prediction_noise=prediction_noise,
            mask=candidate_mask[rows],
            reduction="mean",
        )
        parts.append((int(rows.sum()), loss, metrics))
    for row in is_ranked.nonzero().flatten().tolist():
        ordered = rewards[row, rankings[row, : int(candidate_mask[row].sum())]]
        better, worse = torch.triu_indices(len(ordered), len(ordered), offset=1, device=ordered.device)
        pairs = torch.stack([ordered[better], ordered[worse]], dim=1)
        first = torch.zeros_like(pairs)
        first[:, 0] = 1.0
        parts.append((1, *preference_loss(pairs, first, prediction_noise=prediction_noise, reduction="mean")))
    zero = rewards.new_zeros(())
    loss = sum((count * part for count, part, _ in parts), start=zero) / len(rewards)
    names = ("accuracy", "margin")
    metrics = {
        name: sum((count * part[name] for count, _, part in parts), start=zero) / len(rewards) for name in names
    }
    return loss, metrics


def center_loss(rewards: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of (r_chosen + r_rejected)^2, which keeps rewards near 0 (Eisenstein et al. 2023).

    Args:
        rewards (`torch.Tensor` of shape `(N, 2)`):
            Both rewards of each pair. Gradient.

    Raises:
        ValueError: If `rewards` is not `(N, 2)` floating.
    """
    checks.check_tensor("rewards", rewards)
    if rewards.dim() != 2 or rewards.shape[1] != 2:
        raise ValueError(f"`rewards` has shape {tuple(rewards.shape)}, expected (N, 2): centring works with pairs.")
    return torch.mean((rewards[:, 0] + rewards[:, 1]) ** 2)
