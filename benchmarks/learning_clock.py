"""Snapshots of a policy with the seconds it took to get there, the same in both environments of `learning.py`.

Two clocks count from the beginning of training, wall time and the CPU time of the process, which on a quiet machine
with one thread are the same. They stand still while a snapshot is written.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback


WINDOW = 256  # training episodes whose mean gold ends a run


def now() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


class Enough(Exception):
    """Raised out of the training loop: TRL 1.12's does not look at `control`."""


class Snapshots(TrainerCallback):
    """
    Writes the policy every `every` updates; ends the run at the margin above the target, if there is one, or
    at the last second.

    Args:
        job (`dict`): what `learning.py` asks for.
        policy (`nn.Module`): what is written.
        steps (`int`): steps of the trainer per update.
        rollouts: returns the mean training gold of each rollout so far.
    """

    def __init__(self, job: dict[str, Any], policy: nn.Module, steps: int, rollouts: Callable[[], list[float]]):
        self.world, self.size, self.steps = job["world"], job["setting"]["rollout_size"], steps
        self.every = max(1, self.world["snapshot_episodes"] // self.size)
        self.folder, self.policy, self.rollouts = Path(job["folder"]), policy, rollouts
        self.updates: list[dict[str, float]] = []
        self.count, self.zero = 0, (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.zero = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1
        if self.count % (self.steps * self.every):
            return
        stopped = now()
        wall, cpu = (b - a for a, b in zip(self.zero, stopped, strict=True))
        update = self.count // self.steps
        golds = self.rollouts()[:update]
        recent = golds[-max(1, WINDOW // self.size) :]
        row = {"update": update, "episodes": update * self.size, "seconds": wall, "cpu_seconds": cpu}
        row["gold"] = sum(recent) / len(recent)
        self.updates.append(row)
        save_file({n: p.detach().clone() for n, p in self.policy.named_parameters()}, self.file(row))
        margin = self.world["margin"]
        above = margin is not None and row["episodes"] >= WINDOW and row["gold"] > self.world["target"] + margin
        if above or cpu > self.world["max_seconds"]:
            raise Enough
        self.zero = tuple(a + c - b for a, b, c in zip(self.zero, stopped, now(), strict=True))

    def file(self, row: dict[str, float]) -> Path:
        return self.folder / f"policy-{row['update']}.safetensors"

    def train(self, trainer: Any) -> None:
        """Train, and leave `updates.json` in the folder of the job."""
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.add_callback(self)
        try:
            trainer.train()
        except Enough:
            pass
        (self.folder / "updates.json").write_text(json.dumps(self.updates))
