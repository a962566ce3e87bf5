"""Names, signatures, keys and branches of TRL 1.16 that we lean on. A red test here says what of ours would break."""

import ast
import inspect
import textwrap
from collections import deque
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, RewardTrainer, SFTTrainer, TrlParser
from trl.kernels import chunked_logprob
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed, prepare_fsdp
from trl.trainer import utils as trl_utils
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head, shuffle_sequence_dict, split_tensor_dict

from rlhf_ext import PPOConfig, PPOTrainer, PreferenceRewardTrainer
from rlhf_ext.models import memory_trace
from rlhf_ext.trainers import ppo_config_checks, ppo_rollout, ppo_trainer
from tests.tiny import tiny_causal_lm, tiny_tokenizer
from tests.trainers.ppo_runs import PROMPTS, make_trainer, rollout


PACKAGE = Path(ppo_trainer.__file__).parents[1]

# (class, method): (parameters, what of ours breaks)
SIGNATURES = {
    (GRPOTrainer, "_calculate_rewards"): (
        ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "PPOTrainer's first wrap: raw scores, prompt ids for reward functions",
    ),
    (GRPOTrainer, "_generate_and_score_completions"): (["self", "inputs"], "PPOTrainer's second wrap: the rollout"),
    (GRPOTrainer, "_compute_loss"): (["self", "model", "inputs"], "PPOTrainer's third wrap: the value loss"),
    (GRPOTrainer, "_tokenize_prompts"): (["self", "prompts"], "prompt ids for reward functions"),
    (GRPOTrainer, "_save"): (["self", "output_dir", "state_dict"], "PPOTrainer._save: critic and reward folders"),
    (GRPOTrainer, "create_optimizer"): (["self", "model"], "critic_learning_rate"),
    (GRPOTrainer, "train"): (
        ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
        "CompleteCheckpointMixin.train: checks the checkpoint",
    ),
    **{
        (owner, name): (["self", *parameters], f"{name}: checkpoints that are complete or absent")
        for owner in (GRPOTrainer, RewardTrainer)
        for name, parameters in {
            "_get_output_dir": ["trial"],
            "_save_checkpoint": ["model", "trial"],
            "_push_from_checkpoint": ["checkpoint_folder"],
        }.items()
    },
    **{
        (owner, name): (["self", *parameters], f"HubMixin.{name}: card and folders of every role on the Hub")
        for owner in (GRPOTrainer, RewardTrainer)
        for name, parameters in {
            "create_model_card": ["model_name", "dataset_name", "tags"],
            "push_to_hub": ["commit_message", "blocking", "token", "revision", "private", "kwargs"],
        }.items()
    },
    (GRPOTrainer, "_save_rng_state"): (["self", "output_dir"], "resuming: the rollout in use is saved"),
    (GRPOTrainer, "_load_rng_state"): (["self", "checkpoint"], "resuming: the rollout in use comes back"),
    (GRPOTrainer, "_load_from_checkpoint"): (["self", "resume_from_checkpoint", "model"], "resuming: every role"),
    (GRPOTrainer, "_get_train_sampler"): (["self", "dataset"], "resuming: the order of a later epoch"),
    (RewardTrainer, "compute_loss"): (
        ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        "PreferenceRewardTrainer.compute_loss",
    ),
    (RewardTrainer, "_prepare_dataset"): (
        ["self", "dataset", "processing_class", "args", "dataset_name"],
        "PreferenceRewardTrainer._prepare_dataset: general rows",
    ),
    (SFTTrainer, "_prepare_dataset"): (
        ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"],
        "CompleteSFTTrainer._prepare_dataset: no label on the end of a text that was cut",
    ),
    (RewardTrainer, "_set_signature_columns_if_needed"): (["self"], "columns of candidates would be dropped"),
    (RewardTrainer, "_save"): (["self", "output_dir", "state_dict"], "reward_config.json beside the weights"),
    (TrlParser, "parse_args_and_config"): (
        ["self", "args", "return_remaining_strings", "fail_with_unknown_args", "separate_remaining_strings"],
        "StrictParser: whole names of flags",
    ),
    (TrlParser, "set_defaults_with_config"): (["self", "kwargs"], "StrictParser: unknown keys of a YAML"),
    (TrlParser, "parse_known_args"): (["self", "args", "namespace"], "StrictParser: unknown flags"),
    (DataCollatorForPreference, "torch_call"): (["self", "examples"], "DataCollatorForCandidates follows its order"),
}


@pytest.mark.parametrize("seam", SIGNATURES, ids=lambda seam: f"{seam[0].__name__}.{seam[1]}")
def test_signatures_of_wrapped_methods(seam):
    owner, name = seam
    expected, broken = SIGNATURES[seam]
    assert list(inspect.signature(getattr(owner, name)).parameters) == expected, f"breaks: {broken}"


KEYWORDS = {
    "trainer arguments": (
        GRPOTrainer.__init__,
        [
            "model",
            "reward_funcs",
            "args",
            "train_dataset",
            "eval_dataset",
            "processing_class",
            "reward_processing_classes",
            "callbacks",
            "optimizers",
            "quantization_config",
            "peft_config",
        ],
    ),
    "log-probabilities of policy and reference": (
        GRPOTrainer._get_per_token_logps_and_entropies,
        ["model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"],
    ),
    "log-probabilities of the reference": (add_fused_lm_head, ["model", "temperature"]),
    "log-probabilities of preferred completions": (
        chunked_logprob.ChunkedLogProbFunction.forward,
        [
            "hidden",
            "weight",
            "bias",
            "targets",
            "temperature",
            "chunk_size",
            "final_logit_softcapping",
            "logit_scale",
            "outputs",
        ],
    ),
    "rollouts under checkpointing": (disable_gradient_checkpointing, ["model", "gradient_checkpointing_kwargs"]),
    "adapters beside each other": (PeftModel.add_adapter, ["adapter_name", "peft_config", "autocast_adapter_dtype"]),
    "reading adapters": (
        get_peft_model_state_dict,
        ["model", "state_dict", "adapter_name", "save_embedding_layers"],
    ),
    "writing adapters": (set_peft_model_state_dict, ["model", "peft_model_state_dict", "adapter_name"]),
    "whitening on all processes": (Accelerator.pad_across_processes, ["tensor", "dim"]),
    "the reference on its device": (Accelerator.prepare_model, ["model", "evaluation_mode"]),
    "the reference under DeepSpeed": (prepare_deepspeed, ["model", "accelerator"]),
    "the reference under FSDP": (prepare_fsdp, ["model", "accelerator"]),
}


@pytest.mark.parametrize("ours", KEYWORDS)
def test_keywords_of_what_we_call(ours):
    function, names = KEYWORDS[ours]
    missing = set(names) - set(inspect.signature(function).parameters)
    assert not missing, f"{function.__qualname__} lost {missing}; breaks: {ours}"


# Every TRL name that the package imports: a new one is a new dependency on the minor version.
TRL_NAMES = {
    "trl.GRPOConfig",
    "trl.GRPOTrainer",
    "trl.ModelConfig",
    "trl.RewardConfig",
    "trl.RewardTrainer",
    "trl.SFTConfig",
    "trl.SFTTrainer",
    "trl.TrlParser",
    "trl.get_peft_config",
    "trl.get_quantization_config",
    "trl.is_conversational",
    "trl.kernels.chunked_logprob.ChunkedLogProbFunction",
    "trl.models.utils.disable_gradient_checkpointing",
    "trl.models.utils.prepare_deepspeed",
    "trl.models.utils.prepare_fsdp",
    "trl.trainer.utils.FusedCausalLMOutput",
    "trl.trainer.utils.add_fused_lm_head",
    "trl.trainer.utils.get_callable_name",
    "trl.trainer.utils.get_config_model_id",
    "trl.trainer.utils.global_then_local_main_first",
    "trl.trainer.utils.is_async_callable",
    "trl.trainer.utils.maybe_gather_lm_head_ctx",
    "trl.trainer.utils.pad",
}


def test_the_list_of_imported_names_is_complete():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "trl":
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert found == TRL_NAMES


# What the parent reads


def reads(method, owner):
    """Attributes of `self` (or `self.args`) that a method of the parent reads."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == owner:
            found.add(node.attr)
    return found


# Flags as the parent's loss and rollout read them, and how each stands with us. A name of the parent's attribute that
# differs from the field's: `epsilon_low` is `epsilon`, `_entropy_bonus_enabled` is `entropy_coef`.
ATTRIBUTE_OF = {
    "epsilon_low": "epsilon",
    "_entropy_bonus_enabled": "entropy_coef",
    "aux_loss_enabled": "router_aux_loss_coef",
}
LOSS_FLAGS = {
    "inherited": {"epsilon_low", "epsilon_high", "delta", "max_completion_length", "steps_per_generation"},
    "refused": {
        "_entropy_bonus_enabled",
        "aux_loss_enabled",
        "beta",
        "entropy_coef",
        "entropy_coef_delta",
        "entropy_coef_max",
        "entropy_coef_min",
        "entropy_target",
        "importance_sampling_level",
        "loss_type",
        "off_policy_mask_threshold",
        "router_aux_loss_coef",
        "sapo_temperature_neg",
        "sapo_temperature_pos",
        "top_entropy_quantile",
        "use_adaptive_entropy",
        "use_bias_correction_kl",
        "use_vllm",
        "vespo_k_neg",
        "vespo_k_pos",
        "vespo_lambda_neg",
        "vespo_lambda_pos",
        "vllm_importance_sampling_correction",
    },
}
ROLLOUT_FLAGS = {
    "inherited": {
        "chat_template_kwargs",
        "gradient_accumulation_steps",
        "gradient_checkpointing_kwargs",
        "log_multimodal",
        "num_generations",
        "num_generations_eval",
        "num_iterations",
        "pad_to_multiple_of",
        "per_device_eval_batch_size",
        "per_device_train_batch_size",
        "reward_weights",
        "steps_per_generation",
    },
    "refused": {
        "beta",
        "mask_truncated_completions",
        "multi_objective_aggregation",
        "scale_rewards",
        "use_vllm",
        "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
    },
}


@pytest.mark.parametrize(
    ("method", "flags"),
    [("_compute_loss", LOSS_FLAGS), ("_generate_and_score_completions", ROLLOUT_FLAGS)],
)
def test_every_flag_that_the_parent_reads_is_known(method, flags):
    source = getattr(GRPOTrainer, method)
    known = {field.name for field in fields(GRPOConfig)} | set(ATTRIBUTE_OF)
    found = (reads(source, "self") & known) | reads(source, "self.args")
    listed = flags["inherited"] | flags["refused"]
    assert found - listed == set(), f"GRPOTrainer.{method} reads a new flag: inherit or refuse it in PPOConfig"
    assert listed - found == set(), f"GRPOTrainer.{method} no longer reads these: is our use of them still true?"
    groups = ("vllm_", "sapo_", "vespo_", "ref_model_", "entropy_coef_", "entropy_target")
    for name in flags["refused"]:
        name = ATTRIBUTE_OF.get(name, name)
        assert name in ppo_config_checks.ONLY_VALUE or name.startswith(groups), f"PPOConfig lets {name} through"
    for name in flags["inherited"]:
        assert ATTRIBUTE_OF.get(name, name) not in ppo_config_checks.ONLY_VALUE, name


def test_our_own_reads_of_arguments_exist():
    known = {field.name for field in fields(PPOConfig)} | set(dir(PPOConfig))
    for module in (ppo_trainer, ppo_rollout):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self.args", "args"):
                assert node.attr in known, f"{module.__name__} reads args.{node.attr}"


# Overrides that do not call the method they override, with the one that does in their place.
INSTEAD = {("PPOTrainer", "_compute_loss"): "compute_policy_loss", ("PreferenceRewardTrainer", "compute_loss"): None}


@pytest.mark.parametrize("ours", [PPOTrainer, PreferenceRewardTrainer])
def test_overrides_call_super(ours):
    parent = next(base for base in ours.__mro__ if base.__module__.startswith("trl."))
    mixed = [kind for kind in ours.__mro__ if kind.__module__.startswith("rlhf_ext.")]
    overridden = [
        (kind, n) for kind in mixed for n, f in vars(kind).items() if inspect.isfunction(f) and hasattr(parent, n)
    ]
    assert {"__init__", "_save", "train", "_save_checkpoint"} <= {name for _, name in overridden}
    for kind, name in overridden:
        body = inspect.getsource(vars(kind)[INSTEAD.get((ours.__name__, name), name) or name])
        if INSTEAD.get((ours.__name__, name), name) is None:
            assert "Does not call `super()`" in body, f"{ours.__name__}.{name} has to say why"
        else:
            assert f"super().{name}(" in body, f"{ours.__name__}.{name} copies what it should wrap"


# What comes out of a rollout


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("seams"))


@pytest.fixture(scope="module")
def batch(trainer):
    return rollout(trainer)


def test_loss_scaling_flags():
    """Our value term assumes that GRPO divides by accumulation itself; the preference loss that the trainer does."""
    assert GRPOTrainer.loss_is_scaled_for_ga is True
    assert RewardTrainer.loss_is_scaled_for_ga is False


def test_keys_and_shapes_of_the_parents_rollout(trainer):
    trainer.model.train()
    found = GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": prompt} for prompt in PROMPTS])
    assert set(found) == {
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "advantages",
        "num_items_in_batch",
        "old_per_token_logps",
    }, "a new key reaches the loss: does it change the objective?"
    rows = len(PROMPTS)
    assert found["prompt_ids"].shape == found["prompt_mask"].shape and len(found["prompt_ids"]) == rows
    assert found["completion_ids"].shape == found["completion_mask"].shape and len(found["completion_ids"]) == rows
    assert found["advantages"].shape == (rows,)
    assert found["num_items_in_batch"].dim() == 0
    prompt, completion = found["prompt_mask"], found["completion_mask"]
    assert (prompt[:, 1:] >= prompt[:, :-1]).all(), "prompts are padded on the left: before_each_token slices there"
    assert (completion[:, 1:] <= completion[:, :-1]).all(), "completions are padded on the right"


def test_keys_and_shapes_of_our_rollout(trainer, batch):
    rows, tokens = batch["completion_ids"].shape
    for name in ("advantages", "old_per_token_logps", "values", "returns"):
        assert batch[name].shape == (rows, tokens), name
        assert torch.isfinite(batch[name]).all(), f"the parent multiplies {name} by the mask: NaN would stay"
    assert int(batch["num_items_in_batch"]) == int(batch["completion_mask"].sum()), (
        "the divisor has to count the whole rollout: _loss_divisor"
    )


@pytest.mark.parametrize(
    ("accumulation", "steps", "iterations", "present"),
    [(2, 2, 1, False), (2, 2, 4, True), (4, 2, 1, False), (4, 2, 2, False), (2, 4, 1, True)],
)
def test_when_the_parent_gives_old_log_probabilities(trainer, monkeypatch, accumulation, steps, iterations, present):
    """Where it does not, PPOTrainer computes them itself, and `pg` takes them away."""
    monkeypatch.setattr(trainer.args, "gradient_accumulation_steps", accumulation)
    monkeypatch.setattr(trainer.args, "steps_per_generation", steps)
    monkeypatch.setattr(trainer, "num_iterations", iterations)
    rows = [{"prompt": prompt} for prompt in PROMPTS[:2]]
    found = GRPOTrainer._generate_and_score_completions(trainer, rows)
    assert ("old_per_token_logps" in found) is present
    assert "ref_per_token_logps" not in found, "beta is 0: the reference is ours"
    assert "old_per_token_logps" in trainer._generate_and_score_completions(rows)
    monkeypatch.setattr(trainer.args, "policy_objective", "pg")
    assert "old_per_token_logps" not in trainer._generate_and_score_completions(rows)


def test_log_probabilities_come_first_in_a_tuple(trainer, batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    found = trainer._get_per_token_logps_and_entropies(
        trainer.model, input_ids=ids, attention_mask=mask, logits_to_keep=batch["completion_ids"].size(1), batch_size=3
    )
    assert isinstance(found, tuple), "RolloutMixin._logps takes the first item"
    assert found[0].shape == batch["completion_ids"].shape


def test_parent_takes_advantages_per_token(trainer, batch):
    """The `(B, T)` branch has no user left in TRL; without it PPO's advantages would be misread."""
    trainer.model.train()
    per_row = torch.randn(len(PROMPTS))
    per_token = per_row[:, None].expand_as(batch["advantages"])
    losses = [
        GRPOTrainer._compute_loss(trainer, trainer.model, {**batch, "advantages": advantages})
        for advantages in (per_row, per_token)
    ]
    assert losses[0].item() == losses[1].item()
    other = GRPOTrainer._compute_loss(trainer, trainer.model, {**batch, "advantages": per_token.cumsum(dim=1)})
    assert other.item() != losses[0].item(), "tokens have to count one by one"


@pytest.mark.parametrize(
    ("accumulation", "steps", "training"), [(1, 1, True), (2, 2, True), (1, 4, True), (2, 8, True), (2, 8, False)]
)
def test_divisor_is_the_parents(trainer, batch, monkeypatch, accumulation, steps, training):
    """With a ratio of 1 and advantages of 1 the parent's loss is -tokens / divisor; the value loss uses ours."""
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", accumulation)
    monkeypatch.setattr(trainer.args, "steps_per_generation", steps)
    ones = {**batch, "advantages": torch.ones_like(batch["advantages"])}
    trainer.model.train(training)
    with torch.no_grad():
        loss = GRPOTrainer._compute_loss(trainer, trainer.model, ones)
        divisor = trainer._loss_divisor(batch)
    trainer.model.train()
    assert loss.item() == pytest.approx(-(batch["completion_mask"].sum() / divisor).item(), rel=1e-5)
    expected = batch["num_items_in_batch"].item() * (accumulation / steps if training else 1)
    assert divisor.item() == pytest.approx(expected)


def test_foreign_keys_stay_aligned_through_shuffle_and_split(trainer, monkeypatch):
    """`values` and `returns` are unknown to the parent: its buffer has to move them with their rows."""
    rows = torch.arange(8)
    given = {
        "prompt_mask": torch.ones(8, 2, dtype=torch.long),
        "completion_ids": rows[:, None].repeat(1, 3),
        "completion_mask": torch.ones(8, 3, dtype=torch.long),
        "values": rows[:, None].repeat(1, 3).float(),
        "num_items_in_batch": torch.tensor(5),
    }
    parts = split_tensor_dict(shuffle_sequence_dict(given), 2)
    for part in parts:
        assert torch.equal(part["completion_ids"].float(), part["values"])
        assert part["num_items_in_batch"] == 5, "0-d tensors have to be passed through"
    assert sorted(torch.cat([p["values"][:, 0] for p in parts]).tolist()) == list(range(8))

    calls = []
    monkeypatch.setattr(trainer, "_generate_and_score_completions", lambda inputs: calls.append(inputs) or dict(given))
    monkeypatch.setattr(trainer, "_step", 0)
    monkeypatch.setattr(trainer, "_buffered_inputs", None)
    monkeypatch.setattr(trainer, "num_iterations", 2)
    trainer.model.train()
    seen = []
    for step in range(4):
        trainer._step = step
        part = trainer._prepare_inputs([])
        assert torch.equal(part["completion_ids"].float(), part["values"])
        seen.append(part["values"][:, 0].tolist())
    assert len(calls) == 1, "one rollout serves all iterations"
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(8)), "every row once per epoch"


def test_rewards_are_gathered_and_per_function(trainer):
    rows = [{"prompt": prompt} for prompt in PROMPTS[:3]]
    found = trainer._calculate_rewards(rows, PROMPTS[:3], ["a", "b", "c"], [[5], [6], [7]])
    assert found.shape == (3, 1), "_scores weighs the columns"


def test_logs_of_the_completions_table(trainer):
    table = trainer._logs["advantages"]
    assert isinstance(table, deque), "_log_rollout pops the parent's advantages from its end"
    rows = [{"prompt": prompt} for prompt in PROMPTS[:3]]
    table.clear()
    trainer._generate_and_score_completions(rows)
    assert len(table) == 3, "the parent's rows have to be replaced, not added to"
    assert any(table), "the parent's advantages of groups of one are all zero"
    assert "frac_reward_zero_std" not in trainer._metrics["train"]


# Models


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fused_head_gives_log_probabilities(kind):
    """PPOTrainer's hook reads `output.log_probs`: ratio statistics, and the shown loss of `pg`."""
    model = tiny_causal_lm(kind, tiny_tokenizer())
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        plain = (model(input_ids=ids).logits[:, :-1] / 0.7).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        add_fused_lm_head(model, temperature=0.7)
        output = model(input_ids=ids, labels=ids, fused_lm_head=True)
        assert hasattr(model(input_ids=ids), "logits"), "generation needs the stock forward"
    torch.testing.assert_close(output.log_probs[:, -3:], plain, atol=1e-5, rtol=0)


def test_checkpointing_is_off_inside_and_back_after():
    model = tiny_causal_lm("llama", tiny_tokenizer())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with disable_gradient_checkpointing(model, {"use_reentrant": False}):
        assert not model.is_gradient_checkpointing, "rollouts would recompute for nothing"
    assert model.is_gradient_checkpointing


def test_peft_keeps_the_active_adapter_where_the_switch_writes_it():
    """RoleSwitch writes these two attributes of every layer; PEFT's own switches clear `requires_grad`."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(tiny_causal_lm("llama", tiny_tokenizer()), config)
    model.add_adapter("critic", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    assert layers and all(hasattr(m, "_active_adapter") and hasattr(m, "_disable_adapters") for m in layers)
    ids = torch.tensor([[5, 6, 7]])
    tuners = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    found = []
    for active, disabled in ((["default"], False), (["critic"], False), (["default"], True)):
        for layer in tuners:
            layer._active_adapter, layer._disable_adapters = active, disabled
        with torch.no_grad():
            found.append(model(input_ids=ids).logits)
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[0], found[2])
    model.set_adapter("default")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".critic." in n), (
        "if PEFT no longer clears it, RoleSwitch could be its own context manager"
    )


# Last, because new arguments reset the state that the shared trainer above lives in.


def test_one_completion_per_prompt_needs_our_integer():
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig(output_dir="unused", num_generations=1, use_cpu=True, bf16=False)
    assert PPOConfig(output_dir="unused", use_cpu=True, bf16=False).num_generations == 1


# Resuming


def test_what_a_checkpoint_of_ppo_holds_of_the_parent(trainer):
    """Private state that decides how a run goes on: where it is in a rollout, and what waits to be logged."""
    for name in ("_step", "_buffered_inputs", "_metrics", "_logs"):
        assert hasattr(trainer, name), name
    body = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "self._step % generate_every == 0 or self._buffered_inputs is None" in body
    assert "self._buffered_inputs[self._step % self.args.steps_per_generation]" in body
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler.generator, torch.Generator) and sampler.num_samples == len(PROMPTS)
    loop = inspect.getsource(Trainer._inner_training_loop) + inspect.getsource(Trainer._run_epoch)
    # In this order: the loss is set to zero, data is skipped, then our part of the state is read.
    assert loop.index("self._tr_loss = torch.tensor(0.0") < loop.index("self._load_rng_state(")
    assert "self._globalstep_last_logged = self.state.global_step" in loop
    saving = inspect.getsource(Trainer._save_checkpoint)
    assert "self._get_output_dir(trial=trial)" in saving and "self._push_from_checkpoint(output_dir)" in saving


# Memory plan


def test_the_fused_head_works_on_tiles_of_the_planned_size():
    """The plan adds the tiles of TRL's chunked log-probabilities by size: fake tensors do not show them."""
    assert memory_trace.TILE_TOKENS == chunked_logprob.TOKEN_CHUNK_SIZE
    assert memory_trace.TILE_VOCABULARY == trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
