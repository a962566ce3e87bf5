"""What is done to scores on their way from a reward to PPO, as wrappers around the reward; they compose.

    PPOTrainer(..., reward_funcs=[MissingEOS(Clipped(Normalized("runs/reward"), -5.0, 5.0), penalty=1.0)])

The innermost reward is anything `reward_funcs` takes. The critic starts from the score after `Normalized`: a clip, a
penalty and a cut say something about an answer that its value before the last token need not know.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..functional.scores import (
    as_rewards,
    as_scores,
    clip_scores,
    cut_length,
    ensemble_mean,
    ensemble_spread,
    normalize_scores,
    penalize_unfinished,
)


class ScoreWrapper:
    """A reward function around another one; `None` for a row stays `None`.

    Args:
        reward (`str`, `nn.Module`, `Callable` or `ScoreWrapper`):
            Anything that `reward_funcs` of [`PPOTrainer`] takes, but no coroutine. The trainer makes a function of it.

    Attributes:
        inner (`Callable`): the reward inside, once the trainer has made a function of it.
    """

    def __init__(self, reward: Any):
        self.inner = reward

    @property
    def __name__(self) -> str:
        return str(getattr(self.inner, "__name__", self.inner)).rstrip("/").split("/")[-1]

    def bind(self, processing_class: PreTrainedTokenizerBase) -> None:
        """Told once what the policy's tokenizer is, when `inner` is a function."""

    def __call__(
        self, prompts: Sequence, completions: Sequence, completion_ids: Sequence[Sequence[int]], **kwargs: Any
    ) -> list[float | None]:
        inner = self.inner(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs)
        return as_rewards(self.treat(as_scores(inner), completion_ids))

    def treat(self, scores: torch.Tensor, completion_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Scores `(B,)` after this wrapper, float64; NaN for a row the reward does not apply to. Here: as they are."""
        return scores


class Normalized(ScoreWrapper):
    """gain * score + bias (Ziegler et al. 2019, Sec. 2.1).

    Args:
        gain, bias (`float`, *optional*):
            As [`~rlhf_ext.functional.scores.score_normalization`] gives them. Not given: the ones that were saved with
            the reward model, which its loader applies; this wrapper then makes sure that there are some.

    Raises:
        ValueError: only one is given, `gain` is not positive, or none are given and the model has none.
    """

    def __init__(self, reward: Any, gain: float | None = None, bias: float | None = None):
        super().__init__(reward)
        if (gain is None) != (bias is None):
            raise ValueError(f"gain={gain} and bias={bias}: give both, or neither for those saved with the model.")
        if gain is not None:
            normalize_scores(torch.zeros(1), gain=gain, bias=bias)  # refuses a sign that would train the opposite
        self.gain, self.bias = gain, bias

    def bind(self, processing_class: PreTrainedTokenizerBase) -> None:
        if self.gain is None and not any(getattr(part, "is_normalized", False) for part in parts_of(self.inner)):
            raise ValueError(
                f"Normalized({self.__name__!r}) asks for the gain and the bias saved with the reward model, but none "
                "are. Write them with `rlhf_ext.models.scoring.save_normalization`, or pass gain and bias."
            )

    def treat(self, scores: torch.Tensor, completion_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        return scores if self.gain is None else normalize_scores(scores, gain=self.gain, bias=self.bias)


class Clipped(ScoreWrapper):
    """A score between `low` and `high`.

    Raises:
        ValueError: `low` is not below `high`.
    """

    def __init__(self, reward: Any, low: float, high: float):
        super().__init__(reward)
        clip_scores(torch.zeros(1), low=low, high=high)
        self.low, self.high = low, high

    def treat(self, scores: torch.Tensor, completion_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        return clip_scores(scores, low=self.low, high=self.high)


class MissingEOS(ScoreWrapper):
    """The score minus `penalty` where a completion was cut by length, TRL's rule.

    Attributes:
        eos_token_ids (`set[int]`): what finishes a completion; the trainer sets every id of the generation config.

    Raises:
        ValueError: `penalty` is negative.
    """

    def __init__(self, reward: Any, penalty: float):
        super().__init__(reward)
        penalize_unfinished(torch.zeros(1), torch.ones(1, dtype=torch.bool), penalty=penalty)
        self.penalty, self.eos_token_ids = penalty, set()

    def bind(self, processing_class: PreTrainedTokenizerBase) -> None:
        self.eos_token_ids = {processing_class.eos_token_id}

    def treat(self, scores: torch.Tensor, completion_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        finished = torch.tensor([bool(ids) and ids[-1] in self.eos_token_ids for ids in completion_ids])
        return penalize_unfinished(scores, finished, penalty=self.penalty)


class CutAt(ScoreWrapper):
    """The reward reads a completion up to and including a token; one without it gets a fixed score.

    Ziegler et al. 2019, Sec. 2.3: up to the first full stop after 16 tokens, -1 without any. What was cut off still
    counts for the KL, and the score is paid on the last real token. The end-of-sequence token is cut off too.

    Args:
        token (`str` or `int`): a token of the policy, or its id.
        min_index (`int`, *optional*, defaults to 0): first index, from 0, at which a cut may stand.
        missing_score (`float`, *optional*, defaults to -1): score without the token.

    Raises:
        ValueError: the text is no single token of the policy, or `min_index` is negative.
    """

    def __init__(self, reward: Any, token: str | int, min_index: int = 0, missing_score: float = -1.0):
        super().__init__(reward)
        cut_length([], [0], min_index=min_index)
        self.token, self.min_index, self.missing_score = token, min_index, missing_score

    def bind(self, processing_class: PreTrainedTokenizerBase) -> None:
        self.processing_class, ids = processing_class, [self.token]
        if isinstance(self.token, str):
            ids = processing_class(self.token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or not 0 <= ids[0] < len(processing_class) or ids[0] == processing_class.unk_token_id:
            raise ValueError(f"token={self.token!r} is {len(ids)} tokens {ids} of the policy. Give one of its tokens.")
        self.token_id = ids[0]

    def __call__(
        self, prompts: Sequence, completions: Sequence, completion_ids: Sequence[Sequence[int]], **kwargs: Any
    ) -> list[float | None]:
        lengths = [cut_length(ids, [self.token_id], min_index=self.min_index) for ids in completion_ids]
        cut = [list(ids[:length]) for ids, length in zip(completion_ids, lengths, strict=True)]
        texts = list(completions)
        for row, length in enumerate(lengths):
            if length is not None:
                texts[row] = _with_text(texts[row], self.processing_class.decode(cut[row], skip_special_tokens=True))
        scores = self.inner(prompts=prompts, completions=texts, completion_ids=cut, **kwargs)
        return [
            score if length is not None or score is None else self.missing_score
            for score, length in zip(scores, lengths, strict=True)
        ]


class EnsembleSpread:
    """Standard deviation over the scores of several rewards: how much they disagree. A probe, or a label query's rank.

    Args:
        rewards (`list`): at least two; each as `reward_funcs` takes them, normalised on its own.
    """

    __name__ = "ensemble_spread"

    def __init__(self, rewards: Sequence[Any]):
        if len(rewards) < 2:
            raise ValueError(f"An ensemble of {len(rewards)} members has no spread. Pass two or more.")
        self.members: list[Callable] = list(rewards)

    def __call__(self, prompts: Sequence, completions: Sequence, **kwargs: Any) -> list[float | None]:
        scores = [as_scores(member(prompts=prompts, completions=completions, **kwargs)) for member in self.members]
        return as_rewards(self.combine(torch.stack(scores, dim=1)))

    def combine(self, scores: torch.Tensor) -> torch.Tensor:
        """One number per row `(B,)` of the members' scores `(B, K)`."""
        return ensemble_spread(scores)


class EnsembleMean(EnsembleSpread):
    """Mean over the scores of several rewards (Christiano et al. 2017). A reward.

    Args:
        rewards (`list`): at least two; each as `reward_funcs` takes them, normalised on its own: a member with a
            wider unit would outvote the others.
    """

    __name__ = "ensemble"

    def combine(self, scores: torch.Tensor) -> torch.Tensor:
        return ensemble_mean(scores)


def treated_score(
    reward: Any,
    *,
    normalize: bool = False,
    cut_at: str | int | None = None,
    cut_min_index: int = 0,
    cut_missing_score: float = -1.0,
    clip: Sequence[float] | None = None,
    missing_eos_penalty: float | None = None,
) -> Any:
    """`reward` in the wrappers that were asked for, in the order of these arguments, the first one innermost.

    Raises:
        ValueError: see the wrappers.
    """
    reward = Normalized(reward) if normalize else reward
    reward = reward if cut_at is None else CutAt(reward, cut_at, cut_min_index, cut_missing_score)
    reward = reward if clip is None else Clipped(reward, *clip)
    return reward if not missing_eos_penalty else MissingEOS(reward, missing_eos_penalty)


def parts_of(reward: Any) -> Iterator[Any]:
    """A reward, and everything that it wraps."""
    reward = getattr(reward, "reward", reward)
    yield reward
    for inner in [reward.inner] if isinstance(reward, ScoreWrapper) else getattr(reward, "members", []):
        yield from parts_of(inner)


def unit_of(reward: Any, weight: float = 1.0) -> tuple[float, float]:
    """Gain and bias from a reward's innermost score to `weight` times what its wrappers make of it.

    Clips, penalties and cuts aside.
    """
    gain, bias = 1.0, 0.0
    wrappers = [part for part in parts_of(reward) if isinstance(part, Normalized) and part.gain is not None]
    for part in reversed(wrappers):  # the innermost acts first
        gain, bias = part.gain * gain, part.gain * bias + part.bias
    return weight * gain, weight * bias


def _with_text(completion: Any, text: str) -> Any:
    if isinstance(completion, str):
        return text
    return [*completion[:-1], {**completion[-1], "content": text}]
