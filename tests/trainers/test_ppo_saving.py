"""What a run leaves on disk: a policy that anybody loads, a critic and a reward adapter that score as they did."""

import os

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ext import PPOConfig, PPOTrainer
from rlhf_ext.models.checkpoints import check_checkpoint
from rlhf_ext.models.scoring import ModelReward, load_reward_model, token_scores
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.ppo_runs import PROMPTS


IDS = torch.tensor([[5, 6, 7, 8, 1], [9, 10, 11, 12, 13], [30, 31, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def lora(**kwargs):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **kwargs})


def train(folder, policy, **kwargs):
    """Three steps, which move every trained weight, and a checkpoint after the second."""
    config = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "log_completions": True,
        "disable_tqdm": True,
        **kwargs.pop("config", {}),
    }
    trainer = PPOTrainer(
        model=policy,
        args=PPOConfig(output_dir=str(folder / "run"), **config),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tiny_tokenizer(),
        **kwargs,
    )
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    return trainer


def varied(model, seed=7):
    """LoRA starts as nothing, where one adapter is like the other; give each values of its own."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    return model


def make_base(folder, kind="llama"):
    tokenizer = tiny_tokenizer()
    tiny_causal_lm(kind, tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def make_reward_adapter(folder, kind="llama"):
    """A reward adapter on the base of `make_base`, as PEFT saves it."""
    reward = tiny_reward_model(kind, tiny_tokenizer())
    reward.base_model.load_state_dict(tiny_causal_lm(kind, tiny_tokenizer()).base_model.state_dict())
    reward = varied(get_peft_model(reward, lora(task_type="SEQ_CLS", modules_to_save=["score"])))
    reward.peft_config["default"].base_model_name_or_path = str(folder / "base")
    reward.save_pretrained(folder / "reward")
    tiny_tokenizer().save_pretrained(folder / "reward")
    return str(folder / "reward")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def full(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    policy = tiny_causal_lm(request.param, tiny_tokenizer())
    return train(folder, policy, reward_funcs=tiny_reward_model(request.param, tiny_tokenizer(), seed=1)), folder


@pytest.fixture(scope="module")
def one_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_base")
    policy = make_base(folder)
    # Checkpointing, because its function lands in `training_args.bin`.
    config = {"gradient_checkpointing": True}
    trainer = train(folder, policy, reward_adapter=make_reward_adapter(folder), peft_config=lora(), config=config)
    return trainer, folder


@pytest.fixture(scope="module")
def lora_and_lora_critic(tmp_path_factory):
    """Policy and critic each with adapters, on bases of their own."""
    folder = tmp_path_factory.mktemp("lora_and_lora_critic")
    policy = make_base(folder)
    reward = load_reward_model(make_reward_adapter(folder))
    return train(folder, policy, reward_funcs=reward, peft_config=lora()), folder


def keys_of(path):
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]


def outputs(trainer, role):
    with torch.no_grad():
        return trainer.model.eval()(input_ids=IDS, attention_mask=MASK, role=role)[MASK.bool()]


def outputs_from(folder):
    with torch.no_grad():
        return token_scores(load_reward_model(str(folder)), IDS, MASK)[MASK.bool()]


# A policy without adapters


def test_a_full_policy_holds_no_foreign_key(full):
    trainer, folder = full
    for saved in (folder / "saved", folder / "run" / "checkpoint-2"):
        keys = keys_of(saved / "model.safetensors")
        assert keys and not [key for key in keys if "critic" in key or "score" in key]
        policy, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
        assert not info["unexpected_keys"] and not info["missing_keys"]
        assert policy.config.architectures == [type(trainer.roles.base).__name__]
    assert len(keys) == len(tiny_causal_lm(policy.config.model_type, tiny_tokenizer()).state_dict()) - int(
        policy.config.tie_word_embeddings
    )
    policy = AutoModelForCausalLM.from_pretrained(folder / "saved")
    torch.testing.assert_close(logits(policy), logits(trainer.model))
    assert AutoTokenizer.from_pretrained(folder / "saved").get_vocab() == tiny_tokenizer().get_vocab()


def test_a_critic_of_its_own_loads_as_a_reward_model(full):
    trainer, folder = full
    values = outputs(trainer, "critic")
    torch.testing.assert_close(outputs_from(folder / "saved" / "critic"), values, atol=1e-6, rtol=0)
    # The one of the second step is another one: what is written is the critic as it was then.
    assert (outputs_from(folder / "run" / "checkpoint-2" / "critic") - values).abs().max() > 1e-4
    assert AutoTokenizer.from_pretrained(folder / "saved" / "critic").get_vocab() == tiny_tokenizer().get_vocab()


def test_the_next_run_starts_from_the_saved_policy_and_critic(full, tmp_path):
    trainer, folder = full
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_completion_length=6)
    following = PPOTrainer(
        model=str(folder / "saved"),
        reward_funcs=lambda prompts, **kwargs: [0.0] * len(prompts),
        critic_model=str(folder / "saved" / "critic"),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )
    torch.testing.assert_close(outputs(following, "critic"), outputs(trainer, "critic"), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(following.model), logits(trainer.model))


# Adapters


def test_an_adapter_policy_loads_with_peft(one_base):
    trainer, folder = one_base
    for saved in (folder / "saved", folder / "run" / "checkpoint-2"):
        keys = keys_of(saved / "adapter_model.safetensors")
        assert keys and all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in keys)
        assert not [key for key in keys if "critic" in key or "reward" in key]
        assert not (saved / "model.safetensors").exists(), "the base is not saved again"
        config = PeftConfig.from_pretrained(str(saved))
        assert (config.task_type, config.base_model_name_or_path) == ("CAUSAL_LM", str(folder / "base"))
    policy = AutoPeftModelForCausalLM.from_pretrained(str(folder / "saved"))
    torch.testing.assert_close(logits(policy), logits(trainer.model))
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert (logits(policy) - logits(base)).abs().max() > 1e-3, "an empty adapter would be the base"


@pytest.mark.parametrize("role", ["critic", "reward"])
def test_adapter_roles_load_as_reward_models(one_base, role):
    trainer, folder = one_base
    found = outputs_from(folder / "saved" / role)
    torch.testing.assert_close(found, outputs(trainer, role), atol=1e-5, rtol=0)
    assert PeftConfig.from_pretrained(str(folder / "saved" / role)).task_type == "SEQ_CLS"
    moved = (found - outputs_from(folder / "reward")).abs().max()
    assert moved > 1e-3 if role == "critic" else moved < 1e-5


def test_saved_adapters_start_the_next_run(one_base, tmp_path):
    """The reward adapter goes through a second run as through the first; the policy keeps its adapter."""
    trainer, folder = one_base
    following = PPOTrainer(
        model=str(folder / "saved"),
        reward_adapter=str(folder / "saved" / "reward"),
        args=PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_completion_length=6),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )
    torch.testing.assert_close(outputs(following, "reward"), outputs(trainer, "reward"), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(following.model), logits(trainer.model))
    following.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "ref").is_dir(), "merging tells by it that the adapter went on from another"
    policy = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "saved"))
    torch.testing.assert_close(logits(policy), logits(trainer.model))


def test_a_saved_critic_adapter_starts_the_next_critic(one_base, tmp_path):
    """The next run is paid by the reward adapter, as the first was, and values begin where they ended."""
    trainer, folder = one_base
    config = {"use_cpu": True, "bf16": False, "report_to": [], "max_completion_length": 6}
    arguments = {
        "model": str(folder / "saved"),
        "args": PPOConfig(output_dir=str(tmp_path), **config),
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
    }
    saved = folder / "saved"
    following = PPOTrainer(**arguments, reward_adapter=str(saved / "reward"), critic_model=str(saved / "critic"))
    for role in ("critic", "reward"):
        torch.testing.assert_close(outputs(following, role), outputs(trainer, role), atol=1e-5, rtol=0)
    assert following.critic == "adapter"
    assert any(p.requires_grad for name, p in following.model.named_parameters() if ".critic." in name)
    # A reward adapter as start of the critic is in its own unit, and PPO pays in another.
    weighted = {**arguments, "args": PPOConfig(output_dir=str(tmp_path), reward_weights=[3.0], **config)}
    paths = {"reward_adapter": str(saved / "reward"), "critic_model": saved / "reward"}
    torch.testing.assert_close(
        outputs(PPOTrainer(**weighted, **paths), "critic"), 3 * outputs(trainer, "reward"), atol=1e-4, rtol=0
    )
    paths["critic_model"] = saved / "critic"
    torch.testing.assert_close(
        outputs(PPOTrainer(**weighted, **paths), "critic"), outputs(trainer, "critic"), atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match="is a critic that PPO saved: its values are no scores"):
        ModelReward(load_reward_model(saved / "critic"), tiny_tokenizer(), tiny_tokenizer())
    with pytest.raises(ValueError, match="is a critic that PPO saved.*critic_model="):
        PPOTrainer(**arguments, reward_adapter=str(saved / "critic"))
    with pytest.raises(ValueError, match="is a critic that PPO saved"):
        PPOTrainer(**arguments, reward_funcs=str(saved / "critic"), critic_model=str(saved / "critic"))


def test_training_arguments_hold_no_weights(one_base):
    """`context_fn` is pickled with them: a bound method would drag the base along, and bind the file to it."""
    trainer, folder = one_base
    assert trainer.args.gradient_checkpointing_kwargs["context_fn"] is not None
    path = folder / "saved" / "training_args.bin"
    assert os.path.getsize(path) < 50_000
    loaded = torch.load(path, weights_only=False)
    assert type(loaded) is PPOConfig and loaded.kl_coef == trainer.args.kl_coef


def test_policy_and_critic_with_adapters_on_bases_of_their_own(lora_and_lora_critic):
    trainer, folder = lora_and_lora_critic
    keys = keys_of(folder / "saved" / "adapter_model.safetensors")
    assert keys and not [key for key in keys if "critic" in key]
    policy = AutoPeftModelForCausalLM.from_pretrained(str(folder / "saved"))
    torch.testing.assert_close(logits(policy), logits(trainer.model))
    found = outputs_from(folder / "saved" / "critic")
    torch.testing.assert_close(found, outputs(trainer, "critic"), atol=1e-5, rtol=0)
    assert (found - outputs_from(folder / "reward")).abs().max() > 1e-3, "the critic has moved"


# Card and table


@pytest.mark.parametrize(
    ("objective", "words"), [("clip", "PPO-Clip"), ("pg", "policy gradient"), ("penalty", "PPO-Penalty")]
)
def test_every_objective_writes_checkpoints_and_its_card(tmp_path, objective, words):
    more = {"clip": {}, "pg": {"num_iterations": 1}, "penalty": {"penalty_kl_target": 0.01}}[objective]
    config = {"policy_objective": objective, "max_steps": 2, **more}
    policy = tiny_causal_lm("llama", tiny_tokenizer())
    train(tmp_path, policy, reward_funcs=lambda prompts, **kwargs: [1.0] * len(prompts), config=config)
    assert words in (tmp_path / "run" / "README.md").read_text()
    check_checkpoint(tmp_path / "run" / "checkpoint-2")


def test_the_card_names_what_was_paid(tmp_path):
    def by_token(prompts, completion_ids, **kwargs):
        return [[1.0] * len(ids) for ids in completion_ids]

    policy, config = tiny_causal_lm("llama", tiny_tokenizer()), {"max_steps": 1, "save_strategy": "no"}
    trainer = train(tmp_path, policy, token_reward_funcs=by_token, config={**config, "kl_estimator": "k3"})
    trainer.create_model_card("run")
    card = (tmp_path / "run" / "README.md").read_text()
    assert (
        "`by_token` per token" in card and "x `no_score`" not in card and "(ref / pi - 1 + log pi - log ref)" in card
    )


def test_the_card_says_ppo(full):
    _, folder = full
    card = (folder / "run" / "README.md").read_text()
    assert "PPO" in card and "Proximal Policy Optimization Algorithms" in card and "1707.06347" in card
    assert "grpo" not in card.lower()
    header = card.split("---")[1]
    assert "ppo" in header and "rlhf_ext" in header


def test_completions_are_written_with_their_advantages(full):
    _, folder = full
    tables = sorted((folder / "run" / "completions").glob("*.parquet"))
    assert tables
    table = pd.concat([pd.read_parquet(path) for path in tables])
    assert {"step", "prompt", "completion", "advantage"} <= set(table.columns)
    assert sorted(table["prompt"])[: len(PROMPTS)] and set(table["prompt"]) <= set(PROMPTS)
    # The parent's own column, relative to the group, is 0 for one completion per prompt.
    assert table["advantage"].abs().max() > 1e-3
    assert table["advantage"].notna().all()
    assert table["advantage"].nunique() > len(PROMPTS) // 2
