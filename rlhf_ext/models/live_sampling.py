"""Sampling that reads no prompt twice and stops paying for ended rows: a loop for `generate(custom_generate=...)`.

`generate` reads a prompt as often as it is sampled, and runs every row until the last one has ended. Here equal
prompts of a batch are read once, and rows that have ended leave the batch, and with it the key-value cache, whenever a
quarter of it has ended. The distribution of each row is the same; the random numbers that a row meets are not.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .growing_cache import GrowingLayer, cache_argument, cache_of, grow_ahead
from .positions import positions_from_mask
from .roles import base_of


ENDED_SHARE = 0.25
"""Share of ended rows at which the batch is cut: each cut copies the cache once."""

DRAWN = 2**21
"""Probabilities that are summed up at a time: 16 MiB of float64."""


@contextmanager
def only_live_rows(model: nn.Module) -> Iterator[None]:
    """Let `model.generate` sample with [`sample_live_rows`] in a `with` block.

    Families that feed a decoding step in their own way keep `generate`'s loop, and so do those with states that are no
    keys and values of a row, and adapters that look at the prompts which `generate` was given.
    """
    base = base_of(model)
    own_way = type(base).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    own_way = own_way or base._is_stateful or not base._supports_default_dynamic_cache()
    if own_way or any(_looks_at_prompts(config) for config in getattr(model, "peft_config", {}).values()):
        yield
        return
    before, given = base.generate, vars(base).get("generate")
    base.generate = functools.partial(before, custom_generate=sample_live_rows)
    try:
        yield
    finally:
        del base.generate
        if given is not None:
            base.generate = given


def _looks_at_prompts(adapter: PeftConfig) -> bool:
    return adapter.is_prompt_learning or getattr(adapter, "alora_invocation_tokens", None) is not None


@torch.no_grad()
def sample_live_rows(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> torch.Tensor:
    """
    Decode as `generate` does, greedily or by sampling, read equal prompts once, and let ended rows go.

    Args:
        model (`nn.Module`):
            Causal language model.
        input_ids (`torch.Tensor` of shape `(B, P)`):
            Prompts, padded on the left.
        logits_processor, stopping_criteria, generation_config:
            As `generate` made them; processors and criteria must look at each row by itself.
        model_kwargs:
            `attention_mask (B, P)` and the cache; the rest is read from the configuration.

    Returns:
        `torch.Tensor` of shape `(B, P + C)`: prompts and completions, padding behind the end of a row.
    """
    mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
    if mask is None:  # `generate` drops one that hides nothing
        mask = torch.ones_like(input_ids)
    if cache is None:
        cache = model_kwargs.get("cache")
    grow_ahead(cache, generation_config.max_length - 1)  # the last token is never read
    rows = torch.arange(len(input_ids), device=input_ids.device)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    texts: list[torch.Tensor | None] = [None] * len(rows)
    ids = input_ids
    firsts, copies = _distinct(ids, mask) if _can_be_cut(cache) else (rows, rows)
    read = functools.partial(_read, model, cache_argument(base_of(model)))
    logits, cache = read(ids[firsts], mask[firsts], cache)
    if len(firsts) < len(rows):
        cache.batch_select_indices(copies)
        logits = logits[copies.to(logits.device)]
    while True:
        scores = logits_processor(ids, logits)
        new = (draw(scores) if generation_config.do_sample else scores.argmax(-1))[:, None]
        ids, mask = torch.cat([ids, new], dim=1), torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        ends = stopping_criteria(ids, None) & ~ended
        for place in ends.nonzero().flatten().tolist():
            texts[int(rows[place])] = ids[place].clone()  # no view: it would hold the whole batch
        ended = ended | ends
        if ended.all():
            break
        if ended.float().mean() >= ENDED_SHARE and _can_be_cut(cache):
            live = (~ended).nonzero().flatten()
            cache.batch_select_indices(live.cpu())  # layers may lie on several devices: each takes the CPU's indices
            rows, ids, new, mask, ended = (t[live] for t in (rows, ids, new, mask, ended))
        logits, cache = read(new, mask, cache)
    padding = generation_config.pad_token_id
    longest = max(len(text) for text in texts if text is not None)
    padded = input_ids.new_full((len(input_ids), longest), padding if padding is not None else 0)
    for row, text in enumerate(texts):
        assert text is not None
        padded[row, : len(text)] = text
    return padded


def _read(
    model: nn.Module, cache_name: str, new: torch.Tensor, mask: torch.Tensor, cache: Any
) -> tuple[torch.Tensor, Any]:
    """Logits `(B, V)` behind the last of `new (B, T)`, which `cache` has not seen, and the cache that has."""
    # A loss that balances experts wants a mask as long as the tokens given: of a step, that is not the cache's.
    routing = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
    output = model(
        input_ids=new,
        attention_mask=mask,
        position_ids=positions_from_mask(mask)[:, -new.size(1) :],
        use_cache=True,
        logits_to_keep=1,
        **{cache_name: cache},
        **routing,
    )
    return output.logits[:, -1].float(), cache_of(output, given=cache)


def _distinct(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that differ from all before them, and which of those each of the `B` rows equals; on the CPU."""
    places: dict[tuple[int, ...], int] = {}
    firsts, copies = [], []
    for row, text in enumerate(torch.cat([ids, mask.to(ids.dtype)], dim=1).tolist()):
        copies.append(places.setdefault(tuple(text), len(places)))
        if len(places) > len(firsts):
            firsts.append(row)
    return torch.tensor(firsts), torch.tensor(copies)


def _can_be_cut(cache: Any) -> bool:
    # Others keep more than keys and values: states of convolutions and recurrences.
    kinds = (GrowingLayer, DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in kinds for layer in getattr(cache, "layers", [None]))


def draw(scores: torch.Tensor) -> torch.Tensor:
    """One token of each row of `(B, V)` logits, by the inverse of the distribution function: one random number a row.

    In float64, where sums over a vocabulary of 262,144 tokens round off less than the rarest of them weighs (float32
    on MPS, which has nothing wider).

    Raises:
        ValueError: the logits of a row are not finite, as those of a policy that has diverged.
    """
    wide = torch.float32 if scores.device.type == "mps" else torch.float64
    share = torch.rand(len(scores), 1, dtype=wide, device=scores.device)
    rows = max(1, DRAWN // scores.size(-1))
    parts = zip(scores.split(rows), share.split(rows), strict=True)
    return torch.cat([_draw_at(*part) for part in parts])


def _draw_at(scores: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    below = scores.softmax(dim=-1).to(share.dtype).cumsum(dim=-1)
    if not below[:, -1].isfinite().all():
        raise ValueError(
            "The model's logits are not finite: training has diverged, or its dtype is too narrow for it. Lower the "
            "learning rate, or load it in bfloat16 or float32."
        )
    # To the right of equal sums, so that a token of probability 0 is never drawn.
    place = torch.searchsorted(below, share * below[:, -1:], right=True)
    return place.clamp(max=scores.size(-1) - 1).squeeze(-1)
