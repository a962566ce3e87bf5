"""Bad input is refused before training, in words that name field, value and remedy."""

import pytest
from datasets import Dataset

from rlhf_ext.trainers.reward_config import PreferenceRewardConfig
from rlhf_ext.trainers.reward_trainer import PreferenceRewardTrainer
from tests.tiny import tiny_reward_model, tiny_tokenizer


PAIR = {"prompt": "w1 ", "chosen": "good", "rejected": "bad"}


def build(folder, rows, tokenizer=None, model=None, **kwargs):
    tokenizer = tokenizer or tiny_tokenizer()
    return PreferenceRewardTrainer(
        model=model or tiny_reward_model("llama", tiny_tokenizer()),
        args=PreferenceRewardConfig(
            str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", **kwargs
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"lm_coef": -0.5}, "lm_coef.*-0.5.*unlearn"),
        ({"lm_reduction": "mean"}, "lm_reduction.*mean.*nothing reads it"),
        ({"lm_coef": 0.5, "lm_reduction": "max"}, "lm_reduction.*max.*choose"),
        ({"reward_aggregation": "mean"}, "reward_aggregation.*mean.*last"),
        ({"overlong": "keep"}, "overlong.*keep.*drop"),
        ({"prediction_noise": 1.0}, "prediction_noise.*1.0.*below 1"),
        ({"preference_coef": 0.0}, "preference_coef.*0.0.*above 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor.*0.1.*prediction_noise"),
    ],
)
def test_flags_that_do_not_compose_are_refused(tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        PreferenceRewardConfig(str(tmp_path), use_cpu=True, bf16=False, **flags)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token.*None.*Set"):
        build(tmp_path, [PAIR], tokenizer)
    build(tmp_path, [PAIR], tokenizer, eos_token="<eos>")


def test_rows_beyond_the_context_are_refused_whatever_the_limit(tmp_path):
    long = {**PAIR, "prompt": "w1 " * 130}
    for max_length in (None, 1024):
        with pytest.raises(ValueError, match=r"context of 128 tokens.*\{1: 132\}.*max_length"):
            build(tmp_path, [PAIR, long], max_length=max_length)


def test_overlong_rows_are_counted_and_refused_above_one_percent(tmp_path):
    long = {**PAIR, "prompt": "w1 " * 20}
    few = build(tmp_path, [PAIR] * 99 + [long], max_length=10)
    assert few.preference_reports["train"].num_overlong == 1
    assert len(few.train_dataset) == 99
    with pytest.raises(ValueError, match=r"2 of 100 rows \(2.0%\).*max_length=10.*\[98, 99\].*overlong='drop'"):
        build(tmp_path, [PAIR] * 98 + [long] * 2, max_length=10)
    asked = build(tmp_path, [PAIR] * 98 + [long] * 2, max_length=10, overlong="drop")
    assert asked.preference_reports["train"].num_overlong == 2
    with pytest.raises(ValueError, match="All rows are longer"):
        build(tmp_path, [long], max_length=10, overlong="drop")


def test_incomparable_rows_are_dropped_and_keep_the_places_of_the_others(tmp_path):
    rows = [{**PAIR, "incomparable": True}, {**PAIR, "incomparable": False}]
    trainer = build(tmp_path, rows)
    assert trainer.preference_reports["train"].num_incomparable == 1
    assert list(trainer.train_dataset["row"]) == [1]


def test_centering_and_margins_work_with_pairs_only(tmp_path):
    three = {"prompt": "w1 ", "completions": ["good", "bad", "fine"], "best": 0}
    with pytest.raises(ValueError, match=r"center_rewards_coefficient.*0.1.*\{0: 3\}"):
        build(tmp_path, [three], center_rewards_coefficient=0.1)
    with pytest.raises(ValueError, match="Row 0 has `margin` 0.5.*pairs only"):
        build(tmp_path, [{**three, "margin": 0.5}])
    with pytest.raises(ValueError, match="Row 1 has `margin` None"):
        build(tmp_path, [{**PAIR, "margin": 0.5}, {**PAIR, "margin": None}])


def test_margins_of_a_stream_are_checked_as_they_come(tmp_path):
    """Taken from the first reward, a margin for the second candidate would teach the opposite."""
    rows = [{"prompt": "w1 ", "completions": ["good", "bad"], "best": best, "margin": 5.0} for best in (0, 1)]
    trainer = PreferenceRewardTrainer(
        model=tiny_reward_model("llama", tiny_tokenizer()),
        args=PreferenceRewardConfig(
            str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", max_steps=2
        ),
        train_dataset=Dataset.from_list(rows).to_iterable_dataset(),
        processing_class=tiny_tokenizer(),
    )
    with pytest.raises(ValueError, match="Row 1 has `margin` 5.0.*pairs only"):
        trainer.train()


def test_rows_are_checked_with_their_place(tmp_path):
    with pytest.raises(ValueError, match="Row 1.*`best` is 2.*0 to 1"):
        build(tmp_path, [{"completions": ["good", "bad"], "best": index} for index in (0, 2)])
    with pytest.raises(ValueError, match="Row 0.*`rejected_ids` is \\[\\]"):
        build(tmp_path, [{"chosen_ids": [5, 1], "rejected_ids": []}])
    with pytest.raises(ValueError, match="has 0 rows"):
        build(tmp_path, [])


def test_models_without_one_score_are_refused(tmp_path):
    two = tiny_reward_model("llama", tiny_tokenizer())
    two.config.num_labels = 2
    with pytest.raises(ValueError, match="num_labels.*2"):
        build(tmp_path, [PAIR], model=two)
    with pytest.raises(ValueError, match="PreferenceRewardConfig"):
        from trl import RewardConfig

        PreferenceRewardTrainer(
            model=tiny_reward_model("llama", tiny_tokenizer()),
            args=RewardConfig(str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=Dataset.from_list([PAIR]),
        )
