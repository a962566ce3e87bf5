"""
Time and memory of one PPO iteration as it grows: completion length, episodes, completions per prompt, roles.

    python benchmarks/growth.py --output_dir runs/growth --result benchmarks/results/growth.json

A small model, full fine-tuning. Each point is a process of its own, run `--repeats` times, and what counts is the
median; points that are there are not run again. Along each axis an exponent is fitted (least squares of the logarithms
over all processes, with 95% intervals), and beside it stands the exponent of the counted matrix products on the same
points: nothing may grow faster than its work. Memory is the peak above what the process held after its imports.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare import commit_of_head
from compare_statistics import T95
from matmul_work import flops, phases
from ppo_shape import ROLES, Shape, make_trainer, offline


BASE = Shape(
    layers=4,
    hidden=256,
    intermediate=512,
    vocabulary=2048,
    episodes=16,
    prompt=16,
    completion=64,
    micro_batch=8,
    epochs=2,
)
PROMPTS = 8  # of the axis of completions per prompt
ITERATIONS = 3  # of which the first is not timed
AXES: dict[str, dict[int, Shape]] = {
    "completion length": {n: replace(BASE, completion=n) for n in (32, 64, 128, 256, 512)},
    "episodes": {n: replace(BASE, episodes=n) for n in (8, 16, 32, 64)},
    "completions per prompt": {n: replace(BASE, episodes=PROMPTS * n, num_generations=n) for n in (1, 2, 4, 8)},
    "roles": {n: replace(BASE, roles=n) for n in range(1, len(ROLES) + 1)},
}
TINY = {"completion length": (32, 64), "roles": (1, 4)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--result", type=Path, help="JSON for benchmarks/results.py")
    parser.add_argument("--repeats", type=int, default=3, help="processes per point")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: one thread on a busy machine")
    parser.add_argument("--tiny", action="store_true", help="two axes with two points, to see that it works")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error("--clock cpu adds the seconds of all threads up: set --threads 1")
    if arguments.run:
        print(json.dumps(run(Shape(**json.loads(arguments.run)), arguments)))
        return 0
    axes = {axis: {n: AXES[axis][n] for n in TINY[axis]} for axis in TINY} if arguments.tiny else AXES
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    points: dict[str, Any] = {}
    for repeat in range(arguments.repeats):  # all points once, then all once more: a slow hour meets all of them
        for axis, shapes in axes.items():
            for n, shape in shapes.items():
                found = measure(shape, repeat, arguments)
                points.setdefault(axis, {}).setdefault(n, []).append(found)
                print(f"{axis} {n}: {found['seconds']:.2f} s, {found['peak'] / 2**20:.0f} MiB", flush=True)
    summary = result(points, axes, arguments)
    (arguments.output_dir / "growth.json").write_text(json.dumps(summary, indent=1) + "\n")
    for row in summary["rows"]:
        print(row)
    if arguments.result:
        arguments.result.write_text(json.dumps(summary, indent=1) + "\n")
    return 0


def measure(shape: Shape, repeat: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One process of a point; the point of the base shape is the same on every axis, and so run once."""
    text = json.dumps(vars(shape))
    name = "-".join(str(value) for value in vars(shape).values())
    path = arguments.output_dir / f"{arguments.clock}{arguments.threads}-{name}-{repeat}.json"
    if path.exists():
        return json.loads(path.read_text())
    line = [sys.executable, __file__, "--run", text, "--output_dir", str(arguments.output_dir)]
    line += ["--clock", arguments.clock, "--threads", str(arguments.threads)]
    # Freed blocks go back to the system at once, so that what is measured is what is alive.
    environment = offline(arguments.threads) | {
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "MALLOC_ARENA_MAX": "1",
    }
    process = subprocess.run(line, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}:\n{process.stderr[-4000:]}")
    path.write_text(process.stdout.splitlines()[-1] + "\n")
    return json.loads(path.read_text())


def run(shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the median iteration, and bytes."""
    import time

    import torch
    from memory import release
    from phase_timer import IterationTimes

    from rlhf_ext.models.memory import PeakMemory

    torch.set_num_threads(arguments.threads)
    folder = arguments.output_dir / "run"
    # Much is imported, and many pools are made, on first use: a tiny run brings them in before the count begins.
    tiny = replace(shape, layers=1, hidden=64, intermediate=64, vocabulary=256, completion=8)
    tiny = replace(tiny, episodes=shape.num_generations * 8, epochs=1)
    trainer = make_trainer(tiny, folder, 1)
    trainer.train()
    del trainer
    release()
    meter = PeakMemory()
    baseline = meter.now()
    meter.reset()
    trainer = make_trainer(shape, folder, ITERATIONS)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    times = IterationTimes(trainer, shape.epochs, clock=clock)
    trainer.add_callback(times)
    trainer.train()
    seconds = [sum(iteration.values()) for iteration in times.iterations[1:]]
    return {"seconds": statistics.median(seconds), "peak": meter.peak() - baseline}


def exponent(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Slope of log y on log x by least squares, and the ends of its 95% interval (NaN for fewer than three points)."""
    xs, ys = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    square = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / square
    freedom = len(xs) - 2
    if freedom < 1:
        return slope, math.nan, math.nan
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    half = T95[min(freedom, len(T95)) - 1] * math.sqrt(rest / freedom / square)
    return slope, slope - half, slope + half


def verdict(fit: tuple[float, float, float], of_work: float) -> str:
    """Where the exponent of the work lies: above the whole interval of `fit`, inside of it, or below."""
    if fit[1] > of_work:
        return "FASTER"
    return "slower" if fit[2] < of_work else "within its interval"


def last_step(points: dict[int, list[dict[str, Any]]], work: dict[int, float]) -> str:
    """Growth of the seconds between the last two points over that of the work, which one line for all points may hide:
    the median of the repeats, with the least and the most."""
    before, after = list(work)[-2:]
    pairs = zip(points[before], points[after], strict=True)
    ratios = sorted(b["seconds"] / a["seconds"] * work[before] / work[after] for a, b in pairs)
    return f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"


def result(points: dict[str, Any], axes: dict[str, dict[int, Shape]], arguments: argparse.Namespace) -> dict[str, Any]:
    """What `benchmarks/results.py` renders: per axis medians, exponents, and whether they are those of the work."""
    rows = []
    for axis, shapes in axes.items():
        work = {n: sum(flops(w) for w in phases(shape).values()) for n, shape in shapes.items()}
        of_work = exponent(list(work.items()))[0]
        row = [f"{axis}: {', '.join(str(n) for n in shapes)}", of_work]
        for key, unit in (("seconds", 1.0), ("peak", 2**20)):
            fit = exponent([(n, found[key]) for n, repeats in points[axis].items() for found in repeats])
            medians = [statistics.median(f[key] for f in repeats) / unit for repeats in points[axis].values()]
            row += [", ".join(f"{value:.3g}" for value in medians), f"{fit[0]:.2f} [{fit[1]:.2f}, {fit[2]:.2f}]"]
            row.append(verdict(fit, of_work))
        row.insert(5, last_step(points[axis], work))
        rows.append(row)
    return {
        "title": "Growth of one PPO iteration: exponents of time and memory beside the exponent of the counted work",
        "command": "python benchmarks/growth.py --output_dir runs/growth"
        + (" --clock cpu" if arguments.clock == "cpu" else ""),
        "commit": commit_of_head(),
        "seed": 0,
        "columns": [
            "axis",
            "exponent of the work",
            "seconds",
            "exponent of the time",
            "against the work",
            "last step, time over work",
            "peak, MiB",
            "exponent of the memory",
            "against the work",
        ],
        "rows": rows,
        "notes": [
            f"{BASE.layers} layers, {BASE.hidden} wide, vocabulary {BASE.vocabulary}, {BASE.episodes} episodes of "
            f"{BASE.prompt} + {BASE.completion} tokens in micro-batches of {BASE.micro_batch}, {BASE.epochs} epochs "
            f"of one step, {arguments.threads} thread(s); roles in the order {', '.join(ROLES)}; completions per "
            f"prompt with {PROMPTS} prompts. Medians of {arguments.repeats} processes; 95% intervals over all.",
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
