"""Evaluation whose numbers do not hang on the batches, say of which data set they are, and leave training alone."""

import copy
import os
from typing import Any

import torch

from ..functional.statistics import pooled_statistic


class EvaluationMetricsMixin:
    """The part of a trainer that logs an evaluation.

    The parent averages batches, of which the last one is smaller, and calls the numbers of every data set alike.
    """

    _eval_rows: list[float] | None = None

    def _count_eval_rows(self, rows: float) -> None:
        """Tell of a batch of an evaluation how many rows it has, on all processes."""
        self._eval_rows = [*(self._eval_rows or []), rows]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if _prefix(logs) is not None:
            self._pool_batches()
            self._name_data_set(logs)
        super().log(logs, start_time)

    def _pool_batches(self) -> None:
        rows, self._eval_rows = torch.tensor(self._eval_rows or [], dtype=torch.float64), None
        for name, values in self._metrics["eval"].items():
            if len(values) == len(rows) > 0:
                numbers = torch.tensor(values, dtype=torch.float64)
                known = ~numbers.isnan()
                if known.any():
                    pooled = pooled_statistic(numbers[known], rows[known], kind=_kind(name))
                    self._metrics["eval"][name] = [pooled.item()]

    def _name_data_set(self, logs: dict[str, float]) -> None:
        """`eval_NAME_...` of one of several data sets; the parent writes `eval_` in front."""
        prefix = _prefix(logs) or "eval_"
        if prefix != "eval_":
            metrics = self._metrics["eval"]
            renamed = {prefix.removeprefix("eval_") + name: values for name, values in metrics.items()}
            metrics.clear()
            metrics.update(renamed)


class EvaluationMixin(EvaluationMetricsMixin):
    """The part of [`PPOTrainer`] that evaluates: its samples move no random number of training, and its completions
    have tables of their own, `completions/eval_STEP.parquet`."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        kept = self._logs
        self._logs = copy.deepcopy(kept)
        for values in self._logs.values():
            if values is not None:
                values.clear()
        device = self.accelerator.device
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                return super().evaluate(*args, **kwargs)
        finally:
            self._logs = kept

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        folder = os.path.join(self.args.output_dir, "completions")
        table = os.path.join(folder, f"completions_{self.state.global_step:05d}.parquet")
        if _prefix(logs) is None or not self.log_completions or not self.is_world_process_zero():
            super().log(logs, start_time)
            return
        of_training = f"{table}.training"
        if os.path.exists(table):
            os.replace(table, of_training)
        try:
            super().log(logs, start_time)
            if os.path.exists(table):
                os.replace(table, os.path.join(folder, f"{_prefix(logs)}{self.state.global_step:05d}.parquet"))
        finally:
            if os.path.exists(of_training):
                os.replace(of_training, table)


def _prefix(logs: dict[str, float]) -> str | None:
    """`eval_`, or `eval_NAME_` of one of several data sets; `None` for what is no evaluation, such as the last log."""
    timed = next((key for key in logs if key.startswith("eval_") and key.endswith("_runtime")), None)
    return None if timed is None else timed.removesuffix("runtime")


def _kind(name: str) -> str:
    last = name.rsplit("/", 1)[-1]
    if last.startswith("min_") or last.endswith("_min"):
        return "min"
    return "max" if last.startswith("max_") or last.endswith("_max") else "mean"
