"""A language-modelling head beside the scalar one, on the same trunk (Askell et al. 2021).

The head is the one of the checkpoint that the trunk comes from. Where input and output embeddings are tied the trunk
carries it already; elsewhere it stands as `lm_head` beside `score`, so that one folder loads as either model.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..functional.token_logps import token_logps


LM_HEAD = "lm_head"

LM_FOLDER = "lm"
"""Where the language-model half of a trained reward adapter is saved, inside the folder of the adapter."""

TILE_VOCABULARY = 32768
"""Entries of the vocabulary that a tile of logits spans."""


def keep_lm_head(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], *, trains: bool = True) -> None:
    """
    Put a language-modelling head beside the head `score` of a classifier; nothing to do where embeddings are tied.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Decoder sequence-classification model, without PEFT around it; changed in place.
        tensors (`Mapping[str, torch.Tensor]`):
            `weight (V, d)` and, if there is one, `bias (V,)`: what a causal language model has as its output
            embeddings. Copied, in the dtype of the trunk.
        trains (`bool`, *optional*, defaults to `True`):
            Whether the head trains. Under adapters it stays as it is.

    Raises:
        ValueError: there are no tensors and the embeddings are not tied, they do not fit the trunk, or the model has a
            head that is no plain linear layer.
    """
    head = getattr(model, LM_HEAD, None)
    if head is not None and type(head) is not nn.Linear:
        raise ValueError(
            f"The head `{LM_HEAD}` is a {type(head).__name__}, not a plain linear layer: an adapter in it would not "
            f"be read. Take {LM_HEAD!r} out of `target_modules` and `modules_to_save`."
        )
    if head is not None or is_tied(model):
        return
    size = (model.get_input_embeddings().weight.shape[0], model.config.get_text_config().hidden_size)
    if "weight" not in tensors:
        raise ValueError(
            "`lm_coef` is above 0, but the model has no language-modelling head: its checkpoint holds none and its "
            "embeddings are not tied. Start from the SFT model, by its name, or call `keep_lm_head(model, "
            "sft_model.get_output_embeddings().state_dict())` on an instance first."
        )
    if tuple(tensors["weight"].shape) != size:
        raise ValueError(f"The head `{LM_HEAD}` is {tuple(tensors['weight'].shape)}, but the trunk needs {size}.")
    weight = tensors["weight"]
    head = nn.Linear(size[1], size[0], bias="bias" in tensors, device=model.device, dtype=model.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        if "bias" in tensors:
            head.bias.copy_(tensors["bias"])
    setattr(model, LM_HEAD, head.requires_grad_(trains))


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the input embeddings of a trunk are its output embeddings too."""
    return bool(model.config.get_text_config().tie_word_embeddings)


def lm_logps(
    model: PreTrainedModel, hidden: torch.Tensor, input_ids: torch.Tensor, lm_mask: torch.Tensor
) -> torch.Tensor:
    """
    Log-probability of the tokens that a mask picks, never holding more than a tile of logits.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Classifier with a language-modelling head, from [`keep_lm_head`] or tied.
        hidden (`torch.Tensor` of shape `(B, T, d)`):
            Last hidden states. Gradient.
        input_ids (`torch.Tensor` of shape `(B, T)`):
            Token ids.
        lm_mask (`torch.Tensor` of shape `(B, T)`, bool):
            Tokens to predict, each from the ones before it. The first of a row has none before it and is left out.

    Returns:
        `torch.Tensor` of shape `(B, T)`, fp32: log p(token t | tokens before t), 0 where the mask is false. It hangs
        on the graph also where the mask picks nothing, so that every parameter takes part in every step.
    """
    # Here and not above: TRL takes ten seconds to import, and models that score need none of it.
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    head = getattr(model, LM_HEAD, None)
    weight, bias = (model.get_input_embeddings().weight, None) if head is None else (head.weight, head.bias)
    if isinstance(weight, DTensor):
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    picked = lm_mask[:, 1:].bool()
    softcap, scale = logit_transform(model.config.get_text_config())
    rows, targets = hidden[:, :-1][picked].to(weight.device), input_ids[:, 1:][picked].to(weight.device)
    with maybe_gather_lm_head_ctx(weight, bias):
        if weight.device.type == "cpu" and not hasattr(weight, "ds_id"):  # TRL's kernel is made for GPUs
            logps, _ = token_logps(rows, weight, targets, bias=bias, logit_scale=scale, softcap=softcap)
        else:
            logps = ChunkedLogProbFunction.apply(
                rows, weight, bias, targets, 1.0, TILE_VOCABULARY, softcap, scale, ("log_probs",)
            )[0]
    rows = logps.new_zeros(picked.shape).masked_scatter(picked.to(logps.device), logps)
    return nn.functional.pad(rows, (1, 0)).to(hidden.device)


def logit_transform(config: PreTrainedConfig) -> tuple[float | None, float]:
    """Soft cap and factor that a family puts between the head and its logits."""
    softcap = getattr(config, "final_logit_softcapping", None)
    factors = [getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:  # HyperCLOVA X multiplies by what Granite divides by
        factors.append(divisor if config.model_type == "hyperclovax" else 1 / divisor)
    return softcap, next((float(factor) for factor in factors if factor is not None), 1.0)
