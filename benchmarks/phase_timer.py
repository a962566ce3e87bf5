"""Time of the phases of a trainer's iteration, by timers around its methods; the trainer itself is left as it is.

A second belongs to the innermost phase that is running. What no timer covers is the rest of the iteration.
"""

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


Phase = str | Callable[[list[str]], str]
"""Name of a phase, or a function that names it from the phases around it."""


class PhaseTimer:
    """Seconds per phase since the last `take`, by a clock such as `time.perf_counter`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self.stack: list[str] = []
        self.last = clock()

    def wrap(self, owner: Any, name: str, phase: Phase) -> None:
        """Count a method of `owner` as a phase; nothing happens where there is no such method."""
        method = getattr(owner, name, None)
        if method is None:
            return

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._lap()
            self.stack.append(phase if isinstance(phase, str) else phase(self.stack))
            try:
                return method(*args, **kwargs)
            finally:
                self._lap()
                self.stack.pop()

        setattr(owner, name, timed)

    def _lap(self) -> None:
        now = self.clock()
        self.seconds[self.stack[-1] if self.stack else "rest"] += now - self.last
        self.last = now

    def take(self) -> dict[str, float]:
        """The seconds so far; the count begins anew."""
        self._lap()
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found


def logps_phase(stack: list[str]) -> str:
    if "reference" in stack:
        return "reference"
    return "old log-probabilities" if ROLLOUT_REST in stack else "policy forward"


ROLLOUT_REST = "rest of the rollout"
METHODS: tuple[tuple[str, Phase], ...] = (
    ("_generate_and_score_completions", ROLLOUT_REST),
    ("_generate_single_turn", "rollout"),
    ("_calculate_rewards", "reward"),
    ("_reference_logps", "reference"),
    ("_get_per_token_logps_and_entropies", logps_phase),
    ("_values", "values"),
    ("_compute_loss", "critic forward"),  # what is not the policy's, below
    ("compute_policy_loss", "policy forward"),
)


class IterationTimes(TrainerCallback):
    """Puts timers on a trainer and keeps the seconds per phase of each iteration, rollout and updates.

    Args:
        trainer: one of `PPOTrainer`.
        steps (`int`): optimizer steps of an iteration.
        profile (`bool`): whether torch's profiler watches the last step, in which no rollout falls.
        clock: the time of the phases; the profiler has its own, wall time.
    """

    def __init__(
        self, trainer: Any, steps: int, profile: bool = False, clock: Callable[[], float] = time.perf_counter
    ):
        self.trainer, self.steps, self.profile = trainer, steps, profile
        self.timer, self.iterations = PhaseTimer(clock), []
        self.profiler: Any = None
        self.profiled_seconds = 0.0
        for name, phase in METHODS:
            self.timer.wrap(trainer, name, phase)
        self.timer.wrap(trainer.accelerator, "backward", "backward")
        self.timer.wrap(trainer.accelerator, "clip_grad_norm_", "optimizer")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.timer.wrap(self.trainer.optimizer, "step", "optimizer")
        self.timer.take()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profile and state.global_step == state.max_steps - 1:
            import torch

            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profiler.__enter__()
            self.profiled_seconds = -time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is not None:
            self.profiled_seconds += time.perf_counter()
            self.profiler.__exit__(None, None, None)
        if state.global_step % self.steps == 0:
            self.iterations.append(self.timer.take())
