"""Texts of a run of the loop: answers of all rounds to the same prompts, and comparisons with their labels."""

import html
from typing import Any

from ..data.texts import text_of
from .loop_record import LoopRecord, is_number


NUM_PROMPTS = 8
NUM_COMPARISONS = 4

# A longer text is folded.
MOST_CHARACTERS, MOST_LINES = 400, 10

WON, LOST, EQUAL = "▲ wins", "▼ loses", "= ties"


def answers_section(record: LoopRecord, scorers: list[str], num_prompts: int = NUM_PROMPTS) -> str:
    """
    The first prompts, each with one answer of every round side by side.

    Args:
        scorers (`list[str]`): scores that hold for all rounds; the mark beside one says how the answer compares to the
            SFT policy's by it.

    Raises:
        ValueError: a line of a round answers another prompt than the same line of another round.
    """
    answers = {}
    for number, steps in record.rounds.items():
        rows = steps["evaluation"].rows("answers.jsonl")
        if rows:
            answers[number] = rows
    if not answers:
        return ""
    first = min(answers)
    for number, rows in answers.items():
        for place, (row, other) in enumerate(zip(rows, answers[first], strict=False), 1):
            if row.get("prompt") != other.get("prompt"):
                path = record.rounds[number]["evaluation"].folder / "answers.jsonl"
                raise ValueError(
                    f"line {place} of {str(path)!r} answers another prompt than that of round {first}, so rounds "
                    "cannot be laid side by side. Remove the step and run it again."
                )
    # Several answers to a prompt stand one after the other; the first of them is shown.
    rows = answers[first]
    places = [i for i, row in enumerate(rows) if i == 0 or row.get("prompt") != rows[i - 1].get("prompt")]
    blocks = []
    for place in places[:num_prompts]:
        base = answers[0][place] if 0 in answers and place < len(answers[0]) else None
        cards = "".join(
            _answer(number, rows[place], base, scorers) for number, rows in answers.items() if place < len(rows)
        )
        prompt = folded(text_of(rows[place].get("prompt")))
        blocks.append(
            f'<section class="prompt"><div class="asked">{prompt}</div><div class="cards">{cards}</div></section>'
        )
    note = f"The first {len(blocks)} of {len(places)} held-out prompts, the first answer to each."
    if scorers and 0 in answers:
        note += f" {WON}, {LOST}, {EQUAL}: against SFT's answer, by the score beside it."
    return f'<h2>Answers of each round, side by side</h2><p class="note">{html.escape(note)}</p>{"".join(blocks)}'


def comparisons_section(record: LoopRecord, num_shown: int = NUM_COMPARISONS) -> str:
    """A few comparisons of each round, and what their labels say; one of every kind first."""
    blocks = []
    for number in sorted(record.rounds):
        if "labels" not in record.rounds[number]:
            continue
        rows = record.rounds[number]["labels"].rows("rows.jsonl")
        if not rows:
            continue
        kinds: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            kinds.setdefault(_verdicts(row)[0], []).append(place)
        order = [places[0] for places in kinds.values()]
        order += [place for place in range(len(rows)) if place not in order]
        shown = "".join(_comparison(rows[place]) for place in sorted(order[:num_shown]))
        blocks.append(
            f"<details{' open' if not blocks else ''}><summary>Round {number}: {min(num_shown, len(rows))} of "
            f"{len(rows)} comparisons{_annotators(record.rounds[number]['labels'].result)}</summary>{shown}</details>"
        )
    return "<h2>What was compared, and how it was labelled</h2>" + "".join(blocks) if blocks else ""


def folded(text: str) -> str:
    """A text as HTML; a long one shows its beginning until it is opened."""
    body = f'<div class="words" dir="auto">{html.escape(text)}</div>'
    if len(text) <= MOST_CHARACTERS and text.count("\n") < MOST_LINES:
        return body
    start = " ".join(text[: MOST_CHARACTERS // 2].split())
    return f'<details><summary dir="auto">{html.escape(start)}…</summary>{body}</details>'


def _answer(number: int, row: dict[str, Any], base: dict[str, Any] | None, scorers: list[str]) -> str:
    scores = row.get("scores") or {}
    lines = []
    for name, score in scores.items():
        if not is_number(score):
            continue
        mark = ""
        other = ((base or {}).get("scores") or {}).get(name)
        if number and name in scorers and is_number(other):
            mark = f" {WON if score > other else LOST if score < other else EQUAL}"
        lines.append(f"{name} {score:.3f}{mark}")
    shown = "".join(f"<div>{html.escape(line)}</div>" for line in lines)
    title = "SFT" if number == 0 else f"Round {number}"
    text = folded(text_of(row.get("completion")))
    return f'<div class="card"><b>{title}</b>{text}<div class="note">{shown}</div></div>'


def _comparison(row: dict[str, Any]) -> str:
    kind, verdicts = _verdicts(row)
    completions, policies = row.get("completions") or [], row.get("policies") or []
    cards = ""
    for place, completion in enumerate(completions):
        policy = policies[place] if place < len(policies) and policies[place] else "?"
        cut = row.get("truncated") or []
        end = " (cut)" if place < len(cut) and cut[place] else ""
        verdict = verdicts[place] if place < len(verdicts) else ""
        cards += (
            f'<div class="card"><b>{html.escape(f"{policy}{end}")}</b>{folded(text_of(completion))}'
            f'<div class="note">{html.escape(verdict)}</div></div>'
        )
    votes = row.get("num_labels")
    by = f" by {row['annotator']}" if row.get("annotator") else ""
    said = f"{kind}; {votes} label{'' if votes == 1 else 's'}{by}" if votes else f"{kind}{by}"
    return (
        f'<section class="prompt"><div class="asked">{folded(text_of(row.get("prompt")))}</div>'
        f'<p class="note">{html.escape(said)}</p><div class="cards">{cards}</div></section>'
    )


def _verdicts(row: dict[str, Any]) -> tuple[str, list[str]]:
    """What kind of label a row has, and what it says of each completion."""
    size = len(row.get("completions") or [])
    if row.get("incomparable"):
        return "cannot be compared", [""] * size
    if row.get("target"):
        target = row["target"]
        if len(set(target)) == 1:
            return ("split evenly" if row.get("split") else "tie"), ["="] * size
        return "shares of the votes", [f"{'▲ ' if t == max(target) else ''}{t:.2f}" for t in target]
    if row.get("ranking"):
        places = {completion: place for place, completion in enumerate(row["ranking"], 1)}
        return "ranking", [f"{'▲ ' if places.get(k) == 1 else ''}{places.get(k, '-')}" for k in range(size)]
    if row.get("best") is not None:
        return "best", ["▲ best" if k == row["best"] else "" for k in range(size)]
    return "no label", [""] * size


def _annotators(result: dict[str, Any]) -> str:
    """Who labelled, where the step says so."""
    names = list(result.get("annotators") or {})
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return html.escape(f", labelled by {', '.join(names[:5])}{more}")
