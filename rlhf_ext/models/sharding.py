"""Weights that several processes share: load them whole, read them whole.

ZeRO-3 keeps every parameter in pieces. A piece cannot be copied (the reference, the critic), written into (a head) or
asked for a score by a model that DeepSpeed never prepared (a reward model), and torch says nothing about it.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.integrations import deepspeed as integration


_FSDP_RANK_0 = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@contextmanager
def whole_weights(zero3: bool = True) -> Iterator[None]:
    """Load and build models whole on every process, as without ZeRO-3 and FSDP; `prepare` cuts them up later.

    Under ZeRO-3 `from_pretrained` leaves pieces behind as soon as a configuration exists. Under FSDP it fills the
    weights on one process only, which is enough for a model that is prepared and not for one that scores.

    Args:
        zero3 (`bool`, *optional*, defaults to `True`):
            Whether ZeRO-3 is kept out; FSDP always is.
    """
    config, fsdp = integration._hf_deepspeed_config_weak_ref, os.environ.pop(_FSDP_RANK_0, None)
    if zero3:
        integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if integration._hf_deepspeed_config_weak_ref is None:  # a trainer built meanwhile set its own
            integration._hf_deepspeed_config_weak_ref = config
        if fsdp is not None:
            os.environ[_FSDP_RANK_0] = fsdp


def is_in_pieces(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds parameters of `model`."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Whole parameters inside the block, to read; nothing happens without ZeRO-3. Enter it on all processes."""
    pieces = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not pieces:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(pieces):
        yield


def add_frozen(state: dict[str, torch.Tensor], model: nn.Module, roles: set[str]) -> dict[str, torch.Tensor]:
    """`state` with the frozen weights of `roles` that ZeRO-3 leaves out of it. Call it on all processes.

    Args:
        state (`dict[str, torch.Tensor]`):
            What `Trainer` gathered to save.
        model (`nn.Module`):
            The model that trains, not wrapped.
        roles (`set[str]`):
            Parts of the names, such as `"ref"` or `"reward_head"`.
    """
    lost = {
        name: parameter
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "ds_id") and not parameter.requires_grad and roles & set(name.split("."))
    }
    with gathered(lost.values()):
        return {**state, **{name: parameter.detach().cpu().clone() for name, parameter in lost.items()}}
