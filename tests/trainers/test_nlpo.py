"""NLPO: masks of an older policy in sampling and in both log-probabilities, kept with the rollout, renewed in time."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from rlhf_ext import NLPOConfig, NLPOTrainer
from rlhf_ext.functional import estimate_kl, top_p_mask
from rlhf_ext.functional.nlpo import unpack_mask
from rlhf_ext.trainers.ppo_rollout import token_mask, whole_rows
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.test_ppo_loss import PROMPTS, make_trainer, rollout, stir
from tests.trainers.test_ppo_roles import logged, weights


def make_nlpo(tmp_path, kind="llama", lora=False, **config):
    tokenizer = tiny_tokenizer()
    defaults = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 7,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "mask_top_p": 0.7,
        "mask_min_tokens": 1,
        "mask_refresh_rollouts": 1,
    }
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


@pytest.mark.parametrize(("kind", "lora"), [("llama", False), ("gpt2", True)])
def test_loss_is_the_clipped_one_on_masked_log_probabilities(tmp_path, kind, lora):
    trainer = make_nlpo(tmp_path, kind, lora, entropy_bonus_coef=0.2)
    batch = rollout(trainer)
    mask, allowed = token_mask(batch), masks_of(trainer, batch)
    ids, attention_mask = whole_rows(batch)
    first = batch["prompt_ids"].size(1)

    def by_hand():
        logits = trainer.model(input_ids=ids, attention_mask=attention_mask).logits[:, first - 1 : -1]
        logps = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        entropy = -(logps.exp() * torch.where(allowed, logps, 0.0)).sum(-1)
        return logps.gather(-1, batch["completion_ids"][..., None])[..., 0], entropy

    with torch.no_grad():
        now, _ = by_hand()
    torch.testing.assert_close(batch["old_per_token_logps"][mask], now[mask], atol=1e-5, rtol=0)
    stir(trainer)
    trainer.current_gradient_accumulation_steps = 2
    loss = trainer.compute_policy_loss(batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    logps, entropy = by_hand()
    ratio = (logps - batch["old_per_token_logps"])[mask].exp()
    advantages = batch["advantages"][mask]
    expected = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() - 0.2 * entropy[mask].sum()
    expected = expected / mask.sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, trainer.model.get_parameter(name).grad, atol=1e-6, rtol=1e-4)


def test_the_kl_is_taken_of_the_raw_distributions(tmp_path):
    trainer = make_nlpo(tmp_path)
    stir(trainer)
    kept, stock = {}, trainer.compute_advantages
    trainer.compute_advantages = lambda rows: kept.update(rows) or stock(rows)
    batch = rollout(trainer)
    mask = token_mask(batch)
    with torch.no_grad():
        raw = trainer._logps(trainer.model, batch, "train")
        reference = trainer._reference_logps(batch, "train")
    expected = torch.where(mask, estimate_kl(raw, reference, estimator="k1"), 0.0)
    torch.testing.assert_close(kept["kl"], expected, atol=1e-5, rtol=0)
    assert (raw - batch["old_per_token_logps"])[mask].abs().max() > 1e-2


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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mask_top_p": 0.0}, "mask_top_p=0.0 must lie in"),
        ({"mask_min_tokens": 0}, "mask_min_tokens=0 must be 1 or more"),
        ({"mask_refresh_rollouts": 0}, "mask_refresh_rollouts=0 must be 1 or more"),
        ({"policy_objective": "penalty"}, "policy_objective='penalty'.*mask_top_p=1.0"),
    ],
)
def test_bad_values(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        NLPOConfig(str(tmp_path), use_cpu=True, bf16=False, **config)
