"""The memory table of a run: what was planned and what was measured, printed when training ends."""

import json
import os
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..models.growing_cache import cache_of
from ..models.memory import PeakMemory, cache_bytes, gib, gradient_bytes, model_bytes, optimizer_bytes
from ..models.memory_plan import MemoryPlan
from ..models.roles import base_of


ROWS = ("weights", "adapters and heads", "gradients", "optimizer", "cache", "activations", "peak")


class MemoryCallback(TrainerCallback):
    """
    Measures what a PPO run holds, prints it beside the plan and writes `memory.json` to the output folder.

    Weights, adapters, gradients, optimizer and cache are bytes of unique storages, each at its largest. Activations
    are the highest rise of a micro-batch's update above what was held when it began. The peak is that of the device
    while training; on a CPU it is the process's, less what that held when this callback was made: make it before the
    models. There it also has what is imported late (some 60 MiB) and blocks that the allocator keeps.

    Args:
        device (`str` or `torch.device`):
            Device of the run.
        plan ([`~rlhf_ext.models.memory_plan.MemoryPlan`], *optional*):
            What was planned; `None` leaves the column out.
    """

    def __init__(self, device: torch.device | str, plan: MemoryPlan | None = None):
        super().__init__()
        self.plan = plan
        self.meter = PeakMemory(device)
        self.baseline = 0 if self.meter.device.type == "cuda" else self.meter.now()
        self.measured = dict.fromkeys(ROWS, 0)
        self._others: list[nn.Module] = []
        self._before: int | None = None  # held when an update began; None outside of one
        self._hooks: list[Any] = []

    def watch(self, trainer: Any) -> None:
        """Count a reference and reward models that are models of their own among the weights of `trainer`'s run."""
        rewards = [getattr(getattr(func, "reward", None), "model", None) for func in trainer.reward_funcs]
        others = [model for model in (trainer.reference, *rewards) if isinstance(model, nn.Module)]
        self._others = [model for model in others if model is not trainer.roles.model]

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs: Any) -> None:
        self.meter.reset()
        base = base_of(model)
        self._hooks = [
            base.register_forward_pre_hook(self._before_forward),
            base.register_forward_hook(self._after_forward),
        ]

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        # The first forward with gradients after a rollout, or after a step, begins an update.
        if torch.is_grad_enabled() and self._before is None:
            self._keep("peak", self.meter.peak() - self.baseline)
            self._before = self.meter.now()
            self.meter.reset()

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        cache = cache_of(output)
        if cache is not None:
            self._keep("cache", cache_bytes(cache))

    def on_substep_end(self, args, state, control, model: nn.Module | None = None, **kwargs: Any) -> None:
        self._end_of_update(model)

    def on_pre_optimizer_step(self, args, state, control, model: nn.Module | None = None, **kwargs: Any) -> None:
        self._end_of_update(model)

    def _end_of_update(self, model: nn.Module) -> None:
        self._keep("gradients", gradient_bytes(model))
        if self._before is not None:
            peak = self.meter.peak()
            self._keep("activations", peak - self._before)
            self._keep("peak", peak - self.baseline)
            self._before = None
            self.meter.reset()

    def on_step_end(self, args, state, control, model: nn.Module | None = None, optimizer=None, **kwargs: Any) -> None:
        self._keep("peak", self.meter.peak() - self.baseline)
        if optimizer is not None:
            self._keep("optimizer", optimizer_bytes(optimizer))

    def _keep(self, name: str, size: int) -> None:
        self.measured[name] = max(self.measured[name], size)

    def on_train_end(self, args, state, control, model: nn.Module | None = None, **kwargs: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        owners = model_bytes(model)
        small = sum(size for owner, size in owners.items() if owner.startswith("adapter") or owner == "heads")
        others = sum(sum(model_bytes(other).values()) for other in self._others)
        self.measured |= {"weights": sum(owners.values()) - small + others, "adapters and heads": small}
        if not state.is_world_process_zero:
            return
        planned = self.planned
        print("\n" + memory_table(self.measured, planned), flush=True)
        with open(os.path.join(args.output_dir, "memory.json"), "w") as file:
            json.dump({"measured": self.measured, "planned": planned}, file, indent=1)

    @property
    def planned(self) -> dict[str, int] | None:
        """The plan in the rows of the table, bytes."""
        if self.plan is None:
            return None
        parts = self.plan.parts
        return {
            "weights": sum(parts[name] for name in ("base", "reference", "critic model", "reward model")),
            "adapters and heads": parts["adapters, heads"],
            "gradients": parts["gradients"],
            "optimizer": parts["optimizer"],
            "cache": parts["cache"],
            "activations": parts["activations"],
            "peak": self.plan.peak,
        }


def memory_table(measured: dict[str, int], planned: dict[str, int] | None) -> str:
    """Lines of `memory`, `planned`, `measured`."""
    lines = [f"{'memory':<20}{'planned':>14}{'measured':>14}"]
    for name in ROWS:
        lines.append(f"{name:<20}{gib(planned[name]) if planned else '-':>14}{gib(measured[name]):>14}")
    return "\n".join(lines)
