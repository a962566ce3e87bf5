"""What an evaluation found, as JSON, Markdown and a self-contained HTML page."""

import html
import json
import math
import os
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ..data.texts import text_of
from ..functional.diversity import best_of_n_kl, reward_kl_frontier
from . import report_page
from .evaluation_policy import PolicyEvaluation


PAIR_COLUMNS = ("pairs", "prompts", "accuracy", "decisive", "always longer", "without length", "r(score, length)")
PAIR_NOTE = (
    "Accuracy: share of pairs whose better answer scores higher, equal scores and tied labels one half; in brackets "
    "95% Wilson intervals that count prompts, not pairs. Decisive: without tied labels; always longer: taking the "
    "longer answer of these. Without length: accuracy of what a line through the origin, from length difference to "
    "score difference, leaves over."
)
BEST_OF = (2, 4, 16, 64)


def write_reward_report(output_dir: str, results: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """
    Write what [`~rlhf_ext.pipelines.evaluation.evaluate_reward_model`] found of each model.

    Returns:
        `str`: the Markdown, to be printed.
    """
    sections, figures = [], []
    for result in results:
        name, rows = result["model"], result["rows"]
        counts = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in rows.items())
        lines = [("all", result["overall"]), *result["sources"].items()]
        sections.append((f"{name}: accuracy", counts, ("", *PAIR_COLUMNS), [pair_row(*line) for line in lines]))
        if "ensemble" in result:
            sections += ensemble_sections(name, result)
        if result["three_h"]:
            unmapped = result["unmapped"]
            note = f"In no line: {', '.join(unmapped)}; --source_map gives them one." if unmapped else ""
            sections.append(
                (
                    f"{name}: helpful, honest, harmless",
                    note,
                    ("", *PAIR_COLUMNS),
                    [pair_row(*line) for line in result["three_h"].items()],
                )
            )
        bins = result["calibration"]["bins"]
        sections.append(
            (
                f"{name}: calibration",
                f"Expected calibration error {result['calibration']['ece']:.3f}; every pair in both orders.",
                ("probability", "entries", "predicted", "observed"),
                [
                    [f"{b['low']:.2f} to {b['high']:.2f}", str(b["count"]), _n(b["predicted"]), _n(b["observed"])]
                    for b in bins
                ],
            )
        )
        figures.append((f"{name}: reliability, ECE {result['calibration']['ece']:.3f}", reliability_plot(bins)))
        figures.append((f"{name}: accuracy by source, always longer beside it", accuracy_plot(lines)))
    found = {"reward_models": list(results), "settings": settings}
    return _write(output_dir, "Reward model evaluation", PAIR_NOTE, sections, figures, found)


def write_policy_report(
    output_dir: str,
    policies: Sequence[PolicyEvaluation],
    baseline: PolicyEvaluation | None,
    wins: dict[str, dict[str, dict[str, float]]],
    settings: dict[str, Any],
    num_shown: int = 20,
) -> str:
    """
    Write what was measured of policies.

    Args:
        policies, baseline ([`PolicyEvaluation`]):
            The baseline has a column of its own, and its samples stand beside the first policy's.
        wins (`dict`):
            By policy and then by who compared, as [`~rlhf_ext.functional.pairs.win_rate`] gives it.

    Returns:
        `str`: the Markdown, to be printed.
    """
    shown = [*policies, *([baseline] if baseline is not None else [])]
    names = list(dict.fromkeys(key for e in shown for key in e.metrics if not key.endswith(("_se", "_std"))))
    rows = [[name, *(_with_error(e.metrics, name) for e in shown)] for name in names]
    sections = [("Measures", "", ("", *(e.name for e in shown)), rows)]
    if wins:
        columns = ("policy", "by", "win rate", "prompts", "disagreement", "position bias")
        lines = [
            [
                policy,
                by,
                _interval(w, "win_rate"),
                str(w["prompts"]),
                _n(w.get("disagreement")),
                _n(w.get("position_bias")),
            ]
            for policy, of_policy in wins.items()
            for by, w in of_policy.items()
        ]
        note = f"Against {baseline.name} on the same prompts, ties one half; 95% intervals over prompts."
        sections.append(("Win rate", note, columns, lines))
    figures = [
        ("Length of answers, tokens", _histogram({e.name: list(map(len, e.samples.completion_ids)) for e in shown}))
    ]
    figures += [
        (f"Score by {name}", _histogram({e.name: e.scores[name] for e in shown})) for name in policies[0].scores
    ]
    found: dict[str, Any] = {
        "policies": {e.name: e.metrics for e in policies},
        "baseline": None if baseline is None else {baseline.name: baseline.metrics},
        "wins": wins,
        "settings": settings,
    }
    if all("kl" in e.metrics for e in shown) and policies[0].scores:
        found["frontier"] = {}
        for name in policies[0].scores:
            points = [(e.metrics["kl"], e.metrics[f"score/{name}"]) for e in shown]
            kept = reward_kl_frontier(points)
            found["frontier"][name] = [shown[place].name for place in kept]
            figures.append((f"Score by {name} against KL", frontier_plot([e.name for e in shown], points, kept)))
    samples = _samples(policies[0], baseline, num_shown)
    note = "Means over answers, ± one standard error over prompts where given; docs/measures.md has the formulas."
    return _write(output_dir, "Policy evaluation", note, sections, figures, found, samples)


def pair_row(name: str, line: dict[str, Any]) -> list[str]:
    """The cells of one line of the accuracy tables."""
    return [
        name,
        str(line["pairs"]),
        str(line["prompts"]),
        _interval(line, "accuracy"),
        _interval(line, "decisive_accuracy", "decisive_"),
        _interval(line, "longer_accuracy", "longer_"),
        _n(line["accuracy_length_regressed"]),
        _n(line["length_correlation"]),
    ]


def ensemble_sections(name: str, result: dict[str, Any]) -> list[tuple]:
    """The members of an ensemble beside it, and whether they disagree where their mean is wrong."""
    found = result["ensemble"]
    rows = [pair_row("mean of the members", result["overall"]) + [_n(result["calibration"]["ece"])]]
    rows += [pair_row(member, line) + [_n(line["ece"])] for member, line in found["members"].items()]
    unit = f", over {found['normalized_over']}" if found["normalized_over"] else ""
    note = f"The score is the mean of the members, each normalised on its own{unit}; ECE is that of the mean of the "
    doubt = [
        [
            _n(found["spread_mean"]),
            _n(found["gap_spread_mean"]),
            f"{found['errors']} of {found['judged']}",
            _n(found["spread_auroc"]),
            _n(found["closeness_auroc"]),
        ]
    ]
    header = ("spread of scores", "of differences", "errors", "AUROC of spread", "AUROC of closeness")
    of_doubt = (
        "Spread: standard deviation over the members, in the unit of the score. AUROC: chance that a pair the mean "
        "has wrong has a larger spread of differences than one it has right, 0.5 knows nothing; beside it the same of "
        "a small mean difference, which needs no ensemble. Pairs without a tied label or equal scores."
    )
    return [
        (f"{name}: members", note + "preferences they predict.", ("", *PAIR_COLUMNS, "ECE"), rows),
        (f"{name}: doubt", of_doubt, header, doubt),
    ]


def reliability_plot(bins: Sequence[dict[str, float]]) -> Figure:
    """Observed share over predicted probability, a dot's area growing with its pairs; the diagonal is calibrated."""
    figure, axes = _axes("predicted P(first is better)", "observed")
    most = max(b["count"] for b in bins)
    axes.plot([0, 1], [0, 1], "--", color="#98a4b0", linewidth=1)
    axes.plot([b["predicted"] for b in bins], [b["observed"] for b in bins], "-", linewidth=1)
    axes.scatter(
        [b["predicted"] for b in bins], [b["observed"] for b in bins], s=[10 + 90 * b["count"] / most for b in bins]
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    return figure


def accuracy_plot(lines: Sequence[tuple[str, dict[str, Any]]]) -> Figure:
    """Decisive accuracy with its interval, and always longer, per line."""
    lines = [(name, line) for name, line in lines if line["decisive_accuracy"] is not None]
    figure, axes = _axes("accuracy on decisive pairs", "", height=max(2.2, 1.1 + 0.32 * len(lines)))
    for y, (_, line) in enumerate(reversed(lines)):
        p, low, high = (line[f"decisive_{key}"] for key in ("accuracy", "low", "high"))
        axes.errorbar(
            [p],
            [y],
            xerr=[[max(p - low, 0)], [max(high - p, 0)]],
            fmt="o",
            color="C0",
            label="model" if y == 0 else None,
        )
        axes.plot([line["longer_accuracy"]], [y], "x", color="C1", label="always longer" if y == 0 else None)
    axes.axvline(0.5, color="#98a4b0", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(lines)), [name if len(name) <= 28 else f"{name[:27]}…" for name, _ in reversed(lines)])
    axes.set_xlim(0, 1)
    if lines:
        figure.legend(frameon=False, fontsize=8, loc="outside upper right", ncols=2)
    return figure


def frontier_plot(names: Sequence[str], points: Sequence[tuple[float, float]], kept: Sequence[int]) -> Figure:
    """Policies by KL and score; the line joins those that no other beats, dotted lines are the KL of best of n."""
    figure, axes = _axes("KL to the reference, nats per answer", "score")
    axes.plot([points[i][0] for i in kept], [points[i][1] for i in kept], "-", linewidth=1)
    for name, (kl, score) in zip(names, points, strict=True):
        axes.plot([kl], [score], "o", label=name)
    last = max(kl for kl, _ in points)
    for n in BEST_OF:
        if best_of_n_kl(n) <= 1.2 * max(last, best_of_n_kl(2)):
            axes.axvline(best_of_n_kl(n), color="#98a4b0", linewidth=1, linestyle=":")
            axes.annotate(
                f"best of {n}", (best_of_n_kl(n), 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=7
            )
    axes.legend(frameon=False, fontsize=8)
    return figure


def _histogram(series: dict[str, list[float]]) -> Figure:
    figure, axes = _axes("", "answers")
    every = [value for values in series.values() for value in values]
    low, high = min(every), max(every)
    edges = [low + (high - low or 1.0) * i / 20 for i in range(21)]
    for name, values in series.items():
        axes.hist(values, bins=edges, histtype="step", label=name)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _axes(x_label: str, y_label: str, height: float = 3.2) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _samples(policy: PolicyEvaluation, baseline: PolicyEvaluation | None, num_shown: int) -> str:
    shown = [policy, *([baseline] if baseline is not None else [])]
    name = next(iter(policy.scores), None)
    header = ["prompt"]
    for e in shown:
        header += [e.name] + ([f"score by {name}"] if name else [])
    rows = []
    for place in range(0, len(policy.samples.texts), policy.num_samples):
        row = [text_of(policy.samples.prompts[place])]
        for e in shown:
            row += [e.samples.texts[place]] + ([_n(e.scores[name][place])] if name else [])
        rows.append(row)
    step = 2 if name else 1
    text = (0, *range(1, len(header), step))
    return "<h2>Samples</h2>" + report_page.table(header, rows[:num_shown], text=text)


def _write(
    output_dir: str,
    title: str,
    note: str,
    sections: Sequence[tuple[str, str, Sequence[str], Sequence[Sequence[str]]]],
    figures: Sequence[tuple[str, Figure]],
    found: dict[str, Any],
    below: str = "",
) -> str:
    os.makedirs(output_dir, exist_ok=True)
    markdown, body = [f"# {title}", note], [f'<p class="note">{html.escape(note)}</p>']
    for heading, remark, header, rows in sections:
        markdown += [f"## {heading}"] + ([remark] if remark else [])
        markdown.append("\n".join(map(_line, [header, ["---"] * len(header), *rows])))
        remark = f"<p>{html.escape(remark)}</p>" if remark else ""
        body.append(f"<h2>{html.escape(heading)}</h2>{remark}{report_page.table(header, rows)}")
    body += ["<h2>Plots</h2>", report_page.plots(figures), below]
    settings = json.dumps(_plain(found["settings"]), indent=1)
    body.append(f"<h2>Settings</h2><pre>{html.escape(settings)}</pre>")
    text = "\n\n".join(markdown) + "\n"
    contents = {
        "evaluation.json": json.dumps(_plain(found), indent=2, ensure_ascii=False) + "\n",
        "evaluation.md": text,
        "report.html": report_page.page(title, "\n".join(body)),
    }
    for name, content in contents.items():
        with open(os.path.join(output_dir, name), "w", encoding="utf-8") as file:
            file.write(content)
    return text


def _line(cells: Sequence[str]) -> str:
    escaped = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
    return "| " + " | ".join(escaped) + " |"


def _plain(value: Any) -> Any:
    """What JSON knows: NaN and infinity, which it does not, become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _n(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _interval(line: dict[str, Any], key: str, prefix: str = "") -> str:
    if line[key] is None:
        return "-"
    return f"{line[key]:.3f} [{line[f'{prefix}low']:.3f}, {line[f'{prefix}high']:.3f}]"


def _with_error(metrics: dict[str, float], name: str) -> str:
    error = metrics.get(f"{name}_se")
    return _n(metrics.get(name)) + (f" ± {error:.3f}" if error is not None and math.isfinite(error) else "")
