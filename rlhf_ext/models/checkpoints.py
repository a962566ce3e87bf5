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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging


logger = logging.get_logger(__name__)

SEAL = "checkpoint_files.json"
"""When a checkpoint was written, and size and SHA-256 of every file of it; written last."""

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
        json.dump({"written": time.time_ns(), "files": files}, file, indent=1)
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
            A folder; `True` (or `"true"`, as it comes from a command line) for the last one in `output_dir`.

    Raises:
        ValueError: there is none, it is damaged (see [`check_checkpoint`]), or the one with the highest step is not
            the newest, so that two runs have written there.
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
        newest = max(numbers, key=lambda number: _written(Path(output_dir) / f"checkpoint-{number}"))
        if newest != numbers[-1] and _fault(Path(folder)) is None:
            raise ValueError(
                f"resume_from_checkpoint=True, but in {output_dir!r} checkpoint-{numbers[-1]} is older than "
                f"checkpoint-{newest}: two runs have written there. Name the folder to resume from."
            )
    check_checkpoint(folder)
    return folder


class CompleteCheckpointMixin:
    """The part of a trainer that writes checkpoints aside and resumes from whole ones only."""

    _aside = False
    _pushed_later: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self.args.should_save:
            _clear_aside(Path(self.args.output_dir))  # of a run that was killed
        self.accelerator.wait_for_everyone()
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            self._on_resume(checkpoint)
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
        aside = final.parent / ASIDE / final.name
        with self._written_aside(final):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            best = self.state.best_model_checkpoint
            if best is not None and ASIDE in Path(best).parts:
                self.state.best_model_checkpoint = str(final)
                if self.args.should_save:
                    self.state.save_to_json(str(aside / TRAINER_STATE_NAME))
            if self.args.should_save:
                seal_checkpoint(aside)
        if self.args.should_save:
            if final.exists():  # the step was saved before, by a run that was resumed from an earlier one
                os.rename(final, aside.parent / "replaced")
            os.rename(aside, final)
            _flush(final.parent)
            shutil.rmtree(aside.parent)
        self.accelerator.wait_for_everyone()
        if self._pushed_later is not None:
            self._pushed_later = None
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(final.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    @contextmanager
    def _written_aside(self, final: Path) -> Iterator[None]:
        if self.args.should_save:
            _clear_aside(final.parent)
        self._aside = True
        try:
            yield
        except Exception as error:
            # Free the room at once: a full disk is the likeliest reason.
            if self.args.should_save:
                shutil.rmtree(final.parent / ASIDE, ignore_errors=True)
            whole = [n for n in _numbers(final.parent) if _fault(final.parent / f"checkpoint-{n}") is None]
            last = f"the last one, checkpoint-{whole[-1]}, is whole" if whole else "there is none yet"
            remedy = "Mend that, and resume."
            if _is_of_disk(error):
                remedy = f"Free space in {str(final.parent)!r}, or lower `save_total_limit`, and resume."
            raise RuntimeError(
                f"{final} could not be written ({type(error).__name__}: {error}); {last}. {remedy}"
            ) from error
        finally:
            self._aside = False

    # What waits to be logged, so that a resumed run logs what the whole one logs

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        os.makedirs(output_dir, exist_ok=True)
        state = {
            "loss": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "total_tokens": self._total_train_tokens,
        }
        torch.save(state, os.path.join(output_dir, f"log_state_{self.args.process_index}.pt"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Called after the data was skipped, just before the first step.
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        state = load_state(os.path.join(checkpoint, f"log_state_{self.args.process_index}.pt"), self.args.device)
        self._tr_loss, self._total_loss_scalar = state["loss"], state["total_loss"]
        self._globalstep_last_logged = state["last_logged"]
        self._metrics["train"].update(state["metrics"])
        self._total_train_tokens = state["total_tokens"]


def load_state(path: str, device: Any = "cpu") -> dict[str, Any]:
    """Read a file of tensors and plain values that one process wrote into a checkpoint.

    Raises:
        ValueError: it is not there.
    """
    if not os.path.isfile(path):
        raise ValueError(
            f"{path!r} is missing: the checkpoint was written with save_only_model, or by fewer processes. Resume "
            "with as many processes as wrote it."
        )
    # Through the CPU: `torch.load` knows no device "cpu:0", which a CPU of several processes is called.
    state = torch.load(path, map_location="cpu", weights_only=True)
    return send_to_device(state, device)


def weights_digest(model: nn.Module) -> str:
    """A short hash of all weights and buffers of `model`, to tell whether a frozen model is the same one."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _is_of_disk(error: Exception) -> bool:
    """Whether a write failed; torch's own writer says so by a `RuntimeError`."""
    is_torch = any(name in str(error) for name in ("inline_container", "PytorchStreamWriter"))
    return isinstance(error, (OSError, SafetensorError)) or is_torch


def _clear_aside(output_dir: Path) -> None:
    """Remove what a killed run left, after putting in place a checkpoint that lacked nothing but its name."""
    for folder in sorted((output_dir / ASIDE).glob("checkpoint-*")):
        if _fault(folder) is None and not (output_dir / folder.name).exists():
            os.rename(folder, output_dir / folder.name)
    shutil.rmtree(output_dir / ASIDE, ignore_errors=True)


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence; `None` if it is whole."""
    if not folder.is_dir():
        return "is no folder"
    try:
        files = json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
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


def _written(folder: Path) -> int:
    """When a checkpoint was sealed, nanoseconds; 0 where no seal says."""
    try:
        return int(json.loads((folder / SEAL).read_text(encoding="utf-8"))["written"])
    except (OSError, ValueError, KeyError):
        return 0


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
