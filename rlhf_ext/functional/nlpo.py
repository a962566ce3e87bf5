"""NLPO's policy: the distribution renormalised on the tokens that a mask allows.

Shapes: B batch, T completion tokens, H hidden size, V vocabulary. Mask: True = a real completion token.
"""

import math
from typing import cast

import torch
from torch.utils.checkpoint import checkpoint

from . import _checks as checks


def pack_mask(allowed: torch.Tensor) -> torch.Tensor:
    """A bool mask `(..., V)` in bits: uint8 `(..., ceil(V / 8))`, so that a rollout's masks can be kept.

    Raises:
        ValueError: If `allowed` is not bool.
    """
    if allowed.dtype != torch.bool:
        raise ValueError(f"`allowed` is {allowed.dtype}, expected torch.bool: pass the output of `top_p_mask`.")
    bits = torch.nn.functional.pad(allowed, (0, -allowed.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = (2 ** torch.arange(8, device=allowed.device)).to(torch.uint8)
    return (bits.to(torch.uint8) * weights).sum(dim=-1, dtype=torch.uint8)


def unpack_mask(packed: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The bool mask `(..., V)` that [`pack_mask`] packed.

    Raises:
        ValueError: If `packed` is not uint8 of the width of `vocab_size`.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != -(-vocab_size // 8):
        raise ValueError(
            f"`packed` is {packed.dtype} of width {packed.shape[-1]}, expected torch.uint8 of width "
            f"{-(-vocab_size // 8)} for {vocab_size} tokens: pass the output of `pack_mask`."
        )
    bits = packed.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8)
    return (bits & 1).bool().flatten(-2)[..., :vocab_size]


def masked_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    packed: torch.Tensor,
    mask: torch.Tensor,
    *,
    temperature: float,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token, and entropy, under the policy renormalised on the allowed tokens.

    pi'(v) = [v allowed] pi(v) / sum over allowed w of pi(w),   pi = softmax((W h + b) / temperature)

    Ramamurthy et al. 2023, Sec. 4 and Algorithm 1. Never more than `chunk_size` rows of logits live at a time; a chunk
    is computed again in the backward pass.

    Args:
        hidden (`torch.Tensor`): `(B, T, H)`, last hidden state that predicts token t. Gradient.
        weight, bias (`torch.Tensor`): output matrix `(V, H)` and bias `(V,)` or None. Gradient.
        ids (`torch.Tensor`): `(B, T)`, the tokens drawn; each must be allowed.
        packed (`torch.Tensor`): `(B, T, ceil(V / 8))` uint8 of [`pack_mask`].
        mask (`torch.Tensor`): bool `(B, T)`. Only real tokens are computed.
        temperature (`float`): of the sampling, above 0.
        chunk_size (`int`): tokens per chunk.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: both `(B, T)`, float32 or better, 0 at masked positions.

    Raises:
        ValueError: If shapes do not fit, a dtype is wrong, a scalar leaves its range, or a real token is not allowed.
    """
    checks.check_masked(mask)
    checks.check_scalar("temperature", temperature, above=0.0)
    checks.check_scalar("chunk_size", chunk_size, minimum=1)
    checks.check_tensor("hidden", hidden, (*mask.shape, weight.shape[-1]))
    allowed = unpack_mask(packed[mask], weight.shape[0])
    tokens = ids[mask]
    if not bool(allowed.gather(-1, tokens[:, None]).all()):
        raise ValueError("A real token of `ids` is not allowed by `packed`: they come from different rollouts.")
    rows, step = checks.upcast(hidden[mask]), int(chunk_size)
    matrix, offset = checks.upcast(weight), None if bias is None else checks.upcast(bias)
    pieces = []
    for start in range(0, max(rows.shape[0], 1), step):
        chunk = slice(start, start + step)
        args = (rows[chunk], matrix, offset, tokens[chunk], allowed[chunk], float(temperature))
        if torch.is_grad_enabled():
            pieces.append(cast(torch.Tensor, checkpoint(_chunk, *args, use_reentrant=False, preserve_rng_state=False)))
        else:
            pieces.append(_chunk(*args))
    both = torch.cat(pieces)
    logps, entropy = (both.new_zeros(mask.shape).masked_scatter(mask, column) for column in both.unbind(dim=-1))
    return logps, entropy


def _chunk(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    allowed: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    logits = torch.nn.functional.linear(rows, weight, bias) / temperature
    logps = logits.masked_fill(~allowed, -math.inf).log_softmax(dim=-1)
    # 0 * (-inf) would be NaN, in the backward pass too.
    entropy = -(logps.exp() * torch.where(allowed, logps, 0.0)).sum(dim=-1)
    return torch.stack([logps.gather(-1, tokens[:, None]).squeeze(-1), entropy], dim=-1)
