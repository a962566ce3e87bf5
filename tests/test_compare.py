"""The comparison of trainers: intervals against numbers by hand, and a second call that runs what is missing."""

import json
import math
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import compare_report  # noqa: E402
from compare_statistics import T95, area, episodes_to, final_gold, interval, smoothed, verdict  # noqa: E402


def curve(*gold, size=32, kl=0.0):
    return [{"episodes": size * (i + 1), "gold": g, "kl": kl, "seconds": 1.0} for i, g in enumerate(gold)]


def test_interval_by_hand():
    # mean 3, variance 2.5, so half = t(4) * sqrt(2.5 / 5) = 2.776445 * 0.7071068
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3.0, 1.036757, 4.963243), abs=1e-4)
    assert interval([0.2, 0.2]) == (0.2, 0.2, 0.2)
    centre, low, high = interval([0.7])
    assert centre == 0.7 and math.isnan(low) and math.isnan(high)
    for values in ([], [0.0] * 32):
        with pytest.raises(ValueError, match="1 to 31"):
            interval(values)


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 30])
def test_quantiles_are_those_of_student(freedom):
    # 0.475 of gamma((n+1)/2) / (sqrt(n pi) gamma(n/2)) (1 + x^2/n)^-(n+1)/2 lies between 0 and the quantile.
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    steps, width = 20_000, T95[freedom - 1] / 20_000
    middles = ((i + 0.5) * width for i in range(steps))
    mass = width * sum(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in middles)
    assert mass == pytest.approx(0.475, abs=1e-5)


def test_area_and_episodes_to_a_level():
    run = curve(0.1, 0.3, 0.5, 0.7)
    assert area(run) == pytest.approx(0.4)
    assert [row[:2] for row in smoothed(run, 64)] == [(64, pytest.approx(0.2)), (96, 0.4), (128, 0.6)]
    assert final_gold(run, 64) == 0.6
    assert episodes_to(run, 0.4, 64) == 96 and episodes_to(run, 0.41, 64) == 128
    assert episodes_to(run, 0.61, 64) is None


def test_verdicts():
    assert verdict(-0.01, 0.05, -0.02) == "confirmed"
    assert verdict(-0.09, -0.03, -0.02) == "refuted"
    assert verdict(-0.03, 0.05, -0.02) == "undecided"


def test_claims_are_paired_by_seed():
    def run(*gold):
        return {"updates": curve(*gold), "final": {"gold_reward": 0.5, "grammatical": 1.0, "kl": 1.0}}

    runs = {
        "ours": {0: run(0.2, 0.6, 0.6), 1: run(0.3, 0.7, 0.7)},
        "base": {0: run(0.2, 0.3, 0.4), 1: run(0.3, 0.4, 0.5)},
    }
    protocol = {"subject": "ours", "level_of": "base", "fewer_episodes_than": ["base"], "not_behind": ["base"]}
    protocol |= {"window": 32, "margin": 0.02}
    saved, areas = compare_report.claim_table(runs, protocol, budget=96)["rows"]
    assert saved[2:] == ["32 [32, 32]", "> 0", "confirmed"]  # 64 episodes instead of 96, on both seeds
    assert areas[2].startswith("0.167 [") and areas[-1] == "confirmed"
    table = compare_report.arm_table(runs, {"ours": "1", "base": "1"}, protocol)
    assert [row[7] for row in table["rows"]] == ["64 (2 of 2)", "96 (2 of 2)"]
    compare_report.claim_table({**runs, "base": runs["ours"]}, protocol, budget=96)  # an arm equals itself


COMMON = {"minibatches": 1, "epochs": 2, "rollout_size": 8, "tune": {"learning_rate": [1.0e-3]}}
SPEC = {
    "world": {
        "model_size": "tiny",
        "max_completion_length": 6,
        "sft_rows": 64,
        "sft_steps": 2,
        "sft_errors": {"insult": 0.75},
        "test_prompts": 8,
        "episodes": 16,
        "kl_coef": 0.05,
        "missing_eos_penalty": 0.5,
    },
    "tuning_seeds": [100],
    "protocol": {
        "title": "Test",
        "subject": "clip",
        "level_of": "grpo",
        "fewer_episodes_than": ["grpo"],
        "not_behind": ["grpo"],
        "window": 8,
        "margin": 0.02,
    },
    "arms": [
        {"name": "clip", "trainer": "ppo", "args": {"epsilon_value": None}, **COMMON},
        {"name": "grpo", "trainer": "grpo", "args": {"num_generations": 4}, **COMMON},
    ],
}


def call(monkeypatch, folder, *flags):
    command = ["compare.py", "--arms", str(folder / "arms.yaml"), "--output_dir", str(folder / "out"), *flags]
    monkeypatch.setattr(sys, "argv", command)
    compare.main()


def test_second_call_runs_what_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump(SPEC))
    with pytest.raises(ValueError, match="no learning rate for clip, grpo. Run with --tune"):
        call(monkeypatch, tmp_path, "--seeds", "1")
    tuned = {arm["name"]: {"learning_rate": 1e-3, "areas": {"0.001": 0.1}} for arm in SPEC["arms"]}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tuned.json").write_text(json.dumps(tuned))

    call(monkeypatch, tmp_path, "--seeds", "1")
    runs = tmp_path / "out" / "runs"
    clip, grpo = (runs / name / "seed0.jsonl" for name in ("clip", "grpo"))
    assert "2 are missing" in capsys.readouterr().out
    run = compare.read_run(clip)
    assert [row["episodes"] for row in run["updates"]] == [8, 16] and run["header"]["seed"] == 0
    assert all({"gold", "kl", "length", "seconds", "entropy"} <= set(row) for row in run["updates"])
    assert abs(run["updates"][0]["kl"]) < 1e-4 < abs(run["updates"][1]["kl"])  # before the first update, and after it
    first = compare.read_run(grpo)["updates"]
    assert abs(first[0]["kl"]) < 1e-4
    before = clip.stat().st_mtime_ns

    grpo.rename(grpo.with_suffix(".part"))  # what an interrupted run leaves
    result, image = tmp_path / "compare.json", tmp_path / "compare.png"
    call(monkeypatch, tmp_path, "--seeds", "1", "--result", str(result), "--plot", str(image))
    assert "1 runs are there, 1 are missing" in capsys.readouterr().out
    assert clip.stat().st_mtime_ns == before and grpo.exists() and image.exists()
    again = compare.read_run(grpo)["updates"]
    assert [row["gold"] for row in again] == [row["gold"] for row in first]  # the same seed, the same run
    assert len(json.loads(result.read_text())["rows"]) == 2 and (tmp_path / "compare_claims.json").exists()

    changed = {**SPEC, "arms": [{**SPEC["arms"][0], "epochs": 1}, SPEC["arms"][1]]}
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(ValueError, match="was run with other settings than clip has now. Pass --rerun"):
        call(monkeypatch, tmp_path, "--seeds", "1")


def test_files_of_arms_that_would_not_be_fair_are_refused(tmp_path):
    def changed(**fields):
        arms = [{**SPEC["arms"][0], **fields}, SPEC["arms"][1]]
        (tmp_path / "arms.yaml").write_text(yaml.safe_dump({**SPEC, "arms": arms}))
        return tmp_path / "arms.yaml"

    for fields, message in (
        ({"rollout_size": 6}, "would differ in their budget"),
        ({"tune": {"learning_rate": [1e-3, 1e-4]}}, "different numbers of learning rates"),
        ({"trainer": "dpo"}, "trainer 'dpo' is unknown"),
        ({"name": "grpo"}, "share a name"),
    ):
        with pytest.raises(ValueError, match=message):
            compare.read_arms(changed(**fields))


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "benchmarks").glob("arms*.yaml")))
def test_the_published_arms_are_read(file):
    spec = compare.read_arms(ROOT / "benchmarks" / file)
    names = {arm["name"] for arm in spec["arms"]}
    protocol = spec["protocol"]
    assert {
        protocol["subject"],
        protocol["level_of"],
        *protocol["fewer_episodes_than"],
        *protocol["not_behind"],
    } <= names
    assert not set(spec["tuning_seeds"]) & set(range(10))
