"""`evaluation.md` and the self-contained `report.html` of an evaluation."""

import base64
import html
import io
from pathlib import Path
from typing import Any


Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2rem; font-size: 1.2rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { padding: .3rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid #dde3ea; }
td + td { font-variant-numeric: tabular-nums; } td.text { white-space: pre-wrap; min-width: 14rem; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; } img { max-width: 100%; } .note { color: #55636f; }
"""

# Nothing is fetched and no script runs, whatever a completion holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_evaluation(
    folder: Path, found: dict[str, Any], samples: list[dict[str, Any]], num_samples: int = 20
) -> None:
    """
    Write both files.

    Args:
        folder (`Path`):
            Where to.
        found (`dict`):
            What `run_evaluation` gives.
        samples (`list[dict]`):
            Per prompt `prompt`, `answer`, `baseline` and `scores`; empty for a reward model.
        num_samples (`int`, *optional*, defaults to 20):
            How many of them are shown.
    """
    tables = reward_tables(found) if found["kind"] == "reward model" else policy_tables(found)
    title = f"Evaluation of the {found['kind']} {found['model']}"
    facts = [f"Data: {found['dataset']}. Seed {found['seed']}, {found['seconds']:.0f} seconds."]
    if found["kind"] == "reward model":
        facts.append(f"Rows: {found['rows']}. Pairs: {found['pairs']}.")
        facts.append(
            "Accuracy: equal scores and ties one half; 95% Wilson interval. `longer`: always the longer answer."
        )
    else:
        facts.append(
            f"{found['prompts']} prompts; samples: {found['sampling']}. Intervals: 95%, 1.96 standard errors."
        )
    lines = [f"# {title}", "", *facts]
    for name, columns, rows in tables:
        lines += ["", f"## {name}", "", _row(columns), _row(["---"] * len(columns)), *map(_row, rows)]
    (folder / "evaluation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p class=note>{html.escape(fact)}</p>" for fact in facts)]
    for name, columns, rows in tables:
        body += [f"<h2>{html.escape(name)}</h2>", _html_table(columns, rows)]
    body += [
        f"<figure><figcaption>{html.escape(name)}</figcaption><img alt='{html.escape(name)}' src='{uri}'></figure>"
        for name, uri in _figures(found)
    ]
    if samples:
        body += ["<h2>Answers side by side</h2>", _samples_table(samples[:num_samples])]
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def reward_tables(found: dict[str, Any]) -> list[Table]:
    """Accuracy, the three Hs, length and calibration."""

    def line(name: str, numbers: dict[str, Any]) -> list[str]:
        return [name, _interval(numbers, "accuracy"), f"{numbers['longer']:.3f}", str(numbers["pairs"])]

    columns = ["", "accuracy", "longer", "pairs"]
    tables: list[Table] = [
        (
            "Accuracy",
            columns,
            [line("all", found["all"]), *(line(name, numbers) for name, numbers in found["sources"].items())],
        )
    ]
    if found["three_h"]:
        rows = [line(name, numbers) for name, numbers in found["three_h"].items()]
        tables.append(("Helpful, honest, harmless", columns, rows))
    length = {**found["length"], "expected calibration error (10 bins)": found["calibration"]["ece"]}
    tables.append(
        ("Length and calibration", ["measure", "value"], [[_label(k), f"{v:.3f}"] for k, v in length.items()])
    )
    return tables


def policy_tables(found: dict[str, Any]) -> list[Table]:
    """Scores and win rates, distance from the reference, and what the answers are like."""
    tables: list[Table] = []
    if found["scores"]:
        has_baseline = "baseline_scores" in found
        columns = ["reward", "policy", *(["baseline"] if has_baseline else [])]
        rows = []
        for name, numbers in found["scores"].items():
            row = [name, _interval(numbers, "mean")]
            if has_baseline:
                row.append(_interval(found["baseline_scores"][name], "mean"))
            rows.append(row)
        tables.append(("Scores", columns, rows))
    if found.get("win_rate"):
        rows = []
        for name, numbers in found["win_rate"].items():
            extra = [f"{numbers[k]:.3f}" if k in numbers else "-" for k in ("disagreement", "position_bias")]
            rows.append([name, _interval(numbers, "win_rate"), str(numbers["prompts"]), *extra])
        columns = ["by", "win rate over the baseline", "prompts", "disagreement of the orders", "position bias"]
        tables.append(("Win rate", columns, rows))
    if "distance" in found:
        rows = [
            ["KL to the reference, nats per answer", _interval(found["distance"], "kl", low="kl_low", high="kl_high")],
            ["KL, nats per token", f"{found['distance']['kl_per_token']:.4f}"],
            ["perplexity of the answers under the reference", f"{found['distance']['reference_perplexity']:.2f}"],
        ]
        tables.append(("Distance from the reference", ["measure", "value"], rows))
    columns = ["measure", "policy"]
    others = found.get("baseline_answers")
    if others is not None:
        columns.append("baseline")
    rows = []
    for key, value in found["answers"].items():
        row = [_label(key), f"{value:.3f}"]
        if others is not None:
            row.append(f"{others[key]:.3f}")
        rows.append(row)
    tables.append(("The answers", columns, rows))
    return tables


def _figures(found: dict[str, Any]) -> list[tuple[str, str]]:
    from matplotlib.figure import Figure

    if found["kind"] != "reward model":
        return []
    figures = []
    figure = Figure(figsize=(4.6, 4), layout="constrained")
    axes = figure.subplots()
    bins = found["calibration"]["bins"]
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.plot([b["predicted"] for b in bins], [b["observed"] for b in bins], "o-")
    axes.set(xlabel="predicted P(first is better)", ylabel="share labelled so", xlim=(0, 1), ylim=(0, 1))
    figures.append(("Reliability", _uri(figure)))
    parts = {"all": found["all"], **found["sources"]}
    figure = Figure(figsize=(6, 0.5 * len(parts) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = list(parts)[::-1]
    middle = [parts[name]["accuracy"] for name in names]
    bars = [
        [m - parts[n]["low"] for m, n in zip(middle, names, strict=True)],
        [parts[n]["high"] - m for m, n in zip(middle, names, strict=True)],
    ]
    axes.errorbar(middle, range(len(names)), xerr=bars, fmt="o", capsize=3, label="reward model")
    axes.plot([parts[name]["longer"] for name in names], range(len(names)), "x", color="grey", label="longer")
    axes.axvline(0.5, color="grey", linewidth=0.8)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="accuracy", xlim=(0, 1))
    axes.legend(frameon=False)
    figures.append(("Accuracy by source", _uri(figure)))
    return figures


def _uri(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _samples_table(samples: list[dict[str, Any]]) -> str:
    has_baseline = samples[0]["baseline"] is not None
    names = list(samples[0]["scores"])
    columns = ["prompt", "policy", *(["baseline"] if has_baseline else []), *names]
    rows = []
    for sample in samples:
        texts = [sample["prompt"], sample["answer"], *([sample["baseline"]] if has_baseline else [])]
        cells = [f"<td class=text>{html.escape(text)}</td>" for text in texts]
        cells += [f"<td>{sample['scores'][name]:.3f}</td>" for name in names]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    return f"<div class=wide><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _html_table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _interval(numbers: dict[str, Any], key: str, low: str = "low", high: str = "high") -> str:
    return f"{numbers[key]:.3f} [{numbers[low]:.3f}, {numbers[high]:.3f}]"


def _label(key: str) -> str:
    return key.replace("_", " ")
