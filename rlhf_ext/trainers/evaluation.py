"""Evaluation whose numbers do not hang on the batches, say of which data set they are, and leave training alone."""

import os
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..functional.statistics import pooled_statistic


OF_SCORED = ("reward", "rewards/", "rlhf_reward", "advantages/", "returns/", "value/", "probe/")
"""Begin what is over rows that have a score; of all else every row counts, but for `terminated`."""


class EvaluationMetricsMixin:
    """The part of a trainer that logs an evaluation.

    The parent averages batches, of which the last one is smaller, and calls the numbers of every data set alike.
    """

    _eval_prefix: str | None = None
    _eval_rows: list[dict[str, float]] | None = None

    def _count_eval_rows(self, rows: float, scored: float | None = None, ended: float | None = None) -> None:
        """Tell of a batch of an evaluation how many rows it has, have a score, and end by themselves."""
        kinds = {"rows": rows, "scored": rows if scored is None else scored, "ended": rows if ended is None else ended}
        self._eval_rows = [*(self._eval_rows or []), kinds]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        prefix = kwargs.get("metric_key_prefix", args[2] if len(args) > 2 else "eval")
        with self._apart(prefix):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._apart(None):
            return super().predict(*args, **kwargs)

    @contextmanager
    def _apart(self, prefix: str | None) -> Iterator[None]:
        """An evaluation begins with nothing and leaves nothing, however it ends; one of several lies in another."""
        before, self._eval_prefix = self._eval_prefix, prefix
        self._forget()
        try:
            yield
        finally:
            self._eval_prefix = before
            self._forget()

    def _forget(self) -> None:
        self._metrics["eval"].clear()
        self._eval_rows = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._eval_prefix is not None:
            self._pool_batches()
            # The parent writes `eval_` in front.
            self._rename(self._eval_prefix[5:] if self._eval_prefix.startswith("eval_") else "")
        super().log(logs, start_time)

    def _pool_batches(self) -> None:
        batches = self._eval_rows or []
        for name, values in self._metrics["eval"].items():
            if len(values) == len(batches) > 0:
                numbers = torch.tensor(values, dtype=torch.float64)
                weights = torch.tensor([batch[_rows_of(name)] for batch in batches], dtype=torch.float64)
                known = ~numbers.isnan()
                if known.any():
                    pooled = pooled_statistic(numbers[known], weights[known], kind=_kind(name))
                    self._metrics["eval"][name] = [pooled.item()]

    def _rename(self, data_set: str) -> None:
        if data_set:
            metrics = self._metrics["eval"]
            renamed = {f"{data_set}_{name}": values for name, values in metrics.items()}
            metrics.clear()
            metrics.update(renamed)


class EvaluationMixin(EvaluationMetricsMixin):
    """The part of [`PPOTrainer`] that evaluates: its samples move no random number of training, and its completions
    have tables of their own, `completions/eval_STEP.parquet`."""

    @contextmanager
    def _apart(self, prefix: str | None) -> Iterator[None]:
        kept, self._logs = self._logs, {name: _empty(values) for name, values in self._logs.items()}
        device = self.accelerator.device
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), super()._apart(prefix):
                yield
        finally:
            self._logs = kept

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._eval_prefix is None or not self.log_completions or not self.is_world_process_zero():
            super().log(logs, start_time)
            return
        folder, step = os.path.join(self.args.output_dir, "completions"), f"{self.state.global_step:05d}.parquet"
        table = os.path.join(folder, f"completions_{step}")
        of_training = f"{table}.training"
        if os.path.exists(table):
            os.replace(table, of_training)
        try:
            super().log(logs, start_time)
            if os.path.exists(table):
                name = self._eval_prefix.replace("/", "-").replace(os.sep, "-")
                os.replace(table, os.path.join(folder, f"{name}_{step}"))
        finally:
            if os.path.exists(of_training):
                os.replace(of_training, table)


def _empty(values: Any) -> Any:
    if isinstance(values, defaultdict):
        return defaultdict(values.default_factory)
    return None if values is None else deque(maxlen=values.maxlen)


def _rows_of(name: str) -> str:
    if "terminated" in name:
        return "ended"
    return "scored" if name.startswith(OF_SCORED) else "rows"


def _kind(name: str) -> str:
    last = name.rsplit("/", 1)[-1]
    if last.startswith("min_") or last.endswith("_min"):
        return "min"
    return "max" if last.startswith("max_") or last.endswith("_max") else "mean"
