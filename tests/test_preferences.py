"""Reward models on the toy world: the numbers of the report by hand, and a file of arms that holds together."""

import json
import math
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import preferences  # noqa: E402
import preferences_report as report  # noqa: E402
from compare import slug  # noqa: E402


ARMS = ROOT / "benchmarks" / "preference_arms.yaml"


def test_accuracy_counts_pairs_of_different_gold_and_equal_scores_half():
    # golds 1, 0, 0: the pair of the zeros does not count; 1 > 0 is right once and level once
    assert report.pair_accuracy([[2.0, 1.0, 2.0]], [[1.0, 0.0, 0.0]]) == 0.75
    assert report.pair_accuracy([[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]) == 0.5


def test_normalised_by_the_reference():
    # reference mean 2, deviation 1
    assert report.normalize([[2.0, 5.0]], [[1.0, 3.0]]) == [[0.0, 3.0]]


def test_spearman_by_hand():
    assert report.ranks([3.0, 1.0, 3.0]) == [2.5, 1.0, 2.5]
    # ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15)
    assert report.spearman([1.0, 2.0, 3.0, 4.0], [20.0, 10.0, 40.0, 30.0]) == pytest.approx(0.6)
    assert report.spearman([1.0, 2.0, 9.0], [1.0, 8.0, 9.0]) == pytest.approx(1.0)
    assert math.isnan(report.spearman([1.0, 1.0], [1.0, 2.0]))


def member(seed_rows, rows=4, nll=1.0):
    gold = {name: [[1.0, 0.0]] * 4 for name in preferences.SETS}
    scores = {name: seed_rows for name in preferences.SETS} | {"reference": [[1.0, -1.0]] * 4}
    return {"scores": scores, "gold": gold, "rows": rows, "nll": dict.fromkeys(report.TESTS, nll)}


def test_ensemble_errs_where_members_differ():
    # The fourth pair is judged wrong by the mean, and there the members differ; gold is +-1 once normalised.
    sure, other = [[1.0, -1.0]] * 3, [[1.1, -1.0], [1.2, -1.0], [1.3, -1.0]]
    found = report.ensemble([member([*sure, [1.0, -1.0]]), member([*other, [-3.0, 3.0]])], "in_distribution")
    assert found["quartiles"] == [0.0, 0.0, 0.0, 1.0]
    assert found["accuracy"] == 0.75 and found["member_accuracy"] == 0.875
    # |mean - gold|: 0.05 0.1 0.15 2 for the first answers, 0 0 0 2 for the second; spread orders them the same way
    assert found["spearman"] == pytest.approx(1.0)


def test_differences_are_paired_by_seed():
    right, wrong = member([[1.0, 0.0]] * 4, nll=1.0), member([[0.0, 1.0]] * 4, nll=1.5)
    half = member([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2, nll=1.5)
    runs = {"a": {0: right, 1: half}, "b": {1: wrong, 0: half}}  # 1 less 0.5, 0.5 less 0
    rows = report.difference_table(runs, [{"question": "q", "arm": "a", "than": "b"}])["rows"]
    assert rows[0][:6] == ["q", "a", "b", "in distribution", "0.500 [0.500, 0.500]", "ahead"]
    assert rows[0][6].startswith("-0.25 [")
    assert report.difference_table(runs, [{"question": "q", "arm": "b", "than": "a"}])["rows"][0][5] == "behind"


def test_file_of_arms_holds_together():
    spec = preferences.read_arms(ARMS)
    arms = {arm["name"]: arm for arm in spec["arms"]}
    assert len({slug(name) for name in arms}) == len(arms)  # a name is a file
    assert max(arm["labels"] for arm in arms.values()) <= spec["world"]["pool_prompts"]
    parts = spec["report"]
    for compared in parts["comparisons"]:
        arm, than = arms[compared["arm"]], arms[compared["than"]]
        read = {"pair": 2, "pair_ties": 2, "pair_no_ties": 2, "best_of": 4}
        if compared["question"] == "equal answers read":
            assert arm["labels"] * read[arm["kind"]] == than["labels"] * read[than["kind"]]
        else:
            # One thing differs and nothing else: the labels are the same.
            names = {key for key in arm if arm[key] != than[key]} - {"name"}
            assert len(names) == 1 and names <= {"kind", "trainer"}, compared
    for curve in parts["curves"].values():
        assert all(arms[name]["labels"] == number for number, name in curve.items())
    assert [arms[name]["bootstrap"] for name in parts["members"]] == list(range(len(parts["members"])))
    assert {arms[name]["labels"] for name in [*parts["members"], parts["single"]]} == {arms[parts["single"]]["labels"]}


@pytest.mark.parametrize(
    ("arm", "message"),
    [({"name": "b", "label": 3}, r"arm 'b' has \['label'\]"), ({"name": "a"}, "arms share a name")],
)
def test_wrong_arms_are_refused(tmp_path, arm, message):
    spec = {**yaml.safe_load(ARMS.read_text()), "arms": [{"name": "a"}, arm]}
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(ValueError, match=message):
        preferences.read_arms(tmp_path / "arms.yaml")


def test_report_names_what_is_missing_or_of_other_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", "--runs", str(tmp_path), "--seeds", "1"])
    with pytest.raises(ValueError, match=r"has no pairs-256-0.json, .*Run preferences.py first"):
        report.main()
    spec = preferences.read_arms(ARMS)
    run = {"arm": {**spec["arms"][0], "labels": 1}, "world": spec["world"], "seed": 0}
    (tmp_path / "pairs-256-0.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="was run with other settings"):
        report.main()


def test_report_of_a_whole_set(tmp_path, monkeypatch):
    spec = preferences.read_arms(ARMS)
    runs, results = tmp_path / "runs", tmp_path / "results"
    runs.mkdir()
    results.mkdir()
    for number, arm in enumerate(spec["arms"]):
        for seed in range(2):
            one = member([[1.0, 0.0]] * 2 + [[0.1 * number, 0.2 * seed], [0.0, 0.1 * number]])
            one |= {"arm": arm, "world": spec["world"], "seed": seed, "commit": "abc"}
            (runs / f"{slug(arm['name'])}-{seed}.json").write_text(json.dumps(one))
    flags = ["--runs", str(runs), "--seeds", "2", "--results", str(results), "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", ["report", *flags])
    report.main()
    for name in ("arms", "differences", "ensemble"):
        table = json.loads((results / f"preferences_{name}.json").read_text())
        assert table["commit"] == "abc" and table["seed"] == [0, 1] and table["rows"]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert (tmp_path / "plot.png").stat().st_size > 1000
