"""
The floor of one PPO iteration: its matrix products at this machine's measured rate, and our time over it, per phase.

    python benchmarks/roofline.py --output_dir runs/roofline --result benchmarks/results/roofline.json

Workload W1 of docs/performance.md. The products are counted (`matmul_work.py`) and each of their shapes is timed, best
of several, on the same threads as the run. `floor` takes every product at the rate of its own shape, `floor at best
rate` all of them at the rate of the fastest shape. The last update is profiled.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare import commit_of_head
from matmul_work import UPDATE, Rates, flops, phases
from ppo_shape import W1, Shape, make_trainer, offline


GOAL = 1.5  # times the floor, of the update
EXTRA = ("rest of the rollout", "optimizer", "rest")  # phases without a product


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--result", type=Path, help="JSON for benchmarks/results.py")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--iterations", type=int, default=5, help="timed ones, after one that is not")
    parser.add_argument("--micro_batch", type=int, default=W1.micro_batch, help="rows of a forward")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: one thread on a busy machine")
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that it works")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error("--clock cpu adds the seconds of all threads up: set --threads 1")
    if not arguments.child:  # the number of threads is read when torch is imported
        os.execve(sys.executable, [sys.executable, __file__, *sys.argv[1:], "--child"], offline(arguments.threads))
    shape = replace(W1, micro_batch=arguments.micro_batch)
    if arguments.tiny:
        shape = replace(W1, layers=2, hidden=64, intermediate=128, vocabulary=512, micro_batch=8, completion=16)
    measured = measure(shape, arguments)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "roofline.json").write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))
    if arguments.result:
        arguments.result.write_text(json.dumps(result(measured, arguments), indent=1) + "\n")
    return 0


def measure(shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates of the products, seconds of the phases, and the profile of one update."""
    import torch
    from phase_timer import IterationTimes

    torch.set_num_threads(arguments.threads)
    work = phases(shape)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    rates = Rates(0.05 if arguments.tiny else 0.3, clock)
    for products in work.values():
        rates.measure(products)
    trainer = make_trainer(shape, arguments.output_dir / "run", arguments.iterations + 2)
    times = IterationTimes(trainer, shape.epochs, profile=True, clock=clock)
    trainer.add_callback(times)
    trainer.train()
    timed = times.iterations[1:-1]  # the first warms up, the last was watched
    rows = {}
    for name in [*work, *EXTRA]:
        seconds = [iteration.get(name, 0.0) for iteration in timed]
        rows[name] = {
            "seconds": statistics.median(seconds),
            "spread": [min(seconds), max(seconds)],
            "gflop": flops(work[name]) / 1e9 if name in work else 0.0,
            "floor": rates.floor(work[name]) if name in work else 0.0,
            "floor_best_rate": flops(work[name]) / rates.best if name in work else 0.0,
        }
    update = [name for name in (*UPDATE, "optimizer", "rest") if name in rows]
    return {
        "threads": arguments.threads,
        "clock": arguments.clock,
        "commit": commit_of_head(),
        "shape": vars(shape),
        "parameters": sum(p.numel() for n, p in trainer.model.named_parameters() if "critic" not in n),
        "rates_gflops": [[p.kind, p.m, p.k, p.n, rate / 1e9] for p, rate in rates.measured.items()],
        "phases": rows,
        "update": total(rows, update, timed),
        "iteration": total(rows, list(rows), timed),
        "profile": profile(times),
    }


def total(rows: dict[str, Any], names: list[str], timed: list[dict[str, float]]) -> dict[str, Any]:
    """Sum over phases: the median of the sums, not the sum of the medians."""
    seconds = [sum(iteration.get(name, 0.0) for name in names) for iteration in timed]
    floors = {key: sum(rows[name][key] for name in names) for key in ("gflop", "floor", "floor_best_rate")}
    return {"seconds": statistics.median(seconds), "spread": [min(seconds), max(seconds)], **floors}


def profile(times: Any, top: int = 15) -> dict[str, Any]:
    """Operators of one update by the time spent in themselves, in shares of its wall time (on one process thread)."""
    events = sorted(times.profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    wall = times.profiled_seconds
    ops = [[event.key, event.self_cpu_time_total / 1e6, event.count] for event in events[:top]]
    return {
        "seconds": wall,
        "outside_operators": wall - sum(event.self_cpu_time_total for event in events) / 1e6,
        "operators": ops,
    }


def table(measured: dict[str, Any]) -> str:
    lines = [f"{'phase':24} {'GFLOP':>8} {'floor':>8} {'at best':>8} {'ours, s':>8} {'over':>6}"]
    whole = {"update": measured["update"], "iteration": measured["iteration"]}
    for name, row in {**measured["phases"], **whole}.items():
        over = f"{row['seconds'] / row['floor']:6.2f}" if row["floor"] else f"{'-':>6}"
        numbers = f"{row['gflop']:8.1f} {row['floor']:8.3f} {row['floor_best_rate']:8.3f} {row['seconds']:8.3f}"
        lines.append(f"{name:24} {numbers} {over}")
    share = measured["profile"]
    lines.append(f"one update under the profiler: {share['seconds']:.3f} s; self time of its operators:")
    lines += [f"{seconds:9.3f} s {n:6d} x  {name}" for name, seconds, n in share["operators"]]
    lines.append(f"{share['outside_operators']:9.3f} s          outside of operators")
    over = measured["update"]["seconds"] / measured["update"]["floor"]
    lines.append(f"update over its floor: {over:.2f}, goal {GOAL}: {'met' if over <= GOAL else 'missed'}")
    return "\n".join(lines)


def result(measured: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """What `benchmarks/results.py` renders."""
    whole = {"update, optimizer included": measured["update"], "iteration": measured["iteration"]}
    rows = []
    for name, row in {**measured["phases"], **whole}.items():
        over = f"{row['seconds'] / row['floor']:.2f}" if row["floor"] else None
        spread = f"{row['seconds']:.3g} [{row['spread'][0]:.3g}, {row['spread'][1]:.3g}]"
        rows.append([name, row["gflop"], row["floor"], row["floor_best_rate"], spread, over])
    rates = [rate for *_, rate in measured["rates_gflops"]]
    operators = ", ".join(
        f"`{n}` {s / measured['profile']['seconds']:.0%}" for n, s, _ in measured["profile"]["operators"][:8]
    )
    return {
        "title": "One PPO iteration on W1 and the floor of its matrix products, seconds",
        "command": "python benchmarks/roofline.py --output_dir runs/roofline"
        f" --threads {measured['threads']} --iterations {arguments.iterations} --micro_batch {arguments.micro_batch}"
        f"{' --clock cpu' if measured['clock'] == 'cpu' else ''}{' --tiny' if arguments.tiny else ''}",
        "commit": measured["commit"],
        "seed": 0,
        "columns": ["phase", "GFLOP", "floor", "floor at best rate", "ours, median [least, most]", "over the floor"],
        "rows": rows,
        "notes": [
            f"{measured['threads']} threads, fp32, micro-batches of {measured['shape']['micro_batch']} rows; products "
            f"ran at {min(rates):.0f} to {max(rates):.0f} GFLOP/s, by shape.",
            f"Self time of one update's operators: {operators}.",
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
