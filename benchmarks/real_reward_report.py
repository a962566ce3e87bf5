"""Tables and plots of the runs of `real_reward.py`.

    python benchmarks/real_reward_report.py --runs runs/real/arms --data runs/real \
        --result benchmarks/results/reward_arms.json --plot docs/reward_arms.png

`--result`: accuracy by source beside both baselines on the same rows; `NAME_details.json`: calibration, length,
likelihood, the trap set, cost; `NAME_groups.json`: K answers of one prompt.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from real_preferences import bag_of_words, read

from rlhf_ext.functional.pairs import calibration, length_statistics, pair_credits, preference_accuracy


ARMS = {"pairs": "pairwise", "pairs_lm": "pairwise + LM"}
DRAWS = 10_000


def bootstrap(credits: torch.Tensor, seed: int = 0) -> str:
    """Mean of `(seeds, rows)` and a 95% interval: rows drawn again and again, each with its mean over seeds."""
    rows = credits.mean(dim=0)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(rows), (DRAWS, len(rows)), generator=generator)
    low, high = rows[draws].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=rows.dtype)).tolist()
    return f"{rows.mean().item():.3f} [{low:.3f}, {high:.3f}]"


def credits_of(scores: list[list[float]], targets: list[list[float]]) -> torch.Tensor:
    return pair_credits(torch.tensor(scores, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)[:, 0])


def rows_of(runs: list[dict[str, Any]], name: str) -> torch.Tensor:
    """Scores of all seeds, `(seeds, rows, 2)`."""
    return torch.tensor([run["scores"][name] for run in runs], dtype=torch.float64)


def span(values: list[float], digits: int = 3) -> str:
    mean = sum(values) / len(values)
    return (
        f"{mean:.{digits}f}"
        if len(values) == 1
        else f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    )


def accuracy_table(arms: dict[str, list[dict[str, Any]]], data: Path) -> dict[str, Any]:
    test = read(data / "test.jsonl")
    keep = [i for i, row in enumerate(test) if row["target"][0] != row["target"][1]]
    test = [test[i] for i in keep]
    targets = [row["target"] for row in test]
    systems = {}
    for arm, runs in arms.items():
        systems[f"{ARMS[arm]}, {len(runs)} seed{'s' if len(runs) > 1 else ''}"] = torch.stack(
            [credits_of([run["scores"]["test"][i] for i in keep], targets) for run in runs]
        )
    longer = [[float(len(text)) for text in row["completions"]] for row in test]
    words = [list(pair) for pair in bag_of_words(read(data / "train.jsonl"), test)]
    systems["always longer"] = credits_of(longer, targets)[None]
    systems["bag of words"] = credits_of(words, targets)[None]
    sources = {"all": range(len(test))}
    for name in sorted({row["source"] for row in test}):
        sources[name] = [i for i, row in enumerate(test) if row["source"] == name]
    table = [
        [name, *(bootstrap(credits[:, list(rows)]) for rows in sources.values())] for name, credits in systems.items()
    ]
    ours, baselines = list(systems)[: len(arms)], list(systems)[len(arms) :]
    compared = [(one, other) for one in ours for other in baselines]
    if len(ours) == 2:
        compared.append((ours[1], ours[0]))
    for one, other in compared:
        gap = systems[one].mean(0, keepdim=True) - systems[other].mean(0, keepdim=True)
        table.append(
            [f"{one.split(',')[0]} less {other.split(',')[0]}"]
            + [bootstrap(gap[:, list(rows)]) for rows in sources.values()]
        )
    return {"columns": ["", *(f"{name} ({len(rows)} pairs)" for name, rows in sources.items())], "rows": table}


def detail_table(arms: dict[str, list[dict[str, Any]]], data: Path) -> dict[str, Any]:
    test, traps = read(data / "test.jsonl"), read(data / "traps.jsonl")
    target = torch.tensor([row["target"][0] for row in test], dtype=torch.float64)
    columns, cells = [""], {}

    def put(label: str, text: str) -> None:
        cells.setdefault(label, []).append(text)

    for arm, runs in arms.items():
        columns.append(ARMS[arm])
        scores = rows_of(runs, "test")
        lengths = torch.tensor(runs[0]["lengths"]["test"], dtype=torch.float64)
        decisive = target != 0.5
        ece = [calibration(torch.sigmoid(s[:, 0] - s[:, 1]), target)["ece"] for s in scores]
        put("ECE, 10 bins", span(ece))
        found = [length_statistics(s[decisive], lengths[decisive], target[decisive]) for s in scores]
        for key, label in (
            ("length_correlation", "correlation of score and length (tokens, prompt included)"),
            ("accuracy_length_regressed", "accuracy, length regressed out"),
        ):
            put(label, span([f[key] for f in found]))
        put("nats per token: preferred answers, before training", span([run["nll_untrained"] for run in runs]))
        put("nats per token: preferred answers, after", span([run["nll"] for run in runs]))
        kinds = [row["source"] for row in traps]
        trap_scores = rows_of(runs, "traps")
        trap_target = torch.tensor([row["target"][0] for row in traps], dtype=torch.float64)
        for kind in ("all", *sorted(set(kinds))):
            rows = torch.tensor([kind in ("all", k) for k in kinds])
            accuracy = [preference_accuracy(s[rows], trap_target[rows])["accuracy"] for s in trap_scores]
            put(f"LLMBar {kind} ({int(rows.sum())})", span(accuracy))
        put("pairs, tokens", f"{runs[0]['rows']}, {runs[0]['tokens']}")
        put("seconds of training (one thread, machine shared)", span([run["train_seconds"] for run in runs], 0))
        put("peak memory of the process, MiB", span([run["peak_mib"] for run in runs], 0))
    return {"columns": columns, "rows": [[label, *texts] for label, texts in cells.items()]}


def group_table(run: dict[str, Any], data: Path) -> dict[str, Any]:
    groups = read(data / "groups_test.jsonl")
    systems = {
        "K-way model": run["scores"]["groups_test"],
        "always longest": [[float(len(text)) for text in row["completions"]] for row in groups],
    }
    rows = []
    for name, scores in systems.items():
        cells = [name]
        for source in ("all", "en", "zh"):
            chosen = [i for i, row in enumerate(groups) if source in ("all", row["source"])]
            top = torch.tensor(
                [float(max(range(len(scores[i])), key=scores[i].__getitem__) == groups[i]["best"]) for i in chosen]
            )
            cells.append(bootstrap(top[None].double()))
        rows.append(cells)
    chance = ["chance"]
    for source in ("all", "en", "zh"):
        sizes = [len(row["completions"]) for row in groups if source in ("all", row["source"])]
        chance.append(f"{sum(1 / size for size in sizes) / len(sizes):.3f} ({len(sizes)} groups)")
    return {"columns": ["best answer on top", "all", "English", "Chinese"], "rows": [*rows, chance]}


def plot(arms: dict[str, list[dict[str, Any]]], data: Path, path: str) -> None:
    """Accuracy during training (seed 0), and how often the answer called better is the better one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    test = read(data / "test.jsonl")
    target = torch.tensor([row["target"][0] for row in test], dtype=torch.float64)
    decisive = target != 0.5
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for arm, runs in arms.items():
        curve = [(p["step"], p["scores"]) for p in runs[0]["curve"]] + [(runs[0]["steps"], runs[0]["scores"]["test"])]
        points = [
            preference_accuracy(torch.tensor(s, dtype=torch.float64)[decisive], target[decisive]) for _, s in curve
        ]
        pairs_seen = [step * runs[0]["rows"] / runs[0]["steps"] for step, _ in curve]
        middle = [p["accuracy"] for p in points]
        bars = [
            [m - p["low"] for m, p in zip(middle, points, strict=True)],
            [p["high"] - m for m, p in zip(middle, points, strict=True)],
        ]
        axes[0].errorbar(pairs_seen, middle, yerr=bars, marker="o", capsize=3, label=f"{ARMS[arm]}, seed 0")
        scores = rows_of(runs, "test").flatten(0, 1)
        bins = calibration(torch.sigmoid(scores[:, 0] - scores[:, 1]), target.repeat(len(runs)))["bins"]
        axes[1].plot([b["predicted"] for b in bins], [b["observed"] for b in bins], marker="o", label=ARMS[arm])
    axes[0].set(xlabel="pairs seen", ylabel="accuracy on held-out pairs")
    axes[1].plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes[1].set(xlabel="predicted P(first is better)", ylabel="share labelled so")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in sorted(args.runs.glob("*/scores.json"))]
    arms = {arm: [run for run in runs if run["arm"] == arm] for arm in ARMS}
    arms = {arm: found for arm, found in arms.items() if found}
    counts = json.loads((args.data / "data.json").read_text())["sources"]
    left_out = ", ".join(f"{name} {c['too_long']} of {c['rows']}" for name, c in counts.items())
    shared = {
        "command": "python benchmarks/real_reward.py --base_model MODEL --data runs/real --output_dir runs/real/arms",
        "commit": ", ".join(sorted({run["commit"] for run in runs})),
        "seed": sorted({run["seed"] for run in runs}),
    }
    setting = (
        "Gemma 3 270M in NF4 with double quantisation, LoRA r=16 on every linear layer of the top 6 of 18, lower "
        "layers computed once for all runs and replayed; one pass, 8 pairs a step, learning rate 2e-4, not tuned; LM "
        "term 0.1 x mean over tokens. A seed is adapter, head and order of rows."
    )
    found = [
        (
            "",
            "Reward models on human preferences: pairwise, with and without the LM term",
            accuracy_table(arms, args.data),
            [
                "Held-out prompts (a fifth, by hash), decisive pairs, equal scores half, mean over seeds; 95% "
                f"interval by drawing the pairs {DRAWS:,} times. Longer than 256 tokens and left out: {left_out}.",
                setting,
            ],
        ),
        (
            "_details",
            "The same runs: calibration, length, likelihood, traps, cost",
            detail_table(arms, args.data),
            ["Mean over seeds (lowest to highest). LLMBar was built to fool length and style; it is not trained on."],
        ),
    ]
    groups = [run for run in runs if run["arm"] == "groups"]
    if groups:
        notes = [
            f"{groups[0]['rows']} groups of 2 to 10 answers, {groups[0]['tokens']} tokens, "
            f"{groups[0]['train_seconds']:.0f} s. Shows that ragged K "
            "trains on people's rankings; too few groups to compare losses.",
        ]
        found.append(("_groups", "K-way on OASST, one seed", group_table(groups[0], args.data), notes))
    for name, title, table, notes in found:
        result = {"title": title, **shared, **table, "notes": notes}
        path = args.result.with_name(f"{args.result.stem}{name}.json")
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(title)
        for row in (result["columns"], *result["rows"]):
            print(" | ".join(map(str, row)))
    if args.plot is not None:
        plot(arms, args.data, str(args.plot))


if __name__ == "__main__":
    main()
