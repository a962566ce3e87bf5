"""How the base of an adapter was quantised in training: PEFT's config does not say it, so it stands beside it.

On the base in full precision such an adapter is another function than the one that was trained.
"""

import json
import os
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel


QUANTIZATION_FILE = "base_quantization.json"


def without_cpu_packing(model: nn.Module) -> nn.Module:
    """
    Keep a 4-bit base as it was quantised, whatever runs on it; changed in place. Does nothing to other models.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 rewrites a 4-bit weight at its first forward in evaluation mode, for a
    kernel that knows no gradient, and rounds its scales to bf16. Training after an evaluation then has wrong gradients
    with nothing but a warning of torch, and scores in evaluation are not those of training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # writes the weight back as it saves it
    return model


def quantization_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """The quantisation in a model's config as plain values, `None` where there is none."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def save_base_quantization(base: PreTrainedModel, folder: str) -> None:
    """Write [`QUANTIZATION_FILE`] beside an adapter if its base is quantised."""
    settings = quantization_of(base.config)
    if settings is not None:
        with open(os.path.join(folder, QUANTIZATION_FILE), "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=1, default=str)


def read_base_quantization(path: str | None) -> dict[str, Any] | None:
    """What [`save_base_quantization`] wrote in the file `path`; `None` where there is no such file."""
    if path is None or not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def as_loading_option(settings: dict[str, Any] | None) -> dict[str, Any]:
    """Keywords of `from_pretrained` that quantise a base as it was; empty for `None`.

    Raises:
        ValueError: it was quantised by another library than bitsandbytes.
    """
    if settings is None:
        return {}
    if settings.get("quant_method") != "bitsandbytes":
        raise ValueError(
            f"{QUANTIZATION_FILE} says {settings.get('quant_method')!r}; only bitsandbytes quantises a base while it "
            "loads. Give a base that is stored that way."
        )
    return {"quantization_config": BitsAndBytesConfig.from_dict(settings)}
