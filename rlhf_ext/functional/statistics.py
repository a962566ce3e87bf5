"""Numbers that are logged, not trained on.

Shapes: B batch, T completion tokens. Mask: True = a real completion token. Masked inputs may hold NaN; padding never
changes a number, and an empty mask gives 0 instead of NaN.
"""

from collections.abc import Sequence

import torch

from . import _checks as checks
from .losses import log_ratio_of, ratio_metrics
from .masking import masked_mean, masked_var


@torch.no_grad()
def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 - var(R - V) / var(R) over all real tokens; 0 where the returns do not vary.

    Args:
        values (`torch.Tensor` of shape `(B, T)`): V before token t.
        returns (`torch.Tensor` of shape `(B, T)`): target of V.
        mask (`torch.Tensor` of shape `(B, T)`, bool): True = real token.

    Raises:
        ValueError: If shapes differ, an input is not floating or `mask` is not bool.
    """
    checks.check_masked(mask, values=values, returns=returns)
    total = masked_var(returns, mask)
    rest = masked_var(returns - values, mask)
    return torch.where(total > 0, 1 - rest / total.clamp(min=torch.finfo(total.dtype).tiny), torch.zeros_like(total))


@torch.no_grad()
def rollout_statistics(
    scores: torch.Tensor,
    kl: torch.Tensor,
    rewards: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor | None = None,
    returns: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What is logged once per rollout, over the rows of all processes.

    Args:
        scores (`torch.Tensor` of shape `(B,)`): weighted sum of the rewards' scores; NaN rows have no score, train
            nothing and count in the KL alone.
        kl (`torch.Tensor` of shape `(B, T)`): k1 estimate of the KL to the reference, nats per token.
        rewards (`torch.Tensor` of shape `(B, T)`): per-token rewards after the KL term, before whitening.
        advantages (`torch.Tensor` of shape `(B, T)`): before whitening.
        mask (`torch.Tensor` of shape `(B, T)`, bool): True = real token.
        values, returns (`torch.Tensor` of shape `(B, T)`, *optional*): with a critic.

    Returns:
        `dict`: `kl` (nats summed per sequence, mean over sequences), `kl_per_token`, `rlhf_reward` (the summed rewards
        of a sequence, score - kl_coef * KL), `advantages/mean`, `advantages/std`, and with values `value/mean`,
        `value/explained_variance`, `returns/mean`.

    Raises:
        ValueError: If shapes differ, an input is not floating or `mask` is not bool.
    """
    checks.check_masked(mask, kl=kl, rewards=rewards, advantages=advantages)
    checks.check_tensor("scores", scores, mask.shape[:1])
    per_sequence = checks.clear(kl, mask).sum(-1)
    paid = checks.clear(rewards, mask).sum(-1)
    scored = ~scores.isnan()
    taught = mask & scored[:, None]
    statistics = {
        "kl": masked_mean(per_sequence, torch.ones_like(scored)),
        "kl_per_token": masked_mean(kl, mask),
        "rlhf_reward": masked_mean(paid, scored),
        "advantages/mean": masked_mean(advantages, taught),
        "advantages/std": masked_var(advantages, taught).sqrt(),
    }
    if values is not None and returns is not None:
        checks.check_masked(mask, values=values, returns=returns)
        statistics["value/mean"] = masked_mean(values, taught)
        statistics["value/explained_variance"] = explained_variance(values, returns, taught)
        statistics["returns/mean"] = masked_mean(returns, taught)
    return statistics


@torch.no_grad()
def ratio_statistics(logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Distance of the policy from the one that sampled: `approx_kl` = mean(r - 1 - log r), and the extremes of r.

    Args:
        logps, old_logps (`torch.Tensor` of shape `(B, T)`): log-probability of token t now and in the rollout.
        mask (`torch.Tensor` of shape `(B, T)`, bool): True = real token.

    Raises:
        ValueError: If shapes differ, an input is not floating or `mask` is not bool.
    """
    checks.check_masked(mask, logps=logps, old_logps=old_logps)
    metrics = ratio_metrics(log_ratio_of(logps, old_logps, mask), mask)
    return {f"policy/{name}": metrics[name] for name in ("approx_kl", "ratio_max", "ratio_min")}


@torch.no_grad()
def distinct_ngrams(ids: torch.Tensor, mask: torch.Tensor, *, n: int) -> torch.Tensor:
    """Distinct-n of Li et al. 2016 over a set of completions: different n-grams / all n-grams; 0 without any.

    Near 1 every n-gram occurs once; near 0 the completions repeat themselves or each other. It falls with the number
    of tokens, so compare sets of one size.

    Args:
        ids (`torch.Tensor` of shape `(B, T)`, integer): token ids.
        mask (`torch.Tensor` of shape `(B, T)`, bool): True = real token. An n-gram is n real tokens in a row.
        n (`int`): tokens per n-gram, at least 1.

    Returns:
        `torch.Tensor`: 0-d float32.

    Raises:
        ValueError: If shapes differ, `ids` is not integer, `mask` is not bool or `n` is below 1.
    """
    _check_ids(ids, mask)
    checks.check_scalar("n", n, minimum=1)
    if ids.shape[1] < n:
        return torch.zeros((), device=ids.device)
    grams = ids.unfold(1, n, 1)[mask.unfold(1, n, 1).all(dim=-1)]
    if grams.shape[0] == 0:
        return torch.zeros((), device=ids.device)
    return torch.tensor(grams.unique(dim=0).shape[0] / grams.shape[0], device=ids.device)


@torch.no_grad()
def completion_statistics(
    ids: torch.Tensor, mask: torch.Tensor, *, eos_token_ids: Sequence[int]
) -> dict[str, torch.Tensor]:
    """What is logged of the sampled tokens themselves, over the rows of all processes.

    Args:
        ids (`torch.Tensor` of shape `(B, T)`, integer): token ids of the completions.
        mask (`torch.Tensor` of shape `(B, T)`, bool): True = real token, the end of sequence among them.
        eos_token_ids (`Sequence[int]`): the ids that end a sequence.

    Returns:
        `dict`: `completions/eos_rate`, the share of completions that hold an end of sequence, and
        `completions/distinct_1`, `completions/distinct_2` of [`distinct_ngrams`].

    Raises:
        ValueError: If shapes differ, `ids` is not integer or `mask` is not bool.
    """
    _check_ids(ids, mask)
    ended = (torch.isin(ids, torch.tensor(eos_token_ids, dtype=ids.dtype, device=ids.device)) & mask).any(dim=1)
    return {
        "completions/eos_rate": masked_mean(ended.float(), torch.ones_like(ended)),
        "completions/distinct_1": distinct_ngrams(ids, mask, n=1),
        "completions/distinct_2": distinct_ngrams(ids, mask, n=2),
    }


def _check_ids(ids: torch.Tensor, mask: torch.Tensor) -> None:
    checks.check_masked(mask)
    if ids.shape != mask.shape or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"`ids` is {ids.dtype} of shape {tuple(ids.shape)}, expected integers of shape {tuple(mask.shape)}: pass "
            "the token ids that `mask` belongs to."
        )


@torch.no_grad()
def row_means(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of each row over its real tokens, `(B,)`; 0 for a row without any.

    Args:
        x (`torch.Tensor` of shape `(B, T)`): one number per token.
        mask (`torch.Tensor` of shape `(B, T)`, bool): True = real token.

    Raises:
        ValueError: If shapes differ, `x` is not floating or `mask` is not bool.
    """
    checks.check_masked(mask, x=x)
    return checks.clear(x, mask).sum(-1) / mask.sum(-1).clamp(min=1)


@torch.no_grad()
def is_below_zero(kl: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether the mean of a KL over sequences lies more than three standard errors below 0, where no KL can be.

    Args:
        kl (`torch.Tensor` of shape `(B, T)`): k1 estimate, nats per token; single ones may well be negative.
        mask (`torch.Tensor` of shape `(B, T)`, bool): True = real token.

    Raises:
        ValueError: If shapes differ, `kl` is not floating or `mask` is not bool.
    """
    checks.check_masked(mask, kl=kl)
    per_sequence = checks.clear(kl, mask).sum(-1)
    if len(per_sequence) < 8:  # too few to know their spread
        return False
    return bool(per_sequence.mean() < -3 * per_sequence.std() / len(per_sequence) ** 0.5 - 1e-4)


@torch.no_grad()
def perplexity(logps: torch.Tensor, *, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Perplexity exp(nll) and nll = -sum log p / tokens, nats per token, pooled over all answers.

    Args:
        logps (`torch.Tensor` of shape `(N,)`): log-probability of each answer, summed over its tokens.
        num_tokens (`int`): predicted tokens of all answers together.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: both 0-d, float64.

    Raises:
        ValueError: If `logps` is not a floating `(N,)`, or `num_tokens` is below 1.
    """
    checks.check_tensor("logps", logps)
    if logps.dim() != 1:
        raise ValueError(f"`logps` has shape {tuple(logps.shape)}, expected (N,): one sum per answer.")
    checks.check_scalar("num_tokens", num_tokens, minimum=1)
    nll = -logps.double().sum() / num_tokens
    return nll.exp(), nll


@torch.no_grad()
def pooled_statistic(values: torch.Tensor, weights: torch.Tensor, *, kind: str = "mean") -> torch.Tensor:
    """One number of a whole from those of its parts: `sum w v / sum w`, or the extreme; 0 where no part counts.

    Args:
        values (`torch.Tensor` of shape `(N,)`): number of each part; NaN of a part that counts is that of the whole.
        weights (`torch.Tensor` of shape `(N,)`): tokens of each part, not negative; parts of weight 0 do not count.
        kind (`str`, *optional*, defaults to `"mean"`): `"mean"`, `"max"` or `"min"`.

    Returns:
        `torch.Tensor`: 0-d.

    Raises:
        ValueError: If shapes differ, an input is not floating or `kind` is another.
    """
    checks.check_tensor("values", values, weights.shape)
    checks.check_tensor("weights", weights, values.shape)
    if kind not in ("mean", "max", "min"):
        raise ValueError(f"`kind` is {kind!r}: set it to 'mean', 'max' or 'min'.")
    counts = weights > 0
    if not counts.any():
        return values.new_zeros(())
    values, weights = values[counts], weights[counts]
    if kind == "mean":
        return (values * weights).sum() / weights.sum()
    return values.max() if kind == "max" else values.min()
