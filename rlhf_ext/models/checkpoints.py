"""Checkpoints that are complete or absent, and that say when they were damaged.

`Trainer` writes a checkpoint file by file under its final name: a run that is killed meanwhile leaves a folder that
looks like a checkpoint and is none, and resuming `True` picks it. Here it is written aside, sealed by a list of its
files, and renamed in one step.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging


logger = logging.get_logger(__name__)

SEAL = "checkpoint_files.json"
"""Size and SHA-256 of every file of a checkpoint, written last."""

# The leading underscore keeps it out of pushes to the Hub, whose ignore patterns name it.
ASIDE = "_unfinished_checkpoint"


def seal_checkpoint(folder: str | os.PathLike) -> None:
    """Write [`SEAL`] over all files of `folder` and make them durable."""
    folder = Path(folder)
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        _flush(path)
    with open(folder / SEAL, "w", encoding="utf-8") as file:
        json.dump(files, file, indent=1)
    _flush(folder / SEAL)
    _flush(folder)


def check_checkpoint(folder: str | os.PathLike) -> None:
    """Refuse a checkpoint that is not what was sealed.

    Raises:
        ValueError: it is no folder, was not sealed, or a file is missing or changed; names the folder and the files,
            and the newest older checkpoint that is whole, which is used only when asked for.
    """
    fault = _fault(Path(folder))
    if fault is None:
        return
    number = _number(Path(folder).name)
    older = [n for n in _numbers(Path(folder).parent) if number is None or n < number]
    whole = next((n for n in reversed(older) if _fault(Path(folder).parent / f"checkpoint-{n}") is None), None)
    remedy = "No older checkpoint beside it is whole: start anew."
    if whole is not None:
        path = str(Path(folder).parent / f"checkpoint-{whole}")
        remedy = f"To go on from an older one, ask for it: resume_from_checkpoint={path!r}."
    raise ValueError(f"resume_from_checkpoint={str(folder)!r} {fault}. {remedy}")


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """The checkpoint that a run resumes from, checked; `None` for a new run.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*):
            A folder; `True` (or `"true"`, as it comes from a command line) for the newest in `output_dir`.

    Raises:
        ValueError: there is none, or it is damaged (see [`check_checkpoint`]).
    """
    if not resume_from_checkpoint or str(resume_from_checkpoint).lower() == "false":
        return None
    folder = str(resume_from_checkpoint)
    if folder.lower() == "true":
        numbers = _numbers(Path(output_dir))
        if not numbers:
            raise ValueError(
                f"resume_from_checkpoint=True, but {output_dir!r} holds no checkpoint. Leave it out to start anew."
            )
        folder = os.path.join(output_dir, f"checkpoint-{numbers[-1]}")
    check_checkpoint(folder)
    return folder


class CompleteCheckpointMixin:
    """The part of a trainer that writes checkpoints aside and resumes from whole ones only."""

    _aside = False
    _pushed_later: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            self._on_resume(checkpoint)
        if self.args.should_save:
            shutil.rmtree(os.path.join(self.args.output_dir, ASIDE), ignore_errors=True)  # of a run that was killed
        return super().train(checkpoint, *args, **kwargs)

    def _on_resume(self, checkpoint: str) -> None:
        """Called with a whole checkpoint, before anything of it is read."""

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, ASIDE) if self._aside else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside:  # the upload runs in the background, and would lose the folder to the rename
            self._pushed_later = checkpoint_folder
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        final = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with self._written_aside(final):
            super()._save_checkpoint(model, trial)
        aside = final.parent / ASIDE / final.name
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal_checkpoint(aside)
            if final.exists():  # the step was saved before, by a run that was resumed from an earlier one
                shutil.rmtree(final)
            os.rename(aside, final)
            _flush(final.parent)
            shutil.rmtree(aside.parent)
        self.accelerator.wait_for_everyone()
        if self._pushed_later is not None:
            self._pushed_later = None
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            best = self.state.best_global_step
            rotate_checkpoints(
                output_dir=str(final.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=str(final.parent / f"checkpoint-{best}") if best else None,
                use_mtime=True,
            )

    @contextmanager
    def _written_aside(self, final: Path) -> Iterator[None]:
        if self.args.should_save:
            shutil.rmtree(final.parent / ASIDE, ignore_errors=True)
        self._aside = True
        try:
            yield
        except Exception as error:
            # Free the room at once: a full disk is the likeliest reason.
            if self.args.should_save:
                shutil.rmtree(final.parent / ASIDE, ignore_errors=True)
            numbers = _numbers(final.parent)
            last = f"the last one, checkpoint-{numbers[-1]}, is whole" if numbers else "there is none yet"
            raise RuntimeError(
                f"{final} could not be written ({type(error).__name__}: {error}); {last}. Free space in "
                f"{str(final.parent)!r}, or lower `save_total_limit`, and resume."
            ) from error
        finally:
            self._aside = False


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence; `None` if it is whole."""
    if not folder.is_dir():
        return "is no folder"
    try:
        files = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"has no readable {SEAL}: it was not finished, or not written by this package"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"is damaged: {name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"is damaged: {name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _digest(path) != expected["sha256"]:
            return f"is damaged: the content of {name} has changed"
    return None


def _numbers(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, ascending."""
    if not folder.is_dir():
        return []
    return sorted(n for n in (_number(path.name) for path in folder.iterdir() if path.is_dir()) if n is not None)


def _number(name: str) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    return int(match.group(1)) if match else None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """A rename survives a loss of power only if what it names was written before."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
