"""`rlhf-ext env`: versions and devices, and whether the run of a PPO YAML fits a card, before anything is loaded."""

import os
import platform
import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, PeftConfig
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from ..data.arguments import PromptArguments
from ..data.config_file import with_config
from ..models.memory import gib
from ..models.memory_plan import MemoryPlan, plan_memory
from ..models.memory_shape import RunShape
from ..trainers.ppo_config import PPOConfig


STACK = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "deepspeed", "rlhf-ext")
GIB = 2**30

logger = logging.get_logger(__name__)


def run_environment(
    config: str | None = None,
    model_config: str | None = None,
    card_gb: float | None = None,
    num_processes: int = 1,
    sharding: str = "none",
) -> MemoryPlan | None:
    """Print the stack and, for a YAML of `recipes/ppo.py`, the memory plan.

    Args:
        config (`str`, *optional*):
            YAML of a PPO run.
        model_config (`str`, *optional*):
            `config.json` or its folder, instead of the model that the YAML names: needs no hub.
        card_gb (`float`, *optional*):
            Memory of one device in GiB. Unset: the card that is there, else the one in the YAML's `# Hardware:` line.
        num_processes, sharding:
            Processes, and how they share what they hold.

    Returns:
        [`MemoryPlan`] or `None` without a YAML.

    Raises:
        ValueError: an unknown key in the YAML, a missing length or model, or a plan above the card.
    """
    print("\n".join(stack_lines()), flush=True)
    if config is None:
        if model_config is not None or card_gb is not None:
            raise ValueError("`--model_config` and `--card_gb` belong to a plan. Give the run's YAML as `--config`.")
        return None
    arguments = read_arguments(config)
    shape = run_shape(*arguments, model_config=model_config)
    # Lengths of a rollout were derived for one process.
    whole = yaml.safe_load(Path(config).read_text(encoding="utf-8")).get("generation_batch_size")
    rollout = shape.rollout if whole is None else -(-int(whole) // num_processes)
    shape = replace(shape, ranks=num_processes, sharding=sharding, rollout=rollout)
    plan = plan_memory(shape)
    card = card_bytes(card_gb, config) if shape.device == "cuda" or card_gb is not None else None
    print("\n".join(["", *plan_lines(plan, shape, card)]), flush=True)
    if card is not None:
        plan.check_fits(card)
    return plan


def stack_lines() -> list[str]:
    """Versions of the libraries and the devices that are there."""
    lines = [f"{'python':<14}{platform.python_version()}"]
    for name in STACK:
        try:
            lines.append(f"{name:<14}{version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name:<14}not installed")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        lines.append(f"{f'cuda:{index}':<14}{card.name}, {gib(card.total_memory)}")
    if not torch.cuda.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        lines.append(f"{'cpu':<14}{os.cpu_count()} cores, {gib(memory)}; no CUDA device")
    return lines


def read_arguments(config: str) -> tuple[PromptArguments, PPOConfig, ModelConfig, str]:
    """A YAML as `recipes/ppo.py` reads it, and `"cuda"` or `"cpu"`, where it will run.

    Raises:
        ValueError: there is no such file, or a key that none of the recipe's classes knows.
    """
    with_config(["--config", config])
    values = yaml.safe_load(Path(config).read_text())
    # Planned on another machine than it runs on: bf16 without a GPU passes only where the CPU is asked for.
    flags = ["--config", config, "--use_cpu", "true", "--output_dir", "plan", "--report_to", "none"]
    parser = TrlParser((PromptArguments, PPOConfig, ModelConfig))
    return *parser.parse_args_and_config(flags), "cpu" if values.get("use_cpu") else "cuda"


def run_shape(
    script_args: PromptArguments,
    training_args: PPOConfig,
    model_args: ModelConfig,
    device: str,
    *,
    model_config: str | None = None,
    prompt_length: int | None = None,
) -> RunShape:
    """What of a run decides its memory, from the recipe's arguments.

    Args:
        device (`str`):
            `"cuda"` or `"cpu"`.
        model_config (`str`, *optional*):
            Architecture to take instead of the one `model_name_or_path` names.
        prompt_length (`int`, *optional*):
            Tokens of the longest prompt; unset, `max_prompt_length`.

    Raises:
        ValueError: no prompt length, or no model.
    """
    prompt_length = prompt_length or script_args.max_prompt_length
    if prompt_length is None:
        raise ValueError("`max_prompt_length` is not set, and memory grows with it. Set it in the YAML.")
    source = model_args.model_name_or_path
    if source is None and model_config is None:
        raise ValueError("`model_name_or_path` is not set. Set it in the YAML, or give `--model_config`.")
    trust = training_args.trust_remote_code
    starts_from_adapter = source is not None and os.path.exists(os.path.join(source, "adapter_config.json"))
    lora = get_peft_config(model_args)
    if starts_from_adapter:
        lora = PeftConfig.from_pretrained(source)
        source = lora.base_model_name_or_path
        if source is None and model_config is None:
            raise ValueError(f"The adapter {model_args.model_name_or_path!r} names no base. Give `--model_config`.")
    config = read_config(model_config or source, trust)

    def other(path: str | None) -> PretrainedConfig:
        """Architecture of another model; with `--model_config` a name that is no folder has the policy's."""
        if path is None or (model_config is not None and not os.path.isdir(path)):
            return config
        return read_config(path, trust)

    named = [script_args.reward_model_path, *(script_args.token_reward_funcs or []), *(script_args.probe_funcs or [])]
    models = [name for name in named if name and ":" not in name]  # the others are Python functions
    critic = training_args.critic
    if critic is None:
        reads_values = training_args.advantage_estimator != "leave_one_out"
        critic = "none" if not reads_values else "adapter" if script_args.reward_adapter_path else "model"
    reference = "none"
    if training_args.kl_coef > 0:
        reference = "adapter" if starts_from_adapter else "base" if lora is not None else "copy"
    dtype = (
        model_args.dtype if model_args.dtype not in (None, "auto") else str(config.dtype or "float32").split(".")[-1]
    )
    return RunShape(
        config=config,
        dtype=getattr(torch, dtype),
        quantization=get_quantization_config(model_args),
        lora=lora,
        reward_lora=_reward_lora(script_args.reward_adapter_path, lora),
        reference=reference,
        critic=critic,
        critic_config=other(script_args.critic_model_path or script_args.reward_model_path)
        if critic == "model"
        else config,
        reward_configs=[other(name) for name in models],
        rows=training_args.per_device_train_batch_size,
        rollout=training_args.per_device_train_batch_size * training_args.steps_per_generation,
        prompt_length=prompt_length,
        completion_length=training_args.max_completion_length,
        gradient_checkpointing=training_args.gradient_checkpointing,
        accumulates=training_args.gradient_accumulation_steps > 1,
        autocast=training_args.bf16,
        optim=getattr(training_args.optim, "value", training_args.optim),
        attn_implementation=model_args.attn_implementation,
        device=device,
        gathers_for_generation=training_args.ds3_gather_for_generation,
        trunk_cache_gib=training_args.trunk_cache_gib,
    )


def _reward_lora(path: str | None, lora: LoraConfig | None) -> LoraConfig | None:
    """The reward adapter's own configuration if its folder is here, else one like the policy's."""
    if path is None or lora is None:
        return None
    config = lora
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        config = PeftConfig.from_pretrained(path)
    config = LoraConfig.from_peft_type(**config.to_dict())
    config.modules_to_save, config.task_type, config.inference_mode = None, "CAUSAL_LM", False
    return config


def read_config(path: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """An architecture from a `config.json`, its folder, or a Hub id.

    Raises:
        ValueError: it cannot be read; the message says how to do without a hub.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"The architecture of {path!r} cannot be read ({str(error).splitlines()[0]}). Without access to a hub "
            "give a folder with its config.json, or that file, as `--model_config`."
        ) from error


def card_bytes(card_gb: float | None, config: str) -> int | None:
    """Bytes of one device: as told, as found, or as the YAML's header names it (`# Hardware: 1 GPU of 24 GB`)."""
    if card_gb is not None:
        return int(card_gb * GIB)
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    named = re.search(r"^# Hardware:.*?GPU.*?(\d+) ?GB", Path(config).read_text(), re.MULTILINE)
    return int(named[1]) * GIB if named else None


def plan_lines(plan: MemoryPlan, shape: RunShape, card: int | None) -> list[str]:
    """The plan as a table: parts with the phases that hold them, sums of the phases, the verdict."""
    share = f", one of {shape.ranks} ranks under {shape.sharding}" if shape.ranks > 1 else ""
    lines = [f"Memory plan of one {shape.device} device{share}; planned on paper, not measured", ""]
    for name, size in plan.parts.items():
        if size:
            lines.append(f"  {name:<22}{gib(size):>12}")
    lines.append("")
    for phase in plan.phases:
        mark = "  <- peak" if phase == plan.peak_phase else ""
        lines.append(f"  {phase:<22}{gib(plan.phase_bytes(phase)):>12}{mark}")
    lines += ["", f"Largest part at the peak: {plan.largest}, {gib(plan.parts[plan.largest])}"]
    if card is not None:
        left = card - plan.peak
        lines.append(f"Card: {gib(card)}; " + (f"fits, {gib(left)} left" if left >= 0 else f"{gib(-left)} too much"))
    return lines


def plan_or_none(
    script_args: PromptArguments, training_args: PPOConfig, model_args: ModelConfig, prompt_length: int
) -> MemoryPlan | None:
    """The plan of a running recipe; `None`, with a warning, where it cannot be made: no run fails for that.

    Under DeepSpeed and FSDP there is none: a model built there is cut up, be it for a plan.
    """
    state = training_args.distributed_state
    if state.distributed_type.value in ("DEEPSPEED", "FSDP") or not state.is_main_process:
        return None
    device = "cuda" if training_args.device.type == "cuda" else "cpu"
    try:
        shape = run_shape(script_args, training_args, model_args, device, prompt_length=prompt_length)
        shape = replace(shape, ranks=state.num_processes, sharding="ddp" if state.num_processes > 1 else "none")
        return plan_memory(shape)
    except Exception as error:
        logger.warning(f"No memory plan: {type(error).__name__}: {error}")
        return None
