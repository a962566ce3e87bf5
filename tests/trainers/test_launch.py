"""What does not go together with a launch is refused before a model is loaded."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from rlhf_ext import PPOConfig, PPOTrainer, PreferenceRewardConfig, PreferenceRewardTrainer
from rlhf_ext.models.sharding import add_frozen, gathered, is_in_pieces, whole_weights
from rlhf_ext.trainers.launch import check_launch, reset_reentrant


def config(kind=PPOConfig, **kwargs):
    return kind("out", use_cpu=True, bf16=False, report_to=[], **kwargs)


def under_deepspeed(args, stage, **settings):
    """The arguments as an accelerate launch with DeepSpeed leaves them."""
    settings = {"bf16": {"enabled": False}, "fp16": {"enabled": False}, **settings}
    settings["zero_optimization"] = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=settings)
    return args


@pytest.mark.parametrize("enabled", [True, "auto"])
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_16_bit_modes_of_deepspeed(name, enabled):
    args = under_deepspeed(config(), 2, **{name: {"enabled": enabled}})
    setattr(args, name, True)
    with pytest.raises(ValueError, match=f"{name}=True switches on DeepSpeed's {name} mode.*Set {name}=False"):
        check_launch(args)
    setattr(args, name, False)
    if enabled == "auto":
        check_launch(args)


@pytest.mark.parametrize("trainer", [PPOTrainer, PreferenceRewardTrainer])
def test_trainers_ask_before_they_load_a_model(trainer):
    kind = PPOConfig if trainer is PPOTrainer else PreferenceRewardConfig
    args = under_deepspeed(config(kind), 2, bf16={"enabled": True})
    with pytest.raises(ValueError, match="DeepSpeed's bf16 mode"):
        trainer(model="no/such/model", args=args)


def test_zero3_that_cannot_save():
    args = under_deepspeed(config(), 3)
    check_launch(args)
    args.deepspeed_plugin.deepspeed_config["zero_optimization"].pop("stage3_gather_16bit_weights_on_model_save")
    with pytest.raises(ValueError, match="zero3_save_16bit_model=False.*Set it to True"):
        check_launch(args)


def test_a_model_in_pieces():
    model = torch.nn.Linear(2, 2)
    args = under_deepspeed(config(), 3)
    check_launch(args, model)
    model.weight.ds_id = 0
    assert is_in_pieces(model)
    with pytest.raises(ValueError, match="model was loaded in ZeRO-3's pieces.*Pass its path"):
        check_launch(args, model)


def test_reentrant_checkpointing():
    reentrant = {"use_reentrant": True}
    with pytest.raises(ValueError, match="use_reentrant=True.*Set it to False"):
        config(gradient_checkpointing_kwargs=reentrant)
    args = config(PreferenceRewardConfig, gradient_checkpointing_kwargs=reentrant)
    check_launch(args)  # one forward, one backward: right without DeepSpeed
    with pytest.raises(ValueError, match="use_reentrant=True, which fails under ZeRO-3"):
        check_launch(under_deepspeed(args, 3))


def test_what_trl_writes_into_the_arguments_is_taken_back():
    shared = {"use_reentrant": True, "context_fn": print}
    args = SimpleNamespace(gradient_checkpointing_kwargs=shared, activation_checkpointing_kwargs=None)
    reset_reentrant(args)
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False, "context_fn": print}
    assert args.activation_checkpointing_kwargs is None


def test_ddp_never_searches_for_unused_parameters():
    assert config(PreferenceRewardConfig).ddp_find_unused_parameters is False
    assert config(ddp_find_unused_parameters=None).ddp_find_unused_parameters is False
    with pytest.raises(ValueError, match="ddp_find_unused_parameters=True fails.*Set it to False"):
        config(ddp_find_unused_parameters=True)


def test_models_load_whole(monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    kept = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        assert is_deepspeed_zero3_enabled()
        with whole_weights(zero3=False):
            assert is_deepspeed_zero3_enabled() and "FSDP_CPU_RAM_EFFICIENT_LOADING" not in os.environ
        with pytest.raises(KeyError), whole_weights():
            assert not is_deepspeed_zero3_enabled()
            raise KeyError
        assert is_deepspeed_zero3_enabled() and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    finally:
        del kept  # transformers keeps no more than a weak reference
    assert not is_deepspeed_zero3_enabled()


def test_nothing_is_gathered_without_zero3():
    model = torch.nn.ModuleDict({"reward": torch.nn.Linear(2, 2)}).requires_grad_(False)
    with gathered(model.parameters()):
        assert add_frozen({}, model, {"reward"}) == {}
