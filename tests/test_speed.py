"""The speed benchmark without its runs: intervals by hand, settings of both sides, and who is refused a ratio."""

import sys
from math import comb
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import speed_workloads  # noqa: E402
from speed_meter import ForcedLengths  # noqa: E402
from speed_process import check_same_work  # noqa: E402
from speed_report import summary  # noqa: E402
from speed_statistics import line, median_interval  # noqa: E402
from speed_workloads import WORKLOADS, chosen, next_points, settings  # noqa: E402
from speed_world import EOS, FIRST_LENGTH, MARK, PAD, Run, prompts_of, tokenizer_of  # noqa: E402


def test_interval_of_the_median_by_hand():
    assert median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0, 0.75)  # 1 - 2/8
    assert median_interval([5.0]) == (5.0, 5.0, 5.0, 0.0)
    # 6 values: smallest to largest cover 1 - 2/64; 9: second to second 1 - 2 (1 + 9) / 512, third would cover 0.82
    assert median_interval([float(i) for i in range(6)]) == (2.5, 0.0, 5.0, 1 - 2 / 64)
    assert median_interval([float(i) for i in range(9)]) == (4.0, 1.0, 7.0, 1 - 20 / 512)
    middle, low, high, covered = median_interval([float(i) for i in range(20)])
    assert (middle, low, high) == (9.5, 5.0, 14.0)
    assert covered == pytest.approx(1 - 2 * sum(comb(20, i) for i in range(6)) / 2**20)
    with pytest.raises(ValueError, match="empty"):
        median_interval([])


def test_line():
    assert line("W3", [4.9, 5.6, 5.2], [0.38]) == "W3 time 5.20x [4.90, 5.60] memory 0.38x"
    assert line("W5", [], [1.3]) == "W5 memory 1.30x"


def test_ratios_are_by_pair_and_their_own_way_round():
    sides, phases = ("ours", "trl112"), {name: [1.0] for name in ("rollout", "scoring", "update")}
    time = {"ours": [2.0, 4.0], "trl112": [10.0, 8.0]}
    runs = {side: [{"seconds": [s], "cpu_seconds": [s], "phases": phases} for s in time[side]] for side in sides}
    found = summary({"time": runs, "memory": {"ours": [{"peak": 30}], "trl112": [{"peak": 60}]}}, sides)
    assert found["time_ratios"] == [5.0, 2.0] and found["memory_ratios"] == [0.5]
    assert found["seconds"]["ours"] == {"median": 3.0, "low": 2.0, "high": 4.0}


def test_fields_of_ours_reach_ours_alone(monkeypatch):
    monkeypatch.setitem(speed_workloads.OURS, "everywhere", 1)
    assert settings("W4", "ours", 1, {})["options"] == {"everywhere": 1}
    assert settings("W4", "padded", 1, {})["options"] == {"skip_padding": False}
    assert settings("W1", "ours", 1, {})["options"] == {"everywhere": 1}
    assert "options" not in settings("W1", "trl112", 1, {}) and settings("W3c", "trl112", 1, {})["critic_lora"]
    point = {"threads": 2, "micro_batch": 8, "rollout_batch": 16}
    run = Run(**settings("W3", "trl112", 1, {"W3": {"trl112": point}}))
    assert (run.threads, run.micro_batch, run.rollout_batch, run.adapted_layers) == (2, 8, 16, 2)
    assert settings("W3c", "trl112", 1, {"W3": {"trl112": point}})["threads"] == 2, "variants take its point"
    assert settings("W1e", "ours", 1, {})["options"] == {"everywhere": 1, "critic_epochs": 1}
    for name, workload in WORKLOADS.items():
        runs = [Run(**settings(name, side, 1, {}, model="folder")) for side in workload.sides]
        same = ("prompt", "completion", "episodes", "epochs", "adapted_layers", "seed", "model", "nf4", "dtype")
        assert all(getattr(runs[0], field) == getattr(runs[1], field) for field in same), name


def test_the_grid_is_walked_one_setting_after_the_other():
    def walk(side, seconds):
        """Points in their order, where a point takes `seconds` of its threads, rows and rollout batch."""
        tried = []
        while points := next_points(side, tried):
            tried += [(seconds(*point.values()), point) for point in points]
        return [tuple(point.values()) for _, point in tried]

    first = [(1, 16, 32), (2, 16, 32)]
    assert walk("ours", lambda threads, rows, rollout: rows / threads) == [*first, (2, 8, 32), (2, 32, 32), (2, 4, 32)]
    assert walk("ours", lambda threads, rows, rollout: -rows * threads) == [*first, (2, 8, 32), (2, 32, 32)]
    assert walk("ours", lambda threads, rows, rollout: threads) == [*first, (1, 8, 32), (1, 32, 32)]
    for weight in (1, -1):
        points = walk("trl112", lambda threads, rows, rollout, weight=weight: rows - threads + weight * rollout)
        assert points == [*first, (2, 8, 32), (2, 32, 32), (2, 4, 32), (2, 4, 8), (2, 4, 16)]


def test_of_equally_fast_points_the_one_with_less_memory_is_chosen():
    tried = [(seconds, {"micro_batch": rows}) for seconds, rows in [(10.0, 32), (10.4, 16), (10.6, 8), (10.2, 16)]]
    assert chosen(tried) is tried[3][1]
    assert chosen(tried[:1]) is tried[0][1]


def test_another_amount_of_work_gives_no_ratio():
    run = {"workload": "W1", "iterations": 1}
    done = {"checksum": 1.5, "tokens": 4096, "optimizer_steps": 8}
    check_same_work(run, done, done, "trl112")
    for change in ({"checksum": 2.0}, {"tokens": 4095}, {"optimizer_steps": 7}):
        with pytest.raises(ValueError, match="W1"):
            check_same_work(run, done, {**done, **change}, "trl112")
        with pytest.raises(ValueError, match="W1"):
            check_same_work({**run, "iterations": 2}, done, done, "trl112")


def test_rows_end_at_the_length_that_their_prompt_asks_for():
    run = Run("W4", "ours", prompt=(4, 6), completion=(2, 5), episodes=2, vocabulary=128, iterations=0)
    tokenizer = tokenizer_of(run)
    rows = tokenizer(list(prompts_of(run, tokenizer)["prompt"]), return_tensors="pt", padding=True)["input_ids"]
    wanted = [row[-2].item() - FIRST_LENGTH for row in rows]
    force, torch_rows = ForcedLengths(run, [PAD, EOS, MARK]), rows
    for _ in range(5):
        scores = force(torch_rows, torch.zeros(len(rows), run.vocabulary))
        torch_rows = torch.cat([torch_rows, scores.softmax(-1).multinomial(1)], dim=1)
    ends = [(row == EOS).nonzero()[0].item() + 1 for row in torch_rows[:, rows.size(1) :]]
    assert ends == wanted and set(wanted) <= set(range(2, 6)) and len(set(wanted)) > 1
    assert not torch.isin(torch_rows[:, rows.size(1) :], torch.tensor([PAD, MARK])).any()
