"""The statistics of the simulated labeller, each within 4 standard errors."""

import math

import pytest
from datasets import Dataset

from rlhf_ext.data.preferences import normalize_preferences
from rlhf_ext.feedback.simulated import SimulatedLabeller


N = 3000
SCORES = {"a": 1.0, "b": 0.5, "c": 0.45, "d": 0.0}


def gold(prompts, completions, **kwargs):
    return [SCORES[completion] for completion in completions]


def share(values, wanted):
    return sum(value == wanted for value in values) / len(values)


def near(expected):
    return pytest.approx(expected, abs=4 * math.sqrt(max(expected * (1 - expected), 1e-12) / N))


def best(labeller, completions):
    return [labeller.best_of(f"prompt {i}", completions)["best"] for i in range(N)]


def test_argmax_and_row():
    labeller = SimulatedLabeller(gold)
    row = labeller.best_of("p", ["d", "a", "b", "c"])
    assert row == {"prompt": "p", "completions": ["d", "a", "b", "c"], "best": 1, "incomparable": False}
    assert labeller.pair("p", ["a", "b"])["target"] == [1.0, 0.0]
    assert labeller.pair("p", ["b", "a"])["target"] == [0.0, 1.0]
    assert labeller.rank("p", ["d", "a", "b", "c"])["ranking"] == [1, 2, 3, 0]


def test_ties():
    labeller = SimulatedLabeller(gold, tie_band=0.1)
    assert labeller.pair("p", ["b", "c"])["target"] == [0.5, 0.5]
    assert labeller.pair("p", ["a", "b"])["target"] == [1.0, 0.0]
    chosen = best(labeller, ["b", "c", "d"])
    assert share(chosen, 0) == near(0.5)
    assert share(chosen, 2) == 0
    exact = best(SimulatedLabeller(gold), ["b", "b", "b", "d"])
    assert share(exact, 1) == near(1 / 3)
    skipped = SimulatedLabeller(gold).best_of("p", ["b", "b", "d"], skip_ties=True)
    assert (skipped["best"], skipped["incomparable"]) == (None, True)
    assert SimulatedLabeller(gold).best_of("p", ["b", "d", "d"], skip_ties=True)["best"] == 0
    forced = SimulatedLabeller(gold, tie_band=None)
    targets = [forced.pair(f"prompt {i}", ["b", "b"])["target"] for i in range(N)]
    assert share(targets, [1.0, 0.0]) == near(0.5)
    assert share(targets, [0.5, 0.5]) == 0


def test_boltzmann():
    temperature = 0.4
    labeller = SimulatedLabeller(gold, temperature=temperature, tie_band=None)
    names = ["a", "b", "c", "d"]
    weights = [math.exp(SCORES[name] / temperature) for name in names]
    chosen = best(labeller, names)
    for k, weight in enumerate(weights):
        assert share(chosen, k) == near(weight / sum(weights))
    targets = [labeller.pair(f"prompt {i}", ["a", "d"])["target"] for i in range(N)]
    assert share(targets, [1.0, 0.0]) == near(1 / (1 + math.exp(-1 / temperature)))
    firsts = [labeller.rank(f"prompt {i}", names)["ranking"][0] for i in range(N)]
    assert share(firsts, 0) == near(weights[0] / sum(weights))


def test_errors_are_uniform_answers():
    labeller = SimulatedLabeller(gold, error_rate=0.3)
    chosen = best(labeller, ["a", "b", "c", "d"])
    assert share(chosen, 0) == near(0.7 + 0.3 / 4)
    assert share(chosen, 3) == near(0.3 / 4)
    targets = [labeller.pair(f"prompt {i}", ["a", "b"])["target"] for i in range(N)]
    assert share(targets, [0.0, 1.0]) == near(0.15)


def test_rows_are_what_reward_training_reads():
    labeller = SimulatedLabeller(gold, incomparable_rate=0.5)
    for kind in ("best_of", "pair", "rank"):
        rows = [getattr(labeller, kind)(f"prompt {i}", ["a", "d"]) for i in range(40)]
        dropped = sum(row["incomparable"] for row in rows)
        kept, report = normalize_preferences(Dataset.from_list(rows))
        assert 0 < dropped == report.num_incomparable == 40 - len(kept)


def test_incomparable():
    labeller = SimulatedLabeller(gold, incomparable_rate=0.2)
    assert share(best(labeller, ["a", "b", "c"]), None) == near(0.2)
    assert share([labeller.pair(f"prompt {i}", ["a", "b"])["target"] for i in range(N)], None) == near(0.2)
    assert share([labeller.rank(f"prompt {i}", ["a", "b"])["ranking"] for i in range(N)], None) == near(0.2)


def test_labels_depend_on_content_and_seed_only():
    make = lambda seed: SimulatedLabeller(gold, temperature=1.0, seed=seed)  # noqa: E731
    forward = best(make(0), ["a", "b", "c"])
    labeller = make(0)
    backward = [labeller.best_of(f"prompt {i}", ["a", "b", "c"])["best"] for i in reversed(range(N))]
    assert forward == backward[::-1]
    assert forward != best(make(1), ["a", "b", "c"])
    assert len({labeller.best_of("p", ["a", "b", "c"], vote=v)["best"] for v in range(50)}) == 3


@pytest.mark.parametrize(
    "kwargs", [{"error_rate": 1.5}, {"incomparable_rate": -0.1}, {"temperature": 0.0}, {"tie_band": -1.0}]
)
def test_wrong_arguments_are_named(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        SimulatedLabeller(gold, **kwargs)


def test_too_few_completions():
    with pytest.raises(ValueError, match="two"):
        SimulatedLabeller(gold).best_of("p", ["a"])
    with pytest.raises(ValueError, match="two"):
        SimulatedLabeller(gold).pair("p", ["a", "b", "c"])
