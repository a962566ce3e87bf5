"""Scalar adapters (critic, reward) on the base of a causal language model: read them, add them, write them.

On disk such an adapter is what `PreferenceRewardTrainer` saves with LoRA: an ordinary PEFT folder of a sequence
classifier whose head `score` stands in `modules_to_save`. The backbone's LoRA weights have the same names under a
causal language model, so they can be put on the policy's base as they are; the head is kept apart.
"""

import copy
import os

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from .base_quantization import save_base_quantization
from .hub import local_folder
from .reward_checkpoints import (
    is_saved_critic,
    plain_dtype,
    save_reward_config,
    saved_aggregation,
    saved_normalization,
)
from .roles import POLICY


logger = logging.get_logger(__name__)

HEAD_KEY = "base_model.model.score.weight"


_INSTEAD = {
    "reward_adapter": "Pass the folder that PreferenceRewardTrainer saved with a LoRA peft_config, or give a full "
    "reward model in `reward_funcs`.",
    "critic_model": "Beside a `reward_adapter` pass a critic adapter, or set critic='model' for a model of its own.",
}


def read_scalar_adapter(
    folder: str, field: str = "reward_adapter"
) -> tuple[LoraConfig, dict[str, torch.Tensor], torch.Tensor]:
    """Read a reward or critic adapter: its LoRA config, its LoRA weights, and its head `(1, H)`.

    Args:
        folder (`str`):
            A folder, an id on the Hub, or `owner/name/reward` for a folder of a repository.
        field (`str`, *optional*, defaults to `"reward_adapter"`):
            The argument that named it, for messages; a saved critic is read as `"critic_model"` alone.

    Raises:
        ValueError: `folder` does not exist, is no LoRA adapter, is a critic, or has no head (a random one would be a
            silent error).
    """
    try:
        folder = local_folder(folder)
    except ValueError as error:
        raise ValueError(f"{field}={folder!r} has no adapter_config.json: {error} {_INSTEAD[field]}") from error
    if not os.path.exists(os.path.join(folder, "adapter_config.json")):
        raise ValueError(f"{field}={folder!r} has no adapter_config.json. {_INSTEAD[field]}")
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{field}={folder!r} is a {config.peft_type} adapter; only LoRA adapters can share a base.")
    if saved_aggregation(folder) != "last":
        raise ValueError(
            f"{field}={folder!r} was trained with reward_aggregation={saved_aggregation(folder)!r}, but an "
            "adapter on the policy's base is read at the last token. Load it with `load_reward_model` and pass it in "
            "`reward_funcs`."
        )
    if field == "reward_adapter" and is_saved_critic(folder):
        raise ValueError(
            f"{field}={folder!r} is a critic that PPO saved: its values would be paid as scores. Pass it as "
            "critic_model=, and the reward adapter as reward_adapter=."
        )
    weights = load_peft_weights(folder, device="cpu")
    head = weights.pop(HEAD_KEY, None)
    if head is None:
        raise ValueError(
            f"{field}={folder!r} holds no {HEAD_KEY!r}: its head was not saved. Train it with "
            "modules_to_save=['score'], as PreferenceRewardTrainer does."
        )
    others = [name for name in weights if ".lora_" not in name]
    if others:
        raise ValueError(
            f"{field}={folder!r} trains more than LoRA weights and the head ({others[0]!r} and "
            f"{len(others) - 1} more), which roles on one base cannot share. Save only 'score' with it."
        )
    check_leaves_base(config, f"{field}={folder!r}")
    config = copy.copy(config)
    config.modules_to_save, config.task_type, config.inference_mode = None, "CAUSAL_LM", False
    return config, weights, head


def check_leaves_base(config: PeftConfig, what: str) -> None:
    """Refuse an adapter that changes the weights below it, which other roles share.

    Raises:
        ValueError: its initialisation takes something off the base (PiSSA, OLoRA, ...), or it trains biases there.
    """
    init = getattr(config, "init_lora_weights", True)
    if init not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"{what} has init_lora_weights={init!r}, which changes the base that reference, reward and critic share. "
            "Use True, 'gaussian' or 'orthogonal'."
        )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"{what} has bias={config.bias!r}, which trains biases of the base that reference, reward and critic "
            "share. Use 'none'."
        )


def add_scalar_adapter(
    model: PeftModel, name: str, folder: str, field: str = "reward_adapter"
) -> tuple[torch.Tensor, tuple[float, float]]:
    """Add the adapter of `folder` to `model` as `name`; return its head `(1, H)` in float32, and gain and bias.

    Raises:
        ValueError: the weights do not fit the base (another architecture or size).
    """
    config, weights, head = read_scalar_adapter(folder, field)
    trained_on, base = config.base_model_name_or_path, model.get_base_model().config._name_or_path
    if trained_on and base and os.path.realpath(trained_on) != os.path.realpath(base):
        # Two names may mean one model, so it is no error; equal shapes do not show that they do.
        logger.warning(
            f"{field}={folder!r} was trained on {trained_on!r}, the policy's base is {base!r}. If these are "
            "different weights its scores mean nothing."
        )
    model.add_adapter(name, config)
    expected = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    if expected != set(weights):
        odd = sorted(expected.symmetric_difference(weights))
        raise ValueError(
            f"{field}={folder!r} does not fit the policy's base: {len(odd)} weights differ, {odd[0]!r} first. "
            "It has to be trained on the same base model."
        )
    try:
        set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:
        raise ValueError(f"{field}={folder!r} does not fit the policy's base: {error}") from error
    return head.float(), saved_normalization(local_folder(folder)) or (1.0, 0.0)


def add_policy_copy(model: PeftModel, name: str) -> None:
    """Copy the policy's adapter as it is now to a frozen adapter `name`."""
    model.add_adapter(name, copy.deepcopy(model.peft_config[POLICY]))
    weights = get_peft_model_state_dict(model, adapter_name=POLICY, save_embedding_layers=False)
    set_peft_model_state_dict(model, weights, adapter_name=name)


def load_adapter_weights(model: PeftModel, name: str, folder: str, head: nn.Module | None = None) -> None:
    """Put the adapter that [`save_scalar_adapter`] or PEFT wrote in `folder` into adapter `name`, bit by bit.

    Unlike PEFT's `load_adapter` it touches no `requires_grad`. `head` gets the head in the file.

    Raises:
        ValueError: the file has other weights than the adapter.
    """
    weights = load_peft_weights(folder, device="cpu")
    if head is not None:
        with torch.no_grad():
            head.weight.copy_(weights.pop(HEAD_KEY))
    expected = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    if expected != set(weights):
        odd = sorted(expected.symmetric_difference(weights))
        raise ValueError(f"{folder!r} does not fit adapter {name!r}: {len(odd)} weights differ, {odd[0]!r} first.")
    set_peft_model_state_dict(model, weights, adapter_name=name)


def check_adapter_weights(model: PeftModel, name: str, folder: str, head: nn.Module | None = None) -> None:
    """Compare a frozen adapter, and its head, with the copy in `folder`.

    Raises:
        ValueError: they differ, so a run resumed from there would go on under another reward or reference.
    """
    saved = load_peft_weights(folder, device="cpu")
    now = dict(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    if head is not None:
        now[HEAD_KEY] = head.weight
    odd = [key for key in sorted(saved) if key not in now or not torch.equal(now[key].detach().cpu(), saved[key])]
    if odd or len(now) != len(saved):
        raise ValueError(
            f"The adapter {name!r} is not the one in {folder!r} ({len(odd)} weights differ): resuming would go on "
            "under another reward or reference. Pass the same `model` and `reward_adapter` as before."
        )


def save_scalar_adapter(
    model: PeftModel,
    name: str,
    head: torch.Tensor,
    folder: str,
    state: dict[str, torch.Tensor] | None = None,
    normalization: tuple[float, float] = (1.0, 0.0),
    is_critic: bool = False,
) -> None:
    """Write adapter `name` and its head so that PEFT loads them as a sequence classifier, with no foreign key.

    Args:
        state (`dict[str, torch.Tensor]`, *optional*):
            Whole weights under the names of `model`'s state, for a model that is in pieces.
        normalization (`tuple[float, float]`, *optional*):
            Gain and bias of the head.
        is_critic (`bool`, *optional*, defaults to `False`):
            Whether its numbers are values and no scores.
    """
    weights = get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)
    _write_adapter(model, name, folder, {**weights, HEAD_KEY: head}, "SEQ_CLS", ["score"])
    save_reward_config(folder, "last", plain_dtype(model.get_base_model()), normalization, is_critic=is_critic)


def save_lm_adapter(model: PeftModel, name: str, folder: str, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write adapter `name` of a reward model so that PEFT loads it as a causal language model, with no foreign key.

    Args:
        state (`dict[str, torch.Tensor]`, *optional*):
            Whole weights under the names of `model`'s state, for a model that is in pieces.
    """
    weights = get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)
    kept = {key: value for key, value in weights.items() if "score" not in key.split(".")}
    others = [module for module in model.peft_config[name].modules_to_save or [] if module != "score"]
    _write_adapter(model, name, folder, kept, "CAUSAL_LM", others or None)


def _write_adapter(
    model: PeftModel,
    name: str,
    folder: str,
    tensors: dict[str, torch.Tensor],
    task_type: str,
    modules_to_save: list[str] | None,
) -> None:
    config = copy.copy(model.peft_config[name])
    config.modules_to_save, config.task_type, config.inference_mode = modules_to_save, task_type, True
    os.makedirs(folder, exist_ok=True)
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
        os.path.join(folder, "adapter_model.safetensors"),
        metadata={"format": "pt"},
    )
    config.save_pretrained(folder)
    save_base_quantization(model.get_base_model(), folder)
