"""Kullback-Leibler divergence between two policies: sampled, and exact over the vocabulary.

Shapes: B batch, T completion tokens, H hidden, V vocabulary. Mask: True = a real completion token. Unit: nats.
"""

from typing import Literal, cast

import torch
from torch.utils.checkpoint import checkpoint

from . import _checks as checks


Head = torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]


def estimate_kl(logps: torch.Tensor, ref_logps: torch.Tensor, *, estimator: Literal["k1", "k2", "k3"]) -> torch.Tensor:
    """Estimate KL(policy || reference) from the log-probability of the sampled token.

    d = logps - ref_logps;   k1 = d,   k2 = d^2 / 2,   k3 = exp(-d) - 1 + d

    k1 is the log-ratio of Ziegler et al. 2019, Eq. 2; it is unbiased and may be negative, since only its mean under
    the policy is the KL. k3 is unbiased and never negative, k2 is biased and low in variance (Schulman 2020,
    "Approximating KL divergence"). In the reward only k1 has an unbiased gradient.

    Args:
        logps (`torch.Tensor`):
            Shape `(B, T)`, log pi(token t | before), of the policy that sampled the token.
        ref_logps (`torch.Tensor`):
            Shape `(B, T)`, log rho of the same token at the same temperature.
        estimator (`str`):
            `"k1"`, `"k2"` or `"k3"`.

    Returns:
        `torch.Tensor`: Shape `(B, T)`, float32 or better. There is no mask here: padding gives whatever stands in it,
        and the functions that take the result clear it. To send a gradient through k2 or k3, clear both inputs by
        `torch.where` before the call. Differentiable in both.

    Raises:
        ValueError: If shapes differ, a dtype is not floating or the estimator is unknown.
    """
    checks.check_tensor("logps", logps)
    checks.check_tensor("ref_logps", ref_logps, logps.shape)
    log_ratio = checks.upcast(logps) - checks.upcast(ref_logps)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        # expm1, because exp(-d) - 1 loses every digit for the small d of a policy near its reference.
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"`estimator` is {estimator!r}: use 'k1', 'k2' or 'k3'.")


def exact_kl(
    old_hidden: torch.Tensor,
    old_head: Head,
    hidden: torch.Tensor,
    head: Head,
    mask: torch.Tensor,
    *,
    chunk_size: int,
) -> torch.Tensor:
    """KL(old || new) of every token's full distribution, never holding more than `chunk_size` rows of logits.

    KL_t = sum_v p_old(v) (log p_old(v) - log p_new(v)),   p = softmax(W h_t + b)

    The penalty of Schulman et al. 2017, Eq. 8 and Sec. 4: the old policy stands first (the notes swap them). Each
    chunk is recomputed in the backward pass, so that neither pass keeps a `(B, T, V)` tensor.

    Args:
        old_hidden (`torch.Tensor`):
            Shape `(B, T, H)`, last hidden state that predicts token t, of the policy that sampled. Constant.
        old_head (`torch.Tensor` or `tuple`):
            Output matrix `(V, H)`, or `(matrix, bias (V,))`. Constant. Divide hidden states by the sampling
            temperature before the call if it is not 1 and there is no bias.
        hidden (`torch.Tensor`):
            Shape `(B, T, H)` of the policy in training. Gradient.
        head (`torch.Tensor` or `tuple`):
            As `old_head`, of the policy in training. Gradient.
        mask (`torch.Tensor`):
            Bool `(B, T)`. Only real tokens are computed; masked positions may hold NaN.
        chunk_size (`int`):
            Tokens per chunk: a few `(chunk_size, V)` matrices live at a time.

    Returns:
        `torch.Tensor`: Shape `(B, T)`, float32 or better (a half-precision head is converted once, as a whole); 0 at
        masked positions.

    Raises:
        ValueError: If shapes do not fit, a dtype is wrong or `chunk_size` is below 1.
    """
    checks.check_masked(mask)
    checks.check_scalar("chunk_size", chunk_size, minimum=1)
    old_weight, old_bias = _check_head("old_hidden", old_hidden, "old_head", old_head, mask)
    weight, bias = _check_head("hidden", hidden, "head", head, mask)
    if old_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"`old_head` has {old_weight.shape[0]} tokens and `head` {weight.shape[0]}: one vocabulary is needed."
        )
    # Indexing, not multiplying: masked rows are neither computed nor reached by the gradient.
    old_rows, rows = checks.upcast(old_hidden.detach()[mask]), checks.upcast(hidden[mask])
    old_weight, old_bias = old_weight.detach(), None if old_bias is None else old_bias.detach()
    step = int(chunk_size)
    pieces = []
    # One chunk at least: with no real token at all the result still hangs on the graph, so backward() works.
    for start in range(0, max(rows.shape[0], 1), step):
        end = start + step
        args = (old_rows[start:end], old_weight, old_bias, rows[start:end], weight, bias)
        if torch.is_grad_enabled():
            # Nothing random runs inside, so the state of the generators need not be kept.
            piece = cast(torch.Tensor, checkpoint(_chunk_kl, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            piece = _chunk_kl(*args)
        pieces.append(piece)
    kl = torch.cat(pieces)
    return kl.new_zeros(mask.shape).masked_scatter(mask, kl)


def _check_head(
    hidden_name: str, hidden: torch.Tensor, head_name: str, head: Head, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight, bias = head if isinstance(head, tuple) else (head, None)
    checks.check_tensor(hidden_name, hidden)
    checks.check_tensor(head_name, weight)
    if hidden.dim() != 3 or hidden.shape[:2] != mask.shape:
        raise ValueError(
            f"`{hidden_name}` has shape {tuple(hidden.shape)}, expected {(*mask.shape, 'H')}: "
            "slice it to the positions that predict the completion."
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"`{head_name}` has shape {tuple(weight.shape)}, expected ('V', {hidden.shape[2]}): "
            "pass the output matrix, one row per token of the vocabulary."
        )
    if bias is not None:
        checks.check_tensor(f"{head_name} bias", bias, (weight.shape[0],))
        bias = checks.upcast(bias)
    return checks.upcast(weight), bias


def _chunk_kl(
    old_rows: torch.Tensor,
    old_weight: torch.Tensor,
    old_bias: torch.Tensor | None,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    old_logps = torch.nn.functional.linear(old_rows, old_weight, old_bias).log_softmax(dim=-1)
    logps = torch.nn.functional.linear(rows, weight, bias).log_softmax(dim=-1)
    old_probs = old_logps.exp()
    # A token the old policy excludes (-inf) adds 0 by continuity; 0 * (-inf) would be NaN.
    return (old_probs * torch.where(old_probs > 0, old_logps - logps, 0.0)).sum(dim=-1)
