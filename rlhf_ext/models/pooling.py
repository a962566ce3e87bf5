"""From tokens to one score: the scalar head of a reward model on every token, pooled by the attention mask.

Shapes: B rows, T tokens. Mask: 1 (or True) on real tokens, padding on either side.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from .lm_head import lm_logps
from .positions import positions_from_mask


AGGREGATIONS = ("last", "sum")
_PASSED_ON = ("cache", "past_key_values", "hidden_states", "attentions")


@dataclass
class RewardOutput(SequenceClassifierOutputWithPast):
    """
    A score per sequence, and the log-probabilities that were asked for.

    Args:
        lm_logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            Log-probability of each token of `lm_mask` under the language-modelling head, fp32, 0 elsewhere.
    """

    lm_logps: torch.Tensor | None = None


def classifier_of(model: nn.Module) -> PreTrainedModel:
    """
    The sequence-classification model inside `model`, without DDP, DeepSpeed or PEFT around it.

    Args:
        model (`nn.Module`):
            A decoder sequence-classification model, plain or wrapped.

    Returns:
        [`~transformers.PreTrainedModel`]: the model that owns the backbone and the head `score`.

    Raises:
        ValueError: if the model has no scalar head named `score`.
    """
    base = _base_of(model)
    if not isinstance(getattr(base, "score", None), nn.Module):
        raise ValueError(
            f"`model` is a {type(base).__name__} without a head named `score`, so its tokens have no scores. Load a "
            "decoder with `AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)`."
        )
    labels = getattr(base.config, "num_labels", None)
    if labels != 1:
        raise ValueError(
            f"`model.config.num_labels` is {labels}, but a reward model gives one score. Load it with `num_labels=1`."
        )
    return base


def gives_values(model: nn.Module) -> bool:
    """Whether a model was saved as a critic: its numbers are values, and no scores."""
    return bool(getattr(_base_of(model), "is_critic", False))


def set_normalization(model: nn.Module, gain: float, bias: float) -> None:
    """Let a reward model score gain * score + bias from now on; its weights stay as they were trained.

    Args:
        model (`nn.Module`):
            Sequence-classification model, plain or a [`~peft.PeftModel`].
    """
    _base_of(model).score_normalization = (float(gain), float(bias))


def normalization_of(model: nn.Module) -> tuple[float, float]:
    """Gain and bias of a reward model's scores; `(1.0, 0.0)` where none were set."""
    return getattr(_base_of(model), "score_normalization", (1.0, 0.0))


def log_odds_of(model: nn.Module) -> tuple[float, float]:
    """
    What makes a model's score differences the log-odds it was trained with: a factor, and the share of random answers.

    The factor is the gain of training over the gain of now: a model that was normalised afterwards scores in another
    unit than its loss saw. With noise e, P(first) = (1 - e) sigmoid(factor x difference) + e / 2.
    """
    training_gain, noise = getattr(_base_of(model), "score_training", (1.0, 0.0))
    return training_gain / normalization_of(model)[0], noise


def has_normalization(model: nn.Module) -> bool:
    """Whether gain and bias of a reward model were set, to whatever."""
    return hasattr(_base_of(model), "score_normalization")


def _base_of(model: nn.Module) -> nn.Module:
    if hasattr(model, "module") or hasattr(model, "_orig_mod"):  # asking costs milliseconds, several times a batch
        model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def token_scores(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """
    The scalar head of a reward model on every position.

    Args:
        model (`nn.Module`):
            Decoder sequence-classification model with one label, plain or a [`~peft.PeftModel`].
        input_ids (`torch.Tensor` of shape `(B, T)`):
            Token ids, padded on either side.
        attention_mask (`torch.Tensor` of shape `(B, T)`):
            1 on real tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`, fp32: the score read at each token, after gain and bias. A model that sums
        its tokens pays the bias once per completion, so it is left out here. Padded positions hold no meaning.

    Raises:
        ValueError: if the model has no head named `score` or more than one label.
    """
    base = classifier_of(model)
    scores, _ = _score_tokens(base, {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False})
    return scores


def last_token_scores(token_scores: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """
    The score at the last real token, found by the mask and never by the padding id.

    Args:
        token_scores (`torch.Tensor` of shape `(B, T)`):
            A score per token.
        attention_mask (`torch.Tensor` of shape `(B, T)`):
            1 (or True) on real tokens; rows may be padded on the left or on the right.

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        ValueError: if the shapes differ or a row has no real token.
    """
    _check_mask(token_scores, attention_mask)
    steps = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    last = torch.where(attention_mask.bool(), steps, -1).amax(-1)
    if (last < 0).any():
        rows = (last < 0).nonzero().flatten().tolist()
        raise ValueError(f"`attention_mask` has no real token in rows {rows}. Give each row at least one token.")
    return token_scores[torch.arange(len(last), device=last.device), last]


def sum_token_scores(token_scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The sum of the token scores over a segment, the reward of Christiano et al. 2017 (https://huggingface.co/papers/1706.03741),
    section 2.2.3, without discount.

    Args:
        token_scores (`torch.Tensor` of shape `(B, T)`):
            A score per token; masked positions may hold NaN.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 (or True) on the tokens that count.

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_mask(token_scores, mask)
    return torch.where(mask.bool(), token_scores, torch.zeros_like(token_scores)).sum(-1)


def pool_by_attention_mask(model: nn.Module, aggregation: str = "last") -> nn.Module:
    """
    Make the forward of a reward model pool its scores by the attention mask.

    The stock forward looks for the last token that is not the padding id, so that an end-of-sequence token which also
    pads is never read (huggingface/transformers#35352). Where the padding id does not occur inside the text the result
    is the same bit for bit in fp32. The forward also applies the head in fp32, moves positions under padding on the
    left, and takes two more keywords: `completion_mask (B, T)`, the only tokens that count with
    `aggregation="sum"`; and `lm_mask (B, T)`, the tokens whose log-probability under the language-modelling head the
    output then has as `lm_logps` (`rlhf_ext.models.lm_head`).
    `save_pretrained`, PEFT wrapping, DDP, `copy.deepcopy` and `pickle` work as before.

    Args:
        model (`nn.Module`):
            Decoder sequence-classification model with one label, plain or a [`~peft.PeftModel`]; changed in place.
        aggregation (`str`, *optional*, defaults to `"last"`):
            `"last"`: the score at the last real token. `"sum"`: the sum over real tokens, or over `completion_mask`.

    Returns:
        `nn.Module`: `model`.

    Raises:
        ValueError: if `aggregation` is unknown or the model has no head named `score`.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"`aggregation` is {aggregation!r}; choose one of {list(AGGREGATIONS)}.")
    base = classifier_of(model)
    pooled = base.__dict__.get("forward")
    if isinstance(pooled, _PooledForward):
        pooled.aggregation = aggregation
    else:
        base.forward = _PooledForward(base, aggregation)
    return model


def pooled_aggregation(model: nn.Module) -> str | None:
    """The aggregation that [`pool_by_attention_mask`] gave `model`, or `None` for a stock forward."""
    forward = classifier_of(model).__dict__.get("forward")
    while forward is not None and not isinstance(forward, _PooledForward):
        # accelerate's mixed precision puts an autocast wrapper around the forward
        forward = getattr(forward, "__wrapped__", None)
    return forward.aggregation if forward is not None else None


class _PooledForward:
    # An object and not a closure: a bound method of a closure is lost in pickle without an error, because it pickles
    # as `getattr(model, "forward")` and the half-built model answers with the forward of its class.
    def __init__(self, model: PreTrainedModel, aggregation: str):
        functools.update_wrapper(self, model.forward)
        self.model = model
        self.aggregation = aggregation

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        completion_mask: torch.Tensor | None = None,
        lm_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> RewardOutput | tuple:
        if labels is not None:
            raise ValueError("`labels` were given, but a pooled reward model gives scores only. Leave `labels` out.")
        if completion_mask is not None and self.aggregation != "sum":
            raise ValueError("`completion_mask` was given, but only `aggregation='sum'` reads it. Leave it out.")
        if attention_mask is None:
            source = input_ids if input_ids is not None else kwargs["inputs_embeds"]
            attention_mask = torch.ones(source.shape[:2], dtype=torch.long, device=source.device)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        scores, outputs = _score_tokens(self.model, inputs)
        if self.aggregation == "last":
            pooled = last_token_scores(scores, attention_mask.to(scores.device))
        else:
            mask = attention_mask if completion_mask is None else completion_mask
            pooled = sum_token_scores(scores, mask.to(scores.device)) + normalization_of(self.model)[1]
        lm = None if lm_mask is None else lm_logps(self.model, outputs.last_hidden_state, input_ids, lm_mask)
        # The cache has either name, by the version of transformers.
        passed_on = {name: value for name, value in outputs.items() if name in _PASSED_ON}
        result = RewardOutput(logits=pooled.unsqueeze(-1), lm_logps=lm, **passed_on)
        return result.to_tuple() if return_dict is False else result


def _score_tokens(base: PreTrainedModel, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    backbone = getattr(base, base.base_model_prefix)
    mask = inputs["attention_mask"]
    takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
    if takes_positions and inputs.get("position_ids") is None and (mask[:, 1:] > mask[:, :-1]).any():
        # Only where padding stands before text: the model's own positions are right elsewhere, and passing the same
        # numbers once per row would sum the gradient of GPT-2's position table in another order.
        inputs = {**inputs, "position_ids": positions_from_mask(mask)}
    outputs = backbone(**inputs)
    scores = _apply_head(base.score, outputs.last_hidden_state)
    gain, bias = normalization_of(base)
    if (gain, bias) != (1.0, 0.0):
        scores = scores * gain + (0.0 if pooled_aggregation(base) == "sum" else bias)
    return scores, outputs


def _apply_head(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    parameters = dict(head.named_parameters())
    # bf16 keeps 8 bits of a score: pairs that differ by less would tie (huggingface/trl#1258). Autocast is off for the
    # same reason.
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        hidden = hidden.float()
        if all(parameter.dtype == torch.float32 for parameter in parameters.values()):
            return head(hidden).squeeze(-1)
        wide = {name: parameter.float() for name, parameter in parameters.items()}
        return torch.func.functional_call(head, wide, (hidden,)).squeeze(-1)


def _check_mask(scores: torch.Tensor, mask: torch.Tensor) -> None:
    if scores.dim() != 2 or scores.shape != mask.shape:
        raise ValueError(
            f"`token_scores` has shape {tuple(scores.shape)} and the mask {tuple(mask.shape)}; both must be `(B, T)`."
        )
