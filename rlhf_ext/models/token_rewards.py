"""Rewards of single tokens: functions, and reward models whose score is a sum over tokens.

A token reward has the signature of TRL's reward functions and returns one list per completion, a number for each of
its `completion_ids`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .pooling import normalization_of, token_scores
from .reward_functions import ModelReward, inference


class TokenModelReward(ModelReward):
    """A reward model trained with `reward_aggregation="sum"` as a reward of each token (Christiano et al. 2017).

    Its score is the sum over the completion's tokens, so paying each token its own part pays the same in all, earlier.
    A model that is read at the last token has no use before it: those outputs are untrained.

    Raises:
        ValueError: the model does not sum, or does not read the policy's own tokens.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not self.sums:
            raise ValueError(
                f"The reward model {self.__name__!r} is read at the last token; its outputs before it are untrained. "
                'Train one with reward_aggregation="sum", or pass this one in `reward_funcs`.'
            )

    def set_policy(self, policy_processing_class: PreTrainedTokenizerBase) -> None:
        super().set_policy(policy_processing_class)
        if not self.shares_tokenizer:
            raise ValueError(
                f"The reward model {self.__name__!r} has another tokenizer than the policy: its scores belong to "
                "other tokens. Pass it in `reward_funcs`."
            )

    def __call__(self, prompts, completions, completion_ids, prompt_ids=None, **kwargs: Any) -> list[list[float]]:
        starts = prompt_ids if prompt_ids is not None else [self._prompt_ids(prompt) for prompt in prompts]
        rows = [[*start, *ids] for start, ids in zip(starts, completion_ids, strict=True)]
        self._check_lengths(rows)
        bias, found = normalization_of(self.model)[1], []
        with inference(self.model):
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                scores = token_scores(self.model, *self._padded(batch))
                for row, ids, of_tokens in zip(batch, completion_ids[start:], scores, strict=False):
                    found.append(of_tokens[len(row) - len(ids) : len(row)].tolist())
        # The bias belongs to the whole completion.
        return [[*row[:-1], row[-1] + bias] if row else [] for row in found]


def checked_token_reward(func: Callable[..., Any]) -> Callable[..., list[list[float]]]:
    """Check what a token reward returns.

    Returns:
        `Callable`: a function that returns one list of floats per completion.

    Raises:
        ValueError: when called, naming the function and the rows, for a wrong number of rows or of tokens in a row, or
            for a value that is not finite.
    """
    name = getattr(func, "__name__", type(func).__name__)

    def checked(prompts: Sequence, completions: Sequence, completion_ids: Sequence[Sequence[int]], **kwargs: Any):
        rows = func(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs)
        rows = [row.tolist() if hasattr(row, "tolist") else list(row) for row in rows]
        if len(rows) != len(completion_ids):
            raise ValueError(
                f"The token reward {name!r} returned {len(rows)} rows for {len(completion_ids)} completions. Return "
                "one list per completion."
            )
        pairs = enumerate(zip(rows, completion_ids, strict=True))
        wrong = {index: (len(row), len(ids)) for index, (row, ids) in pairs if len(row) != len(ids)}
        if wrong:
            raise ValueError(
                f"The token reward {name!r} returned (rewards, tokens) {wrong}. Return one number per token of "
                "`completion_ids`, the end-of-sequence token included."
            )
        odd = [index for index, row in enumerate(rows) if not all(math.isfinite(value) for value in row)]
        if odd:
            raise ValueError(f"The token reward {name!r} is not finite in rows {odd[:8]} ({len(odd)} in all).")
        return rows

    checked.__name__, checked.reward = name, func
    return checked


def add_rows(sums: Sequence[Sequence[float]], rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Token by token, the rewards of one function added to those of the ones before it."""
    return [[a + b for a, b in zip(one, other, strict=True)] for one, other in zip(sums, rows, strict=True)]


def pad_rows(rows: Sequence[Sequence[float]], like: torch.Tensor) -> torch.Tensor:
    """`(B, C)` of the shape and on the device of `like`, 0 behind each row."""
    padded = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.tensor(values, dtype=torch.float32)
    return padded
