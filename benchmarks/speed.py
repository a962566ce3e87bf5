"""
Time and memory of one PPO iteration: ours against TRL 1.12's, and against our own padded run.

```bash
python benchmarks/speed.py --grid --output_dir runs/speed                     # once: the fastest setting of each side
python benchmarks/speed.py --output_dir runs/speed --pairs 6 --result benchmarks/results/speed.json
python benchmarks/speed.py --output_dir runs/speed --workload W5 --model google/gemma-3-270m
```

One line per workload, `W3 time 5.2x [4.9, 5.6] memory 0.38x`: median over pairs of the peer's seconds over ours, an
interval that holds the median, and our peak over the peer's. The programs alternate, ours first in every other pair;
each is a process of its own. An iteration is rollout, scoring and four epochs of one optimizer step; the first one is
warm-up, and a process gives the median of the rest. A second call with the same folder goes on where the first one
stopped. Memory is the highest resident memory while the models are built
and trained for one iteration, above what the process held after its imports and a tiny run; same method, same
allocator settings on both sides, in processes of their own (see `speed_process.py`).

W1-W3: TRL 1.12, with LoRA on its policy alone, the only place that its `peft_config` reaches; its critic is a whole
model. Letters behind them are variants: `c` a peer whose critic was given adapters by hand, `e` our critic in one of
the four epochs, `s` our critic as a head on the reward adapter. W4: ours without what saves padding.
W5, memory only: sampling the same rollout with the one base; both peaks count from when the base is loaded.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from speed_process import check_same_work, measure, pythons, warn_unless_quiet
from speed_report import grid_result, result, summary
from speed_statistics import line
from speed_workloads import WORKLOADS, chosen, next_points, settings


GRID = Path(__file__).with_name("results") / "speed_grid.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="what each process found, one JSON a workload")
    parser.add_argument("--workload", nargs="+", choices=sorted(WORKLOADS), help="all, but W5 only with --model")
    parser.add_argument("--pairs", type=int, default=6, help="with fewer than 6 the interval covers less than 95%%")
    parser.add_argument(
        "--memory_pairs", type=int, default=1, help="peaks repeat to about 1%%; the table has the least and the most"
    )
    parser.add_argument("--iterations", type=int, default=2, help="measured ones of each process")
    parser.add_argument("--model", help="folder of Gemma 3 270M, for W5")
    parser.add_argument("--environments", type=Path, help="where environments are built; OUTPUT_DIR/environments")
    parser.add_argument("--python", type=Path, help="an interpreter with ours, instead of a new environment")
    parser.add_argument("--peer_python", type=Path, help="an interpreter with TRL 1.12 and PEFT")
    parser.add_argument("--grid", action="store_true", help="look for the fastest setting of each side, and store it")
    parser.add_argument("--grid_file", type=Path, default=GRID)
    parser.add_argument("--result", type=Path, help="JSON for benchmarks/results.py")
    args = parser.parse_args()
    names = args.workload or [name for name in WORKLOADS if name != "W5" or args.model]
    if "W5" in names and not args.model:
        parser.error("W5 needs --model")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    places = pythons(args.environments or args.output_dir.resolve() / "environments", args.python, args.peer_python)
    warn_unless_quiet()
    stored = json.loads(args.grid_file.read_text()) if args.grid_file.exists() else {}
    if args.grid:
        return search(args, names, places, stored)
    found = {name: pair_up(name, args, places, stored.get("best", {})) for name in names}
    if args.result:
        command = f"python benchmarks/speed.py --output_dir runs/speed --pairs {args.pairs}"
        command += f" --iterations {args.iterations}" if args.iterations != 2 else ""
        command += f" --workload {' '.join(args.workload)}" if args.workload else ""
        command += " --model MODEL" if args.model else ""
        args.result.write_text(json.dumps(result(found, command, places), indent=1) + "\n")
    return 0


def pair_up(name: str, args: argparse.Namespace, places: dict[str, Path], grid: dict[str, Any]) -> dict[str, Any]:
    """All processes of one workload; the JSON is written after each pair, the line is printed at the end.

    Raises:
        ValueError: the file of an earlier call has other settings.
    """
    workload, path = WORKLOADS[name], args.output_dir / f"{name}.json"
    found: dict[str, Any] = {kind: {side: [] for side in workload.sides} for kind in ("time", "memory")}
    found["settings"] = {side: settings(name, side, args.iterations, grid, args.model) for side in workload.sides}
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier["settings"] != json.loads(json.dumps(found["settings"])):  # pairs of numbers come back as lists
            raise ValueError(f"{path} has other settings. Move it away, or choose another --output_dir.")
        found = earlier
    pairs = {"memory": args.memory_pairs, "time": args.pairs if workload.timed else 0}
    plan = [(kind, n) for kind in pairs for n in range(pairs[kind]) if n >= len(found[kind][workload.peer])]
    for kind, number in plan:
        iterations = args.iterations if kind == "time" else 0
        order = workload.sides if number % 2 == 0 else workload.sides[::-1]
        for side in order:
            run = settings(name, side, iterations, grid, args.model)
            found[kind][side].append(measure(run, places[side], returning=kind == "memory"))
        ours, theirs = (found[kind][side][-1] for side in workload.sides)
        check_same_work({**found["settings"]["ours"], "iterations": iterations}, ours, theirs, workload.peer)
        found |= summary(found, workload.sides)
        path.write_text(json.dumps(found, indent=1))
    trained = [found["memory"][side][0]["trained"] for side in workload.sides]
    print(f"{line(name, found['time_ratios'], found['memory_ratios'])}   trained {trained[0]:,} and {trained[1]:,}")
    return found


def search(args: argparse.Namespace, names: list[str], places: dict[str, Path], stored: dict[str, Any]) -> int:
    """Short runs over the grid, one workload and side after the other; what is stored of others stays."""
    best, seconds = stored.get("best", {}), stored.get("seconds", {})
    for name in [name for name in names if WORKLOADS[name].timed and WORKLOADS[name].like is None]:
        for side in WORKLOADS[name].sides:
            tried: list[tuple[float, dict[str, Any]]] = []

            def attempt(point: dict[str, Any], name=name, side=side, tried=tried) -> None:
                run = settings(name, side, 1, {name: {side: point}}, args.model)
                tried.append((measure(run, places[side], returning=False)["seconds"][0], point))
                print(f"{name} {side} {point} {tried[-1][0]:.1f} s", flush=True)

            while points := next_points(side, tried):
                for point in points:
                    attempt(point)
            best.setdefault(name, {})[side] = chosen(tried)
            seconds.setdefault(name, {})[side] = [{**point, "seconds": taken} for taken, point in tried]
            args.grid_file.write_text(json.dumps(grid_result(best, seconds), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
