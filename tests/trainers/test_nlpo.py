"""NLPO: masks of an older policy in sampling, kept with the rollout, renewed in time. Losses: `test_ppo_pairs.py`."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from rlhf_ext import NLPOConfig, NLPOTrainer
from rlhf_ext.functional import top_p_mask
from rlhf_ext.functional.nlpo import unpack_mask
from rlhf_ext.trainers.ppo_rollout import whole_rows
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.ppo_runs import ARGUMENTS, PROMPTS, make_trainer
from tests.trainers.test_ppo_roles import logged, weights


def make_nlpo(tmp_path, kind="llama", lora=False, **config):
    tokenizer = tiny_tokenizer()
    defaults = {**ARGUMENTS, "learning_rate": 1e-2, "mask_top_p": 0.7}
    if config.get("mask_top_p") != 1.0:
        defaults |= {"mask_min_tokens": 1, "mask_refresh_rollouts": 1}
    return NLPOTrainer(
        tiny_causal_lm(kind, tokenizer),
        reward_funcs=tiny_reward_model(kind, tokenizer, seed=1),
        args=NLPOConfig(output_dir=str(tmp_path), **{**defaults, **config}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None,
    )


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def masks_of(trainer, batch):
    return unpack_mask(batch["token_masks"], trainer._vocab_size())


def plain_masks(trainer, batch):
    """Masks of the masking policy as it is now, from whole rows without a cache."""
    ids, mask = whole_rows(batch)
    with torch.no_grad():
        logits = trainer.roles.target_forward(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
    first = batch["prompt_ids"].size(1)
    options = {"top_p": 0.7, "min_tokens": 1, "keep_ids": trainer._keep_ids}
    return top_p_mask(logits[:, first - 1 : -1] / trainer.temperature, **options)


@pytest.mark.parametrize("lora", [False, True])
def test_all_tokens_allowed_is_ppo_bit_for_bit(tmp_path, lora):
    found = []
    for name, make in (("ppo", make_trainer), ("nlpo", make_nlpo)):
        config = {"mask_top_p": 1.0} if name == "nlpo" else {}
        trainer = make(tmp_path / name, lora=lora, learning_rate=1e-2, max_steps=4, **config)
        trainer.train()
        found.append(weights(trainer.model))
    assert found[0].keys() == found[1].keys() and same(*found)


def weights_of_target(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.roles.target_weights().items()}


def policy_weights(trainer):
    return {name: trainer.model.get_parameter(name).detach().clone() for name in trainer.roles.target_weights()}


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, lora):
    config = {
        "num_iterations": 2,
        "max_steps": 10,
        "mask_refresh_rollouts": 2,
        "save_strategy": "steps",
        "save_steps": 5,
    }
    trainer = make_nlpo(tmp_path / "whole", lora=lora, **config)
    trainer.train()
    again = make_nlpo(tmp_path / "resumed", lora=lora, **config)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert same(weights(trainer.model), weights(again.model))
    assert same(weights_of_target(trainer), weights_of_target(again))


def test_it_trains_and_says_what_it_allows(tmp_path):
    trainer = make_nlpo(tmp_path, learning_rate=0.0)
    trainer.train()
    assert all(abs(value - 1) < 1e-5 for value in logged(trainer, "policy/ratio_max"))
    assert all(1 <= value < trainer._vocab_size() for value in logged(trainer, "nlpo/allowed_tokens"))


def test_columns_of_padding_have_masks_too(tmp_path):
    trainer = make_nlpo(tmp_path, pad_to_multiple_of=16, max_steps=2)
    trainer.train()
    assert all(abs(row["policy/ratio_max"] - 1) < 1e-5 for row in trainer.state.log_history[:1])


def test_an_evaluation_says_what_it_allows(tmp_path):
    trainer = make_nlpo(tmp_path, per_device_eval_batch_size=8)
    trainer.eval_dataset = Dataset.from_dict({"prompt": PROMPTS})
    assert 1 <= trainer.evaluate()["eval_nlpo/allowed_tokens"] < trainer._vocab_size()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mask_top_p": 0.0}, "mask_top_p=0.0 must lie in"),
        ({"mask_min_tokens": 0}, "mask_min_tokens=0 must be 1 or more"),
        ({"mask_top_p": 1.0, "mask_min_tokens": 5}, "mask_min_tokens=5 has no effect.*mask_top_p=1.0"),
        ({"mask_top_p": 1.0, "mask_refresh_rollouts": 2}, "mask_refresh_rollouts=2 has no effect"),
        ({"mask_refresh_rollouts": 0}, "mask_refresh_rollouts=0 must be 1 or more"),
        ({"policy_objective": "penalty"}, "policy_objective='penalty'.*mask_top_p=1.0"),
    ],
)
def test_bad_values(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        NLPOConfig(str(tmp_path), use_cpu=True, bf16=False, **config)
