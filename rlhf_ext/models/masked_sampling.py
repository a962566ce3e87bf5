"""Sampling under the mask of another policy (NLPO), and what the masks were."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from ..functional import top_p_mask
from ..functional.nlpo import pack_mask
from .growing_cache import cache_argument, cache_of
from .positions import positions_from_mask
from .roles import base_of


class TopPMask(LogitsProcessor):
    """Forbids, at every step of `generate`, the tokens outside the top-p set of a masking policy.

    Args:
        forward (`Callable`):
            The masking policy: keywords of a causal language model's forward in, its output out.
        attention_mask (`torch.Tensor`):
            `(B, P)` of the prompts, left-padded.
        top_p, min_tokens, keep_ids:
            As in [`~rlhf_ext.functional.top_p_mask`].
        temperature (`float`):
            Of the sampling. Processors run before `generate` divides by it, so it is applied here.
        cache_name (`str`):
            Keyword of `forward` for the cache.

    Attributes:
        packed (`list[torch.Tensor]`):
            One `(B, ceil(V / 8))` uint8 per step. To be kept: computed again from whole rows, some masks differ.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        attention_mask: torch.Tensor,
        *,
        top_p: float,
        min_tokens: int,
        keep_ids: list[int],
        temperature: float,
        cache_name: str,
    ):
        self.forward, self.cache_name = forward, cache_name
        self.mask, self.temperature = attention_mask, temperature
        self.options = {"top_p": top_p, "min_tokens": min_tokens, "keep_ids": keep_ids}
        self.cache: Any = None
        self.packed: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.cache is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            input_ids = input_ids[:, -1:]
        output = self.forward(
            input_ids=input_ids,
            attention_mask=self.mask,
            position_ids=positions_from_mask(self.mask)[:, -input_ids.size(1) :],
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        )
        self.cache = cache_of(output)
        allowed = top_p_mask(output.logits[:, -1].float() / self.temperature, **self.options)
        self.packed.append(pack_mask(allowed))
        return scores.masked_fill(~allowed, -torch.inf)


class MaskedGenerate:
    """`generate` of `model` under a [`TopPMask`]; set it as the attribute `generate` for the time of a rollout.

    `generate` takes no processor from a configuration, and TRL calls it with keywords of its own.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any], **options: Any):
        self.generate, self.forward = model.generate, forward
        self.options = {"cache_name": cache_argument(base_of(model)), **options}
        self.packed: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        processor = TopPMask(self.forward, kwargs["attention_mask"], **self.options)
        result = self.generate(*args, logits_processor=LogitsProcessorList([processor]), **kwargs)
        self.packed = torch.stack(processor.packed, dim=1)
        return result
