"""Runs of a loop that are done once: a folder is whole or absent, and a whole one is not trained again."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers import TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)

RUN_FILE = "run.json"
"""What a run was asked for (`settings`) and what came out of it; written beside the model."""

# Where a run writes, what it logs and how often: none of it changes the model.
_WITHOUT_EFFECT = ("output_dir", "run_name", "disable_tqdm", "resume_from_checkpoint", "local_rank", "project")
_WITHOUT_EFFECT_STARTS = ("log", "report", "save", "hub", "push", "trackio", "include_", "dataloader_num", "eval_")


@contextmanager
def alone_in(folder: str | Path, seconds: float = 5.0) -> Iterator[None]:
    """
    Work in a folder as the only process; the lock goes with the process, however it ends.

    Args:
        seconds (`float`, *optional*, defaults to 5): what is left of a killed process may live so long.

    Raises:
        ValueError: another one is at work there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=seconds)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another process is at work in {str(folder)!r}. Wait for it or end it, or choose another `output_dir`."
        ) from error
    try:
        yield
    finally:
        lock.release()


def run_once(folder: Path, settings: dict[str, Any], train: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """
    The record of a run, which is trained unless `folder` holds it already.

    Args:
        folder (`Path`):
            Where the run stands when it is done. Until then it is written aside, under `_unfinished_NAME`, where a
            run that was killed finds its checkpoints again.
        settings (`dict`):
            All that decides the result; as plain values.
        train (`Callable[[Path], dict]`):
            Trains into the folder it is given, and returns what to record. Called by every process.

    Returns:
        `dict`: what `train` returned, then or now.

    Raises:
        ValueError: `folder` holds a run with other settings.
    """
    state, settings = PartialState(), json.loads(json.dumps(settings, default=str))
    if folder.exists():
        saved = read_run(folder)
        if odd := _differences(saved["settings"], settings):
            raise ValueError(
                f"{str(folder)!r} holds a finished run with other settings: {odd}. Choose another `output_dir`, or "
                "remove the folder to train it again."
            )
        logger.warning(f"{str(folder)!r} is finished and is not done again.")
        return saved["result"]
    aside = folder.with_name(f"_unfinished_{folder.name}")
    if state.is_main_process:
        if (aside / RUN_FILE).exists() and _differences(read_run(aside)["settings"], settings):
            shutil.rmtree(aside)
        aside.mkdir(parents=True, exist_ok=True)
        _write(aside, {"settings": settings})
    state.wait_for_everyone()
    start = time.perf_counter()
    result = json.loads(json.dumps(train(aside)))
    state.wait_for_everyone()
    if state.is_main_process:
        for checkpoint in aside.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        _write(aside, {"settings": settings, "result": result, "seconds": round(time.perf_counter() - start, 1)})
        os.rename(aside, folder)
    state.wait_for_everyone()
    return result


def read_run(folder: Path) -> dict[str, Any]:
    """`settings` and, if it is finished, `result` and `seconds` (of its last start) of a run.

    Raises:
        ValueError: the folder holds no run.
    """
    if not (folder / RUN_FILE).exists():
        raise ValueError(f"{str(folder)!r} has no {RUN_FILE}: it was not written by this loop. Remove or rename it.")
    return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))


def has_checkpoint(folder: Path) -> bool:
    """Whether a run that was killed left a checkpoint to go on from."""
    return any(folder.glob("checkpoint-*"))


def arguments_that_matter(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that decide a result, as plain values."""
    # When evaluation chooses the weights, when it happens decides too.
    chosen = args.load_best_model_at_end
    idle = tuple(start for start in _WITHOUT_EFFECT_STARTS if not start.startswith(("eval", "save")) or not chosen)
    return {
        name: value
        for name, value in args.to_dict().items()
        if name not in _WITHOUT_EFFECT and not name.startswith(idle)
    }


def digest_of(rows: Iterable[Any] | None) -> str | None:
    """A short hash of rows, in their order; `None` for none."""
    if rows is None:
        return None
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Of every setting that differs, what was and what is wanted."""
    odd = {}
    for name in sorted({*saved, *wanted}):
        one, other = saved.get(name), wanted.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            odd |= _differences(one, other)
        elif one != other:
            odd[name] = f"{one} before, {other} now"
    return odd


def _write(folder: Path, record: dict[str, Any]) -> None:
    # Whole or not at all: who goes on after a kill reads it first.
    aside = folder / f".{RUN_FILE}"
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(folder / RUN_FILE)
