"""Segments of longer episodes: any start, any length, with an end or cut (Christiano et al. 2017)."""

import pytest
import torch
from datasets import Dataset

from rlhf_ext.models.reward_functions import ModelReward
from rlhf_ext.models.scoring import token_scores
from rlhf_ext.trainers.reward_config import PreferenceRewardConfig
from rlhf_ext.trainers.reward_trainer import PreferenceRewardTrainer
from tests.tiny import tiny_reward_model, tiny_tokenizer
from tests.trainers.test_reward_trainer import build, loss_of, options


CUT = {"prompt": "w1 w2 ", "completions": ["good w3", "bad w4 w5"], "target": [1.0, 0.0]}


def ids_of(text):
    return tiny_tokenizer()(text)["input_ids"]


def scores_alone(trainer, ids):
    ids = torch.tensor([ids])
    return token_scores(trainer.model, ids, torch.ones_like(ids))[0]


def test_a_segment_that_is_not_finished_gets_no_end(tmp_path):
    """The trajectory goes on behind the cut: an end-of-sequence token there would be a state that it never reached."""
    trainer = build(tmp_path, [{**CUT, "truncated": [True, False]}], reward_aggregation="sum")
    cut, finished = trainer.train_dataset[0]["candidate_ids"]
    assert cut == ids_of("w1 w2 good w3") and finished == ids_of("w1 w2 bad w4 w5 <eos>")
    assert trainer.preference_reports["train"].num_truncated == 1
    _, scores = loss_of(trainer)
    expected = [scores_alone(trainer, cut)[2:].sum(), scores_alone(trainer, finished)[2:].sum()]
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-5, rtol=0)
    # PPO's reward reads the same two texts in the same way.
    reward = ModelReward(trainer.model, tiny_tokenizer(), tiny_tokenizer())
    paid = reward(["w1 w2 "] * 2, ["good w3", "bad w4 w5"], [ids_of("good w3"), ids_of("bad w4 w5 <eos>")])
    torch.testing.assert_close(torch.tensor(paid), scores.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("streams", [False, True])
def test_pairs_messages_and_streams_can_be_cut_too(tmp_path, streams):
    chat = {
        name: [{"role": role, "content": text}]
        for name, role, text in (
            ("prompt", "user", "w1"),
            ("chosen", "assistant", "good w3"),
            ("rejected", "assistant", "bad"),
        )
    }
    cases = [
        (
            {"prompt": "w1 w2 ", "chosen": "good w3", "rejected": "bad", "truncated": True},
            "w1 w2 good w3",
            "w1 w2 bad",
        ),
        (
            {"prompt": "w1 w2 ", "chosen": "good w3", "rejected": "bad", "truncated": False},
            "w1 w2 good w3 <eos>",
            "w1 w2 bad <eos>",
        ),
        (
            {**chat, "truncated": [True, False]},
            "<|user|> w1 <eos> <|assistant|> good w3",
            "<|user|> w1 <eos> <|assistant|> bad <eos>",
        ),
    ]
    for row, chosen, rejected in cases:
        rows = Dataset.from_list([row, row])
        trainer = PreferenceRewardTrainer(
            model=tiny_reward_model("llama", tiny_tokenizer()),
            args=PreferenceRewardConfig(**options(tmp_path, max_steps=1)),
            train_dataset=rows.to_iterable_dataset() if streams else rows,
            processing_class=tiny_tokenizer(),
        )
        first = next(iter(trainer.train_dataset))
        assert first["candidate_ids"] == [ids_of(chosen), ids_of(rejected)]
        assert list(first["target"]) == [1.0, 0.0]
        trainer.train()


def test_segments_that_begin_anywhere_in_other_episodes(tmp_path):
    """Token ids with a start per segment: what stands before is read and not counted, whatever its length."""
    episodes = [ids_of("w1 w2 w3 good w4"), ids_of("w9 bad"), ids_of("w5 fine"), ids_of("the cat sat on the mat . w1")]
    rows = [
        {"candidate_ids": episodes[:2], "completion_starts": [3, 0], "target": [0.5, 0.5], "ranking": None, "row": 0},
        {"candidate_ids": episodes[2:], "completion_starts": [1, 5], "target": [0.0, 1.0], "ranking": None, "row": 1},
    ]
    trainer = build(tmp_path, rows, reward_aggregation="sum")
    loss, scores = loss_of(trainer)
    sums = [scores_alone(trainer, ids)[start:].sum() for ids, start in zip(episodes, (3, 0, 1, 5), strict=True)]
    a, b, c, d = sums
    torch.testing.assert_close(scores, torch.stack([a, c, b, d]), atol=1e-5, rtol=0)
    logsigmoid = torch.nn.functional.logsigmoid
    expected = -(0.5 * logsigmoid(a - b) + 0.5 * logsigmoid(b - a) + logsigmoid(d - c)) / 2
    torch.testing.assert_close(loss, expected)
    trainer.train()


def test_what_cannot_be_cut_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Row 0.*`truncated` is \[True\].*2 of them"):
        build(tmp_path, [{**CUT, "truncated": [True]}])
    with pytest.raises(ValueError, match=r"Row 0.*`truncated` is 'yes'.*true or false"):
        build(tmp_path, [{**CUT, "truncated": "yes"}])
    with pytest.raises(ValueError, match=r"Row 0.*`completions\[1\]` is ''.*truncated"):
        build(tmp_path, [{**CUT, "completions": ["good", ""], "truncated": True}])


def test_rows_of_ids_are_checked_like_any_others(tmp_path):
    row = {"candidate_ids": [[5, 6, 7], [8, 9]], "completion_starts": [1, 0], "target": [1.0, 0.0], "ranking": None}
    trainer = build(tmp_path, [{**row, "row": 0}] * 4)
    assert trainer.preference_reports["train"].num_rows == 4
    for change, words in (
        ({"completion_starts": [3, 0]}, "completion_starts.*leave no token of candidates"),
        ({"completion_starts": [1]}, "completion_starts"),
        ({"target": [0.9, 0.0]}, "target"),
        ({"target": None, "ranking": [0, 0]}, "ranking"),
    ):
        with pytest.raises(ValueError, match=words):
            build(tmp_path, [{**row, **change, "row": 0}])
    with pytest.raises(ValueError, match="longer than `max_length=2`"):
        build(tmp_path, [{**row, "row": 0}], max_length=2)
