"""What does not go together with the way a run was launched, refused before a model is loaded."""

from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging
from trl.models.utils import prepare_deepspeed, prepare_fsdp

from ..models.sharding import is_in_pieces


logger = logging.get_logger(__name__)


def check_launch(args: TrainingArguments, model: Any = None) -> None:
    """
    Refuse what DeepSpeed would do to adapters and heads without an error.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The trainer's arguments.
        model (`str` or `nn.Module`, *optional*):
            The model as the caller gave it.

    Raises:
        ValueError: DeepSpeed's 16-bit modes; under ZeRO-3 reentrant checkpointing, a model in pieces, or a
            configuration that cannot save one.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        return
    for name in ("bf16", "fp16"):
        enabled = plugin.deepspeed_config.get(name, {}).get("enabled", False)
        if enabled is True or (enabled == "auto" and getattr(args, name)):
            raise ValueError(
                f"{name}={getattr(args, name)} switches on DeepSpeed's {name} mode, which casts every parameter to "
                f"{name}, adapters and heads too. Set {name}=False and mixed_precision: 'no' in the accelerate "
                "configuration, as accelerate_configs/zero*.yaml do, or launch with multi_gpu.yaml or fsdp2.yaml."
            )
    if plugin.zero_stage != 3:
        return
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "gradient_checkpointing_kwargs has use_reentrant=True, which fails under ZeRO-3. Set it to False."
        )
    if isinstance(model, nn.Module) and is_in_pieces(model):
        raise ValueError(
            "model was loaded in ZeRO-3's pieces, which cannot be copied or read. Pass its path, or load it before "
            "the configuration is made."
        )
    if not plugin.deepspeed_config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "zero3_save_16bit_model=False (stage3_gather_16bit_weights_on_model_save): nothing but DeepSpeed's shards "
            "would be saved. Set it to True."
        )


def reset_reentrant(args: TrainingArguments) -> None:
    """Take back what TRL writes into the arguments for PEFT under ZeRO-3: reentrant checkpointing (trl#2514)."""
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if (getattr(args, name) or {}).get("use_reentrant"):
            logger.warning(f"`{name}` has use_reentrant=True from TRL; it becomes False, which ZeRO-3 needs here.")
            setattr(args, name, {**getattr(args, name), "use_reentrant": False})


def may_cut_weights(trainer: Any) -> bool:
    """Whether weights or optimizer states may live in pieces, of which only the launcher's own code makes a whole."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def prepare_frozen(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Prepare a model that only runs forward, the reference, as the parent prepares its own."""
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(model, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)
