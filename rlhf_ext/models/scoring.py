"""What turns text into a score; the parts live in `pooling`, `reward_checkpoints` and `reward_functions`."""

from .pooling import (
    AGGREGATIONS,
    classifier_of,
    last_token_scores,
    pool_by_attention_mask,
    pooled_aggregation,
    sum_token_scores,
    token_scores,
)
from .reward_checkpoints import load_critic, load_reward_model
from .reward_functions import ModelReward, checked_reward


__all__ = [
    "AGGREGATIONS",
    "ModelReward",
    "checked_reward",
    "classifier_of",
    "last_token_scores",
    "load_critic",
    "load_reward_model",
    "pool_by_attention_mask",
    "pooled_aggregation",
    "sum_token_scores",
    "token_scores",
]
