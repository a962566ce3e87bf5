"""Policy, critic, reference and reward: who starts where, who trains, who stays, and who is asked for what."""

import functools
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from rlhf_ext import PPOConfig, PPOTrainer, PreferenceRewardConfig, PreferenceRewardTrainer
from rlhf_ext.functional import compute_gae, masked_whiten, shape_rewards
from rlhf_ext.models.roles import checkpoint_context
from rlhf_ext.models.scoring import ModelReward, last_token_scores, load_reward_model
from rlhf_ext.trainers.ppo_rollout import before_each_token, token_mask, whole_rows
from tests.tiny import WORDS, tiny_causal_lm, tiny_reward_model, tiny_tokenizer


PROMPTS = ["the cat", "good fine the mat sat on", "bad", "w1 w2 w3 w4 w5 w6 w7", "sat", "on the", "mat ?", "w9 w8 w7"]
ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 2,
    "num_iterations": 1,
    "max_completion_length": 6,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}


def lora(**kwargs):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **kwargs})


def build(tmp_path, policy=None, *, kind="llama", rows=None, tokenizer=None, config=None, **kwargs):
    """A trainer on tiny models; `config` updates the arguments, `kwargs` go to the trainer."""
    tokenizer = tokenizer or tiny_tokenizer()
    return PPOTrainer(
        model=tiny_causal_lm(kind, tokenizer) if policy is None else policy,
        args=PPOConfig(output_dir=str(tmp_path / "out"), **{**ARGUMENTS, **(config or {})}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}) if rows is None else rows,
        processing_class=tokenizer,
        **kwargs,
    )


def rollout(trainer, rows=None):
    """One rollout of the rows in their order, ragged."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    rows = [{"prompt": prompt} for prompt in PROMPTS] if rows is None else rows
    for seed in range(50):
        torch.manual_seed(seed)
        batch = trainer._generate_and_score_completions([dict(row) for row in rows])
        if len(set(batch["completion_mask"].sum(1).tolist())) > 2:
            return batch
    raise AssertionError("no ragged rollout in 50 seeds")


def backward(trainer, batch):
    """Gradients of one backward on the whole rollout."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, batch).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_the_head_reads_no_strided_slice(tmp_path):
    """On a CPU torch would copy a bf16 head once per row of the rollout."""
    trainer, seen = build(tmp_path, reward_funcs=zero), []
    head = trainer.roles.base.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: seen.append((args[0].shape, args[0].is_contiguous())))
    rollout(trainer)
    assert any(shape[:2] == (8, 1) for shape, _ in seen) and all(contiguous for _, contiguous in seen)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model, before):
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def zero(prompts, completions, **kwargs):
    return [0.0] * len(prompts)


def length(prompts, completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


class Adapters:
    """Per kind a base, a LoRA reward model trained on it by `PreferenceRewardTrainer`, and an SFT adapter."""

    def __init__(self, make_folder):
        self.make_folder = make_folder

    @functools.cache  # noqa: B019
    def __getitem__(self, kind):
        folder = self.make_folder(kind)
        tokenizer = tiny_tokenizer()
        tiny_causal_lm(kind, tokenizer).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        pairs = {
            "prompt": PROMPTS,
            "chosen": [f" {w} good" for w in PROMPTS],
            "rejected": [f" {w} bad" for w in PROMPTS],
        }
        keep = ("use_cpu", "bf16", "gradient_checkpointing", "report_to", "save_strategy", "disable_tqdm")
        trainer = PreferenceRewardTrainer(
            model=str(folder / "base"),
            args=PreferenceRewardConfig(
                output_dir=str(folder / "reward"),
                max_steps=4,
                learning_rate=3e-2,
                per_device_train_batch_size=8,
                **{name: ARGUMENTS[name] for name in keep},
            ),
            train_dataset=Dataset.from_dict(pairs),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]),
        )
        trainer.train()
        trainer.save_model(str(folder / "reward"))
        torch.manual_seed(3)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        get_peft_model(base, lora(init_lora_weights=False)).save_pretrained(folder / "sft")
        return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return Adapters(tmp_path_factory.mktemp)


def base_policy(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)


# Where the critic starts


def check_critic_is_the_score(trainer, batch):
    """At step 0 the critic's output at the last real token is the score that PPO pays (request 18)."""
    ids, mask = whole_rows(batch)
    with torch.no_grad():
        outputs = trainer.model(input_ids=ids, attention_mask=mask, role="critic")
    scores = trainer._scores
    assert scores.std() > 1e-3, "equal scores would prove nothing"
    torch.testing.assert_close(last_token_scores(outputs, mask), scores, atol=1e-5, rtol=0)


def test_a_shared_critic_starts_as_the_score_of_the_same_forward(tmp_path, adapters):
    trainer = one_base(tmp_path, adapters, critic="shared", reward_weights=[0.5])
    adapter_reward = trainer.reward_funcs[0].reward
    batch = rollout(trainer)
    check_critic_is_the_score(trainer, batch)
    # The values of the rollout are those of a forward of their own, which was not made.
    ids, mask = whole_rows(batch)
    with torch.no_grad():
        alone = trainer.model(input_ids=ids, attention_mask=mask, role="critic")
    expected = torch.where(token_mask(batch), before_each_token(alone, batch), 0.0)
    torch.testing.assert_close(batch["values"], expected, atol=1e-5, rtol=0)
    assert len(adapter_reward.values) == len(mask)
    with pytest.raises(ValueError, match="reward\\+critic"):
        one_base(tmp_path, adapters).roles.base(input_ids=ids, attention_mask=mask, role="reward+critic")


def test_a_shared_critic_needs_a_reward_adapter(tmp_path):
    with pytest.raises(ValueError, match="critic='shared' starts from a `reward_adapter`"):
        build(tmp_path, reward_funcs=length, config={"critic": "shared"})


# Who trains


def full(tmp_path, adapters):
    return build(tmp_path, reward_funcs=tiny_reward_model("llama", tiny_tokenizer(), seed=1))


def full_gpt2(tmp_path, adapters):
    return build(tmp_path, kind="gpt2", reward_funcs=tiny_reward_model("gpt2", tiny_tokenizer(), seed=1))


def full_without_reward_model(tmp_path, adapters):
    return build(tmp_path, reward_funcs=length)


def lora_and_model(tmp_path, adapters):
    reward = tiny_reward_model("llama", tiny_tokenizer(), seed=1)
    return build(tmp_path, base_policy(adapters["llama"]), reward_funcs=reward, peft_config=lora())


def lora_and_lora_reward_model(tmp_path, adapters):
    reward = load_reward_model(str(adapters["llama"] / "reward"))
    return build(tmp_path, base_policy(adapters["llama"]), reward_funcs=reward, peft_config=lora())


def one_base(tmp_path, adapters, kind="llama", **config):
    folder = adapters[kind]
    return build(
        tmp_path,
        base_policy(folder),
        reward_adapter=str(folder / "reward"),
        peft_config=lora(),
        config=config,
    )


def one_base_gpt2(tmp_path, adapters):
    return one_base(tmp_path, adapters, "gpt2")


def shared_trunk(tmp_path, adapters):
    return one_base(tmp_path, adapters, critic="shared")


def sft_adapter(tmp_path, adapters):
    folder = adapters["llama"]
    policy = PeftModel.from_pretrained(base_policy(folder), folder / "sft", is_trainable=True)
    return build(tmp_path, policy, reward_adapter=str(folder / "reward"))


def sft_adapter_from_its_folder(tmp_path, adapters):
    return build(tmp_path, str(adapters["llama"] / "sft"), reward_adapter=str(adapters["llama"] / "reward"))


def no_critic(tmp_path, adapters):
    return build(tmp_path, reward_funcs=length, config={"advantage_estimator": "leave_one_out", "num_generations": 2})


KINDS_OF_RUN = [
    full,
    full_gpt2,
    full_without_reward_model,
    lora_and_model,
    lora_and_lora_reward_model,
    one_base,
    one_base_gpt2,
    shared_trunk,
    sft_adapter,
    sft_adapter_from_its_folder,
    no_critic,
]


@pytest.mark.parametrize("run", KINDS_OF_RUN, ids=lambda run: run.__name__)
def test_policy_and_critic_move_and_nobody_else(tmp_path, adapters, run):
    trainer = run(tmp_path, adapters)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    is_critic = {name for name in trainable if "critic" in name}
    assert trainable - is_critic, "the policy has to train"
    assert bool(is_critic) == (trainer.critic != "none")
    assert not any(".reward." in name or "reward_head" in name or ".ref." in name for name in trainable)
    before = weights(trainer.model)
    reference = weights(trainer.reference) if trainer.reference is not None else {}
    rewards = [func.reward for func in trainer.reward_funcs if hasattr(func, "reward")]
    rewards = [reward.model for reward in rewards if isinstance(reward, ModelReward)]
    kept = [weights(model) for model in rewards]

    gradients = backward(trainer, rollout(trainer))
    assert set(gradients) == trainable, "gradients that nobody asked for, or that vanished"
    trainer.model.zero_grad()
    trainer.train()

    # Request 8: whatever the policy starts from is its own reference.
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-4)
    assert abs(logged(trainer, "kl")[-1]) > 1e-4, "the reference has to stay behind"
    moved = changed(trainer.model, before)
    assert moved == trainable
    if trainer.reference is not None:
        assert changed(trainer.reference, reference) == set()
    for model, old in zip(rewards, kept, strict=True):
        assert changed(model, old) == set()
        assert all(parameter.grad is None for parameter in model.parameters())


def test_checkpointing_is_set_up_by_the_trainer(tmp_path, adapters):
    """The context reaches the layers through the arguments, and stays there after the parent's rollout."""
    found = []
    for checkpointing in (False, True):
        trainer = one_base(tmp_path, adapters, gradient_checkpointing=checkpointing, max_steps=2, num_iterations=2)
        if checkpointing:
            # `Trainer` reads one of the names when training starts, TRL the other one after each rollout.
            for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
                assert getattr(trainer.args, name)["context_fn"] is checkpoint_context, name
        trainer.train()
        found.append(weights(trainer.model))
        assert trainer.model.is_gradient_checkpointing is checkpointing
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, atol=1e-6, rtol=0, msg=name)


def test_two_trainers_side_by_side(tmp_path, adapters):
    """The context of one trainer's recomputation must not be that of the other's roles."""
    first, second = (one_base(tmp_path, adapters, gradient_checkpointing=True) for _ in range(2))
    batch, other = rollout(first), rollout(second)
    alone = backward(first, batch)
    first.model.zero_grad()
    loss = first._compute_loss(first.model, batch)
    expected = backward(second, other)
    with second.roles.switch.use("reward"):
        loss.backward()
    for name, parameter in first.model.named_parameters():
        if name in alone:
            torch.testing.assert_close(parameter.grad, alone[name], atol=1e-7, rtol=0, msg=name)
    for name, gradient in backward(second, other).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-7, rtol=0, msg=name)


# Rewards


def test_messages_reach_functions_and_models(tmp_path):
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(completions)
        return [0.0 for _ in prompts]

    tokenizer = tiny_tokenizer()
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    model = tiny_reward_model("llama", tokenizer, seed=1)
    trainer = build(
        tmp_path,
        rows=Dataset.from_dict({"prompt": messages}),
        reward_funcs=[reward, model],
        critic_model=tiny_reward_model("llama", tokenizer, seed=1),
        config={"max_steps": 1},
    )
    check = [{"prompt": message} for message in messages]
    batch = rollout(trainer, check)
    assert seen[0][0]["role"] == "assistant"
    # The model reads the very ids: the prompt under the chat template, and the completion with its end.
    ids, mask = whole_rows(batch)
    with torch.no_grad():
        by_hand = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(trainer._scores, by_hand, atol=1e-5, rtol=0)
    trainer.train()
    assert math.isfinite(logged(trainer, "value_loss")[0])


def test_flags_of_the_chat_template_reach_reward_models(tmp_path):
    """A reward model with a tokenizer of its own renders the messages itself, and as the policy does."""
    tokenizer = tiny_tokenizer()
    other = tiny_tokenizer(words=["the", "cat", "good", "bad", "user", "assistant", "w1"])
    other.chat_template = "{{ 'good ' if flag is defined and flag else 'bad ' }}" + tokenizer.chat_template
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    found = []
    for flag in (True, False):
        trainer = build(
            tmp_path,
            rows=Dataset.from_dict({"prompt": messages}),
            reward_funcs=tiny_reward_model("llama", other, seed=1),
            reward_processing_classes=other,
            critic_model=tiny_reward_model("llama", tokenizer, seed=1),
            config={"chat_template_kwargs": {"flag": flag}},
        )
        found.append(
            trainer.reward_funcs[0].reward._text_ids(messages[0], [{"role": "assistant", "content": "cat"}], True)
        )
    good, bad = other("good bad")["input_ids"][:2]
    assert found[0][0] == good and found[1][0] == bad and found[0][1:] == found[1][1:]


def test_a_reward_that_knew_another_policy_learns_of_this_one(tmp_path):
    """One built for rollouts of its own tokenizer, as `load_reward_ensemble` builds them, reads texts from now on."""
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer(words=tuple(reversed(WORDS)))
    model = tiny_reward_model("llama", other, seed=1)
    found = []
    for reward in (ModelReward(model, other, other), ModelReward(model, other, tokenizer)):
        torch.manual_seed(0)
        trainer = build(tmp_path, reward_funcs=reward, critic_model=tiny_reward_model("llama", tokenizer, seed=1))
        rollout(trainer)
        found.append(trainer._scores)
    assert torch.equal(*found)


def test_several_rewards_are_summed_with_their_weights(tmp_path):
    model = tiny_reward_model("llama", tiny_tokenizer(), seed=1)
    trainer = build(
        tmp_path,
        reward_funcs=[length, model],
        critic_model=tiny_reward_model("llama", tiny_tokenizer(), seed=1),
        config={"reward_weights": [0.25, -2.0]},
    )
    batch = rollout(trainer)
    ids, mask = whole_rows(batch)
    with torch.no_grad():
        by_hand = 0.25 * batch["completion_mask"].sum(1) - 2.0 * model(input_ids=ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(trainer._scores, by_hand, atol=1e-5, rtol=0)


def test_rows_without_a_score_teach_nothing(tmp_path):
    """Not even through the moments of whitening: the others get what they get without these rows."""

    def reward(prompts, completions, completion_ids, **kwargs):
        return [None if i < 2 else float(len(ids)) for i, ids in enumerate(completion_ids)]

    stored = {}
    trainer = build(tmp_path, reward_funcs=reward, config={"whiten_rewards": True})
    stock = trainer.compute_advantages
    trainer.compute_advantages = lambda batch: stored.update(batch=batch, found=stock(batch)) or stored["found"]
    batch = rollout(trainer)
    mask = batch["completion_mask"].bool()
    assert batch["advantages"][:2].abs().max() == 0
    assert torch.equal(batch["returns"][:2], batch["values"][:2])
    rewards = shape_rewards(
        trainer._scores[2:], torch.zeros_like(batch["returns"][2:]), mask[2:], kl_coef=trainer.kl_coef
    )
    rewards = masked_whiten(rewards, mask[2:], shift_mean=False)
    torch.testing.assert_close(stored["batch"]["rewards"][2:], rewards, atol=1e-5, rtol=0)
    expected = masked_whiten(stored["found"][0][2:], mask[2:])
    torch.testing.assert_close(batch["advantages"][2:], expected, atol=1e-5, rtol=0)


def test_a_row_without_a_score_is_in_no_baseline(tmp_path):
    """All others score 10: against their own mean none of them is better, and that is what is logged."""

    def reward(prompts, **kwargs):
        return [None if i < 4 else 10.0 for i in range(len(prompts))]

    config = {"advantage_estimator": "returns", "baseline": "batch_mean", "critic": "none", "kl_coef": 0.0}
    trainer = build(tmp_path, reward_funcs=reward, config={**config, "whiten_advantages": False})
    assert rollout(trainer)["advantages"].abs().max() < 1e-5
    assert trainer._metrics["train"]["advantages/std"][-1] == pytest.approx(0, abs=1e-5)


def test_a_group_with_a_missing_score_teaches_nothing(tmp_path):
    """A score of 0 in its place would be the others' baseline."""

    def reward(prompts, completion_ids, **kwargs):
        return [None if i == 0 else 100.0 + len(ids) for i, ids in enumerate(completion_ids)]

    config = {"advantage_estimator": "leave_one_out", "num_generations": 2, "whiten_advantages": False}
    trainer = build(tmp_path, reward_funcs=reward, config={**config, "kl_coef": 0.0})
    batch = rollout(trainer, [{"prompt": prompt} for prompt in PROMPTS[:4] for _ in range(2)])
    assert batch["advantages"][:2].abs().max() == 0
    lengths = batch["completion_mask"].sum(1)
    for row in range(2, 8):
        other = row ^ 1
        real = batch["advantages"][row][batch["completion_mask"][row].bool()]
        assert real.tolist() == pytest.approx([(lengths[row] - lengths[other]).item()] * len(real), abs=1e-4)


def test_a_rollout_without_any_score_keeps_still(tmp_path):
    trainer = build(tmp_path, reward_funcs=lambda prompts, **kwargs: [None] * len(prompts), config={"max_steps": 2})
    before = weights(trainer.model)
    trainer.train()
    assert changed(trainer.model, before) == set()


# What is computed and logged


def test_advantages_are_those_of_functional_on_the_stored_batch(tmp_path):
    stored = {}
    trainer = build(
        tmp_path,
        reward_funcs=tiny_reward_model("llama", tiny_tokenizer(), seed=1),
        config={"gamma": 0.9, "gae_lambda": 0.8, "bootstrap_truncated": True, "max_completion_length": 4},
    )
    stock = trainer.compute_advantages
    trainer.compute_advantages = lambda batch: stored.update(batch) or stock(batch)
    batch = rollout(trainer)
    mask = batch["completion_mask"].bool()
    advantages, returns = compute_gae(
        stored["rewards"],
        batch["values"],
        mask,
        gamma=0.9,
        gae_lambda=0.8,
        bootstrap_values=stored["bootstrap_values"],
    )
    torch.testing.assert_close(batch["returns"], returns)
    torch.testing.assert_close(batch["advantages"], masked_whiten(advantages, mask))
    # Whitened over the rollout, not over a micro-batch (pitfall S16).
    real = batch["advantages"][mask]
    assert real.mean().item() == pytest.approx(0, abs=1e-5)
    assert real.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert batch["advantages"][~mask].abs().max() == 0
    assert abs(batch["advantages"][:4][mask[:4]].mean().item()) > 1e-4


def test_critic_learning_rate_is_a_group_of_its_own(tmp_path, adapters):
    for build_run in (full, one_base):
        trainer = build_run(tmp_path, adapters)
        trainer.args.critic_learning_rate = 5e-3
        trainer.create_optimizer()
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        rates = {}
        for group in trainer.optimizer.param_groups:
            for parameter in group["params"]:
                assert id(parameter) not in rates, "twice"
                rates[id(parameter)] = group["lr"]
        trainable = {id(p) for p in trainer.model.parameters() if p.requires_grad}
        assert set(rates) == trainable
        assert {("critic" in names[key], rate) for key, rate in rates.items()} == {(True, 5e-3), (False, 1e-2)}
        before = len(trainer.optimizer.param_groups)
        trainer.create_optimizer()
        assert len(trainer.optimizer.param_groups) == before, "a second call must not add groups"


def test_odd_rollouts_work_with_one_completion(tmp_path):
    trainer = build(
        tmp_path,
        reward_funcs=length,
        config={
            "per_device_train_batch_size": 1,
            "steps_per_generation": None,
            "generation_batch_size": 3,
            "gradient_accumulation_steps": 3,
        },
    )
    trainer.train()
    assert trainer.state.global_step == 3
