"""`PPOTrainer` as its users meet it: roles, rewards, bad input, files."""

import json

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rlhf_ext import PPOConfig, PPOTrainer
from rlhf_ext.models.scoring import last_token_scores, load_reward_model
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.ppo_runs import PROMPTS, rollout


def build(tmp_path, *, rows=None, config=None, policy=None, tokenizer=None, **kwargs):
    tokenizer = tokenizer or tiny_tokenizer()
    args = {
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
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return PPOTrainer(
        model=tiny_causal_lm("llama", tokenizer) if policy is None else policy,
        args=PPOConfig(output_dir=str(tmp_path / "out"), **{**args, **(config or {})}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}) if rows is None else rows,
        processing_class=tokenizer,
        **kwargs,
    )


def zero(prompts, completions, **kwargs):
    return [0.0] * len(prompts)


def reward_adapter(tmp_path, tokenizer):
    """A reward adapter on the same base as the policy of `build`, with weights that differ from zero."""
    base = tmp_path / "base"
    tiny_causal_lm("llama", tokenizer).save_pretrained(base)
    model = tiny_reward_model("llama", tokenizer, seed=0)
    model.model.load_state_dict(tiny_causal_lm("llama", tokenizer).model.state_dict())
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(model, config)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward"), AutoModelForCausalLM.from_pretrained(base)


def critic_minus_score(trainer):
    """Difference of the critic's output at the last real token and the score PPO pays, per row."""
    batch = rollout(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        outputs = trainer.model(input_ids=ids, attention_mask=mask, role="critic")
    return (last_token_scores(outputs, mask) - trainer._scores).abs().max().item()


def test_roles_on_one_base(tmp_path):
    tokenizer = tiny_tokenizer()
    folder, policy = reward_adapter(tmp_path, tokenizer)
    trainer = build(
        tmp_path,
        tokenizer=tokenizer,
        policy=policy,
        reward_adapter=folder,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        config={"gradient_checkpointing": True, "logging_steps": 1, "num_iterations": 2},
    )
    assert trainer.critic == "adapter"
    assert critic_minus_score(trainer) < 1e-5
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-5)
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".default." in n or ".critic." in n or "critic_head" in n for n in moved)
    assert any(".default." in n for n in moved) and any(".critic." in n for n in moved)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "saved"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
    for role in ("critic", "reward"):
        saved = load_reward_model(str(tmp_path / "saved" / role))
        ours = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids), role=role)[0, -1].item()
        with torch.no_grad():
            assert saved(input_ids=ids).logits.item() == pytest.approx(ours, abs=1e-5)


def test_full_fine_tuning_trains_saves_and_evaluates(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = Dataset.from_dict({"prompt": PROMPTS})
    trainer = build(
        tmp_path,
        tokenizer=tokenizer,
        reward_funcs=tiny_reward_model("llama", tokenizer, seed=1),
        reward_processing_classes=tokenizer,
        eval_dataset=rows.select(range(4)),
        config={
            "eval_strategy": "steps",
            "eval_steps": 2,
            "per_device_eval_batch_size": 4,
            "critic_learning_rate": 5e-3,
            "log_completions": True,
            "save_strategy": "steps",
            "save_steps": 2,
            "adaptive_kl_target": 0.1,
        },
    )
    reference = {n: p.clone() for n, p in trainer.reference.named_parameters()}
    trainer.train()
    assert {g["initial_lr"] for g in trainer.optimizer.param_groups} == {1e-2, 5e-3}
    assert any("eval_kl" in entry for entry in trainer.state.log_history)
    assert all(torch.equal(p, reference[n]) for n, p in trainer.reference.named_parameters())
    out = tmp_path / "out" / "checkpoint-2"
    policy, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert load_reward_model(str(out / "critic")) is not None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "PPO" in card and "grpo" not in card.lower()
    tables = sorted((tmp_path / "out" / "completions").glob("*.parquet"))
    assert tables
    json.dumps(trainer.args.to_dict(), default=str)


def test_columns_messages_and_unscored_rows(tmp_path):
    seen = []

    def reward(prompts, completions, weight, prompt_ids, **kwargs):
        seen.extend(weight)
        return [None if w == 0 else float(w) for w in weight]

    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    rows = Dataset.from_dict({"prompt": messages, "weight": [0, 1, 2, 3, 4, 5, 6, 7]})
    trainer = build(
        tmp_path, rows=rows, reward_funcs=reward, critic_model=tiny_reward_model("llama", tiny_tokenizer())
    )
    trainer.model.train()
    batch = trainer._generate_and_score_completions([dict(row) for row in rows])
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7]
    assert batch["advantages"][0].abs().max() == 0
    assert batch["advantages"][1].abs().max() > 0


def wrong_length(prompts, completions, **kwargs):
    return [0.0]


def not_a_number(prompts, completions, **kwargs):
    return [float("nan") if i == 2 else 0.0 for i in range(len(prompts))]


def no_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


BAD = {
    "no column": ({"rows": Dataset.from_dict({"text": ["a"] * 8}), "reward_funcs": zero}, "no column 'prompt'"),
    "no rows": ({"rows": Dataset.from_dict({"prompt": []}), "reward_funcs": zero}, "no rows"),
    "empty prompt": ({"rows": Dataset.from_dict({"prompt": ["a", " "]}), "reward_funcs": zero}, "row 1"),
    "reserved": (
        {"rows": Dataset.from_dict({"prompt": ["a"], "prompt_ids": [1]}), "reward_funcs": zero},
        "'prompt_ids'",
    ),
    "context": ({"reward_funcs": zero, "config": {"max_completion_length": 126}}, "context of 128"),
    "no reward": ({}, "reward_funcs is empty"),
    "adapter without LoRA": ({"reward_funcs": zero, "reward_adapter": "x"}, "peft_config"),
    "critic of another size": (
        {"reward_funcs": zero, "critic_model": tiny_reward_model("llama", tiny_tokenizer(words=["a"]))},
        "critic_model has a vocabulary",
    ),
    "critic of another tokenizer": (
        {
            "reward_funcs": tiny_reward_model("llama", tiny_tokenizer(words=[f"x{i}" for i in range(34)])),
            "reward_processing_classes": tiny_tokenizer(words=[f"x{i}" for i in range(34)]),
        },
        "another tokenizer",
    ),
    "classes": ({"reward_funcs": zero, "reward_processing_classes": [None, None]}, "reward_processing_classes"),
    "no EOS": ({"reward_funcs": zero, "tokenizer": "no eos"}, "eos_token=None"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_training(tmp_path, case):
    kwargs, message = BAD[case]
    kwargs = dict(kwargs)
    if kwargs.get("tokenizer") == "no eos":
        kwargs.update(tokenizer=no_eos(), policy=tiny_causal_lm("llama", tiny_tokenizer()))
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **kwargs)


@pytest.mark.parametrize(
    ("reward", "message"), [(wrong_length, "wrong_length.*1 rewards for 8"), (not_a_number, "rows .2")]
)
def test_bad_rewards_are_named_at_the_first_call(tmp_path, reward, message):
    trainer = build(tmp_path, reward_funcs=reward)
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.1}, "beta=0.1.*kl_coef"),
        ({"loss_type": "bnpo"}, "loss_type='bnpo'"),
        ({"entropy_coef": 0.1}, "entropy_coef"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"use_vllm": True}, "use_vllm"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions"),
        ({"generation_kwargs": {"top_k": 5}}, "generation_kwargs has .'top_k'"),
        ({"advantage_estimator": "leave_one_out"}, "leave_one_out.*num_generations=1"),
        ({"policy_objective": "trpo"}, "policy_objective='trpo'"),
        ({"critic": "none"}, "critic='none'"),
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"kl_coef": -1.0}, "kl_coef=-1.0"),
        ({"kl_coef": 0.0, "adaptive_kl_target": 6.0}, "kl_coef=0"),
        ({"policy_objective": "pg"}, "one optimizer"),
        ({"disable_dropout": False}, "disable_dropout"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps"}, "load_best_model_at_end"),
    ],
)
def test_flags_that_do_not_compose_raise(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **fields)


def test_an_odd_rollout_works_with_one_completion(tmp_path):
    config = PPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, generation_batch_size=3, per_device_train_batch_size=1
    )
    assert (config.num_generations, config.steps_per_generation, config.optimizer_steps_per_rollout) == (1, 3, 12)
    assert type(config.num_generations) is int
