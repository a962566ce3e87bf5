"""What held-out pairs say of scores: accuracy, length, calibration, win rate.

Shapes: N pairs; column 0 is the first completion. A target is P(first is better): 1, 0, 0.5 for a tie, or a vote.
"""

import math
from collections.abc import Hashable, Sequence

import torch

from . import _checks as checks
from .ai_feedback import swap_disagreement
from .clusters import grouped_interval
from .intervals import wilson_interval


def pair_credits(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Credit of each pair: 1 where the better completion has the higher score, 0 where the worse has, else one half.

    One half goes to equal scores, and to pairs whose target is a tie: nobody can be right about them.

    Args:
        scores (`torch.Tensor` of shape `(N, 2)`): scores of both completions.
        targets (`torch.Tensor` of shape `(N,)`): P(first is better), from 0 to 1.

    Returns:
        `torch.Tensor` of shape `(N,)`, float64.

    Raises:
        ValueError: If shapes differ, a score is not finite or a target is outside [0, 1].
    """
    _check_pairs(scores, targets)
    asked = torch.sign(targets.double() - 0.5)
    given = torch.sign(scores[:, 0].double() - scores[:, 1].double())
    return (1 + asked * given) / 2


def preference_accuracy(
    scores: torch.Tensor, targets: torch.Tensor, groups: Sequence[Hashable] | None = None
) -> dict[str, float]:
    """Mean credit of pairs ([`pair_credits`]) with its 95% Wilson interval, where one half counts as half a success.

    Args:
        scores, targets (`torch.Tensor`):
            As for [`pair_credits`].
        groups (`Sequence[Hashable]`, *optional*):
            The prompt of each pair. Several pairs of one prompt say less than as many prompts, and the interval is
            wider for it ([`~rlhf_ext.functional.clusters.grouped_interval`]).

    Returns:
        `dict[str, float]`: `accuracy`, `low`, `high`, and `pairs`, their number; NaN for no pair.

    Raises:
        ValueError: As [`pair_credits`].
    """
    credits = pair_credits(scores, targets)
    count = len(credits)
    if count == 0:
        return {"accuracy": math.nan, "low": math.nan, "high": math.nan, "pairs": 0}
    low, high = (
        wilson_interval(credits.sum().item(), count)
        if groups is None
        else grouped_interval(credits.tolist(), list(groups))
    )
    return {"accuracy": credits.mean().item(), "low": low, "high": high, "pairs": count}


def length_statistics(scores: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    r"""How far scores follow length, and what is left of the accuracy when that part is taken out.

    `length_correlation`: Pearson's r of score and length over all completions. `length_slope`: b = sum d_s d_l / sum
    d_l^2, the least-squares line through the origin of score differences d_s over length differences d_l in pairs.
    `accuracy_length_regressed`: accuracy of d_s - b d_l, the part of a difference that length does not predict.
    Beside it `accuracy` and `accuracy_longer`, that of always taking the longer one.

    Args:
        scores (`torch.Tensor` of shape `(N, 2)`): scores of both completions.
        lengths (`torch.Tensor` of shape `(N, 2)`): their lengths, in tokens or characters.
        targets (`torch.Tensor` of shape `(N,)`): P(first is better).

    Raises:
        ValueError: As [`pair_credits`]; also if `lengths` has another shape.
    """
    _check_pairs(scores, targets)
    checks.check_tensor("lengths", lengths.double(), scores.shape)
    scores, lengths = scores.double(), lengths.double()
    score_gap, length_gap = scores[:, 0] - scores[:, 1], lengths[:, 0] - lengths[:, 1]
    square = length_gap.square().sum()
    slope = (score_gap * length_gap).sum() / square if square > 0 else square
    residual = score_gap - slope * length_gap
    # Rounding leaves crumbs where length explains all of a difference.
    residual = torch.where(residual.abs() <= 1e-12 * score_gap.abs(), 0.0, residual)
    parted = torch.stack([residual, torch.zeros_like(residual)], dim=1)
    return {
        "length_correlation": _pearson(scores.flatten(), lengths.flatten()),
        "length_slope": slope.item(),
        "accuracy": preference_accuracy(scores, targets)["accuracy"],
        "accuracy_length_regressed": preference_accuracy(parted, targets)["accuracy"],
        "accuracy_longer": preference_accuracy(lengths, targets)["accuracy"],
    }


def predicted_preference(gaps: torch.Tensor, *, factor: float = 1.0, noise: float = 0.0) -> torch.Tensor:
    """P(first is better) = (1 - noise) sigmoid(factor x gap) + noise / 2 (Christiano et al. 2017, Sec. 2.2.3).

    Args:
        gaps (`torch.Tensor`): score of the first less score of the second.
        factor (`float`): what turns a gap into the log-odds that were trained, above 0.
        noise (`float`): chance that the labeller answers at random, from 0 to below 1.

    Raises:
        ValueError: If `factor` is not positive or `noise` leaves its range.
    """
    checks.check_tensor("gaps", gaps)
    checks.check_scalar("factor", factor, above=0.0)
    checks.check_scalar("noise", noise, minimum=0.0, maximum=1.0)
    return (1 - noise) * (factor * gaps).sigmoid() + noise / 2


def calibration(probabilities: torch.Tensor, targets: torch.Tensor, *, num_bins: int = 10) -> dict[str, object]:
    r"""Expected calibration error and the table of a reliability plot (Guo et al. 2017, Eq. 3 and Sec. 2).

    ECE = sum_b n_b / N |mean target in b - mean probability in b|, over bins of equal width. A pair's order is
    arbitrary, so each is entered once as (p, t) and once as (1 - p, 1 - t): the plot is symmetric about one half.

    Args:
        probabilities (`torch.Tensor` of shape `(N,)`): predicted P(first is better), for a reward model
            sigmoid(score of the first - score of the second).
        targets (`torch.Tensor` of shape `(N,)`): P(first is better), soft labels allowed.
        num_bins (`int`): bins from 0 to 1, an even number: a bin around one half would hold both entries of a pair,
            which always average to one half.

    Returns:
        `dict`: `ece`; `bins`, a list of `{low, high, count, predicted, observed}` of the bins that are not empty, over
        both entries of each pair.

    Raises:
        ValueError: If shapes differ, a value is outside [0, 1], there is no pair, or `num_bins` is odd.
    """
    checks.check_scalar("num_bins", num_bins, minimum=2)
    if num_bins % 2:
        raise ValueError(f"`num_bins` is {num_bins}; give an even number: a middle bin hides what is in it.")
    checks.check_tensor("probabilities", probabilities)
    checks.check_tensor("targets", targets, probabilities.shape)
    _check_unit("probabilities", probabilities)
    _check_unit("targets", targets)
    if probabilities.numel() == 0:
        raise ValueError("`probabilities` is empty: give at least one pair.")
    p, t = probabilities.double(), targets.double()
    p, t = torch.cat([p, 1 - p]), torch.cat([t, 1 - t])
    # By the larger of p and 1 - p, so that a pair falls into the same two bins whichever way round it came.
    upper = (torch.maximum(p, 1 - p) * num_bins).long().clamp(max=num_bins - 1)
    place = torch.where(p >= 0.5, upper, num_bins - 1 - upper)
    bins, ece = [], 0.0
    for index in range(num_bins):
        inside = place == index
        count = int(inside.sum())
        if count == 0:
            continue
        predicted, observed = p[inside].mean().item(), t[inside].mean().item()
        ece += count / len(p) * abs(observed - predicted)
        bins.append(
            {
                "low": index / num_bins,
                "high": (index + 1) / num_bins,
                "count": count,
                "predicted": predicted,
                "observed": observed,
            }
        )
    return {"ece": ece, "bins": bins}


def win_rate(wins: torch.Tensor, *, swapped: torch.Tensor | None = None) -> dict[str, float]:
    """How often a policy is preferred to a baseline on the same prompts, ties one half.

    The interval is Wilson's at 95% over prompts ([`~rlhf_ext.functional.clusters.grouped_interval`], every prompt a
    group of its own): mean +- 1.96 standard errors has no width where a few prompts agree. Credits between 0 and 1
    make it wider than it need be, never too narrow.

    Args:
        wins (`torch.Tensor` of shape `(N,)`): credit of the policy per prompt: 1, 0, 0.5 for a tie, or a probability.
        swapped (`torch.Tensor` of shape `(N,)`, *optional*): the same, the judge having been asked in the other order.
            Both are averaged.

    Returns:
        `dict[str, float]`: `win_rate`, `low`, `high`, `prompts`; with `swapped` also `disagreement`, the share of
        prompts whose winner depends on the order (a tie in one order alone counts one half), and `position_bias`, how
        much the first place gains: mean(wins) - mean(swapped), halved.

    Raises:
        ValueError: If there is no prompt, shapes differ or a credit is outside [0, 1].
    """
    checks.check_tensor("wins", wins)
    _check_unit("wins", wins)
    if wins.dim() != 1 or wins.numel() == 0:
        raise ValueError(f"`wins` has shape {tuple(wins.shape)}, expected (N,) with at least one prompt.")
    credits = wins.double()
    extra = {}
    if swapped is not None:
        checks.check_tensor("swapped", swapped, wins.shape)
        _check_unit("swapped", swapped)
        other = swapped.double()
        extra = {
            "disagreement": swap_disagreement(credits, 1 - other).item(),
            "position_bias": ((credits - other) / 2).mean().item(),
        }
        credits = (credits + other) / 2
    mean = credits.mean().item()
    low, high = grouped_interval(credits.tolist(), range(len(credits)))
    return {"win_rate": mean, "low": low, "high": high, "prompts": len(credits), **extra}


def paired_wins(scores: torch.Tensor, baseline_scores: torch.Tensor) -> torch.Tensor:
    """1 where a score is above the baseline's on the same prompt, 0 where below, 0.5 where equal; `(N,)` float64."""
    checks.check_tensor("scores", scores)
    checks.check_tensor("baseline_scores", baseline_scores, scores.shape)
    return (1 + torch.sign(scores.double() - baseline_scores.double())) / 2


def _pearson(x: torch.Tensor, y: torch.Tensor) -> float:
    if x.numel() < 2:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return (x * y).sum().item() / scale.item() if scale > 0 else math.nan


def _check_pairs(scores: torch.Tensor, targets: torch.Tensor) -> None:
    checks.check_tensor("scores", scores)
    if scores.dim() != 2 or scores.shape[1] != 2:
        raise ValueError(f"`scores` has shape {tuple(scores.shape)}, expected (N, 2): both completions of each pair.")
    if not bool(torch.isfinite(scores).all()):
        row = int((~torch.isfinite(scores)).any(dim=1).nonzero()[0])
        raise ValueError(f"`scores` row {row} is {scores[row].tolist()}: drop pairs without a finite score.")
    checks.check_tensor("targets", targets, scores.shape[:1])
    _check_unit("targets", targets)


def _check_unit(name: str, value: torch.Tensor) -> None:
    wrong = ~((value >= 0) & (value <= 1))
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0][0])
        raise ValueError(f"`{name}` is {value[place].item()} at {place}: give numbers from 0 to 1.")
