"""
How far the quickstart's PPO stage differs by its own seed, from one SFT and reward model.

    python benchmarks/quickstart_spread.py --runs runs --seeds 2 --result benchmarks/results/quickstart_spread.json

Reads `RUNS/quickstart-SEED/sft` and `reward`, which `make slow-learning` leaves, and trains PPO on them again with
each setting `RATE:UPDATES` and each seed of PPO; its models are not kept. What `RUNS/spread.json` has already is not
run again.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from compare import commit_of_head
from transformers import AutoModelForCausalLM

from rlhf_ext.pipelines.quickstart import quick, train_ppo
from rlhf_ext.pipelines.quickstart_evaluation import evaluate, gain_over
from rlhf_ext.toyworld.corpus import prompt_rows
from rlhf_ext.toyworld.tiny import build_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="of the SFT and reward models")
    parser.add_argument("--ppo_seeds", type=int, nargs="+", default=[2, 102, 202])
    parser.add_argument("--settings", nargs="+", default=["4e-4:32", "3e-4:40"], help="RATE:UPDATES")
    parser.add_argument("--result", type=Path, help="JSON for benchmarks/results.py")
    args = parser.parse_args()
    stored = args.runs / "spread.json"
    found = json.loads(stored.read_text()) if stored.exists() else {}
    for ppo_seed in args.ppo_seeds:
        for seed in args.seeds:
            for setting in args.settings:
                key = f"{seed} {setting} {ppo_seed}"
                if key not in found:
                    found[key] = run(args.runs / f"quickstart-{seed}", seed, setting, ppo_seed)
                    stored.write_text(json.dumps(found, indent=1))
                    print(key, found[key], flush=True)
    rows = []
    for seed in args.seeds:
        for setting in args.settings:
            runs = [found[f"{seed} {setting} {ppo_seed}"] for ppo_seed in args.ppo_seeds]
            gaps, wins, kls = ([one[name] for one in runs] for name in ("gap_closed", "win_rate", "kl"))
            rate, updates = setting.split(":")
            shown = [
                ", ".join(format(value, form) for value in values)
                for values, form in ((gaps, ".0%"), (wins, ".3f"), (kls, ".2f"))
            ]
            rows.append([seed, rate, int(updates), *shown])
    result = {
        "title": "The quickstart's PPO stage by its own seeds, from one SFT and reward model",
        "command": f"python benchmarks/quickstart_spread.py --runs runs --seeds {' '.join(map(str, args.seeds))}",
        "commit": commit_of_head(),
        "seed": args.ppo_seeds,
        "columns": ["seed of the models", "learning rate", "updates", "gap closed", "win rate", "KL"],
        "rows": rows,
        "notes": ["One number per seed of PPO, in the order of the seeds below. Goals: 70% and 0.75."],
    }
    if args.result:
        args.result.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def run(folder: Path, seed: int, setting: str, ppo_seed: int) -> dict[str, Any]:
    """One PPO stage, measured as the quickstart does it."""
    rate, updates = setting.split(":")
    settings = quick(ppo_learning_rate=float(rate), num_updates=int(updates))
    tokenizer, length = build_tokenizer(), settings.max_completion_length
    test = [row["prompt"] for row in prompt_rows(settings.test_prompts, seed, split="test")]
    sft = AutoModelForCausalLM.from_pretrained(folder / "sft").eval()
    before = evaluate(sft, None, tokenizer, test, length, seed)
    with tempfile.TemporaryDirectory() as work:
        for name in ("sft", "reward"):
            shutil.copytree(folder / name, Path(work) / name)
        policy, _ = train_ppo(work, tokenizer, settings, ppo_seed)
        after = evaluate(policy, sft, tokenizer, test, length, seed)
    return {**gain_over(before, after), "kl": after.metrics["kl"]}


if __name__ == "__main__":
    sys.exit(main())
