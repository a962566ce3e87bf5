"""What a reviewer found: each was silent, and each test was red before its fix."""

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PhiConfig

from rlhf_ext.models.critics import critic_from_policy, critic_from_reward
from rlhf_ext.models.reward_checkpoints import save_reward_config
from rlhf_ext.models.score_wrappers import EnsembleSpread
from rlhf_ext.models.scoring import load_reward_model
from rlhf_ext.trainers.ppo_rollout import whole_rows
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.test_ppo_roles import (
    Adapters,
    base_policy,
    build,
    changed,
    length,
    logged,
    lora,
    one_base,
    rollout,
    weights,
    zero,
)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return Adapters(tmp_path_factory.mktemp)


def reward_model():
    return tiny_reward_model("llama", tiny_tokenizer(), seed=1)


def test_the_reference_is_read_at_the_temperature_of_the_policy(tmp_path, adapters):
    for trainer in (
        build(tmp_path, reward_funcs=length, config={"temperature": 0.7}),
        one_base(tmp_path, adapters, temperature=0.7),
    ):
        rollout(trainer)
        assert trainer._metrics["train"]["kl"][-1] == pytest.approx(0, abs=1e-5)


def test_the_adapted_coefficient_reaches_the_rewards(tmp_path):
    trainer = build(
        tmp_path,
        reward_funcs=length,
        config={"adaptive_kl_target": 0.01, "kl_horizon": 20, "kl_coef": 0.5, "max_steps": 4, "learning_rate": 0.05},
    )
    trainer.train()
    assert trainer.kl_coef > 0.55, "the controller has moved"
    seen = {}
    compute = trainer.compute_advantages
    trainer.compute_advantages = lambda batch: seen.update(batch, kl_coef=trainer.kl_coef) or compute(batch)
    rollout(trainer)
    expected = seen["scores"] - seen["kl_coef"] * seen["kl"].sum(-1)
    assert seen["kl"].sum(-1).abs().max() > 0.1
    torch.testing.assert_close(seen["rewards"].sum(-1), expected)


@pytest.mark.parametrize("model", [lambda: "same", lambda: reward_model().requires_grad_(False)])
def test_a_critic_given_as_a_model_trains(tmp_path, model):
    reward = reward_model()
    given = reward if model() == "same" else model()
    trainer = build(tmp_path, reward_funcs=reward, critic_model=given, config={"max_steps": 1})
    before, kept = weights(trainer.model), weights(given)
    trainer.train()
    moved = changed(trainer.model, before)
    assert any(name.startswith("critic.") for name in moved)
    assert changed(given, kept) == set(), "the caller's model is left alone"


def test_a_critic_from_the_folder_of_an_adapter_trains(tmp_path, adapters):
    critic = load_reward_model(str(adapters["llama"] / "reward"))
    assert isinstance(critic, PeftModel)
    trainer = build(tmp_path, reward_funcs=length, critic_model=critic, config={"max_steps": 1})
    before = weights(trainer.model)
    trainer.train()
    assert any("critic" in name for name in changed(trainer.model, before))


def test_an_optimizer_without_the_critic_is_refused(tmp_path):
    policy = tiny_causal_lm("llama", tiny_tokenizer())
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizers\[0\] lacks .*'critic\."):
        build(tmp_path, policy, reward_funcs=reward_model(), optimizers=(optimizer, None))
    config = {"advantage_estimator": "leave_one_out", "num_generations": 2}
    policy = tiny_causal_lm("llama", tiny_tokenizer())
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    build(tmp_path, policy, reward_funcs=length, optimizers=(optimizer, None), config=config)


def test_a_summing_reward_adapter_is_refused(tmp_path, adapters):
    import shutil

    folder = tmp_path / "summing"
    shutil.copytree(adapters["llama"] / "reward", folder)
    save_reward_config(str(folder), "sum", torch.float32)
    with pytest.raises(ValueError, match="reward_aggregation='sum'.*load_reward_model"):
        build(tmp_path, base_policy(adapters["llama"]), reward_adapter=str(folder), peft_config=lora())


def test_nan_of_the_reward_adapter_is_named(tmp_path, adapters):
    trainer = one_base(tmp_path, adapters)
    trainer.roles.base.reward_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="'reward_adapter' returned .*nan.* for rows"):
        trainer.train()


def test_the_logged_value_loss_does_not_depend_on_the_split(tmp_path):
    losses = []
    for size, parts in ((8, 1), (2, 4)):
        trainer = build(
            tmp_path,
            reward_funcs=reward_model(),
            config={
                "per_device_train_batch_size": size,
                "steps_per_generation": parts,
                "gradient_accumulation_steps": parts,
                "temperature": 1e-4,  # the same completions, whatever the split
                "max_steps": 1,
            },
        )
        trainer.train()
        losses.append(logged(trainer, "value_loss")[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_no_kl_is_logged_without_a_reference(tmp_path):
    trainer = build(tmp_path, reward_funcs=zero, config={"kl_coef": 0.0, "max_steps": 1})
    trainer.train()
    assert logged(trainer, "kl") == [] and logged(trainer, "rlhf_reward") != []


def test_what_trains_of_a_critic_is_float32():
    model = tiny_reward_model("llama", tiny_tokenizer(), dtype=torch.bfloat16)
    policy = tiny_causal_lm("llama", tiny_tokenizer(), dtype=torch.bfloat16)
    for critic in (critic_from_reward(model, 1.0), critic_from_policy(policy)):
        assert {p.dtype for p in critic.parameters() if p.requires_grad} == {torch.float32}


def test_the_configuration_of_the_caller_is_left_alone(tmp_path):
    from rlhf_ext import PPOConfig, PPOTrainer
    from tests.trainers.test_ppo_roles import ARGUMENTS, PROMPTS, Dataset

    tokenizer = tiny_tokenizer()
    tiny_causal_lm("llama", tokenizer).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    args = PPOConfig(output_dir=str(tmp_path / "out"), model_init_kwargs={"dtype": "float32"}, **ARGUMENTS)
    rows = Dataset.from_dict({"prompt": PROMPTS})
    PPOTrainer(model=str(tmp_path / "policy"), reward_funcs=(length,), args=args, train_dataset=rows)
    assert args.model_init_kwargs == {"dtype": "float32"}


def test_a_horizon_shorter_than_the_rollout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="kl_horizon=1 is too short for rollouts of 8"):
        build(tmp_path, reward_funcs=zero, config={"adaptive_kl_target": 1.0, "kl_horizon": 1})


# One base under several roles: nobody may change it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa"}, "peft_config has init_lora_weights='pissa', which changes the base"),
        ({"init_lora_weights": "olora"}, "peft_config has init_lora_weights='olora'"),
        ({"bias": "all"}, "peft_config has bias='all', which trains biases of the base"),
    ],
)
def test_an_adapter_that_changes_the_base_is_refused(tmp_path, adapters, changes, message):
    folder = adapters["llama"]
    with pytest.raises(ValueError, match=message):
        build(tmp_path, base_policy(folder), reward_adapter=str(folder / "reward"), peft_config=lora(**changes))


def test_dropout_of_attention_functions_is_off_in_every_role(tmp_path):
    """`nn.Dropout` is not all: attention reads a rate from its module."""
    policy = tiny_causal_lm("llama", tiny_tokenizer(), attention_dropout=0.3)
    reward = tiny_reward_model("llama", tiny_tokenizer(), seed=1, attention_dropout=0.3)
    trainer = build(tmp_path, policy, reward_funcs=reward, config={"learning_rate": 0.0, "max_steps": 2})
    trainer.train()
    assert all(abs(value - 1) < 1e-5 for value in logged(trainer, "policy/ratio_max"))
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "value/clip_fraction") == [0.0] * len(logged(trainer, "value/clip_fraction"))
    assert trainer.model.config.attention_dropout == 0.3  # what is saved says what was loaded


def test_a_dora_critic_trains_its_magnitudes(tmp_path, adapters):
    folder = adapters["llama"]
    classifier = tiny_reward_model("llama", tiny_tokenizer())
    classifier.base_model.load_state_dict(base_policy(folder).base_model.state_dict())
    config = lora(task_type="SEQ_CLS", modules_to_save=["score"], use_dora=True)
    reward = get_peft_model(classifier, config)
    reward.peft_config["default"].base_model_name_or_path = str(folder / "base")
    reward.save_pretrained(tmp_path / "dora")
    trainer = build(tmp_path, base_policy(folder), reward_adapter=str(tmp_path / "dora"), peft_config=lora())
    magnitudes = {n: p for n, p in trainer.model.named_parameters() if "magnitude" in n}
    assert any(".critic." in name for name in magnitudes)
    assert all(parameter.requires_grad == (".critic." in name) for name, parameter in magnitudes.items())


def test_the_penalty_sees_a_bias_of_the_head_move(tmp_path):
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(PhiConfig(vocab_size=len(tokenizer), **sizes, **ids))
    assert policy.lm_head.bias is not None
    config = {"policy_objective": "penalty", "steps_per_generation": 1, "gradient_accumulation_steps": 1}
    trainer = build(tmp_path, policy, reward_funcs=length, config={**config, "per_device_train_batch_size": 8})
    batch = rollout(trainer)
    with torch.no_grad():
        policy.lm_head.bias += torch.linspace(-1, 1, len(tokenizer))
        trainer._logps(trainer.model, batch, "train")
        found = trainer._kl_to_old(batch, trainer._take_hidden(batch))
        logits = policy(*whole_rows(batch)).logits[:, batch["prompt_ids"].size(1) - 1 : -1]
    new = logits.double().log_softmax(-1)
    old = (logits - torch.linspace(-1, 1, len(tokenizer))).double().log_softmax(-1)
    expected = (old.exp() * (old - new)).sum(-1)[batch["completion_mask"].bool()]
    assert expected.min() > 0.01
    torch.testing.assert_close(found[batch["completion_mask"].bool()].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "block", "message"),
    [
        (
            {"critic_learning_rate": 0.1},
            {},
            "critic_learning_rate=0.1 has no effect on the optimizer of the DeepSpeed",
        ),
        ({"critic_warmup_rollouts": 1}, {"weight_decay": 0.1}, "weight_decay=0.1 in the DeepSpeed configuration"),
    ],
)
def test_an_optimizer_of_the_deepspeed_file_is_asked(tmp_path, config, block, message):
    trainer = build(tmp_path, reward_funcs=length, config=config)
    trainer._check_update()
    settings = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, **block}}, "zero_optimization": {"stage": 2}}
    trainer.args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=settings)
    with pytest.raises(ValueError, match=message):
        trainer._check_update()


@pytest.mark.parametrize("given", ["function", "ensemble"])
def test_a_coroutine_is_no_probe(tmp_path, given):
    async def probe(prompts, **kwargs):
        return [0.0] * len(prompts)

    probes = [probe] if given == "function" else [EnsembleSpread([length, probe])]
    with pytest.raises(ValueError, match="takes no coroutine"):
        build(tmp_path, reward_funcs=length, probe_funcs=probes)


def test_probes_may_write_columns_as_rewards_may(tmp_path):
    def probe(prompts, log_extra, **kwargs):
        log_extra("looked_at", ["yes"] * len(prompts))
        return [0.0] * len(prompts)

    trainer = build(tmp_path, reward_funcs=length, probe_funcs=[probe])
    rollout(trainer)
    assert set(trainer._logs["extra"]["looked_at"]) == {"yes"}
