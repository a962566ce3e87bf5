"""The whole quickstart at a size that learns nothing: its files, its numbers, and what drives PPO."""

import json
import math
import re

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_ext.pipelines import quickstart
from rlhf_ext.pipelines.quickstart import quick, run_quickstart
from rlhf_ext.pipelines.quickstart_evaluation import Evaluation, gain_over


POLICY_KEYS = {
    *("gold_reward", "helpful", "honest", "harmless", "grammatical"),
    *("kl", "length", "truncated", "distinct_2"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    settings = quick(
        model_size="tiny",
        sft_rows=64,
        sft_steps=2,
        label_prompts=60,
        reward_batch_size=4,
        reward_steps=2,
        ppo_prompts=32,
        num_updates=2,
        rollout_size=8,
        test_prompts=16,
        label_error_rate=0.5,
    )
    return folder, run_quickstart(str(folder), 3, settings)


def test_metrics_are_written_and_finite(run):
    folder, metrics = run
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {"gold_reward_max", "win_rate", "reward_accuracy", "seconds"} <= set(metrics)
    for name in ("sft", "ppo"):
        assert set(metrics[name]) == POLICY_KEYS
        assert all(math.isfinite(value) for value in metrics[name].values())
    assert metrics["seed"] == 3
    assert metrics["sft"]["kl"] == 0.0


def test_the_gain_by_hand():
    """Gains .5, 0, -.25 and .75 over a mean of .25 of at most 1; a tie is half a win."""
    before = Evaluation(None, [0.0, 0.25, 0.5, 0.25], {"gold_reward": 0.25})
    found = gain_over(before, Evaluation(None, [0.5, 0.25, 0.25, 1.0], {}))
    assert found["gain"] == 0.25 and found["win_rate"] == 2.5 / 4
    assert found["gap_closed"] == pytest.approx(0.25 / 0.75)
    error = ((0.25**2 * 2 + 0.5**2 * 2) / 3 / 4) ** 0.5
    assert found["gain_interval"] == pytest.approx([0.25 - 1.96 * error, 0.25 + 1.96 * error])


def test_the_report_needs_no_other_file(run):
    folder, _ = run
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert not re.search("https?:", page) and "<script" not in page


def test_every_model_loads_on_its_own(run):
    folder, _ = run
    for name in ("sft", "ppo"):
        AutoModelForCausalLM.from_pretrained(folder / name)
    for name in ("reward", "ppo/critic"):
        AutoModelForSequenceClassification.from_pretrained(folder / name)


def test_ppo_never_sees_gold(run, tmp_path, monkeypatch):
    """With gold out of reach of everything but the plots, the same policy comes out."""
    folder, metrics = run
    monkeypatch.setattr(quickstart, "gold_reward", lambda prompts, completions: [float("nan")] * len(prompts))
    for name in ("sft", "reward"):
        (tmp_path / name).symlink_to(folder / name)
    settings = quick(**metrics["settings"])
    policy, _ = quickstart.train_ppo(str(tmp_path), quickstart.build_tokenizer(), settings, 3)
    saved = AutoModelForCausalLM.from_pretrained(folder / "ppo").state_dict()
    again = policy.state_dict()
    assert saved and all((again[name] == tensor).all() for name, tensor in saved.items())


def test_endless_text_is_paid_less(run):
    tokenizer = quickstart.build_tokenizer()
    reward = quickstart._unfinished(tokenizer, 5.0)
    assert reward(["p"] * 2, ["a"] * 2, [[7, tokenizer.eos_token_id], [7, 7]]) == [0.0, -5.0]
