"""The quickstart's goals on every seed: `make slow-learning` runs the seeds, then this summary.

    python benchmarks/quickstart_seeds.py --runs runs --seeds 0 1 2 --result benchmarks/results/quickstart.json

Reads `quickstart-SEED/metrics.json`, writes one row per seed, and exits with 1 if a goal is missed on any of them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


PARTS = ("helpful", "honest", "harmless")
COLUMNS = ["seed", "gold", "best", "gap closed", "gain, 95% interval", "win rate", *PARTS, "grammatical", "KL"]
COLUMNS += ["reward accuracy", "seconds"]


def missed(metrics: dict) -> list[str]:
    """The goals a run does not meet."""
    sft, ppo = metrics["sft"], metrics["ppo"]
    goals = {
        "gap closed at least 0.70": metrics["gap_closed"] >= 0.70,
        "interval of the gain above 0": metrics["gain_interval"][0] > 0,
        "win rate at least 0.75": metrics["win_rate"] >= 0.75,
        "grammatical at least 0.90": ppo["grammatical"] >= 0.90,
        **{f"{name} at most 0.02 below SFT": ppo[name] >= sft[name] - 0.02 for name in PARTS},
    }
    return [name for name, met in goals.items() if not met]


def row(metrics: dict) -> list:
    sft, ppo = metrics["sft"], metrics["ppo"]
    low, high = metrics["gain_interval"]
    change = [f"{sft[name]:.3f} -> {ppo[name]:.3f}" for name in ("gold_reward", *PARTS, "grammatical")]
    return [
        metrics["seed"],
        change[0],
        metrics["gold_reward_max"],
        f"{metrics['gap_closed']:.0%}",
        f"{metrics['gain']:.3f} [{low:.3f}, {high:.3f}]",
        f"{metrics['win_rate']:.3f}",
        *change[1:],
        f"{ppo['kl']:.2f}",
        f"{metrics['reward_accuracy']:.3f}",
        round(metrics["seconds"]),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--result", type=Path)
    parser.add_argument("--machine", default="", help="what the seconds were measured on")
    args = parser.parse_args()
    runs = [json.loads((args.runs / f"quickstart-{seed}" / "metrics.json").read_text()) for seed in args.seeds]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    misses = {metrics["seed"]: missed(metrics) for metrics in runs}
    verdict = [f"Seed {seed} misses: {', '.join(goals)}." for seed, goals in misses.items() if goals]
    result = {
        "title": "Quickstart on the toy world, 512 held-out prompts, SFT -> PPO",
        "command": "make slow-learning",
        "commit": commit,
        "seed": args.seeds,
        "columns": COLUMNS,
        "rows": [row(metrics) for metrics in runs],
        "notes": [
            "Goals: 70% of the gap closed, interval above 0, win rate 0.75 (ties half), grammatical 0.90, no part of "
            f"gold more than 0.02 below SFT. {' '.join(verdict) or 'All met on every seed.'}",
            *([f"Seconds: {args.machine}."] if args.machine else []),
        ],
    }
    print(json.dumps(result, indent=2))
    if args.result is not None:
        args.result.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(misses.values()))


if __name__ == "__main__":
    sys.exit(main())
