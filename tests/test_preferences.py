"""The comparison of reward models: arms, labels and the numbers made of raw scores, without training."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import preferences  # noqa: E402
import preferences_report as report  # noqa: E402


def test_the_arms_that_are_shipped_answer_the_questions():
    spec = preferences.read_arms(ROOT / "benchmarks" / "preference_arms.yaml")
    arms = {arm["name"]: arm for arm in spec["arms"]}
    assert {name for _, *pair, _, _ in report.QUESTIONS for name in pair} | set(report.MEMBERS) == set(arms)
    for _, better, other, _, _ in report.QUESTIONS:
        # Sides of a question differ in what it asks about and in nothing else.
        differ = {key for key in arms[better] if arms[better][key] != arms[other][key]} - {"name"}
        assert differ in ({"kind"}, {"kind", "labels"}, {"trainer"}), (better, other, differ)
    assert all(arm["labels"] <= spec["world"]["pool_prompts"] for arm in spec["arms"])


@pytest.mark.parametrize(
    "arms, words", [("[{name: a, label: 3}]", "arm 'a' has .*label"), ("[{name: a}, {name: a}]", "share a name")]
)
def test_faulty_arms_are_named(tmp_path, arms, words):
    (tmp_path / "arms.yaml").write_text(f"world: {{}}\ndefaults: {{labels: 1}}\narms: {arms}\n")
    with pytest.raises(ValueError, match=words):
        preferences.read_arms(tmp_path / "arms.yaml")


def test_numbers_of_a_run_by_hand():
    run = {
        "scores": {report.ID: [[3.0, 1.0, 1.0, 0.0]]},
        "gold": {report.ID: [[1.0, 0.5, 0.5, 0.5]]},
        "nll": {report.ID: 2.0},
    }
    found = report.numbers_of(run, report.ID)
    # Three pairs differ in gold, all right; of the three equal ones the score gaps are 0, 1, 1.
    sd = math.sqrt(((3 - 1.25) ** 2 + 2 * 0.25**2 + 1.25**2) / 4)
    assert found == {"accuracy": 1.0, "tie_gap": pytest.approx((2 / 3) / sd), "nll": 2.0}


def test_rank_correlation_shares_ranks_of_equal_values():
    x = torch.tensor([1.0, 2.0, 2.0, 4.0])
    assert report.spearman(x, 3 * x.exp()) == pytest.approx(1.0)
    assert report.spearman(x, -x) == pytest.approx(-1.0)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert report.spearman(x, torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(4.5 / math.sqrt(4.5 * 5.0))


def test_an_ensemble_that_is_right_where_it_agrees():
    gold = [[0.0, 1.0]] * 6 + [[1.0, 0.0]] * 2
    agreed = [[0.0, 4.0]] * 4 + [[0.0, 4.0], [0.0, 4.0]]
    members = [agreed + [[0.0, 1.0], [3.0, 0.0]], agreed + [[2.0, 0.0], [0.0, 6.0]]]
    runs = [
        {
            "scores": {"reference": [[0.0, 4.0]], report.ID: scores},
            "gold": {"reference": [[0.0, 1.0]], report.ID: gold},
        }
        for scores in members
    ]
    found = report.ensemble_numbers(runs, report.ID)
    assert found["single"] == pytest.approx(7 / 8) and found["mean"] == pytest.approx(7 / 8)
    assert found["quarters"][:3] == [0.0, 0.0, 0.0] and found["quarters"][3] == 0.5
    assert found["spearman"] > 0.5
    assert found["sorted_by_disagreement"] == 0.5


def test_errors_sorted_by_margin_by_hand():
    scores = torch.tensor([[4.0, 0.0], [0.0, 1.0], [0.0, 3.0], [2.0, 0.0]])
    gold = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    # Margins 4, 3 and 2 are right, 1 is wrong
    assert report._sorted_errors(scores, gold) == 1.0
    assert report._sorted_errors(scores, 1 - gold) == -1.0


def test_missing_runs_and_runs_of_other_settings_are_named(tmp_path):
    arms = ROOT / "benchmarks" / "preference_arms.yaml"
    with pytest.raises(ValueError, match=r"has no pairs-256-0.json, .*Run preferences.py first"):
        report.read_runs(arms, tmp_path, 1)
    spec = preferences.read_arms(arms)
    run = {"arm": {**spec["arms"][0], "labels": 1}, "world": spec["world"], "seed": 0}
    (tmp_path / "pairs-256-0.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="pairs-256-0.json was run with other settings"):
        report.read_runs(arms, tmp_path, 1)
