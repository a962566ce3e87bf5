"""One model out of a base and the adapters that were trained on it, one after the other.

What is merged is what was trained: the adapters are added in float32 to the base that they name. A base that was
quantised in training is another function than its file in full precision, and is merged only when asked, as the
weights it computed with.
"""

import gc
import os
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .base_quantization import QUANTIZATION_FILE, as_loading_option, quantization_of, read_base_quantization
from .hub import is_inside_repo, local_folder
from .reward_checkpoints import find_file
from .roles import REFERENCE


logger = logging.get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge_adapters(
    adapters: Sequence[str],
    output_dir: str,
    *,
    base: str | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    trust_remote_code: bool = False,
) -> str:
    """Write base plus adapters as one causal language model in safetensors, with its tokenizer.

    Args:
        adapters (`Sequence[str]`):
            LoRA adapters of a causal language model, folders or Hub ids, in the order in which they were trained: each
            on top of the one before it. An adapter whose training went on from another one (PPO from an SFT adapter)
            holds that one already and is given alone.
        output_dir (`str`):
            New or empty folder.
        base (`str`, *optional*):
            Base model; by default the one that the first adapter names, at the revision it names.
        dtype (`str`, *optional*):
            Dtype that is written, of `DTYPES`; by default the base's. The sum is taken in float32 whatever it is.
        dequantize (`bool`, *optional*, defaults to `False`):
            Whether a quantised base is turned into the full-precision weights it computed with.

    Returns:
        `str`: `output_dir`.

    Raises:
        ValueError: the adapters cannot be merged as they were trained; the message names the adapter and the remedy.
    """
    if not adapters:
        raise ValueError("adapters is empty: nothing would be merged. Give at least one.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown. Choose one of {sorted(DTYPES)}.")
    if os.path.isdir(output_dir) and os.listdir(output_dir):
        raise ValueError(f"output_dir={output_dir!r} is not empty. Give a new folder.")
    folders = [local_folder(adapter) for adapter in adapters]
    configs = [_read_config(adapter, folder) for adapter, folder in zip(adapters, folders, strict=True)]
    _check_order(adapters, folders, configs)
    revision = None
    if base is None:
        base, revision = configs[0].base_model_name_or_path, configs[0].revision
        if not base:
            raise ValueError(f"The adapter {adapters[0]!r} names no base. Give it with `base`.")
    elif is_inside_repo(base):
        base = local_folder(base)

    model, own_dtype = _load_base(base, revision, folders, dequantize, trust_remote_code)
    tokenizer = _load_tokenizer([*reversed(folders), base], trust_remote_code)
    if tokenizer is not None and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))  # as PEFT does when it loads such an adapter
    for adapter, folder in zip(adapters, folders, strict=True):
        wrapped = PeftModel.from_pretrained(model, folder)
        _check_tied(wrapped, adapter)
        model = wrapped.merge_and_unload(safe_merge=True)  # raises on NaN
        logger.info(f"Merged {adapter!r}.")
    model.to(DTYPES[dtype] if dtype else own_dtype)
    model.save_pretrained(output_dir)
    if tokenizer is not None:
        tokenizer.save_pretrained(output_dir)
    return output_dir


def _read_config(adapter: str, folder: str) -> PeftConfig:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f"The adapter {adapter!r} has no {name}. Give a folder or an id of a LoRA adapter.")
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"The adapter {adapter!r} is of type {config.peft_type.value}; only LoRA adapters are merged."
        )
    if config.task_type not in ("CAUSAL_LM", None):
        raise ValueError(
            f"The adapter {adapter!r} is a {config.task_type} adapter, a reward model or a critic: its head stays in "
            "float32 and it shares the policy's base. Load it with `load_reward_model` or `load_critic`; merge the "
            "policy's adapter."
        )
    return config


def _check_order(adapters: Sequence[str], folders: list[str], configs: list[PeftConfig]) -> None:
    for number in range(1, len(adapters)):
        if os.path.isdir(os.path.join(folders[number], REFERENCE)):
            raise ValueError(
                f"The adapter {adapters[number]!r} went on from another adapter (it has a folder {REFERENCE!r}), "
                f"whose weights are in it: on top of {adapters[number - 1]!r} they would count twice. Merge it alone."
            )
        if configs[number].base_model_name_or_path == configs[0].base_model_name_or_path:
            logger.warning(
                f"{adapters[number]!r} names the same base as {adapters[0]!r}. The sum is right if it was trained on "
                "that base with the other merged in, and wrong if it was trained on the bare base or went on from it."
            )


def _load_base(
    base: str, revision: str | None, folders: list[str], dequantize: bool, trust_remote_code: bool
) -> tuple[PreTrainedModel, torch.dtype]:
    """The base in float32, and the dtype of its checkpoint."""
    config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
    settings = quantization_of(config)
    where = f"The base {base!r}"
    for folder in folders:
        found = read_base_quantization(os.path.join(folder, QUANTIZATION_FILE))
        if settings is None and found is not None:
            settings, where = found, f"The base that the adapter in {folder!r} was trained on"
    if settings is not None and not dequantize:
        bits = "8-bit" if settings.get("load_in_8bit") else "4-bit" if settings.get("load_in_4bit") else "low-bit"
        raise ValueError(
            f"{where} is quantised ({settings.get('quant_method')}, {bits}): its rounded weights are what the adapter "
            "fits, and a sum in that format would be rounded again. Give --dequantize (dequantize=True) to write them "
            "in full precision, plus the adapter."
        )
    own_dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    if settings is None:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options), own_dtype
    if quantization_of(config) is None:
        options |= as_loading_option(settings)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=own_dtype, **options).dequantize()
    gc.collect()
    return model.float(), own_dtype


def _load_tokenizer(sources: list[str], trust_remote_code: bool) -> Any:
    for source in sources:
        if find_file(source, "tokenizer_config.json") is not None:
            return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    logger.warning("Neither an adapter nor the base has a tokenizer; none is written.")
    return None


def _check_tied(model: PeftModel, adapter: str) -> None:
    base: nn.Module = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if base.config.get_text_config().tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ValueError(
            f"The adapter {adapter!r} changes the embeddings or the output layer, which are one tensor in this base: "
            "merged, the change would act on both. Train without `lm_head` and `embed_tokens` in `target_modules`."
        )
