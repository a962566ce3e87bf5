"""Every field of the parent is inherited knowingly, given another default, or refused; every own field is checked."""

import json
import re
from dataclasses import MISSING, fields

import pytest
import yaml
from transformers import TrainingArguments
from trl import GRPOConfig, TrlParser

from rlhf_ext import PPOConfig
from rlhf_ext.models.roles import checkpoint_context
from rlhf_ext.trainers.ppo_config_checks import ONLY_VALUE


# The parent's fields that keep their meaning.
INHERITED = {
    "model_init_kwargs",
    "trust_remote_code",
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
# The same meaning and another default, of the parent's own fields and of `TrainingArguments`.
REDEFAULTED = {
    "learning_rate": (1e-6, 3e-6),
    "num_generations": (8, 1),
    "num_iterations": (1, 4),
    "disable_dropout": (False, True),
    "ddp_find_unused_parameters": (None, False),
}
# A value that would do something, for each refused field. Only the default composes.
REFUSED = {
    "beta": 0.1,
    "loss_type": "bnpo",
    "entropy_coef": 0.01,
    "use_adaptive_entropy": True,
    "top_entropy_quantile": 0.5,
    "importance_sampling_level": "sequence",
    "off_policy_mask_threshold": 0.5,
    "use_bias_correction_kl": False,
    "scale_rewards": "batch",
    "multi_objective_aggregation": "normalize_then_sum",
    "mask_truncated_completions": True,
    "sync_ref_model": True,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "disable_dropout": False,
    "router_aux_loss_coef": 0.01,
    "use_vllm": True,
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"a": 1},
    "use_transformers_paged": True,
    "use_liger_kernel": True,
    "cast_lm_head_to_fp32": True,
    "load_best_model_at_end": True,
    "auto_find_batch_size": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "enable_jit_checkpoint": True,
    "train_sampling_strategy": "group_by_length",
    "ddp_static_graph": True,
    "ignore_data_skip": True,
    "max_tool_calling_iterations": 2,
    "neftune_noise_alpha": 5.0,
    "remove_unused_columns": True,
    "label_smoothing_factor": 0.1,
    "vllm_mode": "server",
    "vllm_model_impl": "transformers",
    "vllm_enable_sleep_mode": True,
    "vllm_structured_outputs_regex": "a+",
    "vllm_server_base_url": "http://localhost",
    "vllm_server_host": "localhost",
    "vllm_server_port": 1,
    "vllm_server_timeout": 1.0,
    "vllm_group_port": 1,
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_max_model_length": 128,
    "vllm_tensor_parallel_size": 2,
    "vllm_importance_sampling_correction": False,
    "vllm_importance_sampling_mode": "token_mask",
    "vllm_importance_sampling_clip_max": 2.0,
    "vllm_importance_sampling_clip_min": 0.5,
    "vllm_importance_sampling_cap": 2.0,
    "sapo_temperature_neg": 2.0,
    "sapo_temperature_pos": 2.0,
    "vespo_k_pos": 1.0,
    "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 1.0,
    "vespo_lambda_neg": 1.0,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 64,
    "entropy_coef_min": 0.1,
    "entropy_coef_max": 2.0,
    "entropy_coef_delta": 0.1,
    "entropy_target": 0.5,
}


def config(**kwargs):
    return PPOConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": [], **kwargs})


def test_no_field_of_the_parent_slips_through():
    general = {field.name for field in fields(TrainingArguments)}
    own = {field.name for field in fields(GRPOConfig)} - general
    known = INHERITED | set(REDEFAULTED) | set(REFUSED)
    assert own - known == set(), "new in the parent: inherit each here, or refuse it in ONLY_VALUE"
    assert known - own - general == set(), "gone from the parent"
    assert INHERITED & set(REFUSED) == set() and INHERITED & set(REDEFAULTED) == set()
    assert set(ONLY_VALUE) <= set(REFUSED), "a refused field without a test"


def test_only_the_listed_defaults_differ():
    def default(field):
        return field.default_factory() if field.default_factory is not MISSING else field.default

    theirs = {field.name: default(field) for field in fields(GRPOConfig)}
    ours = {field.name: default(field) for field in fields(PPOConfig)}
    differ = {name: (theirs[name], ours[name]) for name in theirs if theirs[name] != ours[name]}
    assert differ == REDEFAULTED


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_do_not_compose_raise(name):
    default = next(f.default for f in fields(PPOConfig) if f.name == name)
    assert REFUSED[name] != default
    extra = {"eval_strategy": "steps"} if name == "load_best_model_at_end" else {}
    # The parent turns a deprecated alias into the field of today before we see it.
    aliases = {"use_transformers_paged": "use_transformers_", "vllm_importance_sampling_cap": "clip_max"}
    shown = aliases.get(name, name)
    with pytest.raises(ValueError, match=shown) as caught:
        config(**{name: REFUSED[name]}, **extra)
    assert re.search(r"Leave it at|Remove it|Set auto_find_batch_size=False|must be less", str(caught.value))


def test_defaults_of_our_own_fields():
    general = {field.name for field in fields(GRPOConfig)}
    own = {field.name: field.default for field in fields(PPOConfig) if field.name not in general}
    assert own == {
        "policy_objective": "clip",
        "penalty_coef": 1.0,
        "penalty_kl_target": None,
        "target_kl": None,
        "entropy_bonus_coef": 0.0,
        "epsilon_value": 0.2,
        "vf_coef": 0.1,
        "kl_coef": 0.05,
        "adaptive_kl_target": None,
        "kl_estimator": "k1",
        "kl_horizon": 10_000,
        "baseline": "none",
        "advantage_estimator": "gae",
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "bootstrap_truncated": False,
        "whiten_rewards": False,
        "whiten_advantages": True,
        "skip_padding": True,
        "trunk_cache_gib": None,
        "critic": None,
        "critic_learning_rate": None,
        "critic_epochs": None,
        "critic_warmup_rollouts": 0,
    }
    for field in fields(PPOConfig):
        if field.name in own:
            assert field.metadata["help"], field.name
            assert f"{field.name} (" in PPOConfig.__doc__, field.name


NAN = float("nan")
BAD = [
    ({"policy_objective": "trpo"}, "policy_objective='trpo'.*Choose one of .'clip', 'penalty', 'pg'"),
    ({"kl_estimator": "k4"}, "kl_estimator='k4'.*Choose one of"),
    ({"baseline": "value"}, "baseline='value'.*Choose one of"),
    ({"target_kl": 0.0}, "target_kl=0.0 must be positive"),
    ({"entropy_bonus_coef": -1.0}, "entropy_bonus_coef=-1.0 must not be negative"),
    ({"penalty_coef": 2.0}, "penalty_coef=2.0 has no effect.*Remove it"),
    ({"penalty_kl_target": 0.01}, "penalty_kl_target=0.01 has no effect"),
    ({"policy_objective": "penalty", "delta": 2.0}, "delta=2.0 has no effect"),
    ({"baseline": "batch_mean"}, "baseline='batch_mean' has no effect"),
    (
        {"baseline": "batch_mean", "critic": "none", "advantage_estimator": "returns"},
        "baseline='batch_mean' has no effect.*whiten_advantages=True",
    ),
    ({"policy_objective": "penalty", "epsilon": 0.1}, "epsilon=0.1 has no effect.*clips no ratio"),
    ({"target_kl": 0.1, "num_iterations": 1}, "target_kl=0.1 has no effect.*1 optimizer step"),
    ({"advantage_estimator": "returns", "gae_lambda": 0.9}, "gae_lambda=0.9 has no effect"),
    (
        {"advantage_estimator": "leave_one_out", "num_generations": 2, "gamma": 0.9},
        "gamma=0.9 has no effect.*leave_one_out",
    ),
    *[
        ({"advantage_estimator": "returns", "critic": "none", name: value}, f"{name}={value} has no effect.*no critic")
        for name, value in (("vf_coef", 0.5), ("epsilon_value", None))
    ],
    ({"kl_horizon": 100}, "kl_horizon=100 has no effect.*adaptive_kl_target=None"),
    (
        {"critic": "none", "advantage_estimator": "returns", "critic_warmup_rollouts": 2},
        "critic_warmup_rollouts=2 has",
    ),
    ({"critic_epochs": 0}, "critic_epochs=0 must lie between 1 and num_iterations=4"),
    ({"critic_epochs": 5}, "critic_epochs=5 must lie between 1 and num_iterations=4"),
    ({"critic": "none", "advantage_estimator": "returns", "critic_epochs": 2}, "critic_epochs=2 has no effect"),
    ({"kl_coef": 0.0, "kl_estimator": "k3"}, "kl_estimator='k3' has no effect"),
    ({"advantage_estimator": "vtrace"}, "advantage_estimator='vtrace'.*Choose one of"),
    ({"critic": "lora"}, "critic='lora'.*Choose one of"),
    *[
        ({name: value}, f"{name}={value}.*between 0 and 1")
        for name in ("gamma", "gae_lambda")
        for value in (-0.1, 1.1)
    ],
    ({"gamma": NAN}, "gamma=nan.*between 0 and 1"),
    *[
        ({name: value}, f"{name}={value}.*must be positive.*None")
        for name in ("temperature", "kl_horizon", "adaptive_kl_target", "epsilon", "epsilon_high", "epsilon_value")
        for value in (0, -1, NAN)
    ],
    *[
        ({name: value}, f"{name}={value}.*must not be negative")
        for name in ("kl_coef", "vf_coef", "critic_learning_rate")
        for value in (-0.1, NAN)
    ],
    ({"delta": 0.9}, "delta=0.9.*above 1.*None"),
    ({"kl_coef": 0.0, "adaptive_kl_target": 6.0}, "kl_coef=0.*adaptive_kl_target.*Start above 0"),
    ({"advantage_estimator": "leave_one_out"}, "leave_one_out.*num_generations=1.*Set num_generations to 2"),
    ({"critic": "none"}, "gae.*critic='none'.*Use 'returns'"),
    (
        {"advantage_estimator": "leave_one_out", "num_generations": 2, "critic": "model"},
        "critic='model' is not read by advantage_estimator='leave_one_out'.*Set it to 'none'",
    ),
    (
        {"bootstrap_truncated": True, "advantage_estimator": "returns"},
        "bootstrap_truncated=True.*'returns'.*Set it to False",
    ),
    (
        {"bootstrap_truncated": True, "advantage_estimator": "leave_one_out", "num_generations": 2},
        "bootstrap_truncated=True.*'leave_one_out'",
    ),
    (
        {"critic_learning_rate": 1e-5, "critic": "none", "advantage_estimator": "returns"},
        "critic_learning_rate=1e-05.*Remove it",
    ),
    (
        {"critic_learning_rate": 1e-5, "advantage_estimator": "leave_one_out", "num_generations": 2},
        "critic_learning_rate=1e-05.*Remove it",
    ),
    ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "steps_per_generation=3.*accumulation_steps=2"),
    ({"policy_objective": "pg"}, "policy_objective='pg'.*num_iterations=1"),
    ({"policy_objective": "pg", "num_iterations": 1, "steps_per_generation": 2}, "one optimizer step"),
    ({"num_generations_eval": 2}, "num_generations_eval=2.*num_generations=1.*Remove it"),
    ({"num_generations": 0}, "num_generations=0 must be at least 1"),
    ({"num_generations": None}, "num_generations=None must be at least 1"),
    ({"num_generations": 3, "per_device_train_batch_size": 4}, "num_generations.*3"),
    *[
        ({"generation_kwargs": {name: value}}, f"generation_kwargs has .'{name}'.*may change the distribution")
        for name, value in [("top_k", 5), ("min_length", 3), ("no_repeat_ngram_size", 2), ("num_beams", 2)]
    ],
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=lambda value: None if isinstance(value, str) else str(value))
def test_bad_values_name_field_value_and_remedy(bad, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        config(**{"gradient_accumulation_steps": 1, **bad})


def test_values_at_the_edge_pass():
    config(
        gamma=0.0, gae_lambda=0.0, kl_coef=0.0, vf_coef=0.0, epsilon_value=None, delta=1.5, critic_learning_rate=0.0
    )
    config(generation_kwargs={"use_cache": True})
    config(advantage_estimator="leave_one_out", num_generations=2, critic="none")
    config(advantage_estimator="returns", critic="none", policy_objective="pg", num_iterations=1)


def test_odd_rollouts_and_counts():
    odd = config(generation_batch_size=3, per_device_train_batch_size=1, gradient_accumulation_steps=1)
    assert (odd.num_generations, odd.steps_per_generation, odd.optimizer_steps_per_rollout) == (1, 3, 12)
    assert type(odd.num_generations) is int and type(odd.num_generations_eval) is int
    assert config(eval_strategy="steps", per_device_eval_batch_size=3).num_generations_eval == 1
    many = config(steps_per_generation=8, gradient_accumulation_steps=2, num_iterations=3)
    assert many.optimizer_steps_per_rollout == 12


def test_parser_reads_yaml_and_flags(tmp_path):
    values = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "kl_coef": 0.1,
        "adaptive_kl_target": 6.0,
        "critic": "model",
        "epsilon_value": 0.3,
        "critic_learning_rate": 1.0e-5,
        "whiten_advantages": False,
    }
    path = tmp_path / "ppo.yaml"
    path.write_text(yaml.safe_dump(values))
    flags = ["--config", str(path), "--kl_coef", "0.2", "--gamma", "0.9", "--whiten_rewards", "true"]
    (read,) = TrlParser((PPOConfig,)).parse_args_and_config(flags)
    for name, value in {**values, "kl_coef": 0.2, "gamma": 0.9, "whiten_rewards": True}.items():
        assert getattr(read, name) == value, name
    with pytest.raises((ValueError, SystemExit)):
        TrlParser((PPOConfig,)).parse_args_and_config(["--config", str(path), "--clip_range", "0.2"])


def test_dictionary_is_json_with_a_context(tmp_path):
    given = config(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_context})
    shown = given.to_dict()["gradient_checkpointing_kwargs"]
    assert json.dumps(shown) == '{"use_reentrant": false, "context_fn": "checkpoint_context"}'
    json.dumps(given.to_dict())
    json.loads(given.to_json_string())
    assert given.gradient_checkpointing_kwargs["context_fn"] is checkpoint_context, "the arguments keep the function"
