"""What `speed.py` writes: ratios by pair, and the two JSON files that `results.py` renders."""

import statistics
from pathlib import Path
from typing import Any

from speed_process import commit_of_head, machine, versions
from speed_statistics import median_interval, spread
from speed_workloads import GRID_NOTE, WORKLOADS


MIB = 2**20
KEPT = ("time_ratios", "cpu_ratios", "memory_ratios", "seconds", "cpu_seconds", "peak_bytes", "phases")


def summary(found: dict[str, Any], sides: tuple[str, str]) -> dict[str, Any]:
    """Ratios by pair, and medians with their spread. Times: the peer's over ours; memory: ours over the peer's."""
    ours, theirs = sides
    seconds, cpu = (
        {side: [statistics.median(run[key]) for run in found["time"][side]] for side in sides}
        for key in ("seconds", "cpu_seconds")
    )
    peaks = {side: [run["peak"] for run in found["memory"][side]] for side in sides}
    phases = {
        side: {
            phase: statistics.median(v for run in found["time"][side] for v in run["phases"][phase])
            for phase in ("rollout", "scoring", "update")
        }
        for side in sides
        if found["time"][side]
    }
    return {
        "time_ratios": [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=False)],
        "cpu_ratios": [b / a for a, b in zip(cpu[ours], cpu[theirs], strict=False)],
        "memory_ratios": [a / b for a, b in zip(peaks[ours], peaks[theirs], strict=False)],
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "cpu_seconds": {side: spread(values) for side, values in cpu.items()},
        "peak_bytes": {side: spread(values) for side, values in peaks.items()},
        "phases": phases,
    }


def result(found: dict[str, Any], command: str, places: dict[str, Path]) -> dict[str, Any]:
    """One row per workload, with settings, versions and machine beside."""
    rows = [_row(name, numbers) for name, numbers in found.items()]
    pairs = max((len(numbers["time_ratios"]) for numbers in found.values()), default=0)
    peaks = sorted({len(numbers["memory_ratios"]) for numbers in found.values()})
    of_peaks = " to ".join(str(count) for count in dict.fromkeys((peaks[0], peaks[-1])))
    covered = f"The interval covers the median with {median_interval([0.0] * pairs)[3]:.1%}. " if pairs else ""
    nf4 = ", W5 NF4 and bfloat16" if "W5" in found else ""
    columns = ["workload", "peer", "ours, s", "peer, s", "peer / ours", "goal", "reached"]
    columns += ["ours, MiB", "peer, MiB", "ours / peer", "goal of memory", "memory reached"]
    shown = [n for n in range(len(columns)) if any(row[n] is not None for row in rows)]  # variants have no goals
    variants = ", variants" if all(WORKLOADS[name].like for name in found) else ""
    return {
        "title": f"One PPO iteration: time and memory{variants}",
        "command": command,
        "commit": ", ".join(sorted({run["commit"] for numbers in found.values() for run in _runs(numbers)})),
        "seed": 0,
        "columns": [columns[n] for n in shown],
        "rows": [[row[n] for n in shown] for row in rows],
        "notes": [
            f"Seconds: medians of {pairs} pairs of processes; peaks: of {of_peaks}, with the least and the most. "
            f"{covered}{machine()['cpu']}, fp32{nf4}."
        ],
        "settings": {name: numbers["settings"] for name, numbers in found.items()},
        "measured": {name: {key: numbers[key] for key in KEPT} for name, numbers in found.items()},
        "versions": {side: versions(places[side]) for side in ("ours", "trl112")},
        "machine": machine(),
    }


def _runs(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for kind in ("time", "memory") for side in numbers[kind].values() for run in side]


def _row(name: str, numbers: dict[str, Any]) -> list[Any]:
    workload, (ours, theirs) = WORKLOADS[name], WORKLOADS[name].sides
    row: list[Any] = [f"{name}, {workload.what}", theirs]
    if numbers["time_ratios"]:
        middle, low, high, _ = median_interval(numbers["time_ratios"])
        row += [round(numbers["seconds"][side]["median"], 2) for side in (ours, theirs)]
        row += [f"{middle:.2f}x [{low:.2f}, {high:.2f}]", workload.time_goal, _reached(middle, workload.time_goal)]
    else:
        row += [None] * 5
    ratios, goal = sorted(numbers["memory_ratios"]), workload.memory_goal
    ratio = statistics.median(ratios)
    row += [round(numbers["peak_bytes"][side]["median"] / MIB) for side in (ours, theirs)]
    spread = f" [{ratios[0]:.3f}, {ratios[-1]:.3f}]" if len(ratios) > 1 else ""
    return [*row, f"{ratio:.3f}{spread}", goal, _reached(-ratio, goal and -goal)]


def _reached(value: float, goal: float | None) -> bool | None:
    return None if goal is None else value >= goal


def grid_result(best: dict[str, Any], seconds: dict[str, Any]) -> dict[str, Any]:
    """The fastest point of each side, which later runs read under `best`, and all that was tried."""
    rows = []
    for name, sides in sorted(seconds.items()):
        for side, tried in sides.items():
            point = [best[name][side][key] for key in ("threads", "micro_batch", "rollout_batch")]
            taken = [row["seconds"] for row in tried]
            of_point = next(row["seconds"] for row in tried if best[name][side].items() <= row.items())
            rows.append([name, side, *point, *(round(s, 2) for s in (of_point, min(taken), max(taken))), len(tried)])
    return {
        "title": "The fastest setting of each side",
        "command": "python benchmarks/speed.py --grid --output_dir runs/speed",
        "commit": commit_of_head(),
        "seed": 0,
        "columns": [
            "",
            "side",
            "threads",
            "micro-batch",
            "rollout batch",
            "s",
            "fastest, s",
            "slowest, s",
            "settings tried",
        ],
        "rows": rows,
        "notes": ["One iteration after one of warm-up, fp32. " + " ".join(GRID_NOTE.split())],
        "best": best,
        "seconds": seconds,
    }
