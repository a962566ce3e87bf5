"""Outputs of a trunk's frozen lower layers, computed once per text and replayed.

Where only the top layers carry adapters, the layers below give the same hidden states for every role, epoch and seed.
The layers stay in place: their `forward` is set on the instance and taken off again, so that hooks, names and
attributes are untouched.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .base_quantization import quantization_of
from .checkpoints import weights_digest


logger = logging.get_logger(__name__)

_ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)

DEFAULT_GIB = 1.0
"""What the texts of a PPO rollout may take where nothing else is asked for."""


class TrunkCache:
    """
    Lets the lowest layers of a model run once per text.

    Texts are told apart by their real tokens. What is replayed in the batch it was computed in is equal bit for bit;
    in a batch of another shape it is equal up to the rounding of matrix products. It lives in the dtype of the hidden
    states, on the CPU: tokens x hidden size x 2 bytes in bf16.

    Args:
        model (`nn.Module`):
            Decoder sequence-classification model or causal language model, plain or a [`~peft.PeftModel`]; its
            positions must follow from the attention mask. Forwards with a key-value cache pass by.
        num_layers (`int`):
            How many of the lowest layers to replay.
        shared (`TrunkCache`, *optional*):
            Cache of the same trunk under another adapter, whose texts are used and added to.
        max_bytes (`int`, *optional*):
            What the texts may take; the ones beyond are computed each time.

    Attributes:
        texts (`dict[bytes, torch.Tensor]`):
            Hidden states `(T, H)` by the hash of a text's tokens.
        num_computed, num_replayed (`int`):
            Sequences that went through the lower layers, and that did not.

    Raises:
        ValueError: something below trains, drops out or (in 8 bits) depends on the other rows of a batch, gradient
            checkpointing is reentrant, or there are not so many layers.
    """

    def __init__(
        self,
        model: nn.Module,
        num_layers: int,
        shared: "TrunkCache | None" = None,
        max_bytes: int | None = None,
    ):
        base = _base_of(model)
        self._backbone, layers = base.base_model, _layers_of(base)
        if not 0 < num_layers < len(layers):
            raise ValueError(
                f"`num_layers` is {num_layers} of a trunk of {len(layers)} layers; choose 1 to {len(layers) - 1}."
            )
        self._lower = layers[:num_layers]
        self._check(base)
        self.max_bytes, self.enabled, self._told_full = max_bytes, True, False
        self._base = base
        self.texts: dict[bytes, torch.Tensor] = {} if shared is None else shared.texts
        self.num_computed = self.num_replayed = 0
        self._replayed: torch.Tensor | None = None
        self._stops = False
        self._passes_by = False
        self._handle = self._backbone.register_forward_pre_hook(self._look_up, with_kwargs=True)
        for place, layer in enumerate(self._lower):
            layer.forward = _Layer(self, layer.forward, place == num_layers - 1)

    @torch.no_grad()
    def fill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        """Compute texts `(B, T)` ahead, without the layers above."""
        self._stops = True
        try:
            self._backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        except _Filled:
            pass
        finally:
            self._stops = False

    def save(self, path: str | os.PathLike) -> None:
        """Write all texts to a safetensors file, for a later run on the same base."""
        tensors = {key.hex(): text.contiguous() for key, text in self.texts.items()}
        save_file(tensors, str(path), metadata=self._origin)

    @functools.cached_property
    def _origin(self) -> dict[str, str]:
        """What made the texts: the frozen layers by their weights, since one base may lie under two names."""
        return {
            "weights": weights_digest(nn.ModuleList([*_before_the_layers(self._base), *self._lower])),
            "quantization": json.dumps(quantization_of(self._base.config), default=str, sort_keys=True),
            "dtype": str(self._base.dtype),
            "layers": str(len(self._lower)),
        }

    def load(self, path: str | os.PathLike) -> None:
        """Add the texts of a file.

        Raises:
            ValueError: they were written under other weights, quantisation, dtype or number of layers.
        """
        with safe_open(str(path), framework="pt") as file:
            written = file.metadata() or {}
            odd = {name: (written.get(name), now) for name, now in self._origin.items() if written.get(name) != now}
            if odd:
                raise ValueError(f"{str(path)!r} holds another trunk's texts: {odd} (then, now).")
            self.texts.update({bytes.fromhex(key): file.get_tensor(key) for key in file.keys()})

    def remove(self) -> None:
        """Give the layers their own forward back."""
        self._handle.remove()
        for layer in self._lower:
            del layer.forward

    def _check(self, base: PreTrainedModel) -> None:
        below = [*_before_the_layers(base), *self._lower]
        modules = [module for part in below for module in part.modules()]
        lower = {id(p) for module in modules for p in module.parameters()}
        trains = [n for n, p in base.named_parameters() if p.requires_grad and id(p) in lower]
        if trains:
            raise ValueError(
                f"{len(trains)} parameters of the layers to replay train, {trains[0]!r} first, so their output "
                "changes. Put adapters on the layers above only (`layers_to_transform`), or replay fewer."
            )
        if any(isinstance(module, _ADAPTED) for module in modules):
            raise ValueError(
                "The layers to replay carry adapters: another one would be given the output of this one. Put adapters "
                "on the layers above only (`layers_to_transform`), or replay fewer."
            )
        rates = [v for m in modules for n, v in vars(m).items() if "dropout" in n and isinstance(v, float)]
        rates += [module.p for module in modules if isinstance(module, nn.Dropout)]
        if max(rates, default=0.0) > 0:
            raise ValueError("The layers to replay have dropout, so their output is never the same. Set it to 0.")
        # bitsandbytes takes the columns where any row of the batch has an outlier out of an 8-bit product
        if any(getattr(getattr(module, "state", None), "threshold", 0.0) for module in modules):
            raise ValueError(
                "The layers to replay are in 8 bits with outliers apart (`llm_int8_threshold`), so what they give for "
                "one text depends on the other texts of its batch. Set the threshold to 0, or quantise to 4 bits."
            )
        config = base.config.get_text_config()
        if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "output_router_logits", False):
            raise ValueError(
                "The layers to replay give more than hidden states: keys and values that layers above read "
                "(`num_kv_shared_layers`), or the choices of experts (`output_router_logits`)."
            )
        checkpoints = [getattr(layer, "_gradient_checkpointing_func", None) for layer in self._lower]
        if any(getattr(func, "keywords", {}).get("use_reentrant", False) for func in checkpoints):
            raise ValueError(
                "`gradient_checkpointing` with use_reentrant=True gets no gradient from a replayed layer. Set "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )

    @torch.no_grad()
    def prove(self) -> None:
        """
        Compare a short batch computed, stored and replayed, for families that nobody has tried.

        Raises:
            ValueError: they differ, or the layers are built in another way; the cache is taken off the model.
        """
        device = next(self._backbone.parameters()).device
        ids = torch.arange(1, 9, device=device).view(2, 4) % self._backbone.config.get_text_config().vocab_size
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], device=device)
        found, enabled = [], self.enabled
        try:
            with self.apart():
                for self.enabled in (False, True, True):
                    out = self._backbone(input_ids=ids, attention_mask=mask, use_cache=False)
                    found.append(out.last_hidden_state[mask.bool()])
            same = torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        except Exception as error:
            self.remove()
            raise ValueError(f"its layers cannot be replayed ({type(error).__name__}: {error})") from error
        finally:
            self.enabled = enabled
            self.num_computed = self.num_replayed = 0
        if not same:
            self.remove()
            raise ValueError("its replayed layers give other numbers than computed ones")

    @property
    def nbytes(self) -> int:
        """Memory of the texts."""
        return sum(text.nbytes for text in self.texts.values())

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Texts of a `with` block are forgotten at its end, and those of before are there again."""
        before, self.texts = self.texts, {}
        try:
            yield
        finally:
            self.texts = before

    def _look_up(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        others = (
            "past_key_values",
            "cache",
            "inputs_embeds",
            "use_cache",
            "output_hidden_states",
            "output_attentions",
        )
        asked = any(kwargs.get(name) is not None and kwargs[name] is not False for name in others)
        self._passes_by = asked or not self.enabled
        if self._passes_by:
            return
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        self._mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        # A hash and not the ids: names of thousands of long texts do not fit the header of a file.
        rows = [row[keep].cpu().numpy().tobytes() for row, keep in zip(ids, self._mask, strict=True)]
        self._keys = [hashlib.sha256(row).digest() for row in rows]
        known = all(key in self.texts for key in self._keys)
        self.num_replayed += len(ids) * known
        self.num_computed += len(ids) * (not known)
        self._replayed = self._gather() if known else None

    def _gather(self) -> torch.Tensor:
        rows = [self.texts[key] for key in self._keys]
        hidden = rows[0].new_zeros(*self._mask.shape, rows[0].shape[-1])
        hidden[self._mask.cpu()] = torch.cat(rows)
        return hidden.to(self._mask.device)

    def _store(self, hidden: torch.Tensor) -> None:
        taken = 0 if self.max_bytes is None else self.nbytes
        for key, row, keep in zip(self._keys, hidden, self._mask, strict=True):
            text = row[keep].detach()
            if key in self.texts:
                continue
            if self.max_bytes is not None and taken + text.nbytes > self.max_bytes:
                if not self._told_full:
                    self._told_full = True
                    logger.warning(
                        f"The cache of frozen layers is full at {self.max_bytes / 2**30:.2f} GiB: batches with other "
                        "texts are computed each time. Raise `trunk_cache_gib`, or set it to 0."
                    )
                continue
            self.texts[key] = text.to("cpu", copy=True)
            taken += text.nbytes


class _Filled(Exception):
    pass


def num_frozen_layers(model: nn.Module) -> int:
    """How many of the lowest layers of a model neither train nor carry an adapter, so that every role shares them."""
    base = _base_of(model)
    layers = _layers_of(base)
    if any(_moves(part) for part in _before_the_layers(base)):
        return 0
    return next((place for place, layer in enumerate(layers) if _moves(layer)), len(layers))


def _moves(part: nn.Module) -> bool:
    """Whether something of it trains, or differs between roles."""
    adapted = any(isinstance(module, _ADAPTED) for module in part.modules())
    return adapted or any(p.requires_grad for p in part.parameters())


def _before_the_layers(base: PreTrainedModel) -> list[nn.Module]:
    """What a text goes through before the first layer: embeddings of tokens and positions, a norm, a dropout."""
    parts = list(base.base_model.children())
    stack = next((place for place, part in enumerate(parts) if _is_stack(part, base)), len(parts))
    return [base.get_input_embeddings(), *parts[:stack]]


def _is_stack(part: nn.Module, base: PreTrainedModel) -> bool:
    return isinstance(part, nn.ModuleList) and len(part) == base.config.get_text_config().num_hidden_layers


def _base_of(model: nn.Module) -> PreTrainedModel:
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _layers_of(base: PreTrainedModel) -> list[nn.Module]:
    return next((list(part) for part in base.base_model.children() if _is_stack(part, base)), [])


class _Layer:
    def __init__(self, cache: TrunkCache, forward: Any, is_last: bool):
        self.cache, self.forward, self.is_last = cache, forward, is_last

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.cache._passes_by:
            return self.forward(hidden_states, *args, **kwargs)
        if self.cache._replayed is not None and self.cache._stops:
            raise _Filled
        if self.cache._replayed is not None:
            return self.cache._replayed if self.is_last else hidden_states
        with torch.no_grad():
            hidden_states = self.forward(hidden_states, *args, **kwargs)
        if self.is_last:
            self.cache._store(hidden_states)
            if self.cache._stops:
                raise _Filled
        return hidden_states
