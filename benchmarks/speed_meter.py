"""How both sides of `speed.py` take time, memory and work, and how long a completion is.

Only torch and transformers are imported, so that this runs in the environment of TRL 1.12 as well.
"""

import ctypes
import gc
import re
import time
from pathlib import Path
from typing import Any

import torch
from speed_world import EOS, FIRST_LENGTH, MARK, PAD, UNKNOWN, Run
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback


class ForcedLengths(LogitsProcessor):
    """No end of sequence and no padding is ever sampled; with `ragged`, each row ends at the length of its prompt."""

    def __init__(self, run: Run, never: list[int]):
        self.ragged, self.never = run.ragged, never

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, self.never] = -torch.inf
        if self.ragged:
            mark = (input_ids == MARK).int().argmax(1)
            wanted = input_ids.gather(1, mark[:, None] - 1)[:, 0] - FIRST_LENGTH
            last = input_ids.size(1) - mark >= wanted  # the token that is chosen now is the last one
            scores[last] = -torch.inf
            scores[last, EOS] = 0.0
        return scores


class Meter(TrainerCallback):
    """Seconds and work of each iteration: `steps` calls of `on_step_end` make one.

    An iteration goes from the end of the one before to its own end, so logging and loading of data are in it. Rollout
    = inside of `generate`; scoring = from there to the first forward with gradients; update = the rest.
    """

    def __init__(self, steps: int):
        self.steps, self.calls, self.marks, self.cpu, self.phases = steps, 0, [], [], []
        self.first, self.generated, self.generations = None, 0.0, []
        self.optimizer_steps, self.sampled, self.tokens = 0, 0, 0

    def watch(self, run: Run, base: Any, trained: Any) -> None:
        """`base`: the causal language model that generates; `trained`: the module whose forward has gradients."""
        generate, never = base.generate, {PAD, EOS, UNKNOWN, MARK}
        if run.model:
            ids = base.generation_config.eos_token_id
            never = {base.config.pad_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
        lengths = ForcedLengths(run, sorted(never))

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = generate(*args, **kwargs, logits_processor=LogitsProcessorList([lengths]))
            self.generated += time.perf_counter() - start
            sequences = getattr(output, "sequences", output)
            width = kwargs.get("input_ids", args[0] if args else None).size(1)
            new = sequences[:, width:]
            self.sampled += int((new != PAD).sum())
            self.generations.append(list(new.shape))
            return output

        base.generate = timed
        trained.register_forward_pre_hook(self._forward)
        register_optimizer_step_post_hook(self._step)

    def _forward(self, module: Any, args: Any) -> None:
        if self.first is None and torch.is_grad_enabled():
            self.first = time.perf_counter()

    def _step(self, *args: Any) -> None:
        self.optimizer_steps += 1

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        if self.calls % self.steps:
            return
        now, before = time.perf_counter(), self.marks[-1]
        phases = {"rollout": self.generated, "update": now - self.first}
        self.phases.append({**phases, "scoring": now - before - sum(phases.values())})
        self.marks.append(now)
        self.cpu.append(time.process_time())
        self.first, self.generated = None, 0.0

    def result(self) -> dict[str, Any]:
        """`cpu_seconds`: of all threads, to compare by on a machine that others use too. `tokens`: of the completions
        that were trained on, where the program counts them, else those sampled."""
        seconds, cpu = (
            [end - start for start, end in zip(row, row[1:], strict=False)] for row in (self.marks, self.cpu)
        )
        return {
            "warm_up": seconds[0] if seconds else None,
            "seconds": seconds[1:],
            "cpu_seconds": cpu[1:],
            "phases": {name: [row[name] for row in self.phases[1:]] for name in ("rollout", "scoring", "update")},
            "tokens": self.tokens or self.sampled,
            "optimizer_steps": self.optimizer_steps,
            "generations": self.generations,
        }


def release() -> None:
    """Give what is free back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` the peak since `forget_peak`."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def trained_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
