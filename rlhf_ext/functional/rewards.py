"""From one score per completion to one reward per token.

Shapes: B batch, T completion tokens. Mask: True = a real completion token.
"""

import torch

from . import _checks as checks


@torch.no_grad()
def shape_rewards(
    scores: torch.Tensor,
    kl: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float,
    token_rewards: torch.Tensor | None = None,
) -> torch.Tensor:
    """Charge every token its KL and pay the score once, on the last real token.

    r_t = -kl_coef kl_t + [t is the last real token] score + token_reward_t

    so that sum_t r_t = score - kl_coef sum_t kl_t: Ziegler et al. 2019, Eq. 2, and Stiennon et al. 2020, Sec. 3.4, as
    paid per token in their released code. The notes write the score as if every token earned it. A reward model's
    output before the last token is untrained and must not be passed as `token_rewards`.

    Args:
        scores (`torch.Tensor`):
            Shape `(B,)`, one per finished completion.
        kl (`torch.Tensor`):
            Shape `(B, T)`, nats per token, `estimate_kl(logps, ref_logps, estimator="k1")`. A single token's value may
            be negative. Masked positions may hold NaN.
        mask (`torch.Tensor`):
            Bool `(B, T)`.
        kl_coef (`float`):
            Weight of the KL, at least 0.
        token_rewards (`torch.Tensor`, *optional*):
            Shape `(B, T)`, further rewards of single tokens. Masked positions may hold NaN.

    Returns:
        `torch.Tensor`: Shape `(B, T)`, float32 or better; 0 at masked positions. A row without a real token has
        nowhere to put its score: it is lost, and the row stays 0. No gradient.

    Raises:
        ValueError: If shapes differ, a dtype is wrong or `kl_coef` is negative.
    """
    checks.check_masked(mask, kl=kl)
    checks.check_tensor("scores", scores, (mask.shape[0],))
    checks.check_scalar("kl_coef", kl_coef, minimum=0.0)
    # Real, and no real token after it: holds for a mask with holes too, where the number of tokens is not the last
    # index.
    last = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)
    # By `where`, so that the NaN score of an empty row stays out of the other columns.
    paid = torch.where(last, checks.upcast(scores).unsqueeze(1).expand(mask.shape), 0.0)
    rewards = paid - kl_coef * checks.clear(kl, mask)
    if token_rewards is not None:
        checks.check_tensor("token_rewards", token_rewards, mask.shape)
        rewards = rewards + checks.clear(token_rewards, mask)
    return rewards


@torch.no_grad()
def combine_scores(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of several rewards: sum_k weights_k scores_k over the rewards that apply to a row.

    Args:
        scores (`torch.Tensor`):
            Shape `(B, K)`, one per completion and reward; NaN where a reward does not apply.
        weights (`torch.Tensor`):
            Shape `(K,)`.

    Returns:
        `torch.Tensor`: Shape `(B,)`, float32 or better. NaN for a row that no reward scored: 0 would be a score.

    Raises:
        ValueError: If shapes differ or a dtype is not floating.
    """
    checks.check_tensor("scores", scores)
    checks.check_tensor("weights", weights, scores.shape[-1:])
    scores = checks.upcast(scores)
    weighted = (scores * weights.to(scores)).nansum(dim=-1)
    return torch.where(scores.isnan().all(dim=-1), torch.nan, weighted)
