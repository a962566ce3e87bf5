"""The loop on the toy world: rounds against one round, and asynchronous against synchronous, with equal labels.

    python benchmarks/loop.py --seeds 5 --output_dir runs/loop_arms --result benchmarks/results/loop.json

All arms of a seed have the same SFT policy, prompts and number of PPO episodes of the last policy, and ask for the
same number of labels. The asynchronous arm asks about pairs of its rollouts that differ, and for the rest at its last
rollout, when no reward model reads them any more; the table says how many were labelled.
Runs go on where they stopped; the table is made of the seeds of which every arm is finished.
"""

import argparse
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from compare import commit_of_head
from compare_statistics import interval
from trl import ModelConfig

from rlhf_ext.data.jsonl import read_jsonl
from rlhf_ext.data.loop_arguments import LoopArguments
from rlhf_ext.pipelines.finished_runs import read_run
from rlhf_ext.pipelines.loop import run_loop


ROOT = Path(__file__).resolve().parents[1]
LABELS = 1_000
ARMS: dict[str, dict[str, Any]] = {
    "one round": {"num_rounds": 1, "labels_per_round": LABELS},
    "4 rounds": {"num_rounds": 4, "labels_per_round": LABELS // 4},
    "asynchronous": {
        "num_rounds": 1,
        "labels_per_round": LABELS,
        "asynchronous": True,
        "refit_labels": 100,
        "refit_steps": 50,
    },
}
DIFFERENCES = (("4 rounds", "one round"), ("asynchronous", "one round"))


def settings_of(arm: str, seed: int, folder: Path) -> LoopArguments:
    """The flags of an arm: those of the recipe, with pairs as in the asynchronous form."""
    given = yaml.safe_load((ROOT / "recipes" / "iterate_tiny.yaml").read_text())
    for own in ("dtype", "seed"):  # given to the model, and by the caller
        given.pop(own)
    given = copy.deepcopy({**given, "num_candidates": 2, "max_eval_prompts": 512, **ARMS[arm]})
    # A pair of completions of each prompt in every arm: what differs is when labels come, not how PPO samples.
    given["ppo"]["num_generations"] = 2
    # Half of the recipe's steps: an hour a seed on two cores would not be run by anybody.
    given["ppo"]["max_steps"], given["reward"]["max_steps"] = 64, 200
    # Each reward model has a unit of its own, which more labels stretch; in one unit kl_coef means the same in all
    # arms. Chosen between .1 and .3 by the gold of the one-round arm of seed 0.
    given["normalize_scores"] = "scale"
    given["ppo"]["kl_coef"] = 0.3
    return LoopArguments(**given, seed=seed, output_dir=str(folder))


def run_arm(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """What the last round of an arm came to."""
    target = folder / f"{arm.replace(' ', '_')}-{seed}"
    shared = folder / f"toy-{seed}"
    if shared.exists() and not (target / "toy").exists():  # one SFT policy a seed
        target.mkdir(parents=True, exist_ok=True)
        shutil.copytree(shared, target / "toy")
    args = settings_of(arm, seed, target)
    run_loop(args, ModelConfig(dtype="float32"))
    if not shared.exists():
        shutil.copytree(target / "toy", shared)
    return collect(target, args.num_rounds)


def collect(target: Path, rounds: int) -> dict[str, Any]:
    """Measures of a finished run."""
    last = read_run(target / f"round_{rounds}" / "evaluation")["result"]
    start = read_run(target / "round_0" / "evaluation")["result"]
    policy = read_run(target / f"round_{rounds}" / "policy")["result"]
    labels = sum(read_run(target / f"round_{r}" / "labels")["result"]["comparisons"] for r in range(1, rounds + 1))
    labels += policy["labels"]["comparisons"] if "reward_versions" in policy else 0
    rewards = target / f"round_{rounds}" / "reward"
    if "reward_versions" in policy:
        rewards = target / "round_1" / "policy" / "rewards" / f"{policy['reward_versions']:04d}"
    return {
        "gold": last["score/gold_reward"],
        "gold of SFT": start["score/gold_reward"],
        "win rate": last["win_rate"]["gold_reward"]["win_rate"],
        "KL": last["kl"],
        "labels": labels,
        "accuracy": read_run(rewards)["result"]["accuracy"],
        "reward with gold": correlation(target / f"round_{rounds}" / "evaluation" / "answers.jsonl"),
        "by_round": [
            read_run(target / f"round_{r}" / "evaluation")["result"]["score/gold_reward"] for r in range(1, rounds + 1)
        ],
        "reward_versions": policy.get("reward_versions"),
        "stale_rollouts": policy.get("stale_rollouts"),
    }


def correlation(answers: Path) -> float:
    """Of the last reward model's score and gold, over the answers to the held-out prompts."""
    scores = [row["scores"] for row in read_jsonl(answers)]
    return float(np.corrcoef([row["reward"] for row in scores], [row["gold_reward"] for row in scores])[0, 1])


def table(found: dict[int, dict[str, dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Means over seeds, and paired differences with 95% t-intervals."""
    columns = ["gold", "win rate", "KL", "accuracy", "reward with gold", "labels"]
    rows = []
    for arm in ARMS:
        cells = [f"{sum(run[arm][name] for run in found.values()) / len(found):.3f}" for name in columns]
        rows.append([arm, *cells])
    for better, other in DIFFERENCES:
        cells = []
        for name in columns:
            centre, low, high = interval([run[better][name] - run[other][name] for run in found.values()])
            cells.append(f"{centre:+.3f} [{low:.3f}, {high:.3f}]")
        rows.append([f"{better} - {other}", *cells])
    return ["", *columns], rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this, less one")
    parser.add_argument("--first_seed", type=int, default=0, help="begin here, for two processes side by side")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/loop_arms"))
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in range(args.first_seed, args.seeds):
        found[seed] = {arm: run_arm(arm, seed, args.output_dir) for arm in ARMS}
        columns, rows = table(found)
        sft = sum(next(iter(run.values()))["gold of SFT"] for run in found.values()) / len(found)
        stale = [run["asynchronous"] for run in found.values()]
        result = {
            "title": f"The loop on the toy world, {LABELS:,} simulated labels in all arms",
            "command": f"python benchmarks/loop.py --seeds {args.seeds} --output_dir {args.output_dir}",
            "commit": commit_of_head(),
            "seed": list(found),
            "columns": columns,
            "rows": rows,
            "notes": [
                f"512 held-out prompts; gold of SFT {sft:.3f}. Accuracy: of the last reward model on its held-out "
                "pairs, 37 to 55 a seed; reward with gold: correlation of the two over the last policy's answers. "
                "Means over seeds; differences are paired, with 95% t-intervals over seeds.",
                "Gold after each of the 4 rounds: "
                + ", ".join(
                    f"{sum(run['4 rounds']['by_round'][r] for run in found.values()) / len(found):.3f}"
                    for r in range(4)
                )
                + ".",
                "Asynchronous: reward versions "
                + ", ".join(str(run["reward_versions"]) for run in stale)
                + "; rollouts scored with labels behind "
                + ", ".join(str(run["stale_rollouts"]) for run in stale)
                + " (by seed).",
            ],
        }
        print(json.dumps(result, indent=2), flush=True)
        if args.result is not None:
            args.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
