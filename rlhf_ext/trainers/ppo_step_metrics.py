"""Numbers of an optimizer step, gathered over its micro-batches, in which rows and tokens are of uneven number."""

from collections import defaultdict
from typing import Any

import torch
from transformers import TrainerCallback

from ..functional.statistics import pooled_statistic


EXTREMES = {
    "policy/ratio_max": "max",
    "policy/ratio_min": "min",
    "clip_ratio/high_max": "max",
    "clip_ratio/low_min": "min",
}
"""What a step keeps the extreme of; of all else, the mean over tokens."""

OF_PARENT = ("entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
"""What the parent logs of each micro-batch, besides the extremes; all micro-batches would weigh the same."""


class StepNumbers(TrainerCallback):
    """Lets the trainer log what a step gathered, before the step is taken."""

    def __init__(self, trainer: "StepMetricsMixin"):
        super().__init__()
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for noted in self.trainer._noted.values():  # of a run that ended in the middle of a step
            noted.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._log_step("train")


class StepMetricsMixin:
    """The part of [`PPOTrainer`] that logs one number per step where there are several micro-batches.

    An evaluation has no steps: there each batch is one.
    """

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self._noted["eval"].clear()  # of a batch that raised
        return super().prediction_step(*args, **kwargs)

    def _begin_notes(self) -> None:
        self._noted: dict[str, dict[str, list[torch.Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.add_callback(StepNumbers(self))

    def _note(self, metrics: dict[str, torch.Tensor], weight: torch.Tensor | float = 1.0) -> None:
        """Add this process's number of a micro-batch; `weight` is how many tokens, or whatever else, it stands for."""
        noted = self._noted["train" if self.model.training else "eval"]
        for name, value in metrics.items():
            pair = [torch.as_tensor(x, dtype=torch.float32, device=self.accelerator.device) for x in (value, weight)]
            noted[name].append(torch.stack(pair).detach())

    def _note_what_the_parent_logged(self, weight: torch.Tensor) -> None:
        """Take the numbers of a micro-batch, which are those of all processes, back from the parent's lists."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in (*OF_PARENT, *EXTREMES):
            if metrics.get(name):
                self._note({name: torch.tensor(metrics[name].pop())}, weight)
                if not metrics[name]:  # an empty list would be logged as None
                    del metrics[name]

    def _log_step(self, mode: str) -> None:
        for name, pairs in self._noted[mode].items():
            values, weights = self.accelerator.gather(torch.stack(pairs)).unbind(dim=-1)
            kind = EXTREMES.get(name, "mean")
            self._metrics[mode][name].append(pooled_statistic(values, weights, kind=kind).item())
        self._noted[mode].clear()
