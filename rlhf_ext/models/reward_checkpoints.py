"""Reward models from disk: full models and PEFT adapters, with the head they were trained with or not at all."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from .base_quantization import (
    QUANTIZATION_FILE,
    as_loading_option,
    quantization_of,
    read_base_quantization,
    without_cpu_packing,
)
from .hub import find_file, is_inside_repo, local_folder
from .pooling import pool_by_attention_mask, set_normalization
from .sharding import whole_weights


REWARD_FILE = "reward_config.json"
"""Written beside a saved reward model: what it takes to score again as it did, and no other file says."""


@whole_weights()
def load_reward_model(
    path_or_model_id: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    base_model: str | os.PathLike | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """
    Load a reward model, in full or as a PEFT adapter, that scores as it did when it was saved.

    Args:
        path_or_model_id (`str` or `os.PathLike`):
            A saved sequence-classification model or adapter: a folder, an id on the Hub, or `owner/name/folder` for a
            folder of a repository. Only safetensors files are read.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Dtype of the backbone; `"auto"` takes the checkpoint's. The head is fp32 whatever it is.
        device (`str` or `torch.device`, *optional*):
            Where to put the model.
        base_model (`str` or `os.PathLike`, *optional*):
            Base of an adapter; by default the one its `adapter_config.json` names, at the commit it names and
            quantised as it was in training.
        subfolder (`str`, *optional*):
            Folder inside, such as `"reward"` of what [`PPOTrainer`] saved or pushed.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether a checkpoint may run code of its own.

    Returns:
        `nn.Module`: the model in eval mode. A decoder's forward pools by the attention mask
        ([`pool_by_attention_mask`]), with the aggregation it was trained with, and gives scores after the gain and
        the bias that were saved with it ([`save_normalization`]).

    Raises:
        ValueError: if there are no such files, they hold no trained head (huggingface/peft#1070), or not one score per
            text.
    """
    path = str(path_or_model_id)
    if subfolder or revision or is_inside_repo(path):
        path = local_folder(path, subfolder, revision)
    saved = _read_json(find_file(path, REWARD_FILE))
    if dtype == "auto" and "backbone_dtype" in saved:
        # The base that an adapter names may be stored in another dtype than the one it was trained on.
        dtype = getattr(torch, saved["backbone_dtype"])
    adapter_config = find_file(path, "adapter_config.json")
    if adapter_config is not None:
        model, head = _load_adapter(path, adapter_config, base_model, dtype, trust_remote_code)
    else:
        if base_model is not None:
            raise ValueError(f"`base_model` was given, but {path!r} is no adapter. Leave `base_model` out.")
        model, missing = load_classifier(path, dtype, trust_remote_code)
        if missing:
            raise ValueError(
                f"{path!r} has no weights for {sorted(missing)}: the head would be random. Pass a trained reward "
                "model, or train one with `PreferenceRewardTrainer`."
            )
        head = read_head(path)
    base = model.get_base_model() if adapter_config is not None else model
    if isinstance(getattr(base, "score", None), nn.Module):
        set_head(base.score, head)
        pool_by_attention_mask(model, saved_aggregation(path))
    normalization = saved_normalization(path)
    if normalization is not None:
        set_normalization(model, *normalization)
    base.is_critic = bool(saved.get("is_critic", False))
    base.score_training = (float(saved.get("training_gain", 1.0)), float(saved.get("prediction_noise", 0.0)))
    return model.to(device).eval() if device is not None else model.eval()


def load_critic(path_or_model_id: str | os.PathLike, *, subfolder: str | None = "critic", **kwargs: Any) -> nn.Module:
    """
    Load the critic that [`PPOTrainer`] saved or pushed beside its policy.

    Args:
        path_or_model_id (`str` or `os.PathLike`):
            Folder or id on the Hub of the policy.
        subfolder (`str`, *optional*, defaults to `"critic"`):
            Folder of the critic inside; `None` if the name is that of the critic itself.
        kwargs:
            As for [`load_reward_model`].

    Returns:
        `nn.Module`: a sequence classifier in eval mode. [`token_scores`] of it gives the value after every token,
        `(B, T)` in fp32.

    Raises:
        ValueError: as [`load_reward_model`]; also for a policy that was trained without a critic.
    """
    return load_reward_model(path_or_model_id, subfolder=subfolder, **kwargs)


def saved_aggregation(path: str) -> str:
    """How the reward model in `path` makes a score of its tokens; `"last"` where no file says."""
    return _read_json(find_file(path, REWARD_FILE)).get("reward_aggregation", "last")


def is_saved_critic(path: str) -> bool:
    """Whether `path` holds the critic of a PPO run: a value at each token, and no score."""
    return bool(_read_json(find_file(path, REWARD_FILE)).get("is_critic", False))


def saved_normalization(path: str) -> tuple[float, float] | None:
    """Gain and bias of the scores of the reward model in `path`; `None` where none were saved."""
    saved = _read_json(find_file(path, REWARD_FILE))
    if "score_gain" not in saved and "score_bias" not in saved:
        return None
    return float(saved["score_gain"]), float(saved["score_bias"])


def saved_noise(path: str) -> float:
    """Share of random answers that the loss of the reward model in `path` allowed for."""
    return float(_read_json(find_file(path, REWARD_FILE)).get("prediction_noise", 0.0))


def save_normalization(folder: str | os.PathLike, gain: float, bias: float) -> None:
    """Save gain and bias with a reward model: whoever loads it gets gain * score + bias, a critic made of it too.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of a saved reward model or adapter. Numbers saved before are replaced, not multiplied.
        gain, bias (`float`):
            As [`~rlhf_ext.functional.scores.score_normalization`] gives them for *raw* scores: load the model, set
            `set_normalization(model, 1.0, 0.0)` and score samples of the reference.

    Raises:
        ValueError: `gain` is not positive, a number is not finite, or `folder` holds no model.
    """
    if not (math.isfinite(gain) and gain > 0 and math.isfinite(bias)):
        raise ValueError(f"gain={gain!r} and bias={bias!r} must be finite, and gain positive: else the order flips.")
    folder = Path(folder)
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{str(folder)!r} holds no reward model to save gain and bias with. Pass its folder.")
    file = folder / REWARD_FILE
    saved = _read_json(str(file) if file.exists() else None)
    file.write_text(json.dumps({**saved, "score_gain": float(gain), "score_bias": float(bias)}), encoding="utf-8")


def load_classifier(
    path: str, dtype: str | torch.dtype, trust_remote_code: bool, revision: str | None = None, **options: Any
) -> tuple[PreTrainedModel, set[str]]:
    """A model with one label from safetensors files, and the names of its weights that no file has."""
    # Missing weights are judged by the caller; the library's own "newly initialized" report would be a false alarm
    # where an adapter brings the head.
    try:
        with _quiet_transformers():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path,
                revision=revision,
                num_labels=1,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except RuntimeError as error:
        if "size" not in str(error):
            raise
        raise ValueError(
            f"{path!r} does not give one score per text: {error} Train it with `num_labels=1`."
        ) from error
    return without_cpu_packing(model), set(info["missing_keys"])


def _load_adapter(
    path: str,
    config_file: str,
    base_model: str | os.PathLike | None,
    dtype: str | torch.dtype,
    trust_remote_code: bool,
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from peft import PeftModel

    config = _read_json(config_file)
    base_path = base_model or config.get("base_model_name_or_path")
    revision = None if base_model else config.get("revision")
    if not base_path:
        raise ValueError(f"`base_model_name_or_path` is empty in {config_file!r}. Pass `base_model=`.")
    options = {}
    if find_file(str(base_path), "config.json", revision) is not None and base_model is None:
        # Unless another base is asked for, the one that the adapter was trained on, rounded as it was.
        base_config = AutoConfig.from_pretrained(base_path, revision=revision, trust_remote_code=trust_remote_code)
        if quantization_of(base_config) is None:
            options = as_loading_option(read_base_quantization(find_file(path, QUANTIZATION_FILE)))
    if find_file(path, "adapter_model.safetensors") is None:
        raise ValueError(f"{path!r} has no adapter_model.safetensors, the only format that is read. Save it again.")
    base, missing = load_classifier(str(base_path), dtype, trust_remote_code, revision, **options)
    head = read_head(path)
    foreign = {name for name in missing if not name.startswith("score.")}
    if foreign or (missing and not head):
        raise ValueError(
            f"Neither the adapter {path!r} nor its base {str(base_path)!r} has weights for "
            f"{sorted(foreign or missing)}: the head would be random. Train the adapter with "
            '`modules_to_save=["score"]`.'
        )
    return PeftModel.from_pretrained(base, path, is_trainable=False), head


def read_head(path: str, revision: str | None = None, name: str = "score") -> dict[str, torch.Tensor]:
    """The parameters of the head `name` in a checkpoint: one file, shards or an adapter."""
    index = find_file(path, "model.safetensors.index.json", revision)
    if index is not None:
        names = sorted(set(_read_json(index)["weight_map"].values()))
    else:
        names = ["adapter_model.safetensors", "model.safetensors"]
    head = {}
    for file_name in filter(None, (find_file(path, file, revision) for file in names)):
        with safe_open(file_name, framework="pt") as file:
            for key in file.keys():
                owner, _, parameter = key.rpartition(".")
                if owner.split(".")[-1] == name:
                    head[parameter] = file.get_tensor(key)
    return head


def load_weights(model: nn.Module, folder: str | os.PathLike) -> None:
    """Put back the weights that `save_pretrained` wrote of this very model or [`~peft.PeftModel`], bit by bit.

    Raises:
        ValueError: the files have other weights than the model.
    """
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from peft.utils.save_and_load import load_peft_weights

        saved, expected = load_peft_weights(str(folder), device="cpu"), set(get_peft_model_state_dict(model))
        if expected != set(saved):
            odd = sorted(expected.symmetric_difference(saved))
            raise ValueError(f"{str(folder)!r} does not fit the model: {len(odd)} weights differ, {odd[0]!r} first.")
        set_peft_model_state_dict(model, saved)
        return
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    wrong = model.load_state_dict(tensors, strict=False)
    # Tied weights are written once.
    missing = set(wrong.missing_keys) - set(getattr(model, "_tied_weights_keys", None) or ())
    if missing or wrong.unexpected_keys:
        raise ValueError(f"{str(folder)!r} does not fit the model: {sorted(missing) + wrong.unexpected_keys}.")


def save_reward_config(
    folder: str | os.PathLike,
    aggregation: str,
    backbone_dtype: torch.dtype,
    normalization: tuple[float, float] = (1.0, 0.0),
    training: tuple[float, float] = (1.0, 0.0),
    is_critic: bool = False,
) -> None:
    """Write beside the weights how token scores become one score, and the dtype of the backbone.

    `training`: the gain that the loss saw, which stays when gain and bias are set anew, and the noise it allowed for.
    `is_critic`: its numbers are values, which nothing may be paid by.
    """
    saved: dict[str, Any] = {"reward_aggregation": aggregation}
    if normalization != (1.0, 0.0):
        saved["score_gain"], saved["score_bias"] = normalization
    if training != (1.0, 0.0):
        saved["training_gain"], saved["prediction_noise"] = training
    if is_critic:
        saved["is_critic"] = True
    saved["backbone_dtype"] = str(backbone_dtype).removeprefix("torch.")
    with open(os.path.join(folder, REWARD_FILE), "w", encoding="utf-8") as file:
        json.dump(saved, file)


def plain_dtype(base: PreTrainedModel) -> torch.dtype:
    """Dtype of a backbone; of a quantised one that of what is left whole, embeddings and norms."""
    if getattr(base, "quantization_method", None):
        return base.get_input_embeddings().weight.dtype  # type: ignore[union-attr]
    return base.dtype


def set_head(head: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """
    Make a head fp32 and copy `tensors` into it.

    A dtype rounds the head along with the backbone (huggingface/trl#1258), and a score must not change on its way over
    the disk. In a PEFT model the saved copy and the original both get the values. Parameters of another shape, such as
    those that ZeRO-3 keeps in pieces, are left alone.
    """
    head.float()
    for name, parameter in head.named_parameters():
        source = tensors.get(name.split(".")[-1])
        if source is not None and source.shape == parameter.shape:
            parameter.data.copy_(source)


def _read_json(file_name: str | None) -> dict[str, Any]:
    if file_name is None:
        return {}
    with open(file_name, encoding="utf-8") as file:
        return json.load(file)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
