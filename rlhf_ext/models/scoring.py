"""What turns text into a score: names of `pooling`, `reward_checkpoints`, `reward_functions`, `score_wrappers`."""

from .pooling import (
    AGGREGATIONS,
    classifier_of,
    last_token_scores,
    normalization_of,
    pool_by_attention_mask,
    pooled_aggregation,
    set_normalization,
    sum_token_scores,
    token_scores,
)
from .reward_checkpoints import load_critic, load_reward_model, save_normalization, saved_normalization
from .reward_functions import ModelReward, checked_reward
from .score_wrappers import (
    Clipped,
    CutAt,
    EnsembleMean,
    EnsembleSpread,
    MissingEOS,
    Normalized,
    ScoreWrapper,
    treated_score,
)


__all__ = [
    "AGGREGATIONS",
    "Clipped",
    "CutAt",
    "EnsembleMean",
    "EnsembleSpread",
    "MissingEOS",
    "ModelReward",
    "Normalized",
    "ScoreWrapper",
    "checked_reward",
    "classifier_of",
    "last_token_scores",
    "load_critic",
    "load_reward_model",
    "normalization_of",
    "pool_by_attention_mask",
    "pooled_aggregation",
    "save_normalization",
    "saved_normalization",
    "set_normalization",
    "sum_token_scores",
    "token_scores",
    "treated_score",
]
