"""Constitutional AI on the toy world over seeds: what the principles achieve without a label of people for harm.

    python benchmarks/constitution_toy.py --seeds 5 --output_dir runs/constitution \
        --result benchmarks/results/constitution.json

Each seed is a run of `recipes/constitution.py` with `recipes/constitution_tiny.yaml` in a folder of its own, and goes
on where it stopped. The table is made of the seeds that are finished, and of nothing else.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from compare import commit_of_head
from compare_statistics import interval
from trl import ModelConfig, TrlParser

from rlhf_ext.data.constitution_arguments import ConstitutionArguments
from rlhf_ext.pipelines.constitution import run_constitution


ROOT = Path(__file__).resolve().parents[1]
POLICIES = {"helpful": "helpful policy", "sl-cai": "SL-CAI", "rl-cai": "RL-CAI"}
SCORES = ("harmless", "helpful", "honest", "gold", "charming")
DIFFERENCES = (("sl-cai", "helpful"), ("rl-cai", "sl-cai"), ("rl-cai", "helpful"))
JUDGE = {
    "error": "errors, both orders averaged",
    "error_one_order": "errors, one order",
    "position_bias": "position bias, one order",
    "position_bias_swapped": "position bias, both orders averaged",
    "wrong_probability": "1 - p of the harmless answer",
}


def run_seed(config: Path, seed: int, folder: Path) -> dict[str, Any]:
    """What a seed's run recorded, from disk where it is finished."""
    flags = ["--config", str(config), "--seed", str(seed), "--output_dir", str(folder)]
    return run_constitution(*TrlParser((ConstitutionArguments, ModelConfig)).parse_args_and_config(flags))


def collect(runs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table: means over seeds, and paired differences with their 95% t-intervals."""
    columns = ["", *SCORES, "KL", "EAD per input"]
    rows = []

    def of(name: str, score: str) -> list[float]:
        key = {"KL": "kl", "EAD per input": "per_input_ead"}.get(score, f"score/{score}")
        return [run["evaluation"]["policies"][name][key] for run in runs]

    for name, title in POLICIES.items():
        rows.append([title, *(f"{sum(of(name, score)) / len(runs):.3f}" for score in columns[1:])])
    for better, other in DIFFERENCES:
        cells = []
        for score in columns[1:]:
            gaps = [a - b for a, b in zip(of(better, score), of(other, score), strict=True)]
            cells.append(_interval(gaps, signed=True))
        rows.append([f"{POLICIES[better]} - {POLICIES[other]}", *cells])
    return columns, rows


def notes_of(runs: list[dict[str, Any]]) -> list[str]:
    judge = [f"{text} {_interval([run['toy'][name] for run in runs])}" for name, text in JUDGE.items()]
    agreement = [run["labels"]["swap_disagreement"] for run in runs]
    return [
        "Means over seeds; differences are paired, with 95% t-intervals over seeds. Nothing of the run was trained on "
        "the true score of harmless, nor on gold; helpful and honest are what the simulated person labels. charming "
        "is the share of answers with the opener that the judge falls for. KL to the helpful policy, nats per answer.",
        f"Judge on held-out pairs of which one answer has an insult: {'; '.join(judge)}. On the pairs of the run the "
        f"winner changed with the order in {_interval(agreement)}.",
        "It tests the pipeline, not a judge: the judge's faults were built into its transcripts.",
    ]


def _interval(values: list[float], signed: bool = False) -> str:
    centre, low, high = interval(values)
    sign = "+" if signed else ""
    return f"{centre:{sign}.3f}" if math.isnan(low) else f"{centre:{sign}.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this, less one")
    parser.add_argument("--first_seed", type=int, default=0, help="leave out the seeds before, for a second process")
    parser.add_argument("--config", type=Path, default=ROOT / "recipes" / "constitution_tiny.yaml")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/constitution"))
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    commit = commit_of_head()
    for seed in range(args.first_seed, args.seeds):
        run_seed(args.config, seed, args.output_dir / f"seed_{seed}")
    done = [seed for seed in range(args.seeds) if (args.output_dir / f"seed_{seed}" / "evaluation").exists()]
    runs = [run_seed(args.config, seed, args.output_dir / f"seed_{seed}") for seed in done]
    columns, rows = collect(runs)
    result = {
        "title": "Constitutional AI on the toy world, 256 held-out prompts, half of which beg for an insult",
        "command": f"python benchmarks/constitution_toy.py --seeds {args.seeds} --output_dir {args.output_dir}",
        "commit": commit,
        "seed": done,
        "columns": columns,
        "rows": rows,
        "notes": notes_of(runs),
    }
    print(json.dumps(result, indent=2))
    if args.result is not None:
        args.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
