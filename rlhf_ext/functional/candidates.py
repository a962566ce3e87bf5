"""From the scores of a batch of candidates to one loss: targets, rankings, margins, centring.

Shapes: N rows, K candidates of the widest row, S sequences in all. What a label costs is `preference_loss` throughout.
"""

import torch

from . import _checks as checks
from .auxiliary import lm_loss
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


def preferred_tokens(
    targets: torch.Tensor, rankings: torch.Tensor, candidate_mask: torch.Tensor, completion_mask: torch.Tensor
) -> torch.Tensor:
    """
    The tokens of the one preferred completion of each row: of the marked one, or of the first of a ranking.

    A row with a tie or a soft target has none: nobody said that either should be imitated. The first token of a
    sequence is left out, because nothing stands before it to predict it from.

    Args:
        targets (`torch.Tensor` of shape `(N, K)`):
            Target of each row that has no ranking.
        rankings (`torch.Tensor` of shape `(N, K)`):
            Candidates best first, padded by -1; all -1 in rows with a target.
        candidate_mask (`torch.Tensor` of shape `(N, K)`, bool):
            Where a row has a candidate; S of them.
        completion_mask (`torch.Tensor` of shape `(S, T)`, bool):
            The completion's tokens of each sequence, ordered by candidate and then by row.

    Returns:
        `torch.Tensor` of shape `(S, T)`, bool.
    """
    columns = torch.arange(targets.shape[1], device=targets.device)
    preferred = (targets == 1.0) | (columns == rankings[:, :1])
    tokens = completion_mask & preferred.T[candidate_mask.T][:, None]
    tokens[:, 0] = False
    return tokens


def preferred_lm_loss(
    logps: torch.Tensor, mask: torch.Tensor, *, num_rows: int, reduction: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""
    Mean over rows of the negative log-likelihood of the preferred completion; a row that has none counts as 0.

    \(L = -\frac{1}{N} \sum_n \sum_t \log r'(y_t | x, y_{<t})\), or with the mean over t in place of the second sum
    (Askell et al. 2021, as the notes give it, with the sign of a loss). Rows and not tokens are counted, so that the
    mean over micro-batches of equal size is the loss of the whole.

    Args:
        logps (`torch.Tensor` of shape `(S, T)`):
            Log-probability of each token of a preferred completion. Gradient. Masked positions may hold NaN.
        mask (`torch.Tensor` of shape `(S, T)`, bool):
            Tokens of preferred completions.
        num_rows (`int`):
            N, the rows of the batch.
        reduction (`str`):
            `"sum"` or `"mean"` over the tokens of one completion.

    Returns:
        `tuple`: 0-d loss; metric `nll`, the mean over all tokens of `mask`, 0 without any.

    Raises:
        ValueError: If shapes differ, a dtype is wrong or the reduction is unknown.
    """
    checks.check_reduction(reduction)
    loss, metrics = lm_loss(logps, mask, reduction="sum")
    if reduction == "mean":
        lengths = mask.sum(dim=-1, keepdim=True).clamp(min=1)
        loss, _ = lm_loss(logps / lengths, mask, reduction="sum")
    return loss / num_rows, metrics


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
