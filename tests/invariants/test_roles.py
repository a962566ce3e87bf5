"""Several roles on one base: who is recomputed, who is switched, who has a gradient, and in which precision."""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from rlhf_ext.models.roles import checkpoint_context
from rlhf_ext.models.scoring import load_reward_model
from rlhf_ext.trainers.ppo_rollout import whole_rows
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.test_ppo_quantised import QUANTISED, make_world, policy, trainer_on
from tests.trainers.test_ppo_roles import (
    backward,
    base_policy,
    build,
    changed,
    check_critic_is_the_score,
    full,
    full_gpt2,
    length,
    logged,
    lora,
    lora_and_model,
    one_base,
    one_base_gpt2,
    rollout,
    sft_adapter,
    weights,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base that can be quantised, a reward adapter and an SFT adapter on it."""
    return make_world(tmp_path_factory.mktemp("world"))


# S17: precision


def test_s17_adapters_and_heads_are_fp32_on_a_bf16_base(tmp_path, adapters):
    folder = adapters["llama"]
    trainer = build(
        tmp_path,
        base_policy(folder, torch.bfloat16),
        reward_adapter=str(folder / "reward"),
        peft_config=lora(),
        config={"bf16": True, "max_steps": 1},
    )
    for name, parameter in trainer.model.named_parameters():
        small = "lora_" in name or "_head" in name and "lm_head" not in name
        assert parameter.dtype == (torch.float32 if small else torch.bfloat16), name
    before = weights(trainer.model)
    trainer.train()
    assert changed(trainer.model, before)
    ids = torch.tensor([[5, 6, 7, 8]])
    for role in ("critic", "reward"):
        # The matrix product of autocast keeps 8 bits of a score.
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = trainer.roles.base(input_ids=ids, attention_mask=torch.ones_like(ids), role=role)
        assert outputs.dtype == torch.float32, role


@pytest.mark.parametrize("kind", ["nf4", pytest.param("bf16", marks=pytest.mark.slow)])
def test_s17_adapters_move_at_the_learning_rates_of_ppo(tmp_path, world, kind):
    """Rounded to bf16, 95% of a LoRA-A stands still for 200 steps at 3e-6."""
    steps = {"max_steps": 50, "learning_rate": 3e-6, "num_iterations": 25, "logging_steps": 50}
    trainer = trainer_on(tmp_path, world, kind, config={**steps, "bf16": kind == "bf16"})
    small = [p for n, p in trainer.model.named_parameters() if "lora_" in n or n.endswith(("critic_head.weight",))]
    assert {parameter.dtype for parameter in small} == {torch.float32}
    before = weights(trainer.model)
    trainer.train()
    entries = moved = still = rounded = 0
    for name, parameter in trainer.model.named_parameters():
        if ".lora_A.default." in name or ".lora_A.critic." in name:
            entries += parameter.numel()
            moved += int((parameter != before[name]).sum())
        if ".lora_A.default." in name:
            # The same steps on weights that are rounded: the measure can fail.
            old, step = before[name].bfloat16(), (parameter - before[name]).detach()
            still += int((old + step.bfloat16() == old).sum())
            rounded += parameter.numel()
    assert moved > 0.99 * entries, f"{moved} of {entries}"
    assert still > 0.5 * rounded


# S18, request 8: the reference


@pytest.mark.parametrize(("kind", "from_folder"), [("fp32", True), ("nf4", False)])
def test_s18_r08_an_unmerged_adapter_is_its_own_reference(tmp_path, world, kind, from_folder):
    if from_folder:
        model = policy(world, kind, "sft")
    else:
        base = AutoModelForCausalLM.from_pretrained(
            world / "base", dtype=torch.float32, quantization_config=QUANTISED[kind]()
        )
        model = PeftModel.from_pretrained(base, world / "sft", is_trainable=True)
    trainer = build(tmp_path, model, reward_adapter=str(world / "reward"))
    ids, mask = whole_rows(rollout(trainer))
    with torch.no_grad():
        now = trainer.model(input_ids=ids, attention_mask=mask).logits
        with trainer.roles.switch.use(None):
            bare = trainer.model(input_ids=ids, attention_mask=mask).logits
    assert (now - bare).abs().max() > 1e-2, "an adapter of zeros would prove nothing"
    trainer.train()
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-4)
    assert abs(logged(trainer, "kl")[-1]) > 1e-4


def test_s18_the_reference_is_the_policy_as_it_was_passed(tmp_path):
    """Not what the policy becomes, and not another base."""
    given = tiny_causal_lm("llama", tiny_tokenizer(), seed=9)
    start = copy.deepcopy(given)
    trainer = build(tmp_path, given, reward_funcs=length)
    trainer.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        reference = trainer.accelerator.unwrap_model(trainer.reference)(input_ids=ids).logits
        torch.testing.assert_close(reference, start(input_ids=ids).logits)


# S19, S20, S21: switching under training


@pytest.mark.parametrize("run", [full, full_gpt2, lora_and_model, one_base, one_base_gpt2, sft_adapter])
def test_s19_gradients_are_the_same_under_checkpointing(tmp_path, adapters, run):
    """Without the context the recomputation runs under another role, and nothing says so."""
    trainer = run(tmp_path, adapters)
    batch = rollout(trainer)
    # B = 0 in a fresh adapter would hide which adapter is recomputed.
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name and "default" in name:
                parameter.normal_(std=0.1)
    plain = backward(trainer, batch)
    for context, same in ((checkpoint_context, True), (None, trainer.critic != "adapter")):
        kwargs = {"use_reentrant": False} | ({"context_fn": context} if context else {})
        trainer.model.gradient_checkpointing_enable(kwargs)
        recomputed = backward(trainer, batch)
        assert recomputed.keys() == plain.keys()
        largest = max((recomputed[name] - plain[name]).abs().max().item() for name in plain)
        assert (largest < 1e-6) is same, f"context_fn={context}: {largest}"


def test_s19_on_nf4_with_dropout_in_the_config(tmp_path, world):
    found = {}
    for checkpointing in (False, True):
        config = {"gradient_checkpointing": checkpointing}
        trainer = trainer_on(tmp_path, world, "nf4", peft_config=lora(lora_dropout=0.1), config=config)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        found[checkpointing] = backward(trainer, rollout(trainer))
    assert found[True].keys() == found[False].keys()
    for name, gradient in found[True].items():
        assert torch.equal(gradient, found[False][name]), name


def test_s20_a_role_leaves_the_adapters_as_they_were(tmp_path, adapters):
    trainer = sft_adapter(tmp_path, adapters)

    def look():
        return trainer.roles.switch.state, {n: p.requires_grad for n, p in trainer.model.named_parameters()}

    before, batch = look(), rollout(trainer)
    assert look() == before
    ids, mask = whole_rows(batch)
    for role in ("critic", "reward"):
        trainer.model(input_ids=ids, attention_mask=mask, role=role)
        assert look() == before, role
    trainer._reference_logps(batch, "train")
    assert look() == before
    with pytest.raises(RuntimeError, match="stop"), trainer.roles.switch.use("ref"):
        raise RuntimeError("stop")
    assert look() == before
    with pytest.raises(ValueError, match="role='judge' has no head"):
        trainer.model(input_ids=ids, attention_mask=mask, role="judge")
    trained = {name.split(".")[-2] for name in backward(trainer, batch) if "lora_" in name}
    assert trained == {"default", "critic"}, "no gradient on the adapters of reward and reference"


def test_s21_every_trained_adapter_has_a_gradient_under_checkpointing(tmp_path, adapters):
    """Frozen inputs and reentrant checkpointing: a finite loss, and no gradient at all."""
    trainer = one_base(tmp_path, adapters, gradient_checkpointing=True, max_steps=1)
    norms = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    role = "head" if "critic_head" in name else name.split(".")[-2]
                    norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
                    norms[role] = norms.get(role, 0.0) + norm

    trainer.add_callback(Look())
    trainer.train()
    assert norms.keys() == {"default", "critic", "head"}
    assert min(norms.values()) > 1e-4


# Request 18: the critic is the reward model


@pytest.mark.parametrize(("kind", "weight"), [("llama", 0.5), ("gpt2", 1.0)])
def test_r18_a_critic_of_its_own_starts_as_the_score(tmp_path, kind, weight):
    reward = tiny_reward_model(kind, tiny_tokenizer(), seed=1)
    trainer = build(tmp_path, kind=kind, reward_funcs=reward, config={"reward_weights": [weight]})
    batch = rollout(trainer)
    check_critic_is_the_score(trainer, batch)
    with torch.no_grad():
        trainer.roles.base.critic.score.weight.normal_()
    with pytest.raises(AssertionError):
        check_critic_is_the_score(trainer, batch)


@pytest.mark.parametrize(("kind", "weight"), [("llama", 0.5), ("gpt2", 1.0)])
def test_r18_a_critic_adapter_starts_as_the_score(tmp_path, adapters, kind, weight):
    trainer = one_base(tmp_path, adapters, kind, reward_weights=[weight])
    assert trainer.critic == "adapter"
    batch = rollout(trainer)
    check_critic_is_the_score(trainer, batch)
    # And the score is that of the reward model on its own.
    alone = load_reward_model(str(adapters[kind] / "reward"))
    ids, mask = whole_rows(batch)
    with torch.no_grad():
        by_hand = alone(input_ids=ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(trainer._scores, weight * by_hand, atol=1e-5, rtol=0)
    with torch.no_grad():
        trainer.roles.base.critic_head.weight.normal_()
    with pytest.raises(AssertionError):
        check_critic_is_the_score(trainer, batch)
