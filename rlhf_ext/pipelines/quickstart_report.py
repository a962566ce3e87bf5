"""The table and the self-contained HTML page of a quickstart run."""

import html
import os
from typing import Any

from ..models.generation import Samples
from . import report_page


# Label, key, and number format of each row of the table.
ROWS = [
    ("gold reward", "gold_reward", ".3f"),
    ("helpful", "helpful", ".3f"),
    ("honest", "honest", ".3f"),
    ("harmless", "harmless", ".3f"),
    ("grammatical", "grammatical", ".3f"),
    ("KL to SFT (nats per answer)", "kl", ".2f"),
    ("length (tokens)", "length", ".1f"),
    ("truncated", "truncated", ".3f"),
    ("distinct bigrams", "distinct_2", ".3f"),
]

# Title, and the series of one plot: (label, key of the history).
PLOTS = [
    ("Gold reward of the rollouts (PPO never sees it)", [("gold", "gold")]),
    ("Score of the reward model", [("score", "reward"), ("score - kl_coef x KL", "rlhf_reward")]),
    ("KL to the reference, nats per answer", [("KL", "kl")]),
    ("Value loss", [("value loss", "value_loss")]),
    ("Explained variance of the critic", [("explained variance", "value/explained_variance")]),
]


def summary_lines(metrics: dict[str, Any]) -> list[str]:
    """The sentences below the table."""
    low, high = metrics["gain_interval"]
    return [
        f"Gap to the best possible gold reward ({metrics['gold_reward_max']:.1f}) closed: {metrics['gap_closed']:.0%}",
        f"Gain {metrics['gain']:.3f}, 95% interval [{low:.3f}, {high:.3f}]; "
        f"win rate over SFT {metrics['win_rate']:.3f} (ties half)",
        f"Reward model: {metrics['reward_accuracy']:.3f} of held-out pairs ordered as gold orders them",
        f"{metrics['seconds']:.0f} seconds, seed {metrics['seed']}",
    ]


def print_table(metrics: dict[str, Any]) -> None:
    """Print SFT and PPO side by side."""
    print(f"\n{'':<30}{'SFT':>9}{'PPO':>9}")
    for label, key, form in ROWS:
        print(f"{label:<30}{metrics['sft'][key]:>9{form}}{metrics['ppo'][key]:>9{form}}")
    print("\n" + "\n".join(summary_lines(metrics)), flush=True)


def _plot(series: list[tuple[str, list[float], list[float]]], x_label: str, dots: bool = False) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for label, x, y in series:
        axes.plot(x, y, "o" if dots else "-", markersize=3, label=label)
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(frameon=False)
    return figure


def _figures(history: list[dict[str, float]]) -> list[tuple[str, Any]]:
    figures = []
    for title, series in PLOTS:
        lines = []
        for label, key in series:
            points = [(update, entry[key]) for update, entry in enumerate(history, 1) if entry.get(key) is not None]
            if points:
                lines.append((label, *map(list, zip(*points, strict=True))))
        if lines:
            figures.append((title, _plot(lines, "update")))
    if history:
        kl = [entry["kl"] for entry in history]
        frontier = [("gold", kl, [entry["gold"] for entry in history])]
        figures.append(("Gold reward against KL", _plot(frontier, "KL, nats per answer", dots=True)))
    return figures


def write_report(
    output_dir: str,
    metrics: dict[str, Any],
    history: list[dict[str, float]],
    before: Samples,
    after: Samples,
    gold_before: list[float],
    gold_after: list[float],
    num_samples: int = 20,
) -> str:
    """Write `report.html` and return its path.

    Args:
        history (`list[dict]`):
            One entry per PPO update.
        before, after ([`Samples`]):
            Completions of SFT and PPO on the same prompts, with the gold score of each.
    """
    table = "".join(
        f"<tr><td>{label}</td><td class=number>{metrics['sft'][key]:{form}}</td>"
        f"<td class=number>{metrics['ppo'][key]:{form}}</td></tr>"
        for label, key, form in ROWS
    )

    def cell(text: str, gold: float) -> str:
        tone = "good" if gold == metrics["gold_reward_max"] else "bad" if gold == 0 else ""
        return f"<td>{html.escape(text)}</td><td class='number {tone}'>{gold:.2f}</td>"

    samples = "".join(
        f"<tr><td>{html.escape(before.prompts[i])}</td>{cell(before.texts[i], gold_before[i])}"
        f"{cell(after.texts[i], gold_after[i])}</tr>"
        for i in range(min(num_samples, len(before.texts)))
    )
    body = f"""<p class="note">SFT on a mixed corpus, 4 completions a prompt, the best one marked by a simulated
labeller, a K-way reward model on the labels, PPO driven by that reward model and by a penalty for an answer that does
not end. Gold is the true reward: only the labeller and this page know it. All numbers are on held-out prompts.</p>
<table><tr><th></th><th>SFT</th><th>PPO</th></tr>{table}</table>
<p>{"<br>".join(html.escape(line) for line in summary_lines(metrics))}</p>
<h2>PPO, update by update</h2>{report_page.plots(_figures(history))}
<h2>Samples side by side</h2><div class="wide">
<table><tr><th>prompt</th><th>SFT</th><th>gold</th><th>PPO</th><th>gold</th></tr>{samples}</table></div>"""
    page = report_page.page(f"Classic RLHF on the toy world, seed {metrics['seed']}", body)
    path = os.path.join(output_dir, "report.html")
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)
    return path
