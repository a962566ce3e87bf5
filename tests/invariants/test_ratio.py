"""What is sampled from is what the ratio is taken of: padding, dropout, temperature, defaults, the cache."""

import pytest
import torch
from transformers import GenerationConfig

from rlhf_ext import PPOConfig
from rlhf_ext.trainers.ppo_rollout import token_mask
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.ppo_runs import make_trainer, stir
from tests.trainers.ppo_runs import rollout as ragged_rollout
from tests.trainers.test_ppo_roles import base_policy, build, logged, lora, one_base, zero


def plain_logps(model, prompt, completion, temperature):
    """Log-probabilities of one row without padding, from an ordinary forward."""
    ids = torch.cat([prompt, completion])[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float() / temperature
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, completion[:, None]).squeeze(-1)


@pytest.mark.parametrize(
    ("kind", "with_lora", "size"), [("llama", False, 2), ("llama", True, 4), ("gpt2", False, 8), ("gpt2", True, 2)]
)
def test_s07_r13_the_ratio_is_one_before_any_update(tmp_path, kind, with_lora, size):
    """lr = 0: every ratio of every epoch is 1, whatever the padding and the micro-batch."""
    parts = 8 // size
    split = {"per_device_train_batch_size": size, "steps_per_generation": parts, "gradient_accumulation_steps": parts}
    trainer = make_trainer(tmp_path, kind, with_lora, learning_rate=0.0, **split)
    trainer.train()
    found = logged(trainer, "policy/ratio_min") + logged(trainer, "policy/ratio_max")
    assert len(found) == 8
    assert all(abs(ratio - 1) < 1e-5 for ratio in found)
    assert all(share == 0 for share in logged(trainer, "clip_ratio/region_mean"))


def test_s07_r13_the_ratio_is_one_in_bf16(tmp_path, adapters):
    policy = base_policy(adapters["llama"], torch.bfloat16)
    config = {"learning_rate": 0.0, "bf16": True, "num_iterations": 2}
    reward = str(adapters["llama"] / "reward")
    trainer = build(tmp_path, policy, reward_adapter=reward, peft_config=lora(), config=config)
    trainer.train()
    found = logged(trainer, "policy/ratio_min") + logged(trainer, "policy/ratio_max")
    assert len(found) == 6 and all(abs(ratio - 1) < 2e-2 for ratio in found)


def test_s08_dropout_is_off_in_every_role(tmp_path, adapters):
    """Of LoRA, which is a module, and of attention, which reads a rate from its module."""
    folder = adapters["llama"]
    policy = base_policy(folder)
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.3
    trainer = build(
        tmp_path,
        policy,
        reward_adapter=str(folder / "reward"),
        peft_config=lora(lora_dropout=0.1, init_lora_weights=False),
        config={"learning_rate": 0.0, "num_iterations": 2},
    )
    trainer.model.train()
    dropouts = [m for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts and all(m.p == 0 for m in dropouts)
    batch = ragged_rollout(trainer)
    with torch.no_grad():
        assert torch.equal(*(trainer._logps(trainer.model, batch, "train") for _ in range(2)))
        assert torch.equal(*(trainer._values(batch, "train")["values"] for _ in range(2)))
    trainer.train()
    found = logged(trainer, "policy/ratio_min") + logged(trainer, "policy/ratio_max")
    assert all(abs(ratio - 1) < 1e-5 for ratio in found)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_s09_log_probabilities_are_taken_at_the_temperature(tmp_path, kind):
    trainer = make_trainer(tmp_path, kind, temperature=0.5)
    batch = ragged_rollout(trainer)
    with torch.no_grad():
        reference = trainer._reference_logps(batch, "train")
        for row, mask in enumerate(token_mask(batch)):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            by_hand = plain_logps(trainer.model, prompt, batch["completion_ids"][row][mask], 0.5)
            torch.testing.assert_close(batch["old_per_token_logps"][row][mask], by_hand, atol=1e-5, rtol=0)
            # The reference still is the policy.
            torch.testing.assert_close(reference[row][mask], by_hand, atol=1e-5, rtol=0)


@pytest.mark.parametrize("peft", [False, True])
def test_s10_defaults_of_the_checkpoint_do_not_leak_into_sampling(tmp_path, peft):
    policy = tiny_causal_lm("llama", tiny_tokenizer())
    policy.generation_config.update(do_sample=True, top_k=1, temperature=1e-3, repetition_penalty=9.0)
    policy.generation_config.update(min_new_tokens=5, no_repeat_ngram_size=1)
    critic = tiny_reward_model("llama", tiny_tokenizer())
    trainer = build(tmp_path, policy, reward_funcs=zero, critic_model=critic, peft_config=lora() if peft else None)
    rows = [{"prompt": "the cat"}] * 8
    lengths, firsts, repeats = set(), set(), 0
    for seed in range(6):
        torch.manual_seed(seed)
        trainer.model.train()
        batch = trainer._generate_and_score_completions([dict(row) for row in rows])
        lengths.update(batch["completion_mask"].sum(1).tolist())
        firsts.update(batch["completion_ids"][:, 0].tolist())
        for ids, mask in zip(batch["completion_ids"].tolist(), batch["completion_mask"].tolist(), strict=True):
            real = ids[: sum(mask)]
            repeats += len(real) != len(set(real))
    assert len(firsts) > 3, "top_k or temperature of the checkpoint"
    assert min(lengths) < 5, "min_new_tokens of the checkpoint"
    assert repeats, "no_repeat_ngram_size of the checkpoint"
    assert policy.generation_config.no_repeat_ngram_size == 1, "it is the user's, and saved with the policy"


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"generation_kwargs": {"min_length": 3}},
        {"generation_kwargs": {"typical_p": 0.9}},
    ],
    ids=str,
)
def test_r12_warpers_of_the_distribution_are_refused(tmp_path, fields):
    with pytest.raises(ValueError, match="distribution"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **fields)


def test_r12_without_warpers_the_kl_to_the_reference_starts_at_zero(tmp_path, adapters):
    trainer = one_base(tmp_path, adapters, learning_rate=0.0)
    trainer.train()
    assert logged(trainer, "kl") == pytest.approx([0.0] * 3, abs=1e-5)


def test_s34_rollouts_use_a_cache_although_checkpointing_is_on(tmp_path, adapters):
    trainer = one_base(tmp_path, adapters, gradient_checkpointing=True, max_steps=2, num_iterations=1)
    widths, generating = [], []
    stock = trainer.roles.base.generate

    def generate(*args, **kwargs):
        assert isinstance(kwargs["generation_config"], GenerationConfig)
        generating.append(True)
        try:
            return stock(*args, **kwargs)
        finally:
            generating.clear()

    def watch(module, args, kwargs):
        if generating:
            inputs = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
            widths.append(inputs.shape[1])

    trainer.roles.base.generate = generate
    trainer.roles.base.base_model.register_forward_pre_hook(watch, with_kwargs=True)
    trainer.train()
    assert len(widths) > 4
    assert [width > 1 for width in widths].count(True) == 2, "one forward on the prompts in each of two rollouts"
    assert trainer.model.is_gradient_checkpointing, "and it is on again where it is needed"


@pytest.mark.parametrize("sampled_from_reference", [False, True])
def test_r12_a_kl_below_zero_is_warned_of(tmp_path, caplog, sampled_from_reference):
    """Samples of another policy than the one whose log-probabilities are taken: here, of the reference."""
    trainer = make_trainer(tmp_path, lora=True)
    stir(trainer, scale=0.5)
    stock = trainer.model.generate

    def generate(*args, **kwargs):
        with trainer.roles.switch.use(None):
            return stock(*args, **kwargs)

    if sampled_from_reference:
        trainer.model.generate = generate
    with caplog.at_level("WARNING"):
        ragged_rollout(trainer)
    assert ("`kl` is below 0" in caplog.text) == sampled_from_reference
