"""Tables and a plot of the runs of `preferences.py`: what each question of the arms has for an answer.

    python benchmarks/preferences_report.py --runs runs/preferences --result benchmarks/results/preferences.json \
        --plot docs/preferences.png

Writes the arms to `--result`, the questions to `NAME_claims.json` and the ensemble to `NAME_ensemble.json`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from compare import slug
from compare_statistics import interval, verdict
from preferences import ROOT, read_arms

from rlhf_ext.functional.pairs import preference_accuracy
from rlhf_ext.functional.scores import score_normalization


ID, OOD = "in_distribution", "out_of_distribution"
MEMBERS = [f"member {number}" for number in range(4)]
# (what is expected, better arm, other arm, set, number); the difference must be above 0.
QUESTIONS = [
    ("best of 4 teaches more per label, 256", "best of 4 256", "pairs 256", ID, "accuracy"),
    ("best of 4 teaches more per label, 512", "best of 4 512", "pairs 512", ID, "accuracy"),
    ("best of 4 teaches more per label out of distribution, 256", "best of 4 256", "pairs 256", OOD, "accuracy"),
    ("best of 4 teaches more per label out of distribution, 512", "best of 4 512", "pairs 512", OOD, "accuracy"),
    ("best of 4 teaches more per answer read, 1024", "best of 4 256", "pairs 512", ID, "accuracy"),
    ("best of 4 teaches more per answer read, 2048", "best of 4 512", "pairs 1024", ID, "accuracy"),
    ("LM term 0.1 helps", "LM 0.1", "pairs 512", ID, "accuracy"),
    ("LM term 0.1 helps out of distribution", "LM 0.1", "pairs 512", OOD, "accuracy"),
    ("LM term 1 helps", "LM 1", "pairs 512", ID, "accuracy"),
    ("LM term 1 helps out of distribution", "LM 1", "pairs 512", OOD, "accuracy"),
    ("LM term 0.1 keeps preferred answers likely (nats per token saved)", "pairs 512", "LM 0.1", ID, "nll"),
    ("LM term 0.1 keeps them likely out of distribution", "pairs 512", "LM 0.1", OOD, "nll"),
    ("LM term 1 keeps preferred answers likely (nats per token saved)", "pairs 512", "LM 1", ID, "nll"),
    ("LM term 1 keeps them likely out of distribution", "pairs 512", "LM 1", OOD, "nll"),
    ("ties kept beat ties dropped", "ties kept", "ties dropped", ID, "accuracy"),
    (
        "ties kept hold equal answers closer (absolute score difference / sd)",
        "ties dropped",
        "ties kept",
        ID,
        "tie_gap",
    ),
    ("noise 0.1 helps at 10% errors", "10% errors, noise 0.1", "10% errors, plain", ID, "accuracy"),
    ("noise 0.2 helps at 20% errors", "20% errors, noise 0.2", "20% errors, plain", ID, "accuracy"),
]


def read_runs(arms: Path, folder: Path, seeds: int) -> dict[str, dict[int, dict[str, Any]]]:
    """`found[arm][seed]`: every arm of the file on every seed.

    Raises:
        ValueError: a run is missing, or was made with other settings than its arm has now.
    """
    spec, lost = read_arms(arms), []
    found: dict[str, dict[int, dict[str, Any]]] = {arm["name"]: {} for arm in spec["arms"]}
    for arm in spec["arms"]:
        for seed in range(seeds):
            path = folder / f"{slug(arm['name'])}-{seed}.json"
            if not path.exists():
                lost.append(path.name)
                continue
            run = json.loads(path.read_text())
            if (run["arm"], run["world"], run["seed"]) != (arm, spec["world"], seed):
                raise ValueError(f"{path} was run with other settings than {arms.name} has now. Run it again.")
            found[arm["name"]][seed] = run
    if lost:
        raise ValueError(f"{folder} has no {', '.join(lost)}. Run preferences.py first, or lower --seeds.")
    return found


def pairs_of(scores: list[list[float]], gold: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and gold of all pairs of one prompt's answers, both `(N, 2)`."""
    s, g = torch.tensor(scores, dtype=torch.float64), torch.tensor(gold, dtype=torch.float64)
    i, j = torch.triu_indices(s.shape[1], s.shape[1], offset=1)
    return torch.stack([s[:, i], s[:, j]], -1).view(-1, 2), torch.stack([g[:, i], g[:, j]], -1).view(-1, 2)


def accuracy_of(scores: torch.Tensor, gold: torch.Tensor) -> float:
    differ = gold[:, 0] != gold[:, 1]
    return preference_accuracy(scores[differ], (gold[differ, 0] > gold[differ, 1]).double())["accuracy"]


def numbers_of(run: dict[str, Any], name: str) -> dict[str, float]:
    """Accuracy on pairs whose gold differs; mean |difference| of those whose gold is equal, over the sd."""
    scores, gold = pairs_of(run["scores"][name], run["gold"][name])
    same = gold[:, 0] == gold[:, 1]
    spread = torch.tensor(run["scores"][name], dtype=torch.float64).flatten().std(unbiased=False)
    return {
        "accuracy": accuracy_of(scores, gold),
        "tie_gap": ((scores[same, 0] - scores[same, 1]).abs().mean() / spread).item(),
        "nll": run["nll"][name],
    }


def ensemble_numbers(runs: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Members normalised one by one on the reference's samples; spread against error, disagreement against errors."""
    normalised = []
    for run in runs:
        gain, bias = score_normalization(torch.tensor(run["scores"]["reference"], dtype=torch.float64).flatten())
        normalised.append(float(gain) * torch.tensor(run["scores"][name], dtype=torch.float64) + float(bias))
    gain, bias = score_normalization(torch.tensor(runs[0]["gold"]["reference"], dtype=torch.float64).flatten())
    truth = float(gain) * torch.tensor(runs[0]["gold"][name], dtype=torch.float64) + float(bias)
    members = torch.stack(normalised)
    mean, spread = members.mean(0), members.std(0, unbiased=False)
    singles = [accuracy_of(*pairs_of(member.tolist(), runs[0]["gold"][name])) for member in members]
    scores, gold = pairs_of(mean.tolist(), runs[0]["gold"][name])
    # Christiano's disagreement: variance over members of the predicted preference, each in the unit it was trained in
    chances = torch.stack([torch.sigmoid(_gap(run["scores"][name])) for run in runs]).var(0, unbiased=False)
    differ = gold[:, 0] != gold[:, 1]
    order = chances[differ].argsort()
    quarters = [1 - accuracy_of(scores[differ][part], gold[differ][part]) for part in order.tensor_split(4)]
    # What needs less than an ensemble: a small difference of scores, of the mean and of one member
    single_scores, _ = pairs_of(members[0].tolist(), runs[0]["gold"][name])
    return {
        "mean": accuracy_of(scores, gold),
        "single": sum(singles) / len(singles),
        "spearman": spearman(spread.flatten(), (mean - truth).abs().flatten()),
        "quarters": quarters,
        "sorted_by_disagreement": quarters[-1] - quarters[0],
        "sorted_by_margin": _sorted_errors(scores[differ], gold[differ]),
        "sorted_by_one_margin": _sorted_errors(single_scores[differ], gold[differ]),
    }


def _sorted_errors(scores: torch.Tensor, gold: torch.Tensor) -> float:
    """Error rate of the quarter of pairs with the smallest |score difference| less that of the largest."""
    parts = (scores[:, 0] - scores[:, 1]).abs().argsort().tensor_split(4)
    small, *_, large = [1 - accuracy_of(scores[part], gold[part]) for part in parts]
    return small - large


def _gap(scores: list[list[float]]) -> torch.Tensor:
    pairs, _ = pairs_of(scores, scores)
    return pairs[:, 0] - pairs[:, 1]


def spearman(x: torch.Tensor, y: torch.Tensor) -> float:
    """Pearson's r of ranks, equal values sharing their mean rank."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    return ((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()).item()


def _ranks(x: torch.Tensor) -> torch.Tensor:
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[place]


def text(values: list[float], digits: int = 3) -> str:
    return "{0:.{3}f} [{1:.{3}f}, {2:.{3}f}]".format(*interval(values), digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, default=ROOT / "benchmarks" / "preference_arms.yaml")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    found = read_runs(args.arms, args.runs, args.seeds)
    seeds = list(range(args.seeds))
    first = next(iter(found.values()))[seeds[0]]
    world = first["world"]
    table = {
        (name, part): [numbers_of(of_seed[seed], part) for seed in seeds]
        for name, of_seed in found.items()
        for part in (ID, OOD)
    }
    shared = {
        "command": f"python benchmarks/preferences.py --seeds {len(seeds)} --output_dir runs/preferences",
        "commit": ", ".join(sorted({run["commit"] for of_seed in found.values() for run in of_seed.values()})),
        "seed": seeds,
    }
    rows = []
    for name, of_seed in found.items():
        if name in MEMBERS:
            continue
        inside, outside = table[name, ID], table[name, OOD]
        rows.append(
            [
                name,
                str(round(sum(of_seed[s]["rows"] for s in seeds) / len(seeds))),
                text([n["accuracy"] for n in inside]),
                text([n["accuracy"] for n in outside]),
                text([n["nll"] for n in inside], 2),
                text([n["nll"] for n in outside], 2),
            ]
        )
    arms = {
        "title": f"Reward models on the toy world, {len(seeds)} seeds",
        **shared,
        "columns": ["arm", "rows", "accuracy", "accuracy, shifted prompts", "nats per token", "nats, shifted"],
        "rows": rows,
        "notes": [
            f"Accuracy on all pairs of four samples whose gold differs, {world['test_prompts']} prompts each; "
            "shifted: products without a label, three in a prompt, half of them begging for an insult. Nats per token "
            "of the answers with the highest gold, under the language-modelling head. Intervals: 95%, t over seeds.",
            f"Every arm: {world['epochs']} passes over its rows, {world['batch_size']} a step, learning rate "
            f"{world['learning_rate']:g}, not tuned. Fewer rows are fewer steps.",
        ],
    }
    claims = {"title": "Reward models on the toy world: what was expected, and what decides it", **shared}
    claims |= {"columns": ["expected", "arms", "difference, paired", "verdict"], "rows": []}
    claims["notes"] = ["Paired differences over seeds, 95% t-intervals; confirmed if the whole interval is above 0."]
    for title, better, other, part, number in QUESTIONS:
        values = [a[number] - b[number] for a, b in zip(table[better, part], table[other, part], strict=True)]
        _, low, high = interval(values)
        claims["rows"].append([title, f"{better} less {other}", text(values), verdict(low, high, 0.0)])
    ensemble = {"title": "An ensemble of four on bootstraps: doubt against error", **shared, "rows": []}
    ensemble["columns"] = ["test set", "accuracy of the mean", "of one member", "mean less one member, paired"]
    ensemble["columns"] += ["rank correlation of spread and error", "errors by quarter of disagreement, low to high"]
    ensemble["columns"] += ["last less first quarter", "by small margin of the mean", "by small margin of one member"]
    quarters = {}
    for part, title in ((ID, "as in training"), (OOD, "shifted prompts")):
        parts = [ensemble_numbers([found[m][seed] for m in MEMBERS], part) for seed in seeds]
        quarters[title] = [[p["quarters"][q] for p in parts] for q in range(4)]
        ensemble["rows"].append(
            [
                title,
                text([p["mean"] for p in parts]),
                text([p["single"] for p in parts]),
                text([p["mean"] - p["single"] for p in parts]),
                text([p["spearman"] for p in parts]),
                ", ".join(f"{sum(values) / len(values):.3f}" for values in quarters[title]),
                *(text([p[f"sorted_by_{by}"] for p in parts]) for by in ("disagreement", "margin", "one_margin")),
            ]
        )
    ensemble["notes"] = [
        "Members normalised one by one to mean 0, standard deviation 1 on samples of the SFT model. Error: |mean of "
        "the members - gold normalised the same way|. Disagreement: variance over members of P(first is better).",
        "The last three columns: error rate of the quarter of pairs with the most disagreement, or the smallest "
        "|score difference|, less that of the opposite quarter; under one member the errors are its own.",
    ]
    for result, name in ((arms, ""), (claims, "_claims"), (ensemble, "_ensemble")):
        path = args.result.with_name(f"{args.result.stem}{name}.json")
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(result["title"])
        for row in (result["columns"], *result["rows"]):
            print(" | ".join(map(str, row)))
    if args.plot is not None:
        plot(table, quarters, str(args.plot))


def plot(table: dict, quarters: dict, path: str) -> None:
    """Accuracy against labels and against answers read; errors by quarter of the ensemble's disagreement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8))
    for kind, sizes, answers in (("pairs", (256, 512, 1024), 2), ("best of 4", (256, 512), 4)):
        values = [[n["accuracy"] for n in table[f"{kind} {size}", ID]] for size in sizes]
        centres = [interval(v) for v in values]
        bars = [[m - low for m, low, _ in centres], [high - m for m, _, high in centres]]
        for axis, x in ((axes[0], sizes), (axes[1], [answers * size for size in sizes])):
            axis.errorbar(x, [m for m, _, _ in centres], yerr=bars, marker="o", capsize=3, label=kind)
    axes[0].set(xlabel="labels", ylabel="accuracy on held-out pairs", xscale="log")
    axes[1].set(xlabel="answers read", xscale="log")
    for title, values in quarters.items():
        centres = [interval(v) for v in values]
        bars = [[m - low for m, low, _ in centres], [high - m for m, _, high in centres]]
        axes[2].errorbar(range(1, 5), [m for m, _, _ in centres], yerr=bars, marker="o", capsize=3, label=title)
    axes[2].set(xlabel="quarter of pairs by disagreement of four members", ylabel="error rate", xticks=range(1, 5))
    for axis, ticks in ((axes[0], (256, 512, 1024)), (axes[1], (512, 1024, 2048))):
        axis.minorticks_off()
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
