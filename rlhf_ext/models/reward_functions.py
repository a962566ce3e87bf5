"""Reward functions with TRL's signature: a reward model as one, and a check around anybody's."""

import functools
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.candidates import end_at_closer, without_added_eos
from ..data.loading import common_prefix_length
from ..functional.batching import length_chunks
from .pooling import (
    gives_values,
    has_normalization,
    last_token_scores,
    log_odds_of,
    normalization_of,
    pooled_aggregation,
    sum_token_scores,
    token_scores,
)


Text = str | list[dict[str, Any]]


class ModelReward:
    """
    A sequence-classification model as a reward function.

    With the policy's own vocabulary the model reads the very ids of the rollout, end-of-sequence token included; a
    decoded text has lost it, and a cut answer would score like a finished one. With another vocabulary it reads the
    text, closed by its own end-of-sequence token if and only if the completion finished. Messages are closed by the
    chat template instead, as in reward training, and a cut answer is left open. Decoders with a head `score` are read
    by the attention mask, other models through their own forward.

    Args:
        model (`nn.Module`):
            Sequence-classification model with one label, plain or a [`~peft.PeftModel`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of `model`.
        policy_processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy, whose ids `completion_ids` are.
        name (`str`, *optional*):
            Name in the logs; defaults to the last part of the model's path.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows per forward. Changes a score by less than 1e-5 in fp32.

    Attributes:
        shares_tokenizer (`bool`):
            Whether the two vocabularies are the same.
        eos_token_ids (`set[int]`):
            The policy's ids that finish a completion; set it where there are more than the tokenizer's.
        chat_template_kwargs (`dict`):
            What messages are rendered with, as the policy's prompts are; the trainer sets it.
    """

    def __init__(
        self,
        model: nn.Module,
        processing_class: PreTrainedTokenizerBase,
        policy_processing_class: PreTrainedTokenizerBase,
        name: str | None = None,
        batch_size: int = 16,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; choose 1 or more.")
        labels = getattr(model.config, "num_labels", 1)
        if labels != 1:
            raise ValueError(
                f"The reward model {_name_of(model)!r} has `num_labels` {labels}; it must give one score."
            )
        if gives_values(model):
            raise ValueError(
                f"{_name_of(model)!r} is a critic that PPO saved: its values are no scores. Pass a reward model."
            )
        self.model = model
        self.processing_class = processing_class
        self.batch_size = batch_size
        self.__name__ = name or _name_of(model)
        self.set_policy(policy_processing_class)

    def set_policy(self, policy_processing_class: PreTrainedTokenizerBase) -> None:
        """Read the completions of the policy with this tokenizer from now on."""
        self.policy_processing_class = policy_processing_class
        self.shares_tokenizer = self.processing_class.get_vocab() == policy_processing_class.get_vocab()
        self.eos_token_ids: set[int] = {policy_processing_class.eos_token_id} - {None}
        self.chat_template_kwargs: dict[str, Any] = {}

    @property
    def log_odds(self) -> tuple[float, float]:
        """Factor and noise that make a difference of its scores a preference, as [`log_odds_of`] gives them."""
        return log_odds_of(self.model)

    @property
    def is_normalized(self) -> bool:
        """Whether a gain and a bias were saved with the model."""
        return has_normalization(self.model)

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """
        Score each completion.

        Args:
            prompts (`Sequence[str]` or `Sequence[list[dict]]`):
                Prompts, as text or messages.
            completions (`Sequence[str]` or `Sequence[list[dict]]`):
                Completions, as text or messages.
            completion_ids (`Sequence[Sequence[int]]`):
                Ids of the rollout, with the end-of-sequence token where one was sampled.
            prompt_ids (`Sequence[Sequence[int]]`, *optional*):
                Ids of the prompts in the rollout; read with a shared vocabulary only, made from `prompts` if absent.
            kwargs:
                Other columns; not read.

        Returns:
            `list[float]`: one score per completion.

        Raises:
            ValueError: if a row is longer than the model's context.
        """
        if self.shares_tokenizer:
            starts = prompt_ids if prompt_ids is not None else [self._prompt_ids(prompt) for prompt in prompts]
            rows = [[*start, *ids] for start, ids in zip(starts, completion_ids, strict=True)]
            lengths = [len(ids) for ids in completion_ids]
        else:
            rows = [
                self._text_ids(prompt, completion, bool(ids) and ids[-1] in self.eos_token_ids)
                for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True)
            ]
            starts = [self._prompt_ids(prompt) for prompt in prompts] if self.sums else rows
            lengths = [len(row) - common_prefix_length(start, row) for start, row in zip(starts, rows, strict=True)]
        self._check_lengths(rows)
        scores = [0.0] * len(rows)
        with inference(self.model):
            for places in length_chunks([len(row) for row in rows], self.batch_size):
                found = self._score([rows[place] for place in places], [lengths[place] for place in places])
                for place, score in zip(places, found.tolist(), strict=True):
                    scores[place] = score
        return scores

    @property
    def sums(self) -> bool:
        """Whether a score is a sum over the completion's tokens."""
        return _has_score(self.model) and pooled_aggregation(self.model) == "sum"

    def _score(self, rows: list[list[int]], completion_lengths: list[int]) -> torch.Tensor:
        input_ids, attention_mask = self._padded(rows)
        if not _has_score(self.model):
            gain, bias = normalization_of(self.model)
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0].float() * gain + bias
        scores = token_scores(self.model, input_ids, attention_mask)
        if not self.sums:
            return last_token_scores(scores, attention_mask)
        first = attention_mask.sum(-1) - torch.tensor(completion_lengths, device=attention_mask.device)
        steps = torch.arange(attention_mask.size(1), device=attention_mask.device)
        completion_mask = (steps >= first[:, None]) & attention_mask.bool()
        return sum_token_scores(scores, completion_mask) + normalization_of(self.model)[1]

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask, padded on the right."""
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(row) for row in rows])
        attention_mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long().to(device)
        pad = self.processing_class.pad_token_id or 0  # any id will do: the mask hides it
        input_ids = torch.full(attention_mask.shape, pad, device=device)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids, device=device)
        return input_ids, attention_mask

    def _prompt_ids(self, prompt: Text) -> list[int]:
        if isinstance(prompt, str):
            return self.processing_class(text=prompt)["input_ids"]
        return self.processing_class.apply_chat_template(
            prompt, tokenize=True, return_dict=True, add_generation_prompt=True, **self.chat_template_kwargs
        )["input_ids"]

    def _text_ids(self, prompt: Text, completion: Text, finished: bool) -> list[int]:
        if isinstance(completion, str):
            text, eos = prompt + completion, self.processing_class.eos_token
            if finished and eos is not None and not text.endswith(eos):
                text += eos
            ids = self.processing_class(text=text)["input_ids"]
            return ids if finished else without_added_eos(ids, text, self.processing_class)
        # An open last turn is what the template knows of a cut answer; the closed one is what reward training read.
        ids = self.processing_class.apply_chat_template(
            [*prompt, *completion],
            tokenize=True,
            return_dict=True,
            continue_final_message=not finished,
            **self.chat_template_kwargs,
        )["input_ids"]
        start = common_prefix_length(self._prompt_ids(prompt), ids)
        return end_at_closer(ids, start, self.processing_class) if finished else ids

    def _check_lengths(self, rows: list[list[int]]) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        long = {index: len(row) for index, row in enumerate(rows) if limit is not None and len(row) > limit}
        if long:
            raise ValueError(
                f"The reward model {self.__name__!r} reads at most {limit} tokens (`max_position_embeddings`), but "
                f"rows {list(long)} have {list(long.values())}. Shorten the prompts or `max_completion_length`."
            )


def checked_reward(func: Callable[..., Any]) -> Callable[..., Any]:
    """
    Check what a reward function returns, where an error would otherwise surface as a silent NaN or far away.

    Args:
        func (`Callable`):
            A reward function with TRL's signature: sync or async, a function or a callable object. It may return a
            list, a tuple, an array or a tensor.

    Returns:
        `Callable`: a function of the same name that returns a list of floats, or `None` for rows `func` does not apply
        to.

    Raises:
        ValueError: when called, naming the function and the rows, for a wrong number of rewards, NaN, infinity or a
            value that is no number.
    """
    if getattr(func, "_is_checked_reward", False):
        return func
    # Imported here, because loading a reward model needs no TRL and importing it takes seconds.
    from trl.trainer.utils import get_callable_name, is_async_callable

    name = get_callable_name(func)

    if is_async_callable(func):

        async def checked(*args: Any, **kwargs: Any) -> list[float | None]:
            return _check_rewards(name, await func(*args, **kwargs), _num_rows(args, kwargs))
    else:

        def checked(*args: Any, **kwargs: Any) -> list[float | None]:
            return _check_rewards(name, func(*args, **kwargs), _num_rows(args, kwargs))

    functools.update_wrapper(checked, func, updated=())
    checked.__name__ = name
    checked._is_checked_reward = True
    return checked


def _num_rows(args: tuple, kwargs: dict[str, Any]) -> int:
    for position, key in enumerate(("prompts", "completions")):
        if key in kwargs:
            return len(kwargs[key])
        if len(args) > position:
            return len(args[position])
    raise ValueError("A reward function is called with `prompts` and `completions`; neither was given.")


def _check_rewards(name: str, rewards: Any, num_rows: int) -> list[float | None]:
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    if not isinstance(rewards, (list, tuple)):
        raise ValueError(
            f"The reward function {name!r} returned a {type(rewards).__name__}. Return a list of {num_rows} numbers."
        )
    if len(rewards) != num_rows:
        raise ValueError(
            f"The reward function {name!r} returned {len(rewards)} rewards for {num_rows} completions. Return one per "
            "completion, and None where it does not apply."
        )
    values = [_number(reward) for reward in rewards]
    wrong = [row for row, value in enumerate(values) if value is not None and not math.isfinite(value)]
    if wrong:
        raise ValueError(
            f"The reward function {name!r} returned {[rewards[row] for row in wrong[:8]]} for rows {wrong[:8]} "
            f"({len(wrong)} in all). Return finite numbers, and None where it does not apply."
        )
    return values


def _number(reward: Any) -> float | None:
    if reward is None:
        return None
    if isinstance(reward, torch.Tensor) and reward.numel() == 1:
        reward = reward.item()
    return float(reward) if isinstance(reward, numbers.Real) else math.nan


def _has_score(model: nn.Module) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return isinstance(getattr(base, "score", None), nn.Module)


def _name_of(model: nn.Module) -> str:
    path = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return str(path).rstrip("/").split("/")[-1]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients, as they were afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
