"""`PreferenceRewardTrainer`: the loss is TRL's for pairs, and right for every other label."""

import pytest
import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from rlhf_ext.functional.candidates import candidates_loss
from rlhf_ext.models.scoring import token_scores
from rlhf_ext.trainers.reward_config import PreferenceRewardConfig
from rlhf_ext.trainers.reward_trainer import PreferenceRewardTrainer
from tests.tiny import tiny_reward_model, tiny_tokenizer


PAIRS = [
    {"prompt": "the cat ", "chosen": "sat on the mat .", "rejected": "bad"},
    {"prompt": "w1 w2 ", "chosen": "good", "rejected": "bad bad w3 w4"},
    {"prompt": "w5 ", "chosen": "fine good w6", "rejected": "bad w6 w7 <eos>"},
    {"prompt": "w8 w9 ", "chosen": "good w1 w2 w3", "rejected": "w9 bad"},
]
MESSAGES = [
    {
        "prompt": [{"role": "user", "content": row["prompt"].strip()}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in PAIRS
]


def options(folder, **kwargs):
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": 3,
    }
    return {**defaults, **kwargs}


def build(folder, rows, *, kind="llama", pad_is_eos=False, model=None, eval_rows=None, peft_config=None, **kwargs):
    tokenizer = tiny_tokenizer(pad_is_eos)
    return PreferenceRewardTrainer(
        model=tiny_reward_model(kind, tokenizer) if model is None else model,
        args=PreferenceRewardConfig(**options(folder, **kwargs)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def loss_of(trainer, rows=None):
    """Loss of the first `rows` rows in one batch, and the flat scores."""
    rows = len(trainer.train_dataset) if rows is None else rows
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(rows)])
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    return loss, outputs.logits.squeeze(-1)


def reference_scores(trainer, row):
    """Scores of a row's candidates by one forward each, without padding and without the pooled forward."""
    scores = []
    for ids in row["candidate_ids"]:
        ids = torch.tensor([ids])
        scores.append(token_scores(trainer.model, ids, torch.ones_like(ids))[0, -1])
    return torch.stack(scores)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rows", [PAIRS, MESSAGES], ids=["text", "messages"])
def test_pairs_train_bit_for_bit_like_the_parent(tmp_path, kind, rows):
    histories, weights = [], []
    for trainer_class, config_class in (
        (RewardTrainer, RewardConfig),
        (PreferenceRewardTrainer, PreferenceRewardConfig),
    ):
        tokenizer = tiny_tokenizer()
        trainer = trainer_class(
            # The words of `rows` hold no padding token, so the parent pools at the right place.
            model=tiny_reward_model(kind, tokenizer),
            args=config_class(**options(tmp_path)),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.evaluate()
        histories.append([log for log in trainer.state.log_history if "loss" in log or "eval_loss" in log])
        weights.append(trainer.model.state_dict())
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    for theirs, ours in zip(*histories, strict=True):
        assert theirs.keys() == ours.keys()
        for name in ("loss", "grad_norm", "num_tokens", "min_reward", "max_reward", "accuracy", "eval_loss"):
            assert theirs.get(name) == ours.get(name), name
        for name in ("mean_reward", "margin", "eval_mean_reward", "eval_margin"):
            assert theirs.get(name, 0.0) == pytest.approx(ours.get(name, 0.0), abs=1e-6), name


@pytest.mark.parametrize("extra", [{"center_rewards_coefficient": 0.1}, {"margin": 0.3}], ids=["center", "margin"])
def test_flags_of_the_parent_keep_its_loss(tmp_path, extra):
    margin = {"margin": extra["margin"]} if "margin" in extra else {}
    flags = {name: value for name, value in extra.items() if name != "margin"}
    losses = []
    for trainer_class, config_class in (
        (RewardTrainer, RewardConfig),
        (PreferenceRewardTrainer, PreferenceRewardConfig),
    ):
        tokenizer = tiny_tokenizer()
        trainer = trainer_class(
            model=tiny_reward_model("llama", tokenizer),
            args=config_class(**options(tmp_path, **flags)),
            train_dataset=Dataset.from_list([{**row, **margin} for row in PAIRS]),
            processing_class=tokenizer,
        )
        batch = trainer.data_collator(list(trainer.train_dataset))
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[0] == losses[1]


def test_tokenized_pairs_give_the_same_loss(tmp_path):
    text = build(tmp_path, PAIRS)
    ids = [{"chosen_ids": one, "rejected_ids": two} for one, two in text.train_dataset["candidate_ids"]]
    assert loss_of(build(tmp_path, ids))[0].item() == loss_of(text)[0].item()


def test_general_rows_give_the_ids_and_the_loss_of_pairs(tmp_path):
    for pairs in (PAIRS, MESSAGES):
        general = [
            {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"]], "best": 1} for row in pairs
        ]
        one, two = build(tmp_path, pairs), build(tmp_path, general)
        for row, other in zip(one.train_dataset, two.train_dataset, strict=True):
            assert row["candidate_ids"] == other["candidate_ids"][::-1]
            assert row["completion_starts"] == other["completion_starts"][::-1]
        torch.testing.assert_close(loss_of(one)[0], loss_of(two)[0])


def test_ragged_candidates_soft_labels_and_rankings_share_a_batch(tmp_path):
    rows = [
        {"prompt": "w1 ", "completions": ["good", "bad w2"], "target": [0.7, 0.3], "best": None, "ranking": None},
        {"prompt": "w2 ", "completions": ["good", "bad", "w6 w7"], "target": None, "best": 1, "ranking": None},
        {
            "prompt": "w3 ",
            "completions": ["a b", "good", "w6", "fine"],
            "target": None,
            "best": None,
            "ranking": [3, 1, 0, 2],
        },
        {"prompt": "w4 ", "completions": ["good", "bad"], "target": [0.5, 0.5], "best": None, "ranking": None},
    ]
    trainer = build(tmp_path, rows)
    scores = [reference_scores(trainer, row) for row in trainer.train_dataset]
    logps = [row.log_softmax(0) for row in scores]
    order = scores[2][[3, 1, 0, 2]]
    pairs = [-torch.nn.functional.logsigmoid(order[i] - order[j]) for i in range(4) for j in range(i + 1, 4)]
    expected = -(0.7 * logps[0][0] + 0.3 * logps[0][1]) - logps[1][1] + sum(pairs) / 6 - logps[3].mean()
    loss, _ = loss_of(trainer)
    torch.testing.assert_close(loss, expected / 4)
    report = trainer.preference_reports["train"]
    assert (report.num_ties, report.num_soft, report.num_rankings, report.max_candidates) == (1, 1, 1, 4)
    trainer.train()  # ragged rows reach the collator through the data loader too


def test_a_ranking_gives_the_vector(tmp_path):
    rewards = torch.tensor([[0.2, 0.9, -0.5, 0.2]], dtype=torch.float64, requires_grad=True)
    ranking = torch.tensor([[1, 0, 3, 2]])
    loss, metrics = candidates_loss(
        rewards, torch.zeros_like(rewards), ranking, torch.ones_like(rewards, dtype=torch.bool)
    )
    assert loss.item() == pytest.approx(0.42105146433670454, abs=1e-9)
    assert metrics["accuracy"].item() == pytest.approx(5.5 / 6)


@pytest.mark.parametrize("noise, expected", [(0.0, 0.704355244468527), (0.1, 0.7022062896771415)])
def test_prediction_noise_reaches_the_loss(tmp_path, noise, expected):
    trainer = build(
        tmp_path, [{"prompt": "w1 ", "completions": ["good", "bad"], "target": [0.5, 0.5]}], prediction_noise=noise
    )
    loss, scores = loss_of(trainer)
    difference = (scores[0] - scores[1]).detach()
    p = (1 - noise) * torch.sigmoid(difference) + noise / 2
    torch.testing.assert_close(loss.detach(), -0.5 * (p.log() + (1 - p).log()))
    mask = torch.ones(1, 2, dtype=torch.bool)
    rewards, target = torch.tensor([[0.6, 0.3]]).double(), torch.full((1, 2), 0.5).double()
    value, _ = candidates_loss(rewards, target, torch.full((1, 2), -1), mask, prediction_noise=noise)
    assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sum_adds_the_scores_of_the_completion_only(tmp_path, kind):
    trainer = build(tmp_path, PAIRS, kind=kind, reward_aggregation="sum")
    expected = []
    for row in trainer.train_dataset:
        for ids, start in zip(row["candidate_ids"], row["completion_starts"], strict=True):
            ids = torch.tensor([ids])
            expected.append(token_scores(trainer.model, ids, torch.ones_like(ids))[0, start:].sum())
    expected = torch.stack(expected).view(-1, 2)
    assert [row[0] for row in trainer.train_dataset["completion_starts"]] == [2, 2, 1, 2]
    loss, scores = loss_of(trainer)
    torch.testing.assert_close(scores.view(2, -1).T, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(expected[:, 0] - expected[:, 1]).mean())
    trainer.train()


def test_evaluation_takes_several_datasets_and_prepared_ones(tmp_path):
    trainer = build(tmp_path, PAIRS, eval_rows=PAIRS)
    prepared = trainer.eval_dataset
    assert trainer._prepare_dataset(prepared, trainer.processing_class, trainer.args, "eval") is prepared
    metrics = trainer.evaluate({"a": Dataset.from_list(PAIRS), "b": prepared})
    assert metrics["eval_a_loss"] == metrics["eval_b_loss"]
    predictions = trainer.predict(prepared).predictions
    assert predictions.shape == (8, 1)


def test_streams_train_as_they_are_read(tmp_path):
    rows = [{**PAIRS[0], "incomparable": True}, *({**row, "incomparable": False} for row in PAIRS)]
    tokenizer = tiny_tokenizer()
    trainer = PreferenceRewardTrainer(
        model=tiny_reward_model("llama", tokenizer),
        args=PreferenceRewardConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list(rows).to_iterable_dataset(),
        processing_class=tokenizer,
    )
    expected = build(tmp_path, PAIRS).train_dataset
    given = list(trainer.train_dataset)
    assert [row["candidate_ids"] for row in given] == list(expected["candidate_ids"])
    trainer.train()
    assert trainer.state.global_step == 3


def test_card_and_tags_are_ours(tmp_path):
    trainer = build(tmp_path, PAIRS)
    trainer.create_model_card(model_name="card")
    card = (tmp_path / "README.md").read_text()
    assert "preference-reward" in card and "reward-trainer" not in card
