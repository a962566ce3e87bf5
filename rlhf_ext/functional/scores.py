"""What is done to a completion's score before it is paid: its unit, its range, and answers without an end.

Shapes: B rows, K members of an ensemble. A NaN score is a row that the reward does not apply to, and stays one.
"""

import math
from collections.abc import Collection, Sequence

import torch

from . import _checks as checks
from .pairs import predicted_preference


@torch.no_grad()
def score_normalization(scores: torch.Tensor, *, scale: bool = True) -> tuple[float, float]:
    """Gain and bias that give scores of the reference's own samples mean 0 and, with `scale`, standard deviation 1.

    gain = 1 / std (population), bias = -gain mean: Ziegler et al. 2019, Sec. 2.1. Without `scale` gain = 1, which puts
    reference answers at 0: Stiennon et al. 2020, Sec. 3.4.

    Args:
        scores (`torch.Tensor`):
            Shape `(B,)`, raw scores of samples of the *fixed* reference (Ziegler) or of reference answers (Stiennon).
        scale (`bool`, *optional*, defaults to `True`):
            Whether the spread becomes 1 too.

    Raises:
        ValueError: If the shape or dtype is wrong, a score is not finite, there is none, or, with `scale`, they are
            all equal: a gain made of rounding errors would blow every score up.
    """
    checks.check_tensor("scores", scores)
    if scores.dim() != 1 or scores.numel() == 0 or not bool(scores.isfinite().all()):
        raise ValueError(
            f"`scores` has shape {tuple(scores.shape)} and {int((~scores.isfinite()).sum())} numbers that are not "
            "finite: pass one finite score per sample."
        )
    wide = scores.double()
    mean, std = wide.mean().item(), wide.std(correction=0).item()
    if not scale:
        return 1.0, 0.0 - mean
    if std <= 1e-6 * max(1.0, abs(mean)):
        raise ValueError(
            f"`scores` has standard deviation {std:g}: equal scores cannot be scaled to 1. Check the model."
        )
    return 1.0 / std, 0.0 - mean / std


@torch.no_grad()
def normalize_scores(scores: torch.Tensor, *, gain: float, bias: float) -> torch.Tensor:
    """gain * score + bias: Ziegler et al. 2019, Sec. 2.1.

    Args:
        scores (`torch.Tensor`): Any shape.
        gain, bias (`float`): As [`score_normalization`] gives them.

    Raises:
        ValueError: If `gain` is not positive (a flipped sign trains the opposite), a number is not finite, or the
            dtype is not floating.
    """
    checks.check_tensor("scores", scores)
    checks.check_scalar("gain", gain, above=0.0)
    checks.check_scalar("bias", bias)
    return checks.upcast(scores) * gain + bias


@torch.no_grad()
def clip_scores(scores: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """min(max(score, low), high); NaN stays NaN.

    Raises:
        ValueError: If `low` is not below `high` or the dtype is not floating.
    """
    checks.check_tensor("scores", scores)
    checks.check_scalar("low", low, below=high)
    checks.check_scalar("high", high)
    return checks.upcast(scores).clamp(low, high)


@torch.no_grad()
def penalize_unfinished(scores: torch.Tensor, finished: torch.Tensor, *, penalty: float) -> torch.Tensor:
    """score - penalty where the completion was cut by length, TRL's habit.

    Ziegler et al. 2019 and the reproduction of Stiennon et al. 2020 put -1 in the score's place instead. That is no
    punishment where scores are below -1; a difference is one at either sign.

    Args:
        scores (`torch.Tensor`): Shape `(B,)`.
        finished (`torch.Tensor`): Bool `(B,)`, True = an end-of-sequence token was sampled.
        penalty (`float`): At least 0.

    Raises:
        ValueError: If shapes or dtypes are wrong, or `penalty` is negative.
    """
    checks.check_masked(finished, ndim=1, scores=scores)
    checks.check_scalar("penalty", penalty, minimum=0.0)
    scores = checks.upcast(scores)
    return torch.where(finished, scores, scores - penalty)


def cut_length(ids: Sequence[int], token_ids: Collection[int], *, min_index: int = 0) -> int | None:
    """Tokens up to and including the first of `token_ids` at index `min_index` or later; `None` if there is none.

    Ziegler et al. 2019, Sec. 2.3: the reward model reads a sample up to the first full stop after 16 tokens, and one
    without any gets a fixed score of -1.

    Args:
        ids (`Sequence[int]`): Token ids of one completion.
        token_ids (`Collection[int]`): Where to cut.
        min_index (`int`, *optional*, defaults to 0): First index, counted from 0, at which a cut may stand.

    Raises:
        ValueError: If `token_ids` is empty or `min_index` is negative.
    """
    if len(token_ids) == 0:
        raise ValueError("`token_ids` is empty: name at least one token to cut at.")
    checks.check_scalar("min_index", min_index, minimum=0)
    wanted = set(token_ids)
    return next((index + 1 for index, token in enumerate(ids) if index >= min_index and token in wanted), None)


@torch.no_grad()
def ensemble_spread(scores: torch.Tensor) -> torch.Tensor:
    """Population standard deviation over the members of an ensemble, `(B,)`: their doubt about each completion.

    Christiano et al. 2017, Sec. 2.2.4, ask for labels where it is large. It grows where a policy climbs a reward
    model beyond its data (Coste et al. 2024).

    Args:
        scores (`torch.Tensor`): Shape `(B, K)`, one column per member, each normalised on its own; NaN where a member
            does not apply.

    Raises:
        ValueError: If the shape is wrong, K < 2 or the dtype is not floating.
    """
    checks.check_tensor("scores", scores)
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(f"`scores` has shape {tuple(scores.shape)}: pass (B, K) with at least two members.")
    return checks.upcast(scores).std(dim=1, correction=0)


@torch.no_grad()
def ensemble_mean(scores: torch.Tensor) -> torch.Tensor:
    """Mean over the members of an ensemble, `(B,)`: their reward (Christiano et al. 2017, Sec. 2.2.3).

    Args:
        scores (`torch.Tensor`): Shape `(B, K)`, one column per member, each normalised on its own; NaN where a member
            does not apply, which makes the mean NaN.

    Raises:
        ValueError: If the shape is wrong or the dtype is not floating.
    """
    checks.check_tensor("scores", scores)
    if scores.dim() != 2 or scores.shape[1] < 1:
        raise ValueError(f"`scores` has shape {tuple(scores.shape)}: pass (B, K), one column per member.")
    return checks.upcast(scores).mean(dim=1)


@torch.no_grad()
def preference_variance(
    first: torch.Tensor, second: torch.Tensor, *, noises: Sequence[float] | None = None
) -> torch.Tensor:
    """Variance over the members of an ensemble of the predicted preference, `(N,)`: what to ask a labeller next.

    Var_k P_k(first is better), population variance: Christiano et al. 2017, Sec. 2.2.4. A member predicts the label,
    (1 - noise_k) sigmoid(first_k - second_k) + noise_k / 2 (Sec. 2.2.3). Without noise it goes from 0 (all agree) to
    0.25 (half of the members are sure of the one, half of the other); a noise that all members share makes it
    (1 - noise)^2 as large and leaves its order as it is.

    Args:
        first, second (`torch.Tensor`): Shape `(N, K)`, scores of both completions of a pair, one column per member,
            in the unit in which each member was trained.
        noises (`Sequence[float]`, *optional*): of each member, the chance that the labeller answers at random which
            its loss allowed for; 0 if not given.

    Raises:
        ValueError: If the shapes differ, K < 2, the dtype is not floating, there is not one noise per member, or one
            is out of range.
    """
    checks.check_tensor("first", first)
    checks.check_tensor("second", second, first.shape)
    if first.dim() != 2 or first.shape[1] < 2:
        raise ValueError(f"`first` has shape {tuple(first.shape)}: pass (N, K) with at least two members.")
    if noises is not None and len(noises) != first.shape[1]:
        raise ValueError(f"`noises` has {len(noises)} numbers for {first.shape[1]} members: pass one per member.")
    gaps = (checks.upcast(first) - checks.upcast(second)).unbind(dim=1)
    members = zip(gaps, noises or [0.0] * len(gaps), strict=True)
    return torch.stack([predicted_preference(gap, noise=noise) for gap, noise in members], dim=1).var(
        dim=1, correction=0
    )


@torch.no_grad()
def score_moments(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population standard deviation over the rows that have a score; NaN if none has.

    Args:
        scores (`torch.Tensor`): Shape `(B,)`; NaN = no score.
    """
    checks.check_tensor("scores", scores)
    scores = checks.upcast(scores)[~scores.isnan()]
    return scores.mean(), scores.std(correction=0)


def as_scores(values: Sequence[float | None]) -> torch.Tensor:
    """What a reward function returned, as float64 `(B,)`: `None` becomes NaN."""
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)


def as_rewards(scores: torch.Tensor) -> list[float | None]:
    """Back to what a reward function returns: NaN becomes `None`."""
    return [None if math.isnan(value) else value for value in scores.tolist()]
