"""How the base of an adapter was quantised in training: PEFT's config does not say it, so it stands beside it.

On the base in full precision such an adapter is another function than the one that was trained.
"""

import json
import os
from typing import Any

from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel


QUANTIZATION_FILE = "base_quantization.json"


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
