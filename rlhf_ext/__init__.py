"""Classic RLHF as thin subclasses of TRL's trainers."""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

# Trainers are imported on first use: TRL takes ten seconds to import, and `rlhf_ext.functional` needs only torch.
_LAZY = {
    "NLPOConfig": ".trainers.nlpo_config",
    "NLPOTrainer": ".trainers.nlpo_trainer",
    "PPOConfig": ".trainers.ppo_config",
    "PPOTrainer": ".trainers.ppo_trainer",
    "PreferenceRewardConfig": ".trainers.reward_config",
    "PreferenceRewardTrainer": ".trainers.reward_trainer",
}

if TYPE_CHECKING:
    from .trainers.nlpo_config import NLPOConfig as NLPOConfig
    from .trainers.nlpo_trainer import NLPOTrainer as NLPOTrainer
    from .trainers.ppo_config import PPOConfig as PPOConfig
    from .trainers.ppo_trainer import PPOTrainer as PPOTrainer
    from .trainers.reward_config import PreferenceRewardConfig as PreferenceRewardConfig
    from .trainers.reward_trainer import PreferenceRewardTrainer as PreferenceRewardTrainer

__all__ = [
    "NLPOConfig",
    "NLPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PreferenceRewardConfig",
    "PreferenceRewardTrainer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
