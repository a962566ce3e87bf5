"""What gives a policy's answers their scores: a reward model, an ensemble of them, or a Python function."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.functions import import_function
from ..functional.scores import as_scores, ensemble_mean
from ..models.ensembles import RewardEnsemble, is_reward_ensemble, load_reward_ensemble
from ..models.generation import Samples
from ..models.reward_functions import ModelReward, checked_reward
from .evaluation import load_reward


@dataclass
class Scorer:
    """A reward model with its tokenizer, an ensemble, or a Python function with TRL's signature, under the name of the
    reports."""

    name: str
    model: nn.Module | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    function: Callable[..., Any] | None = None
    ensemble: RewardEnsemble | None = None

    def model_rewards(self, tokenizer: PreTrainedTokenizerBase, batch_size: int = 16) -> list[ModelReward]:
        """The reward model, or the members of the ensemble, for the policy of `tokenizer`; empty for a function."""
        if self.ensemble is not None:
            for member in self.ensemble.members:
                member.set_policy(tokenizer)
            return list(self.ensemble.members)
        if self.model is None:
            return []
        return [ModelReward(self.model, self.tokenizer, tokenizer, batch_size=batch_size)]

    def score_members(
        self, samples: Samples, tokenizer: PreTrainedTokenizerBase, columns: dict[str, list], batch_size: int
    ) -> torch.Tensor:
        """
        Scores `(N, K)` of N samples, float64: K members of an ensemble, else one column.

        Args:
            tokenizer: of the policy.
            columns (`dict[str, list]`): further columns of the prompts; functions get them.

        Raises:
            ValueError: a reward fails, or gives no score for some row.
        """
        rewards: list[Any] = list(self.model_rewards(tokenizer, batch_size))
        for reward in rewards:
            if not reward.shares_tokenizer:
                # Finished is what was not cut, whichever of several ids ended it.
                reward.eos_token_ids = {ids[-1] for ids, cut in _endings(samples) if not cut}
        extra: dict[str, Any] = {}
        if not rewards:
            rewards, extra = [self.function], {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
        completions: list[Any] = samples.texts
        if not isinstance(samples.prompts[0], str):
            completions = [[{"role": "assistant", "content": text}] for text in samples.texts]
        found = []
        for reward in rewards:
            scores = checked_reward(reward)(
                prompts=samples.prompts,
                completions=completions,
                completion_ids=samples.completion_ids,
                prompt_ids=samples.prompt_ids,
                **columns,
                **extra,
            )
            if any(score is None for score in scores):
                raise ValueError(
                    f"{self.name!r} gave no score (None) for row {scores.index(None)}; a mean needs one for every "
                    "answer. Leave out the prompts it does not apply to."
                )
            found.append(as_scores(scores))
        return torch.stack(found, dim=1)

    def score(
        self, samples: Samples, tokenizer: PreTrainedTokenizerBase, columns: dict[str, list], batch_size: int
    ) -> list[float]:
        """One score per sample, of an ensemble the mean of its members; arguments as for [`Scorer.score_members`]."""
        return ensemble_mean(self.score_members(samples, tokenizer, columns, batch_size)).tolist()


GIVEN = ("prompts", "completions", "completion_ids", "prompt_ids", "trainer_state", "log_extra", "log_metric")
"""What a Python function is called with, beside the columns of the prompts."""


def function_scorer(name: str, columns: Sequence[str]) -> Scorer:
    """
    The Python function `module:function` as a scorer under its own name.

    Args:
        columns (`Sequence[str]`): further columns of the prompts.

    Raises:
        ValueError: there is no such function, it is a coroutine, or it cannot be called with what it will be given.
    """
    from trl.trainer.utils import is_async_callable

    function = import_function(name)
    if is_async_callable(function):
        raise ValueError(f"`reward_funcs` names {name!r}, a coroutine. Write a plain function.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return Scorer(name.partition(":")[2], function=function)
    try:
        signature.bind(**dict.fromkeys((*GIVEN, *columns)))
    except TypeError as error:
        raise ValueError(
            f"`reward_funcs` names {name!r}, which cannot be called: {error}. It is given {', '.join(GIVEN)} and the "
            f"columns {list(columns)} of the prompts; take `**kwargs` for what it does not read, and rename a column "
            "that it does."
        ) from error
    return Scorer(name.partition(":")[2], function=function)


def load_scorer(path: str, name: str, *, batch_size: int, **options: Any) -> Scorer:
    """
    A reward model, or the folder of an ensemble, as a scorer.

    Args:
        options: `device`, `dtype` and `trust_remote_code`, as for [`~rlhf_ext.pipelines.evaluation.load_reward`].
    """
    if is_reward_ensemble(path):
        return Scorer(name, ensemble=load_reward_ensemble(path, batch_size=batch_size, **options))
    return Scorer(name, *load_reward(path, **options))


def _endings(samples: Samples):
    return zip(samples.completion_ids, samples.truncated, strict=True)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """What a trainer would log."""
