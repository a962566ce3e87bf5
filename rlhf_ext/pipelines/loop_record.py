"""What a run of the loop left on disk, read as JSON alone: no model and no torch, so that a page takes a second."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.jsonl import parse_json, read_jsonl


STEPS = ("samples", "selection", "labels", "reward", "policy", "evaluation")


@dataclass
class StepRecord:
    """
    A step of a round.

    Attributes:
        folder (`Path`): where it stands when it is finished.
        state (`str`): `finished`, `started` (its unfinished folder is there) or `missing`.
        result (`dict`): what it recorded; empty unless finished.
        seconds (`float`, *optional*): how long it took, where it is finished and the manifest says so.
    """

    folder: Path
    state: str = "missing"
    result: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a file of the step; none where it is not finished or has no such file."""
        path = self.folder / name
        return read_jsonl(path) if self.state == "finished" and path.exists() else []


@dataclass
class LoopRecord:
    """
    A run.

    Attributes:
        folder (`Path`): of the run.
        settings (`dict`): what was asked for.
        rounds (`dict[int, dict[str, StepRecord]]`): by round, then by step; round 0 is the SFT policy.
    """

    folder: Path
    settings: dict[str, Any]
    rounds: dict[int, dict[str, StepRecord]]

    def results(self, step: str) -> dict[int, dict[str, Any]]:
        """What a step recorded, by round, of the rounds that finished it."""
        found = {number: steps[step] for number, steps in self.rounds.items() if step in steps}
        return {number: step.result for number, step in found.items() if step.state == "finished"}

    def open_steps(self) -> list[tuple[int, str]]:
        """Steps that are not finished: first those that were started, then in the order in which they come."""
        ordered = [(number, step) for number in sorted(self.rounds) if number for step in STEPS]
        # The SFT policy is measured first when the first policy is.
        ordered.insert(ordered.index((1, "evaluation")) if (1, "evaluation") in ordered else 0, (0, "evaluation"))
        missing = [(number, step) for number, step in ordered if self.rounds[number][step].state != "finished"]
        return sorted(missing, key=lambda place: self.rounds[place[0]][place[1]].state != "started")


def read_loop(folder: str | Path) -> LoopRecord:
    """
    Read a run, finished or not.

    Raises:
        ValueError: `folder` is no run of the loop, or a file of it is damaged; the message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder. Give the `output_dir` of a run of the loop.")
    if not (folder / "settings.json").is_file():
        raise ValueError(
            f"{str(folder)!r} has no settings.json: it is no run of the loop. Give the `output_dir` of one."
        )
    settings = _read_dict(folder / "settings.json")
    manifest = _read_dict(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    seconds = {}
    for entry in manifest.get("steps", []):
        if not isinstance(entry, dict) or not {"round", "step"} <= set(entry):
            raise ValueError(
                f"{str(folder / 'manifest.json')!r}: an entry of `steps` names no round and step: {entry}"
            )
        seconds[entry["round"], entry["step"]] = entry.get("seconds")
    asked = (settings.get("loop") or settings).get("num_rounds")
    numbers = set(range(1, asked + 1)) if isinstance(asked, int) else set()
    for path in folder.glob("round_*"):
        # Its folder may be empty: a round of which nothing is finished yet.
        if path.is_dir() and path.name.removeprefix("round_").isdecimal():
            numbers.add(int(path.name.removeprefix("round_")))
    rounds = {}
    for number in sorted({0, *numbers}):
        names = STEPS if number else ("evaluation",)
        rounds[number] = {name: _read_step(folder, number, name, seconds.get((number, name))) for name in names}
    return LoopRecord(folder, settings, rounds)


def is_number(value: Any) -> bool:
    """Whether a value can be plotted; `null`, NaN and infinity cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_step(folder: Path, number: int, name: str, seconds: Any) -> StepRecord:
    step = StepRecord(folder / f"round_{number}" / name)
    if (step.folder / "run.json").exists():
        step.state, step.result = "finished", _read_dict(step.folder / "run.json").get("result") or {}
        step.seconds = seconds if is_number(seconds) else None
    elif step.folder.with_name(f"_unfinished_{name}").exists():
        step.state = "started"
    return step


def _read_dict(path: Path) -> dict[str, Any]:
    return parse_json(path.read_bytes(), repr(str(path)))
