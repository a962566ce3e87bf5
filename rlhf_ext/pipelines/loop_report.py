"""One self-contained page over all rounds of a run of the loop."""

import html
import json
import os
from pathlib import Path
from typing import Any

from ..data.texts import without_passwords
from ..feedback.database import shown_location
from . import report_page
from .loop_record import STEPS, LoopRecord, is_number, read_loop
from .loop_report_plots import function_scorers, policy_plots, round_plots
from .loop_report_texts import answers_section, comparisons_section


NOTE = (
    "Each round samples answers, has some compared, fits the reward model on all labels so far, and trains the policy "
    "by PPO. Every policy answers the same held-out prompts; round 0 is the SFT policy. "
    "± is one standard error over prompts, brackets are 95% intervals."
)
REWARD_NOTE = (
    "Reward models of two rounds have units of their own: compare their scores within a round, and win rates across "
    "rounds."
)

# Label and key of what an evaluation may hold besides scores and win rates.
MEASURES = [
    ("KL, nats per answer", "kl"),
    ("perplexity under the reference", "perplexity"),
    ("length, tokens", "length_mean"),
    ("answers that end by themselves", "eos_rate"),
    ("insults", "insult_rate"),
]


def _accuracy(found: dict[str, Any]) -> str:
    """Accuracy with its interval: of a handful of rows it says little."""
    text, interval = number_text(found.get("accuracy")), found.get("interval")
    return f"{text} [{number_text(interval[0])}, {number_text(interval[1])}]" if interval else text


def write_loop_report(folder: str | Path, output: str | Path | None = None) -> str:
    """
    Write the page of a run, finished or not.

    Args:
        folder (`str` or `Path`): of the run.
        output (`str` or `Path`, *optional*): the HTML file; `report.html` of the run if not given.

    Returns:
        `str`: the path of the page.

    Raises:
        ValueError: `folder` is no run of the loop, or a file of it is damaged.
    """
    record = read_loop(folder)
    path = Path(output) if output is not None else record.folder / "report.html"
    if path.is_dir():
        raise ValueError(f"`output` {str(path)!r} is a folder. Give the name of an HTML file.")
    page = loop_page(record)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    # Half of a surrogate pair, which JSON allows, has no UTF-8.
    aside.write_text(page, encoding="utf-8", errors="backslashreplace")
    aside.replace(path)
    return str(path)


def loop_page(record: LoopRecord) -> str:
    """The page as text."""
    plots = round_plots(record)
    curves = policy_plots(record)
    function = function_scorers(record)
    parts = [
        f'<p class="note">{html.escape(NOTE)}</p>',
        f"<p>{html.escape(progress(record))}</p>",
        "<h2>What was asked</h2>" + settings_section(record.settings),
        "<h2>Rounds</h2>" + rounds_table(record) + f'<p class="note">{html.escape(REWARD_NOTE)}</p>',
        "<h2>Steps</h2>" + steps_table(record),
        "<h2>Over rounds</h2>" + report_page.plots(plots) if plots else "",
        "<h2>PPO of each round</h2>" + report_page.plots(curves) if curves else "",
        answers_section(record, function),
        comparisons_section(record),
    ]
    return report_page.page(f"The loop: {record.folder.resolve().name}", "\n".join(parts))


def progress(record: LoopRecord) -> str:
    """How far the run is, and what comes next."""
    missing = record.open_steps()
    done = sum(all(s.state == "finished" for s in steps.values()) for n, steps in record.rounds.items() if n)
    said = f"{done} of {len(record.rounds) - 1} rounds are finished."
    if missing:
        number, step = missing[0]
        state = record.rounds[number][step].state
        how = "started, not finished" if state == "started" else "not started"
        said += f" Next: round {number}, {step} ({how}). Steps missing: {len(missing)}."
    return said


def settings_section(settings: dict[str, Any]) -> str:
    """
    What differs from the defaults, loop and model in one table; the rest folded. Passwords inside URLs are left out.

    A run of a version that wrote no defaults shows all settings of the loop, and folds those of the model.
    """
    parts = {name: part for name, part in settings.items() if isinstance(part, dict) and name != "defaults"}
    if "loop" not in parts:
        return _settings_table(settings)
    defaults = settings.get("defaults")
    if not isinstance(defaults, dict):
        folded = [(name, part) for name, part in parts.items() if name != "loop"]
        return _settings_table(parts["loop"]) + "".join(_folded(name, part) for name, part in folded)
    asked, rest = {}, ""
    for name, part in parts.items():
        usual = defaults.get(name) if isinstance(defaults.get(name), dict) else {}
        nothing = (None, [], {})
        odd = {
            flag
            for flag, value in part.items()
            if value != usual.get(flag) and not (value in nothing and usual.get(flag) in nothing)
        }
        asked |= {flag: value for flag, value in part.items() if flag in odd}
        rest += _folded(f"{name}: flags at their defaults", {f: v for f, v in part.items() if f not in odd})
    return _settings_table(asked, all_of_them=True) + rest


def rounds_table(record: LoopRecord) -> str:
    """Measures down, rounds across."""
    labels, rewards, chosen = record.results("labels"), record.results("reward"), record.results("selection")
    evaluations = record.results("evaluation")
    rounds = sorted(record.rounds)
    lines: list[tuple[str, dict[int, str]]] = []
    total, so_far = 0, {}
    for number in sorted(labels):
        total += labels[number].get("labels") or 0
        so_far[number] = str(total)
    lines.append(("labels so far", so_far))
    # Of the asynchronous mode, in which labels and reward models go on arriving.
    trained = {n: found for n, found in record.results("policy").items() if "reward_versions" in found}
    given = {n: _count((found.get("labels") or {}).get("labels")) for n, found in trained.items()}
    lines.append(("labels given while the policy trained", given))
    lines.append(
        ("reward models, the first one among them", {n: _count(f["reward_versions"]) for n, f in trained.items()})
    )
    lines.append(
        ("rollouts scored with labels behind", {n: _count(f.get("stale_rollouts")) for n, f in trained.items()})
    )
    for name in ("mean", "selected"):
        shown = {n: number_text(found.get(f"disagreement_{name}")) for n, found in chosen.items()}
        lines.append((f"ensemble's disagreement, {'all samples' if name == 'mean' else 'those selected'}", shown))
    shown = {n: _count(found.get("split")) for n, found in labels.items() if found.get("split")}
    lines.append(("comparisons on which annotators split evenly", shown))
    for name in ("ties", "incomparable"):
        lines.append(
            (f"{name} among the labels of the round", {n: _count(found.get(name)) for n, found in labels.items()})
        )
    for name in ("percent", "alpha"):
        # By each question too, where a round has several: pairs and rankings are no one number.
        by_question = {n: found.get("agreement_by_question") or {} for n, found in labels.items()}
        several = [question for found in by_question.values() if len(found) > 1 for question in found]
        for question in dict.fromkeys(several):
            key = name if name == "percent" else "alpha_nominal"
            shown = {n: number_text((found.get(question) or {}).get(key)) for n, found in by_question.items()}
            kind = "share of pairs" if name == "percent" else "Krippendorff's alpha"
            lines.append((f"agreement on {question}, {kind}", shown))
        shown = {n: number_text((found.get("agreement") or {}).get(name)) for n, found in labels.items()}
        lines.append(("agreement, share of pairs" if name == "percent" else "agreement, Krippendorff's alpha", shown))
    lines.append(
        ("labels that agree with gold", {n: number_text(found.get("gold_agreement")) for n, found in labels.items()})
    )
    lines.append(("reward model: held-out accuracy", {n: _accuracy(found) for n, found in rewards.items()}))
    lines.append(("reward model: held-out rows", {n: _count(found.get("num_rows")) for n, found in rewards.items()}))
    newest = {n: found["last_reward"] for n, found in trained.items() if "last_reward" in found}
    lines.append(("last reward model: held-out accuracy", {n: _accuracy(found) for n, found in newest.items()}))
    lines.append(("last reward model: held-out rows", {n: _count(f.get("num_rows")) for n, f in newest.items()}))
    keys = list(dict.fromkeys(key for found in evaluations.values() for key in found))
    scores = [key for key in keys if key.startswith("score/") and not key.endswith("_se")]
    diversity = [key for key in keys if key.startswith(("per_input_", "across_input_"))]
    measures = [(f"score by {key.removeprefix('score/')}", key) for key in scores]
    measures += MEASURES + [(f"diversity, {key.replace('_', ' ')}", key) for key in diversity]
    wins = {n: found.get("win_rate") or {} for n, found in evaluations.items()}
    for name in dict.fromkeys(name for found in wins.values() for name in found):
        shown = {n: _interval(found[name]) for n, found in wins.items() if name in found}
        lines.append((f"win rate over SFT by {name}", shown))
    lines += [(label, {n: _with_error(found, key) for n, found in evaluations.items()}) for label, key in measures]
    header = ["", *("SFT" if number == 0 else f"round {number}" for number in rounds)]
    rows = [[label, *(shown.get(n, "-") for n in rounds)] for label, shown in lines if set(shown.values()) - {"-"}]
    return report_page.table(header, rows) if rows else "<p>Nothing is measured yet.</p>"


def steps_table(record: LoopRecord) -> str:
    """Seconds of each step, and which are missing."""

    def cell(number: int, name: str) -> str:
        step = record.rounds[number].get(name)
        if step is None:
            return ""
        return f"{step.seconds:.0f} s" if step.state == "finished" and step.seconds is not None else step.state

    rounds = sorted(record.rounds)
    rows = [[name, *(cell(number, name) for number in rounds)] for name in STEPS]
    totals = {n: [s.seconds for s in record.rounds[n].values() if s.seconds is not None] for n in rounds}
    rows.append(["together", *(f"{sum(totals[n]):.0f} s" if totals[n] else "-" for n in rounds)])
    return report_page.table(["", *("SFT" if number == 0 else f"round {number}" for number in rounds)], rows)


def number_text(value: Any) -> str:
    """A number for a table; a dash where there is none."""
    return f"{value:.3f}" if is_number(value) else "-"


def _count(value: Any) -> str:
    return str(value) if is_number(value) else "-"


def _with_error(metrics: dict[str, Any], key: str) -> str:
    error = metrics.get(f"{key}_se")
    return number_text(metrics.get(key)) + (f" ± {error:.3f}" if is_number(error) else "")


def _interval(found: dict[str, Any]) -> str:
    text = number_text(found.get("win_rate"))
    if is_number(found.get("low")) and is_number(found.get("high")):
        text += f" [{found['low']:.3f}, {found['high']:.3f}]"
    return text


def _folded(title: str, settings: dict[str, Any]) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{_settings_table(settings)}</details>"


def _settings_table(settings: dict[str, Any], all_of_them: bool = False) -> str:
    rows = []
    for name, value in settings.items():
        if all_of_them or value is not None and value != [] and value != {}:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append([name, shown_location(text) if name == "store" else without_passwords(text)])
    return report_page.table(["", ""], rows, text=(0, 1))
