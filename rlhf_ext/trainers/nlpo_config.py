"""Arguments of [`NLPOTrainer`]."""

from dataclasses import dataclass, field, fields

from .ppo_config import PPOConfig


@dataclass
class NLPOConfig(PPOConfig):
    r"""
    Configuration of [`NLPOTrainer`]: [`PPOConfig`] and the mask (Ramamurthy et al. 2023).

    Parameters:
        mask_top_p (`float`, *optional*, defaults to `0.9`):
            Probability of the set of likely tokens that the masking policy allows. At 1.0 it is PPO.
        mask_min_tokens (`int`, *optional*, defaults to `100`):
            At least this many of the likeliest tokens are allowed.
        mask_refresh_rollouts (`int`, *optional*, defaults to `20`):
            Rollouts after which the masking policy becomes the policy as it is then.

    Raises:
        ValueError: a value is out of range, or does not compose.
    """

    mask_top_p: float = field(default=0.9, metadata={"help": "Probability that the mask keeps; 1.0 is PPO."})
    mask_min_tokens: int = field(default=100, metadata={"help": "Tokens that are allowed at least."})
    mask_refresh_rollouts: int = field(default=20, metadata={"help": "Rollouts between refreshes of the mask."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.mask_top_p <= 1.0:
            raise ValueError(f"mask_top_p={self.mask_top_p} must lie in (0, 1].")
        for name in ("mask_min_tokens", "mask_refresh_rollouts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        default = {f.name: f.default for f in fields(type(self))}
        for name in ("mask_min_tokens", "mask_refresh_rollouts"):
            if self.mask_top_p == 1.0 and getattr(self, name) != default[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect: mask_top_p=1.0 masks nothing. Remove it."
                )
        if self.policy_objective == "penalty" and self.mask_top_p < 1.0:
            raise ValueError(
                "policy_objective='penalty' takes its KL over the whole vocabulary, where a masked policy's is "
                "infinite as soon as masks differ. Use 'clip', or mask_top_p=1.0."
            )
