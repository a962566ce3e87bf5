"""The best of several seeds on validation rows: which one, what is reported of the others, what is kept on disk."""

import json
import statistics

import pytest
from datasets import Dataset

from rlhf_ext.functional.intervals import wilson_interval
from rlhf_ext.models.reward_functions import ModelReward
from rlhf_ext.models.scoring import load_reward_model
from rlhf_ext.pipelines import best_of_seeds
from rlhf_ext.pipelines.best_of_seeds import train_best_of_seeds
from tests.pipelines.test_reward_ensemble import base, config, lora  # noqa: F401 (base is a fixture)
from tests.tiny import tiny_tokenizer


WORDS = ("good", "bad", "fine", "the", "cat")
ROWS = [{"prompt": f"w{i} ", "chosen": "good w1", "rejected": f"bad w{i}"} for i in range(8)]
# Labels without a pattern, so that seeds differ in how many they get right.
EVAL = [
    {"prompt": f"w{i} ", "chosen": f"{WORDS[i % 5]} w{i % 7}", "rejected": f"{WORDS[(3 * i + 1) % 5]} w{i % 4} w2"}
    for i in range(20)
]


def train(folder, base, num_seeds=3, eval_rows=EVAL, **kwargs):  # noqa: F811
    options = {"keep_seeds": kwargs.pop("keep_seeds", False)}
    return train_best_of_seeds(
        str(base),
        config(folder, **kwargs),
        Dataset.from_list(ROWS),
        None if eval_rows is None else Dataset.from_list(eval_rows),
        tiny_tokenizer(),
        num_seeds=num_seeds,
        peft_config=lora(),
        **options,
    )


def accuracy(folder):
    reward = ModelReward(load_reward_model(folder), tiny_tokenizer(), tiny_tokenizer())
    right = 0.0
    for row in EVAL:
        ids = [[*tiny_tokenizer()(row[name])["input_ids"], 1] for name in ("chosen", "rejected")]
        better, worse = reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]], ids)
        right += (better > worse) + 0.5 * (better == worse)
    return right / len(EVAL)


def test_the_most_accurate_seed_is_kept_and_all_are_reported(tmp_path, base, monkeypatch):  # noqa: F811
    report = train(tmp_path, base)
    assert json.loads((tmp_path / "seeds.json").read_text()) == json.loads(json.dumps(report))
    found = [seed["accuracy"] for seed in report["seeds"]]
    assert [seed["seed"] for seed in report["seeds"]] == [5, 6, 7]
    assert len(set(found)) > 1, "equal seeds would prove nothing"
    assert report["accuracy"] == max(found) and report["best"] == 5 + found.index(max(found))
    assert report["accuracy_mean"] == pytest.approx(statistics.mean(found))
    assert report["accuracy_std"] == pytest.approx(statistics.stdev(found))
    assert report["interval"] == list(wilson_interval(20 * max(found), 20))
    assert "biased upwards" in report["note"]
    assert accuracy(tmp_path / "best") == pytest.approx(max(found))
    weights = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors"))
    assert weights == ["best/adapter_model.safetensors"]

    # Another seed: the finished ones are read, not trained, and the winner may change.
    built, real = [], best_of_seeds.RewardBuilder.build

    def watched(self, folder, *args):
        built.append(folder.name)
        return real(self, folder, *args)

    monkeypatch.setattr(best_of_seeds.RewardBuilder, "build", watched)
    more = train(tmp_path, base, num_seeds=4)
    assert built == ["_unfinished_seed_8"]
    assert more["seeds"][:3] == json.loads(json.dumps(report["seeds"]))
    assert accuracy(tmp_path / "best") == pytest.approx(more["accuracy"])


def test_losers_are_kept_when_asked(tmp_path, base):  # noqa: F811
    report = train(tmp_path, base, num_seeds=2, keep_seeds=True)
    for seed in report["seeds"]:
        assert accuracy(tmp_path / f"seed_{seed['seed']}") == pytest.approx(seed["accuracy"])


def test_what_cannot_be_chosen_is_refused(tmp_path, base):  # noqa: F811
    with pytest.raises(ValueError, match="num_seeds.*1.*two or more"):
        train(tmp_path, base, num_seeds=1)
    with pytest.raises(ValueError, match="validation rows.*none"):
        train(tmp_path, base, eval_rows=None)


def test_wilson_interval():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    with pytest.raises(ValueError, match="more than the 3"):
        wilson_interval(4, 3)
