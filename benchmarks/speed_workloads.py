"""The workloads of `speed.py`, and every setting of both sides, in one place.

A field of `PPOConfig` that makes a workload faster belongs into `ours` of its workload, or into `OURS` for all.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any


OURS: dict[str, Any] = {}
"""Fields of `PPOConfig` for every run of ours but the padded one of W4 and W5's peer."""

PADDED: dict[str, Any] = {"skip_padding": False}
"""Our own padded run, the peer of W4."""

GRID = {"threads": (1, 2), "micro_batch": (4, 8, 16, 32)}
GRID_NOTE = """Both sides, one after the other: threads 1 and 2 with micro-batches of 16 rows, the faster one with 8
and 32, with 4 where 8 is the fastest, and the fastest of these with TRL 1.12's `local_rollout_forward_batch_size` of 8
and 16 instead of 32. Ours has no such field: it generates the rollout at once and scores in micro-batches. One run a
point. Points within 5% of the fastest count as equal, and of these the one with the smallest micro-batch is taken.
float32 throughout. Variants take the points of their workload."""


@dataclass(frozen=True)
class Workload:
    """`run` holds fields of `speed_world.Run` for both sides, `peer_run` for the peer, `ours` fields of `PPOConfig`.

    Only memory is measured where it is not `timed`.
    """

    what: str
    peer: str
    time_goal: float | None
    memory_goal: float | None
    run: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    peer_run: dict[str, Any] = field(default_factory=dict)
    point: dict[str, Any] = field(default_factory=dict)
    """Of the grid, where none was stored."""

    timed: bool = True
    like: str | None = None
    """Workload whose points of the grid are taken."""

    @property
    def sides(self) -> tuple[str, str]:
        return "ours", self.peer


RAGGED = {"adapted_layers": 8, "prompt": (4, 64), "completion": (8, 64)}
GEMMA = {"adapted_layers": 6, "nf4": True, "dtype": "bfloat16"}
FEW_ROWS = {"micro_batch": 4}

AGAINST_TRL = {
    "W1": Workload("full fine-tuning", "trl112", 1.2, 0.8),
    "W2": Workload("LoRA r=16 on all 8 layers", "trl112", 2.0, 0.5, {"adapted_layers": 8}),
    "W3": Workload("LoRA r=16 on the top 2 of 8 layers", "trl112", 5.0, 0.4, {"adapted_layers": 2}),
}


def variant(name: str, what: str, **changes: Any) -> Workload:
    """The same work done in another way, without a goal. For W2c and W3c a model with adapters is passed as TRL 1.12's
    critic, and trains; no argument of it says so."""
    base = AGAINST_TRL[name]
    return replace(base, what=f"as {name}, {what}", time_goal=None, memory_goal=None, like=name, **changes)


WORKLOADS = {
    **AGAINST_TRL,
    "W4": Workload(
        "as W2, prompts 4-64, completions 8-64 tokens", "padded", 2.0, None, RAGGED, peer_run={"options": PADDED}
    ),
    "W5": Workload(
        "Gemma 3 270M, NF4, LoRA on the top 6 layers", "generation", None, 1.3, GEMMA, point=FEW_ROWS, timed=False
    ),
    "W2c": variant("W2", "the peer's critic with LoRA too", peer_run={"critic_lora": True}),
    "W3c": variant("W3", "the peer's critic with LoRA too", peer_run={"critic_lora": True}),
    "W1e": variant("W1", "our critic in the first of four epochs", ours={"critic_epochs": 1}),
    "W3e": variant("W3", "our critic in the first of four epochs", ours={"critic_epochs": 1}),
    "W3s": variant("W3", "our critic a head on the reward adapter", ours={"critic": "shared"}),
}


def settings(
    name: str, side: str, iterations: int, grid: dict[str, Any], model: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """The JSON of one process.

    Args:
        grid (`dict`):
            `{workload: {side: point}}` as `--grid` stored it; a point holds `threads`, `micro_batch`, `rollout_batch`.
    """
    workload = WORKLOADS[name]
    own = {"options": {**OURS, **workload.ours}} if side == "ours" else workload.peer_run
    points = grid.get(workload.like or name, {})
    point = points.get(side, {"threads": 1, "micro_batch": 16, "rollout_batch": 32, **workload.point})
    fixed = {"workload": name, "side": side, "seed": seed, "iterations": iterations}
    return {**fixed, **workload.run, **own, **point, **({"model": model} if workload.run.get("nf4") else {})}


def next_points(side: str, tried: list[tuple[float, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What to try after the pairs `(seconds, point)`; nothing at the end."""
    seen = [point for _, point in tried]
    points = [{"threads": threads, "micro_batch": 16, "rollout_batch": 32} for threads in GRID["threads"]]
    if not tried:
        return points
    best = min(tried, key=lambda pair: pair[0])[1]
    if best["rollout_batch"] != 32:
        return []
    points = [{**best, "micro_batch": rows} for rows in GRID["micro_batch"][1:]]
    if best["micro_batch"] <= 8:
        points.append({**best, "micro_batch": GRID["micro_batch"][0]})
    if all(point in seen for point in points) and side == "trl112":
        points = [{**best, "rollout_batch": rows} for rows in (8, 16)]
    return [point for point in points if point not in seen]


def chosen(tried: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """Of `(seconds, point)` the fastest point, or one that is as good as that and needs less memory."""
    fastest = min(seconds for seconds, _ in tried)
    equal = [(point["micro_batch"], seconds, point) for seconds, point in tried if seconds <= 1.05 * fastest]
    return min(equal, key=lambda found: found[:2])[2]


def described() -> dict[str, Any]:
    return {name: asdict(workload) for name, workload in WORKLOADS.items()}
