"""TRL's fused head on devices without Triton: real completion tokens alone, and tiles that fit a cache.

There the original projects every position, those of prompts and padding too, in tiles of 4,096 tokens.
"""

import functools
import types
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..functional.token_logps import token_logps
from .lm_head import logit_transform


def tile_fused_head(model: PreTrainedModel, temperature: float, *, entropy_gradient: bool = False) -> None:
    """
    Replace what `model(..., labels=labels, fused_lm_head=True)` does, after `trl.trainer.utils.add_fused_lm_head`.

    Same output, up to rounding, with `log_probs` and `entropy` of shape `(B, T - 1)`, 0 where the label is -100. Left
    to the original: devices with Triton, heads that are cut into pieces (ZeRO-3, FSDP2), routed experts.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, without PEFT around it; changed in place.
        temperature (`float`):
            That of the sampling.
        entropy_gradient (`bool`, *optional*, defaults to `False`):
            Whether the entropy is trained on.
    """
    # Here and not above: TRL takes ten seconds to import.
    from trl.trainer.utils import FusedCausalLMOutput

    fused, config = model.forward, model.config.get_text_config()
    softcap, scale = logit_transform(config)
    routed = bool(getattr(config, "output_router_logits", False))

    @functools.wraps(fused)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any):
        head = self.get_output_embeddings()
        if not fused_lm_head or labels is None or routed or kwargs.get("output_router_logits") or not _is_whole(head):
            given = {} if labels is None else {"labels": labels}
            return fused(*args, **({"fused_lm_head": True} if fused_lm_head else {}), **given, **kwargs)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        picked = labels != -100
        found = token_logps(
            hidden[picked],
            head.weight,
            labels[picked],
            bias=head.bias,
            temperature=temperature,
            logit_scale=scale,
            softcap=softcap,
            entropy_gradient=entropy_gradient,
        )
        log_probs, entropy = (row.new_zeros(picked.shape).masked_scatter(picked, row) for row in found)
        loss = -log_probs.sum() / picked.sum().clamp(min=1)
        return FusedCausalLMOutput(loss=loss, log_probs=log_probs, entropy=entropy, label_mask=picked)

    model.forward = types.MethodType(forward, model)


def _is_whole(head: nn.Module) -> bool:
    weight = head.weight
    return (
        type(head) is nn.Linear
        and weight.device.type == "cpu"
        and not isinstance(weight, DTensor)
        and not hasattr(weight, "ds_id")
    )
