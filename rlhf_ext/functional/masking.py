"""Moments over real tokens, and the top-p set of actions.

Shapes: B batch, T completion tokens, V vocabulary. Mask: True = a real completion token.
"""

from collections.abc import Sequence

import torch

from . import _checks as checks


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over all real tokens of the batch.

    mean(x) = sum_{b,t} m_{bt} x_{bt} / sum_{b,t} m_{bt}

    It is the token mean, not the mean of row means (Schulman et al. 2017 average over timesteps, Eq. 7).

    Args:
        x (`torch.Tensor`):
            Any shape, floating. Masked positions may hold NaN.
        mask (`torch.Tensor`):
            Bool, the shape of `x`.

    Returns:
        `torch.Tensor`: 0-d, float32 or better; 0 if no token is real. Differentiable in `x`.

    Raises:
        ValueError: If shapes differ, `x` is not floating or `mask` is not bool.
    """
    checks.check_masked(mask, ndim=None, x=x)
    return checks.mean(checks.clear(x, mask), mask)


def masked_var(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Biased variance over all real tokens of the batch.

    var(x) = sum m (x - mean(x))^2 / sum m

    Divided by n, not n - 1, as in Ziegler et al. 2019 (released code, `whiten`).

    Args:
        x (`torch.Tensor`):
            Any shape, floating. Masked positions may hold NaN.
        mask (`torch.Tensor`):
            Bool, the shape of `x`.

    Returns:
        `torch.Tensor`: 0-d, float32 or better; 0 if no token is real. Differentiable in `x`.

    Raises:
        ValueError: If shapes differ, `x` is not floating or `mask` is not bool.
    """
    checks.check_masked(mask, ndim=None, x=x)
    return _moments(checks.clear(x, mask), mask)[1]


def masked_whiten(x: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
    """Scale the real tokens of the batch to variance 1, and shift their mean to 0 unless told to keep it.

    y = (x - mean(x)) * rsqrt(var(x) + 1e-8)  [+ mean(x) if not shift_mean]

    Ziegler et al. 2019 (released code, `whiten`): advantages with `shift_mean=True`, rewards with `shift_mean=False`.
    They take the moments over all positions of texts of fixed length; ours are masked. One process: for several, the
    moments must be those of the whole batch, so gather before the call.

    Args:
        x (`torch.Tensor`):
            Any shape, floating. Masked positions may hold NaN.
        mask (`torch.Tensor`):
            Bool, the shape of `x`.
        shift_mean (`bool`, *optional*, defaults to `True`):
            Whether the result has mean 0. If `False`, the mean is added back.

    Returns:
        `torch.Tensor`: Shape of `x`, float32 or better; 0 at masked positions. A single real token gives 0 (its own
        value if `shift_mean=False`). Differentiable in `x`.

    Raises:
        ValueError: If shapes differ, `x` is not floating or `mask` is not bool.
    """
    checks.check_masked(mask, ndim=None, x=x)
    cleared = checks.clear(x, mask)
    mean, var = _moments(cleared, mask)
    whitened = (cleared - mean) * torch.rsqrt(var + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


def _moments(cleared: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = checks.mean(cleared, mask)
    # Two passes: E[x^2] - E[x]^2 cancels badly in float32 when the mean is large against the spread.
    var = checks.mean(torch.where(mask, cleared - mean, 0.0).square(), mask)
    return mean, var


@torch.no_grad()
def top_p_mask(
    logits: torch.Tensor,
    *,
    top_p: float,
    min_tokens: int,
    keep_ids: torch.Tensor | Sequence[int] | None,
) -> torch.Tensor:
    """The actions NLPO may take: the smallest set of likely tokens whose probability exceeds `top_p`.

    keep_i = [ sum of p_j over the tokens ranked before i <= top_p ]   (the first token that crosses is kept)

    Ramamurthy et al. 2023, Sec. 4 (NLPO); released code: `top_p` .9, `min_tokens` 100. The logits are those of the
    masking policy; the current policy is then renormalised on the set.

    Args:
        logits (`torch.Tensor`):
            Shape `(..., V)`, of the masking policy. No NaN; -inf marks an impossible token.
        top_p (`float`):
            In (0, 1]. At 1.0 every token is kept.
        min_tokens (`int`):
            At least this many of the likeliest tokens are kept (all of them, if V is smaller). At least 1.
        keep_ids (`torch.Tensor`, `Sequence[int]` or `None`):
            Token ids that are always kept, EOS above all: without it a completion may never end.

    Returns:
        `torch.Tensor`: Bool, shape `(..., V)`, True = allowed. No gradient.

    Raises:
        ValueError: If `logits` is not floating, a scalar leaves its range or an id is not in the vocabulary.
    """
    checks.check_tensor("logits", logits)
    if logits.dim() == 0:
        raise ValueError("`logits` has no dimension: pass shape (..., V).")
    checks.check_scalar("top_p", top_p, above=0.0, maximum=1.0)
    checks.check_scalar("min_tokens", min_tokens, minimum=1)
    vocab_size = logits.shape[-1]
    ids = torch.as_tensor([] if keep_ids is None else keep_ids, device=logits.device).flatten().long()
    if ids.numel() > 0 and not bool(((ids >= 0) & (ids < vocab_size)).all()):
        raise ValueError(f"`keep_ids` holds {ids.tolist()}: every id must lie in [0, {vocab_size}).")
    if top_p == 1.0:
        # The cumulative sum may round above 1 before the last token; "everything" must not depend on rounding.
        return torch.ones_like(logits, dtype=torch.bool)

    # Stable, so that tokens of equal probability fall in or out by their id and not by chance.
    probs, order = checks.upcast(logits).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = torch.zeros_like(probs)
    before[..., 1:] = probs.cumsum(dim=-1)[..., :-1]
    keep_sorted = before <= top_p
    keep_sorted[..., : int(min_tokens)] = True
    keep = torch.zeros_like(keep_sorted).scatter(-1, order, keep_sorted)
    keep[..., ids] = True
    return keep
