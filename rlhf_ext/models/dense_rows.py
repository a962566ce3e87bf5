"""A backbone that computes no column in which every row is padding, and none that a shift of the rows makes so.

PPO's rows are prompts padded on the left beside completions padded on the right, as long as the longest prompt and
the longest completion of a rollout together. Here the real tokens of each row move to its front, the backbone reads
as many columns as the longest row of the batch has tokens, and its hidden states move back to where the tokens stood.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def compute_dense_rows(backbone: nn.Module) -> list[RemovableHandle]:
    """
    Register the hooks on a transformer backbone (`LlamaModel`, `GPT2Model`, ...) and return their handles.

    The last hidden states are those of the rows as they were given, up to the rounding of matrix products, and 0 on
    padding. Only forwards that say `use_cache=False`; left alone are those with embeddings of their own, and those
    that also give the hidden states of every layer or the choices of experts. To be registered before whatever else
    looks at the inputs.
    """
    dense = _DenseRows()
    return [
        backbone.register_forward_pre_hook(dense.squeeze, with_kwargs=True, prepend=True),
        backbone.register_forward_hook(dense.spread),
    ]


class _DenseRows:
    mask: torch.Tensor | None = None

    def squeeze(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.mask = None
        ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        if not isinstance(ids, torch.Tensor) or not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
            return None
        given = any(kwargs.get(name) is not None for name in ("past_key_values", "cache", "inputs_embeds"))
        routed = kwargs.get("output_router_logits") or getattr(module.config, "output_router_logits", False)
        if kwargs.get("use_cache") is not False or given or routed or kwargs.get("output_hidden_states"):
            return None
        mask = mask.bool()
        lengths = mask.sum(dim=1)
        longest = max(int(lengths.max()), 1)
        steps = torch.arange(longest, device=ids.device)
        dense = steps < lengths[:, None]
        if longest == mask.size(1) and bool((dense == mask).all()):
            return None
        self.mask = mask
        # A stable sort of real before padding keeps the tokens in order.
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        kwargs = {**kwargs, "input_ids": ids.gather(1, order), "attention_mask": dense.to(torch.long)}
        if isinstance(positions := kwargs.get("position_ids"), torch.Tensor):
            kwargs["position_ids"] = positions.expand(ids.shape).gather(1, order)
        return args[1:], kwargs

    def spread(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        mask, self.mask = self.mask, None
        if mask is None:
            return None
        hidden = output.last_hidden_state
        dense = torch.arange(hidden.size(1), device=hidden.device) < mask.sum(dim=1)[:, None]
        spread = hidden.new_zeros(*mask.shape, hidden.size(-1))
        # Both masks walk through the rows in the same order.
        spread[mask] = hidden[dense]
        output.last_hidden_state = spread
        return output
