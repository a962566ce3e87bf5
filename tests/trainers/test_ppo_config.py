"""Every field of the parent is inherited knowingly, given another default, or refused."""

import json
from dataclasses import MISSING, fields

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig

from rlhf_ext import PPOConfig
from rlhf_ext.models.roles import checkpoint_context
from rlhf_ext.trainers.ppo_config import ONLY_VALUE


INHERITED = {
    "model_init_kwargs",
    "trust_remote_code",
    "num_generations",
    "num_generations_eval",
    "max_completion_length",
    "ds3_gather_for_generation",
    "shuffle_dataset",
    "pad_to_multiple_of",
    "generation_batch_size",
    "steps_per_generation",
    "temperature",
    "generation_kwargs",
    "chat_template_kwargs",
    "cache_implementation",
    "num_iterations",
    "epsilon",
    "delta",
    "epsilon_high",
    "reward_weights",
    "log_completions",
    "log_multimodal",
    "num_completions_to_print",
    "log_unique_prompts",
    "log_completions_hub_repo",
}
# Groups that only the other losses, engines or controllers read; a value of their own raises.
GROUPS = ("vllm_", "sapo_", "vespo_", "ref_model_", "entropy_coef_", "entropy_target")


def test_no_field_of_the_parent_slips_through():
    general = {field.name for field in fields(TrainingArguments)}
    own = {field.name for field in fields(GRPOConfig) if field.name not in general}
    unknown = {
        name for name in own if name not in INHERITED and name not in ONLY_VALUE and not name.startswith(GROUPS)
    }
    assert unknown == set(), "decide for each: inherit it here, or refuse it in ONLY_VALUE"
    assert INHERITED - own == set(), "gone from the parent"
    assert {name for name in ONLY_VALUE if name not in {f.name for f in fields(PPOConfig)}} == set()


@pytest.mark.parametrize("name", ["vllm_mode", "sapo_temperature_pos", "vespo_k_pos", "ref_model_sync_steps"])
def test_fields_of_other_objectives_raise(tmp_path, name):
    default = next(f.default for f in fields(GRPOConfig) if f.name == name)
    assert default is not MISSING
    value = default + 1 if isinstance(default, (int, float)) else "other"
    with pytest.raises(ValueError, match=name):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{name: value})


def test_defaults_and_json(tmp_path):
    config = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert (config.kl_coef, config.num_iterations, config.vf_coef, config.gae_lambda) == (0.05, 4, 0.1, 0.95)
    assert (config.beta, config.loss_type, config.disable_dropout, config.num_generations) == (0.0, "dapo", True, 1)
    config.gradient_checkpointing_kwargs = {"use_reentrant": False, "context_fn": checkpoint_context}
    assert "checkpoint_context" in json.dumps(config.to_dict(), default=str)
