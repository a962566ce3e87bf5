"""Tables and plot of the reward models on the toy world, from the scores that `preferences.py` left.

    python benchmarks/preferences_report.py --runs runs/preferences --seeds 5 --plot docs/preferences.png

Every difference is one number per seed, and its interval a paired one: both arms of a seed have the same SFT trunk,
prompts, samples and test sets.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from compare import slug
from compare_statistics import interval, verdict
from preferences import ROOT, SETS, read_arms


Run = dict[str, Any]
Rows = list[list[float]]  # (prompts, answers)
TESTS = SETS[1:]
NAMES = {"in_distribution": "in distribution", "out_of_distribution": "out of distribution"}


def pair_accuracy(scores: Rows, gold: Rows) -> float:
    """Share of the pairs of one prompt whose golds differ that the scores order as gold does; equal scores half."""
    right, pairs = 0.0, 0
    for s, g, *_ in _pairs(scores, gold):
        pairs += 1
        right += 0.5 if s == 0 else float((s > 0) == (g > 0))
    return right / pairs


def _pairs(*columns: Rows):
    """Differences of every column over the pairs of a prompt whose last column, gold, differs."""
    for rows in zip(*columns, strict=True):
        for i in range(len(rows[-1])):
            for j in range(i):
                if rows[-1][i] != rows[-1][j]:
                    yield [row[i] - row[j] for row in rows]


def normalize(values: Rows, reference: Rows) -> Rows:
    """`values` less the mean of `reference`, in units of its standard deviation."""
    flat = [value for row in reference for value in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in flat) / len(flat))
    return [[(value - mean) / deviation for value in row] for row in values]


def ranks(values: list[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            found[place] = (start + end) / 2 + 1
        start = end + 1
    return found


def spearman(x: list[float], y: list[float]) -> float:
    """Pearson's correlation of ranks; NaN where one side is constant."""
    a, b = ranks(x), ranks(y)
    middle = (len(a) + 1) / 2
    spread = math.sqrt(sum((v - middle) ** 2 for v in a) * sum((v - middle) ** 2 for v in b))
    if spread == 0:
        return math.nan
    return sum((v - middle) * (w - middle) for v, w in zip(a, b, strict=True)) / spread


def ensemble(members: list[Run], name: str) -> dict[str, Any]:
    """What an ensemble says of one test set: each member and gold normalised on the reference answers by themselves.

    Returns:
        `dict`: `accuracy` of the mean score, mean `member_accuracy`, `spearman` of spread and |mean - gold| over
        answers, and `quartiles`, the error rate of pairs by the members' spread of the difference, least first.
    """
    units = [normalize(run["scores"][name], run["scores"]["reference"]) for run in members]
    gold = normalize(members[0]["gold"][name], members[0]["gold"]["reference"])
    mean = [[sum(c) / len(c) for c in zip(*rows, strict=True)] for rows in zip(*units, strict=True)]
    doubt = [[_deviation(c) for c in zip(*rows, strict=True)] for rows in zip(*units, strict=True)]
    error = [abs(m - g) for ms, gs in zip(mean, gold, strict=True) for m, g in zip(ms, gs, strict=True)]
    judged = []
    for *differences, truth in _pairs(*units, gold):
        middle = sum(differences) / len(differences)
        wrong = 0.5 if middle == 0 else float((middle > 0) != (truth > 0))
        judged.append((_deviation(differences), wrong))
    judged.sort()
    cuts = [round(len(judged) * part / 4) for part in range(5)]
    parts = [[wrong for _, wrong in judged[a:b]] for a, b in zip(cuts, cuts[1:], strict=False)]
    return {
        "accuracy": pair_accuracy(mean, gold),
        "member_accuracy": sum(pair_accuracy(unit, gold) for unit in units) / len(units),
        "spearman": spearman([value for row in doubt for value in row], error),
        "quartiles": [sum(part) / len(part) for part in parts],
    }


def _deviation(values: Any) -> float:
    values = list(values)
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def text(values: list[float], digits: int = 3) -> str:
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*interval(values), d=digits)


def arm_table(runs: dict[str, dict[int, Run]]) -> dict[str, Any]:
    """One row per arm: rows trained on, accuracy and NLL on both test sets. `runs[arm][seed]`."""
    rows = []
    for name, of_seed in runs.items():
        found = list(of_seed.values())
        trained = sorted({run["rows"] for run in found})
        rows.append([name, str(trained[0]) if len(trained) == 1 else f"{trained[0]} to {trained[-1]}"])
        rows[-1] += [text(accuracies(of_seed, test)) for test in TESTS]
        rows[-1] += [f"{sum(run['nll'][test] for run in found) / len(found):.2f}" for test in TESTS]
    columns = ["arm", "rows", *(f"accuracy {NAMES[t]}" for t in TESTS), *(f"NLL {NAMES[t]}" for t in TESTS)]
    return {"columns": columns, "rows": rows}


def accuracies(of_seed: dict[int, Run], test: str) -> list[float]:
    return [pair_accuracy(run["scores"][test], run["gold"][test]) for _, run in sorted(of_seed.items())]


def difference_table(runs: dict[str, dict[int, Run]], comparisons: list[dict[str, str]]) -> dict[str, Any]:
    """One row per comparison and test set: accuracy and NLL of `arm` less those of `than`, seed by seed."""
    rows = []
    for compared in comparisons:
        for test in TESTS:
            pairs = zip(*(accuracies(runs[compared[side]], test) for side in ("arm", "than")), strict=True)
            values = [left - right for left, right in pairs]
            _, low, high = interval(values)
            found = {"confirmed": "ahead", "refuted": "behind", "undecided": "undecided"}[verdict(low, high, 0.0)]
            arm, than = runs[compared["arm"]], runs[compared["than"]]
            nll = [arm[seed]["nll"][test] - than[seed]["nll"][test] for seed in sorted(arm)]
            names = [compared["question"], compared["arm"], compared["than"], NAMES[test]]
            rows.append([*names, text(values), found, text(nll, 2)])
    columns = ["question", "arm", "than", "pairs", "difference of accuracies", "accuracy", "difference of NLL"]
    return {"columns": columns, "rows": rows}


def ensemble_table(runs: dict[str, dict[int, Run]], members: list[str], single: str) -> dict[str, Any]:
    """One row per measure, one column per test set."""
    seeds = sorted(runs[members[0]])
    found = {test: [ensemble([runs[name][seed] for name in members], test) for seed in seeds] for test in TESTS}
    singles = {test: accuracies(runs[single], test) for test in TESTS}

    def row(name: str, measure: Any) -> list[str]:
        return [name, *(text([measure(one, test, i) for i, one in enumerate(found[test])]) for test in TESTS)]

    rows = [
        row("Spearman, spread and absolute error", lambda one, *_: one["spearman"]),
        *(
            row(f"pair errors, quarter {part + 1} of disagreement", lambda one, *_, part=part: one["quartiles"][part])
            for part in range(4)
        ),
        row("pair errors, quarter 4 less quarter 1", lambda one, *_: one["quartiles"][3] - one["quartiles"][0]),
        row("accuracy of the mean", lambda one, *_: one["accuracy"]),
        row("accuracy of the mean less mean of members", lambda one, *_: one["accuracy"] - one["member_accuracy"]),
        row(
            f"accuracy of the mean less {single}",
            lambda one, test, i: one["accuracy"] - singles[test][i],
        ),
    ]
    return {"columns": ["measure", *(NAMES[test] for test in TESTS)], "rows": rows}


def plot(runs: dict[str, dict[int, Run]], curves: dict[str, dict[int, str]], members: list[str], path: str) -> None:
    """Accuracy against labels, and pair errors by quarter of disagreement, both with intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for label, arms in curves.items():
        for test, style in zip(TESTS, ("-", "--"), strict=True):
            _line(axes[0], sorted(arms), [accuracies(runs[arms[n]], test) for n in sorted(arms)], label, test, style)
    axes[0].set(xlabel="labels", ylabel="accuracy on held-out pairs", xscale="log")
    axes[0].set_xticks(sorted({n for arms in curves.values() for n in arms}), minor=False)
    axes[0].get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes[0].minorticks_off()
    for test, style in zip(TESTS, ("-", "--"), strict=True):
        found = [ensemble([runs[name][seed] for name in members], test)["quartiles"] for seed in runs[members[0]]]
        _line(axes[1], [1, 2, 3, 4], list(zip(*found, strict=True)), "ensemble", test, style)
    axes[1].set(xlabel="quarter of pairs by disagreement of members", ylabel="share of pairs judged wrong")
    axes[1].set_xticks([1, 2, 3, 4])
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _line(axis: Any, places: list[int], values: list[Any], label: str, test: str, style: str) -> None:
    found = [interval(list(of_place)) for of_place in values]
    bars = [[mean - low for mean, low, _ in found], [high - mean for mean, _, high in found]]
    means = [mean for mean, _, _ in found]
    axis.errorbar(places, means, yerr=bars, linestyle=style, marker="o", capsize=3, label=f"{label}, {NAMES[test]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, default=ROOT / "benchmarks" / "preference_arms.yaml")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/preferences"))
    parser.add_argument("--results", type=Path, help="folder for preferences_{arms,differences,ensemble}.json")
    parser.add_argument("--plot", type=Path, help="PNG: accuracy against labels, errors against disagreement")
    args = parser.parse_args()
    spec = read_arms(args.arms)
    report, runs, lost = spec["report"], {}, []
    for arm in spec["arms"]:
        for seed in range(args.seeds):
            path = args.runs / f"{slug(arm['name'])}-{seed}.json"
            if not path.exists():
                lost.append(path.name)
                continue
            run = json.loads(path.read_text())
            if (run["arm"], run["world"], run["seed"]) != (arm, spec["world"], seed):
                raise ValueError(f"{path} was run with other settings than {args.arms.name} has now. Run it again.")
            runs.setdefault(arm["name"], {})[seed] = run
    if lost:
        raise ValueError(f"{args.runs} has no {', '.join(lost)}. Run preferences.py first, or lower --seeds.")
    commits = sorted({run["commit"] for of_seed in runs.values() for run in of_seed.values()})
    shared = {
        "command": f"python benchmarks/preferences.py --seeds {args.seeds}",
        "commit": ", ".join(commits),
        "seed": list(range(args.seeds)),
    }
    world = spec["world"]
    settings = (
        f"Every arm: {world['epochs']} times over its rows, {world['batch_size']} a step, learning rate "
        f"{world['learning_rate']:g}, not tuned; {world['test_prompts']} prompts with four answers per test set, "
        "pairs whose golds differ. Intervals: 95%, t over seeds."
    )
    tables = {
        "arms": {
            **arm_table(runs),
            "title": f"Reward models on the toy world, {args.seeds} seeds",
            "notes": [settings, "NLL: nats per token of the best of four answers, under the language-modelling head."],
        },
        "differences": {
            **difference_table(runs, report["comparisons"]),
            "title": "Reward models on the toy world: paired differences",
            "notes": [settings, "Undecided: the interval contains 0."],
        },
        "ensemble": {
            **ensemble_table(runs, report["members"], report["single"]),
            "title": f"An ensemble of {len(report['members'])}: spread against true error",
            "notes": [settings, "Members and gold: mean 0 and deviation 1 on the reference answers, each by itself."],
        },
    }
    for name, table in tables.items():
        table |= shared
        print(f"\n{table['title']}")
        for row in (table["columns"], *table["rows"]):
            print(" | ".join(map(str, row)))
        if args.results is not None:
            (args.results / f"preferences_{name}.json").write_text(json.dumps(table, indent=2) + "\n")
    if args.plot is not None:
        plot(runs, report["curves"], report["members"], str(args.plot))


if __name__ == "__main__":
    sys.exit(main())
