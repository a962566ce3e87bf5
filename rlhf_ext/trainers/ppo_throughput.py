"""How fast a run is: completion tokens per second, of sampling and of training apart."""

import time
from typing import Any

import torch
from transformers import TrainerCallback

from .ppo_rollout import token_mask


class StepClock(TrainerCallback):
    """Takes the time of every optimizer step, and tells the trainer."""

    def __init__(self, trainer: "ThroughputMixin"):
        super().__init__()
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._end_step()


class ThroughputMixin:
    """The part of [`PPOTrainer`] that logs `rollout/tokens_per_second` and `update/tokens_per_second`.

    A rollout is everything from the prompts to the advantages; an update is an optimizer step without the rollout in
    it. Evaluation and saving lie outside of both. Tokens are real completion tokens of all processes.
    """

    _step_began: float | None = None
    _rollout_seconds = 0.0
    _update_tokens = 0

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before, start = self._buffered_inputs, time.perf_counter()
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training:
            if self._buffered_inputs is not before:
                seconds = time.perf_counter() - start
                self._rollout_seconds += seconds
                tokens = inputs["num_items_in_batch"].item()
                self._metrics["train"]["rollout/tokens_per_second"].append(tokens / seconds)
            self._update_tokens += int(token_mask(inputs).sum())
        return inputs

    def _begin_step(self) -> None:
        self._step_began, self._rollout_seconds, self._update_tokens = time.perf_counter(), 0.0, 0

    def _end_step(self) -> None:
        if self._step_began is None or self._stopped:  # a step that is not taken is no measure of one that is
            return
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - self._step_began - self._rollout_seconds
        tokens = torch.tensor(float(self._update_tokens), device=self.accelerator.device)
        tokens = self.accelerator.reduce(tokens, reduction="sum").item()
        self._metrics["train"]["update/tokens_per_second"].append(tokens / seconds)
