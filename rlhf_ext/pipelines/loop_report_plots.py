"""Plots of a run of the loop: over its rounds, and of PPO inside each round."""

from collections.abc import Callable
from typing import Any

from .loop_record import LoopRecord, is_number


# Told apart by dash and marker too, for who sees no colours.
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"

# Title and key of PPO's history; what a run did not log is left out.
CURVES = [
    ("Score of the reward model", ("reward", "rewards")),
    ("Score less kl_coef x KL", ("rlhf_reward",)),
    ("KL to the reference, nats per answer", ("kl",)),
    ("Value loss", ("value_loss",)),
    ("Explained variance of the critic", ("value/explained_variance",)),
    ("Answers that end by themselves", ("completions/eos_rate",)),
]

Line = tuple[str, list[float], list[float], list[tuple[float, float]] | None]


def function_scorers(record: LoopRecord) -> list[str]:
    """Names of the scorers that are functions: those that score the SFT policy too, and are not the reward model."""
    return [name for name in _scorers(record) if name != "reward"]


def round_plots(record: LoopRecord) -> list[tuple[str, Any]]:
    """Figures over rounds, with their titles."""
    evaluations, labels = record.results("evaluation"), record.results("labels")
    figures: list[tuple[str, Any]] = []

    def add(title: str, lines: list[Line], y_label: str, level: float | None = None) -> None:
        lines = [line for line in lines if line[1]]
        if lines:
            figures.append((title, _figure(lines, "round", y_label, level=level, rounds=max(record.rounds))))

    functions = function_scorers(record)
    add("Scores of the answers", [_with_errors(evaluations, f"score/{n}", n) for n in functions], "score")
    add("Score by each round's own reward model", [_with_errors(evaluations, "score/reward", "reward")], "score")
    wins = {n: found.get("win_rate") or {} for n, found in evaluations.items()}
    names = dict.fromkeys(name for found in wins.values() for name in found)
    add("Win rate over SFT, 95% intervals", [_wins(wins, name) for name in names], "win rate", 0.5)
    for name in functions:
        figure = _against_reward(evaluations, name)
        if figure is not None:
            figures.append((f"Over-optimisation: {name} and reward-model score", figure))
    add("KL, nats per answer", [_with_errors(evaluations, "kl", "KL")], "KL")
    keys = dict.fromkeys(key for found in evaluations.values() for key in found)
    for key in ("per_input_", "across_input_"):
        lines = [
            _line(evaluations, name.removeprefix(key).replace("_", " "), lambda found, name=name: found.get(name))
            for name in keys
            if name.startswith(key)
        ]
        add(f"Diversity {key.replace('_', ' ').strip()}", lines, "diversity")
    add("Length of answers", [_line(evaluations, "length", lambda found: found.get("length_mean"))], "tokens")
    agreed = [
        _line(labels, label, lambda found, key=key: (found.get("agreement") or {}).get(key))
        for label, key in (("share of pairs", "percent"), ("Krippendorff's alpha", "alpha"))
    ]
    agreed.append(_line(labels, "with gold", lambda found: found.get("gold_agreement")))
    add("Agreement of labels", agreed, "agreement")
    return figures


def policy_plots(record: LoopRecord) -> list[tuple[str, Any]]:
    """PPO's curves, a line for each round."""
    histories = {}
    for number, result in record.results("policy").items():
        histories[number] = [entry for entry in result.get("history") or [] if isinstance(entry, dict)]
    keys = dict.fromkeys(key for history in histories.values() for entry in history for key in entry)
    probes = [key for key in keys if key.startswith("probe/") and key.endswith("/mean")]
    curves = CURVES + [(f"{key.split('/')[1]} of the rollouts, never paid", (key,)) for key in probes]
    figures = []
    for title, names in curves:
        lines: list[Line] = []
        for number, history in histories.items():
            key = next((name for name in names if any(name in entry for entry in history)), None)
            points = [
                (entry["step"] if is_number(entry.get("step")) else place, entry[key])
                for place, entry in enumerate(history, 1)
                if key is not None and is_number(entry.get(key))
            ]
            if points:
                lines.append((f"round {number}", [x for x, _ in points], [y for _, y in points], None))
        if lines:
            figures.append((title, _figure(lines, "step", "")))
    return figures


def _scorers(record: LoopRecord) -> list[str]:
    keys = [key for found in record.results("evaluation").values() for key in found]
    names = [key.removeprefix("score/") for key in keys if key.startswith("score/")]
    return [name for name in dict.fromkeys(names) if not name.endswith("_se")]


def _line(found: dict[int, dict[str, Any]], label: str, value: Callable[[dict[str, Any]], Any]) -> Line:
    points = [(number, value(found[number])) for number in sorted(found)]
    points = [(number, y) for number, y in points if is_number(y)]
    return label, [x for x, _ in points], [y for _, y in points], None


def _with_errors(found: dict[int, dict[str, Any]], key: str, label: str) -> Line:
    """Bars of 1.96 standard errors where every point has one."""
    _, rounds, values, _ = _line(found, label, lambda part: part.get(key))
    errors = [found[number].get(f"{key}_se") for number in rounds]
    spans = [(1.96 * e, 1.96 * e) for e in errors] if errors and all(map(is_number, errors)) else None
    return label, rounds, values, spans


def _wins(wins: dict[int, dict[str, Any]], name: str) -> Line:
    _, rounds, values, _ = _line(wins, name, lambda found: (found.get(name) or {}).get("win_rate"))
    parts = [wins[number][name] for number in rounds]
    if not all(is_number(part.get("low")) and is_number(part.get("high")) for part in parts):
        return name, rounds, values, None
    spans = [(max(v - part["low"], 0.0), max(part["high"] - v, 0.0)) for v, part in zip(values, parts, strict=True)]
    return name, rounds, values, spans


def _against_reward(evaluations: dict[int, dict[str, Any]], name: str) -> Any:
    """A function's score and the reward model's over rounds, on two axes; None unless two rounds have both."""
    _, rounds, gold, _ = _line(evaluations, name, lambda found: found.get(f"score/{name}"))
    _, scored, reward, _ = _line(evaluations, "reward", lambda found: found.get("score/reward"))
    if len(set(rounds) & set(scored)) < 2:
        return None
    figure, axes = _axes("round", name)
    axes.plot(rounds, gold, "o-", color="C0", label=f"{name} (left)")
    right = axes.twinx()
    right.plot(scored, reward, "s--", color="C1", label="reward model (right)")
    right.set_ylabel("reward-model score")
    axes.set_xticks(sorted({*rounds, *scored}))
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=2)
    return figure


def _figure(
    lines: list[Line], x_label: str, y_label: str, *, level: float | None = None, rounds: int | None = None
) -> Any:
    figure, axes = _axes(x_label, y_label)
    for place, (label, x, y, spans) in enumerate(lines):
        # Lines of rounds are dodged a little, so that their bars can be told apart.
        at = [value + 0.05 * (place - (len(lines) - 1) / 2) for value in x] if rounds is not None and spans else x
        marker = MARKERS[place % len(MARKERS)] if rounds is not None or len(x) == 1 else ""
        style = {"linestyle": DASHES[place % len(DASHES)], "marker": marker, "markersize": 5, "label": label}
        bars = None if spans is None else [[low for low, _ in spans], [high for _, high in spans]]
        axes.errorbar(at, y, yerr=bars, capsize=3, **style)
    if level is not None:
        axes.axhline(level, color="#98a4b0", linewidth=1, linestyle=":")
    if rounds is not None:
        axes.set_xlim(-0.3, rounds + 0.3)
        axes.set_xticks(range(0, rounds + 1, max(1, rounds // 8)))
    if len(lines) > 1:
        figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=min(len(lines), 4))
    return figure


def _axes(x_label: str, y_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # half a second, which a refusal need not take

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure, axes
