"""Every formula of the toolkit, as functions of tensors: torch and math only, nothing of ours above.

Tensors are `(B, T)` with a bool mask, True = a real completion token. Masked inputs may hold NaN; masked outputs are
0. Half precisions are computed in float32. Scalars are keyword-only and checked. A loss is to be minimised and returns
`(loss, metrics)`.
"""

from .advantages import compute_gae, discounted_returns, leave_one_out_advantages
from .auxiliary import entropy_loss, lm_loss, value_loss
from .controllers import AdaptiveKLController, AdaptivePenaltyController
from .kl import estimate_kl, exact_kl
from .losses import policy_gradient_loss, ppo_clip_loss, ppo_penalty_loss
from .masking import masked_mean, masked_var, masked_whiten, top_p_mask
from .preference import preference_loss
from .rewards import shape_rewards


__all__ = [
    "AdaptiveKLController",
    "AdaptivePenaltyController",
    "compute_gae",
    "discounted_returns",
    "entropy_loss",
    "estimate_kl",
    "exact_kl",
    "leave_one_out_advantages",
    "lm_loss",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "policy_gradient_loss",
    "ppo_clip_loss",
    "ppo_penalty_loss",
    "preference_loss",
    "shape_rewards",
    "top_p_mask",
    "value_loss",
]
