"""What an ensemble of reward models knows of its own errors on pairs.

Shapes: N pairs, K members. A gap is the score of the first completion less that of the second.
"""

import math
from collections.abc import Sequence

import torch

from . import _checks as checks
from .pairs import pair_credits, predicted_preference
from .scores import ensemble_mean, ensemble_spread


@torch.no_grad()
def ensemble_preference(gaps: torch.Tensor, *, factors: Sequence[float], noises: Sequence[float]) -> torch.Tensor:
    """P(first is better): mean over the members of what each predicts, `(N,)` (Christiano et al. 2017, Sec. 2.2.3).

    Each member speaks in the unit it was trained in ([`~rlhf_ext.functional.pairs.predicted_preference`]). A mean of
    probabilities is less sure than the probability of a mean where members disagree.

    Args:
        gaps (`torch.Tensor` of shape `(N, K)`): one column per member.
        factors, noises (`Sequence[float]`): of each member.

    Raises:
        ValueError: If the shape is wrong, there is not one factor and one noise per member, or one is out of range.
    """
    checks.check_tensor("gaps", gaps)
    if gaps.dim() != 2 or not gaps.shape[1] == len(factors) == len(noises) > 0:
        raise ValueError(
            f"`gaps` has shape {tuple(gaps.shape)} for {len(factors)} `factors` and {len(noises)} `noises`: pass "
            "(N, K), one column, factor and noise per member."
        )
    members = zip(gaps.unbind(dim=1), factors, noises, strict=True)
    chances = [predicted_preference(gap, factor=factor, noise=noise) for gap, factor, noise in members]
    return torch.stack(chances, dim=1).mean(dim=1)


@torch.no_grad()
def auroc(values: torch.Tensor, positive: torch.Tensor) -> float:
    """Chance that a positive has a higher value than a negative, equal values one half; NaN without one of both.

    The area under the ROC curve, as the Mann-Whitney statistic (Hanley and McNeil 1982). One half: the values know
    nothing.

    Args:
        values (`torch.Tensor` of shape `(N,)`): finite numbers.
        positive (`torch.Tensor` of shape `(N,)`, bool): which are positives.

    Raises:
        ValueError: If shapes or dtypes are wrong, or a value is not finite.
    """
    checks.check_masked(positive, ndim=1, values=values)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("`values` has numbers that are not finite: leave these rows out.")
    count, rest = int(positive.sum()), int((~positive).sum())
    if count == 0 or rest == 0:
        return math.nan
    # Mean rank of each run of equal values, from 1.
    _, place, sizes = values.double().unique(return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    ranks = (last - (sizes.double() - 1) / 2)[place]
    return ((ranks[positive].sum() - count * (count + 1) / 2) / (count * rest)).item()


@torch.no_grad()
def pair_doubt(first: torch.Tensor, second: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """How much the members disagree, and whether they do where their mean is wrong.

    A pair's doubt is the spread of the members' gaps, not of their scores: what a member adds to both completions
    decides nothing. Errors are judged on pairs whose label has a better completion and whose mean gap is not 0.

    Args:
        first, second (`torch.Tensor` of shape `(N, K)`): scores of both completions, one column per member.
        targets (`torch.Tensor` of shape `(N,)`): P(first is better), from 0 to 1.

    Returns:
        `dict[str, float]`: `spread_mean`, mean spread over both completions of all pairs; `gap_spread_mean`, of their
        gaps; `judged` and `errors`, numbers of pairs; `spread_auroc`, [`auroc`] of the gaps' spread for errors, and
        beside it `closeness_auroc`, that of -|mean gap|, which any single model has too. NaN where nothing is wrong,
        or nothing right.

    Raises:
        ValueError: If shapes differ, K < 2, a score is not finite or a target is outside [0, 1].
    """
    checks.check_tensor("first", first)
    checks.check_tensor("second", second, first.shape)
    spread = torch.cat([ensemble_spread(first), ensemble_spread(second)])
    gap_spread, gap = ensemble_spread(first - second), ensemble_mean(first - second)
    credits = pair_credits(torch.stack([gap, torch.zeros_like(gap)], dim=1), targets)
    judged, wrong = credits != 0.5, credits == 0.0
    return {
        "spread_mean": spread.mean().item(),
        "gap_spread_mean": gap_spread.mean().item(),
        "judged": int(judged.sum()),
        "errors": int(wrong.sum()),
        "spread_auroc": auroc(gap_spread[judged], wrong[judged]),
        "closeness_auroc": auroc(-gap[judged].abs(), wrong[judged]),
    }
