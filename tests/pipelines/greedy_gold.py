"""A gold reward whose import makes PPO's rollouts greedy: what is sampled must not depend on who samples it."""

import copy
import os
from pathlib import Path
from typing import Any

from rlhf_ext.trainers.ppo_trainer import PPOTrainer


def goodness(prompts: list, completions: list, **kwargs: Any) -> list[float]:
    """How many words are good."""
    return [float(text.split().count("good") - text.split().count("bad")) for text in completions]


def _greedy(trainer: PPOTrainer) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    stock = model.generate

    def generate(*args: Any, generation_config: Any, **kwargs: Any) -> Any:
        config = copy.deepcopy(generation_config)
        config.do_sample, config.temperature, config.top_k, config.top_p = False, None, None, None
        return stock(*args, generation_config=config, **kwargs)

    model.generate = generate


RANKS = "RLHF_EXT_TEST_RANKS"  # variable: a folder in which each process of a launch leaves its rank
_stock = PPOTrainer.__init__


def _pinned(self: PPOTrainer, *args: Any, **kwargs: Any) -> None:
    _stock(self, *args, **kwargs)
    if RANKS not in os.environ:  # another test of the process that imported this
        return
    _greedy(self)
    state = self.accelerator.state
    plugin = state.deepspeed_plugin
    kind = f"zero{plugin.zero_stage}" if plugin is not None else state.distributed_type.value.lower()
    (Path(os.environ[RANKS]) / f"{kind}-{state.process_index}-of-{state.num_processes}").touch()


PPOTrainer.__init__ = _pinned
