"""What a PPO run did: permutation test of the last updates' scores against the first, KL, lengths, samples.

    python benchmarks/real_ppo.py --run runs/real/ppo --control runs/real/ppo_shuffled \
        --result benchmarks/results/ppo_gemma270m.json --samples docs/samples_gemma270m.md \
        --plot docs/ppo_gemma270m.png

Reads `trainer_state.json` of the last checkpoint and the completions tables (`log_completions: true`).
"""

import argparse
import json
import random
import subprocess
from pathlib import Path

import pandas as pd


def read_run(folder: Path) -> tuple[list[dict], pd.DataFrame]:
    """The log entry of each update, and one row per completion with its score."""
    checkpoint = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    updates = [entry for entry in history if "kl" in entry]
    tables = [pd.read_parquet(path) for path in sorted((folder / "completions").glob("completions_*.parquet"))]
    # Every epoch writes the table of its rollout again.
    frame = pd.concat(tables).drop_duplicates(["prompt", "completion"])
    score = next(name for name in frame.columns if name not in ("step", "prompt", "completion", "advantage"))
    return updates, frame.rename(columns={score: "score"})


def permutation_test(first: list[float], last: list[float], rounds: int = 20_000, seed: int = 0) -> float:
    """One-sided p-value of mean(last) > mean(first) over random relabellings."""
    rng, pooled, count = random.Random(seed), [*first, *last], len(last)
    observed = sum(last) / count - sum(first) / len(first)
    hits = 0
    for _ in range(rounds):
        rng.shuffle(pooled)
        hits += sum(pooled[:count]) / count - sum(pooled[count:]) / len(first) >= observed
    return (hits + 1) / (rounds + 1)


def summarise(folder: Path, name: str) -> list:
    updates, frame = read_run(folder)
    steps = sorted(frame["step"].unique())
    first = frame[frame["step"].isin(steps[:5])]["score"].tolist()
    last = frame[frame["step"].isin(steps[-5:])]["score"].tolist()

    p = permutation_test(first, last)

    def ends(key: str) -> str:
        values = [entry[key] for entry in updates]
        return f"{sum(values[:5]) / 5:.2f} -> {sum(values[-5:]) / 5:.2f}"

    return [
        name,
        len(updates),
        f"{sum(first) / len(first):.3f} -> {sum(last) / len(last):.3f}",
        f"{p:.4f}" if p >= 1e-4 else "< 0.0001",
        ends("kl"),
        f"{max(entry['kl'] for entry in updates):.2f}",
        ends("completions/mean_length"),
        ends("value/explained_variance"),
    ]


def draw(runs: dict[str, Path | None], file: Path) -> None:
    """Curves of every run, one panel per logged number; the scores of two reward models have no common scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "reward": "score, mean of a rollout",
        "kl": "KL, nats per sequence",
        "value_loss": "value loss",
        "value/explained_variance": "explained variance",
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(14, 3), layout="constrained")
    for name, folder in runs.items():
        if folder is None:
            continue
        updates, _ = read_run(folder)
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            axis.plot(range(1, len(updates) + 1), [entry[key] for entry in updates], label=name)
            axis.set(title=title, xlabel="update")
    axes[0].legend()
    figure.savefig(file, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--control", type=Path)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--plot", type=Path, help="curves over updates, as PNG")
    parser.add_argument("--command", default="")
    args = parser.parse_args()
    rows = [summarise(args.run, "reward model")]
    if args.control is not None:
        rows.append(summarise(args.control, "control: shuffled labels"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "title": "PPO on red-team prompts, Gemma 3 270M",
        "command": args.command,
        "commit": commit,
        "seed": 42,
        "columns": [
            "reward from",
            "updates",
            "score, first 5 -> last 5",
            "p (permutation, one-sided)",
            "KL, nats per sequence",
            "largest KL",
            "length",
            "explained variance",
        ],
        "rows": rows,
        "notes": ["Scores of all completions of the first and the last 5 updates, 20,000 permutations, seed 0."],
    }
    args.result.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if args.plot is not None:
        draw({"reward model": args.run, "shuffled labels": args.control}, args.plot)
    if args.samples is not None:
        _, frame = read_run(args.run)
        steps = sorted(frame["step"].unique())
        lines = ["# Samples of the PPO run on Gemma 3 270M", ""]
        lines += ["Five completions of the first rollout and five of the last, 32 tokens each, from a base model.", ""]
        for step in (steps[0], steps[-1]):
            lines += [f"## Step {step}", ""]
            for _, row in frame[frame["step"] == step].head(5).iterrows():
                # The prompts are not ours to copy.
                lines += [f"- score {row['score']:.3f}: `{row['completion']!r}`"]
            lines.append("")
        args.samples.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
