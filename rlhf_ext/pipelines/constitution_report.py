"""The page of a run of Constitutional AI: numbers of each step, and every text in between."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..data.jsonl import read_jsonl
from .constitution_evaluation import SAMPLES
from .constitution_texts import ROWS, TRANSCRIPTS
from .report_page import page, plots, table


STEPS = ("responses", "revisions", "sft", "labels", "reward", "policy", "evaluation")
NOTE = """The policy is paid for what the judge took for good, right or wrong: read the pairs below before the
scores."""
TOY_NOTE = """The toy world tests the pipeline, not a judge: its judge is a small model trained on transcripts with
faults built in. It never sees the true scores ("gold"), by which only the table below is made."""
MAX_BYTES = 16 * 2**20
"""Of the texts of one kind, with their markup: three of them are what a browser opens in seconds."""
JUDGE = {
    "pairs": "held-out pairs, one answer with an insult",
    "error": "errors, both orders averaged",
    "error_one_order": "errors, one order",
    "wrong_probability": "1 - probability of the answer without an insult",
    "position_bias": "position bias, one order (P(A) - 1/2)",
    "position_bias_swapped": "position bias, both orders averaged",
    "swap_disagreement": "winner changes with the order",
}


def write_constitution_report(folder: Path, found: dict[str, Any], num_shown: int, names: Sequence[str]) -> Path:
    """
    Write `folder/report.html`, of a run that is not finished too.

    Args:
        found (`dict`): what each finished step recorded, by its name.
        num_shown (`int`): prompts of one collapsed page of texts. All prompts are there, as long as the texts of
            a kind take at most `MAX_BYTES`; how many do not fit, and where they lie, is said.
        names (`Sequence[str]`): of the policies.
    """
    sections = [f'<p class="note">{NOTE}</p>']
    if "toy" in found:
        sections.append(f'<p class="note"><strong>{TOY_NOTE}</strong></p>')
    if missing := [step for step in STEPS if step not in found]:
        sections.append(f"<p>{len(STEPS) - len(missing)} of {len(STEPS)} steps are finished. Next: {missing[0]}.</p>")
    if "evaluation" in found:
        sections += ["<h2>Policies on held-out prompts</h2>", _policies(found["evaluation"], names)]
    sections += ["<h2>Steps</h2>", _steps(found)]
    if "toy" in found:
        rows = [[text, _number(found["toy"][key])] for key, text in JUDGE.items()]
        sections += ["<h2>The judge against the truth</h2>", table(["", "judge"], rows)]
    if "policy" in found:
        sections += ["<h2>PPO</h2>", _curves(found["policy"]["history"])]
    for step, file, title, show in (
        ("revisions", TRANSCRIPTS, "Answers and revisions", _transcript),
        ("labels", ROWS, "Pairs and labels", _pair),
        ("evaluation", SAMPLES, "Samples of the policies", _samples),
    ):
        if step in found:
            sections += _browse(title, read_jsonl(folder / step / file), num_shown, show)
    path = folder / "report.html"
    aside = folder / "_unfinished_report.html"
    aside.write_text(page("Constitutional AI", "\n".join(sections)), encoding="utf-8")
    os.replace(aside, path)
    return path


def _policies(evaluation: dict[str, Any], names: Sequence[str]) -> str:
    policies, wins = evaluation["policies"], evaluation["wins"]
    measures = list(dict.fromkeys(key for name in names for key in policies[name]))
    rows = [
        [key, *(_number(policies[name].get(key)) for name in names)]
        for key in measures
        if not key.endswith(("_se", "_std"))
    ]
    for score in wins[names[-1]]:
        won = [_number(wins[name][score]["win_rate"]) for name in names[1:]]
        rows.append([f"win rate by {score} against {names[0]}", "", *won])
    note = f"Means over {evaluation['prompts']} prompts; evaluation/evaluation.md has errors and intervals."
    return f'<p class="note">{note}</p>' + table(["", *names], rows)


def _steps(found: dict[str, Any]) -> str:
    rows = [
        [step, name, _number(value)]
        for step in STEPS[:-1]
        for name, value in found.get(step, {}).items()
        if isinstance(value, int | float)
    ]
    return table(["step", "number", ""], rows, text=(0, 1))


def _curves(history: Sequence[dict[str, float]]) -> str:
    figures = []
    for name, title in (("reward", "reward"), ("kl", "KL to the fine-tuned model, nats"), ("length", "tokens")):
        key = "completions/mean_length" if name == "length" else name
        points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
        if points:
            figure = Figure(figsize=(5, 3), layout="constrained")
            axes = figure.subplots()
            axes.plot(*zip(*points, strict=True))
            axes.set_xlabel("optimizer step")
            axes.grid(alpha=0.3)
            figures.append((title, figure))
    return plots(figures)


def _browse(title: str, rows: Sequence[dict[str, Any]], num_shown: int, show: Any) -> list[str]:
    """Every prompt with its texts, in pages that a browser lays out when they are opened."""
    blocks, left = [], MAX_BYTES
    for number, row in enumerate(rows, start=1):
        block = f"<details><summary>{number}. {escape(_short(row['prompt']))}</summary>{show(row)}</details>"
        left -= len(block.encode())
        if left < 0:
            break
        blocks.append(block)
    note = f"All {len(rows)} prompts."
    if len(blocks) < len(rows):
        note = (
            f"The first {len(blocks)} of {len(rows)} prompts: this page has at most {MAX_BYTES:,} bytes of them. All "
            "stand in the .jsonl file of their step."
        )
    pages = [
        f'<details class="page"><summary>{start + 1} to {min(start + num_shown, len(blocks))}</summary>'
        f"{''.join(blocks[start : start + num_shown])}</details>"
        for start in range(0, len(blocks), num_shown)
    ]
    return [f"<h2>{escape(title)}</h2>", f'<p class="note">{note}</p>', *(pages if len(pages) > 1 else blocks)]


def _transcript(row: dict[str, Any]) -> str:
    lines = [["prompt", row["prompt"]], [f"answer{_cut(row.get('truncated'))}", row["answer"]]]
    for number, step in enumerate(row["rounds"], start=1):
        lines += [
            [f"round {number}: principle", step["principle"]],
            [f"round {number}: critique", step["critique"]],
            [f"round {number}: revision{_cut(step.get('truncated'))}", step["revision"]],
        ]
    return table(["", "text"], lines, text=(0, 1))


def _pair(row: dict[str, Any]) -> str:
    first, second = row["completions"]
    one, other = row.get("truncated", (False, False))
    lines = [["prompt", row["prompt"]], [f"first{_cut(one)}", first], [f"second{_cut(other)}", second]]
    lines += [["label: P(first is better)", _number(row["target"][0])]]
    thoughts = row["thoughts"]
    for place, name in enumerate(row["principles"]):
        one, other = row["first_as_a"][place], row["second_as_a"][place]
        lines.append([f"{name}: P(A) with the first as (A)", _number(one)])
        lines.append([f"{name}: P(A) with the second as (A)", _number(other)])
        for order, thought in zip(("first", "second"), thoughts[2 * place : 2 * place + 2], strict=True):
            if thought:
                lines.append([f"{name}: thoughts with the {order} as (A)", thought])
    return table(["", "text"], lines, text=(0, 1))


def _samples(row: dict[str, Any]) -> str:
    answers = row["answers"]
    return table(["prompt", *answers], [[row["prompt"], *answers.values()]], text=range(1 + len(answers)))


def _cut(truncated: bool | None) -> str:
    """Behind the name of a text; runs of an older version do not say it."""
    return " (cut by length)" if truncated else ""


def _short(text: str, length: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}…"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"
