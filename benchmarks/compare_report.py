"""Tables and plot of a finished comparison."""

import json
from pathlib import Path
from typing import Any

from compare_statistics import area, episodes_to, final_gold, interval, smoothed, verdict


Run = dict[str, Any]  # `updates` (rows) and `final` (metrics on held-out prompts)


def report(
    spec: dict[str, Any],
    tuned: dict[str, Any],
    runs: dict[str, dict[int, Run]],
    *,
    command: str,
    commit: str,
    result: Path | None,
    plot_path: Path | None,
) -> None:
    """Print both tables; write them to `result` and `result` with `_claims`, and the plot, where paths are given."""
    world, protocol = spec["world"], spec["protocol"]
    seeds = sorted(runs[protocol["subject"]])
    rates = {name: _rate(found) for name, found in tuned.items()}
    shared = {"command": command, "commit": commit, "seed": seeds}
    arms = arm_table(runs, rates, protocol)
    claims = claim_table(runs, protocol, world["episodes"])
    arms |= {"title": f"{protocol['title']}: {world['episodes']} episodes each, {len(seeds)} seeds", **shared}
    arms["notes"] = [
        f"Area: mean gold of all {world['episodes']} training episodes. Held-out gold, grammatical, KL (nats per "
        f"answer to the SFT model): {world['test_prompts']} prompts after training. Intervals: 95%, t over seeds.",
        f"Episodes to a level: mean over the seeds that reach it (how many do), by the mean of the last "
        f"{protocol['window']} training episodes.",
        f"Learning rate: the one with the largest area on seed {', '.join(map(str, spec['tuning_seeds']))}; in "
        "brackets the areas there (`--tune`). An asterisk: it stands at the edge of its grid.",
    ]
    claims |= {"title": f"{protocol['title']}: what was expected, and what decides it", **shared}
    claims["notes"] = [
        "Paired differences over seeds. Undecided: the interval contains the bound, which stands in the file of arms.",
    ]
    for table in (arms, claims):
        print(table["title"])
        for row in (table["columns"], *table["rows"]):
            print(" | ".join(map(str, row)))
    if result is not None:
        result.write_text(json.dumps(arms, indent=2) + "\n")
        result.with_name(f"{result.stem}_claims.json").write_text(json.dumps(claims, indent=2) + "\n")
    if plot_path is not None:
        plot(runs, protocol["window"], str(plot_path))


def _rate(found: dict[str, Any]) -> str:
    """A tuned learning rate, marked where it is the smallest or largest that was tried, and the grid's areas."""
    grid = sorted(found["areas"], key=float)
    best = max(grid, key=found["areas"].get)
    edge = "*" if best in (grid[0], grid[-1]) else ""
    tried = ", ".join(f"{float(rate):g}: {found['areas'][rate]:.3f}" for rate in grid)
    return f"{float(best):g}{edge} ({tried})"


def _text(values: tuple[float, float, float], digits: int = 3) -> str:
    mean, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{mean} [{low}, {high}]"


def arm_table(runs: dict[str, dict[int, Run]], rates: dict[str, Any], protocol: dict[str, Any]) -> dict[str, Any]:
    """One row per arm. `runs[arm][seed]`; every arm has the same seeds."""
    window, subject, level_of = protocol["window"], protocol["subject"], protocol["level_of"]
    seeds = sorted(runs[subject])
    levels = {seed: final_gold(runs[level_of][seed]["updates"], window) for seed in seeds}
    rows = []
    for name, of_seed in runs.items():
        reached = [episodes_to(of_seed[seed]["updates"], levels[seed], window) for seed in seeds]
        found = [episodes for episodes in reached if episodes is not None]
        areas = {seed: area(of_seed[seed]["updates"]) for seed in seeds}
        behind = [areas[seed] - area(runs[subject][seed]["updates"]) for seed in seeds]
        finals = [of_seed[seed]["final"] for seed in seeds]
        rows.append(
            [
                name,
                rates[name],
                _text(interval(list(areas.values()))),
                "-" if name == subject else _text(interval(behind)),
                _text(interval([final["gold_reward"] for final in finals])),
                f"{sum(final['grammatical'] for final in finals) / len(finals):.3f}",
                _text(interval([final["kl"] for final in finals]), 2),
                f"{round(sum(found) / len(found))} ({len(found)} of {len(seeds)})" if found else "none",
            ]
        )
    columns = ["arm", "learning rate", "area", f"area less {subject}'s, paired", "held-out gold", "grammatical"]
    columns += ["KL", f"episodes to {level_of}'s final gold"]
    return {"columns": columns, "rows": rows}


def claim_table(runs: dict[str, dict[int, Run]], protocol: dict[str, Any], budget: int) -> dict[str, Any]:
    """What was expected, each with the paired difference over seeds that decides it."""
    subject, window, margin = protocol["subject"], protocol["window"], protocol["margin"]
    seeds = sorted(runs[subject])
    rows = []
    for other in protocol["fewer_episodes_than"]:
        saved = []
        for seed in seeds:
            level = final_gold(runs[other][seed]["updates"], window)
            # Censored at the budget: an arm that never gets there has needed at least all of it.
            needed = [episodes_to(runs[name][seed]["updates"], level, window) or budget for name in (other, subject)]
            saved.append(float(needed[0] - needed[1]))
        middle, low, high = interval(saved)
        claim = f"{subject} needs fewer episodes to the final gold of {other}"
        rows.append([claim, "episodes saved", _text((middle, low, high), 0), "> 0", verdict(low, high, 0.0)])
    for other in protocol["not_behind"]:
        pairs = [area(runs[subject][s]["updates"]) - area(runs[other][s]["updates"]) for s in seeds]
        middle, low, high = interval(pairs)
        claim = f"{subject} is not behind {other} per episode"
        rows.append(
            [claim, "difference of areas", _text((middle, low, high)), f"> -{margin}", verdict(low, high, -margin)]
        )
    return {"columns": ["expected", "measure", "mean, 95% interval", "confirmed if whole interval", "verdict"]} | {
        "rows": rows
    }


def plot(runs: dict[str, dict[int, Run]], window: int, path: str) -> None:
    """Gold against episodes and against KL, means over seeds of the smoothed training curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12.5, 4.2), sharey=True)
    colours = pyplot.get_cmap("tab10")
    for number, (name, of_seed) in enumerate(runs.items()):
        curves = [smoothed(run["updates"], window) for run in of_seed.values()]
        steps = list(zip(*curves, strict=True))
        means = [[sum(point[part] for point in step) / len(step) for step in steps] for part in range(3)]
        style = {"label": name, "color": colours(number % 10), "linestyle": "-" if number < 10 else "--"}
        axes[0].plot(means[0], means[1], linewidth=1.2, **style)
        axes[1].plot(means[2], means[1], linewidth=1.2, **style)
    axes[0].set(xlabel="episodes", ylabel=f"gold, mean of the last {window} episodes")
    axes[1].set(xlabel="KL to the SFT model, nats per answer")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
