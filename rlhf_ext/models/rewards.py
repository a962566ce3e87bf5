"""What the caller passes as rewards, made into functions with TRL's signature.

A model becomes a function too: the parent feeds modules `prompt + decoded completion` without special tokens, so that
an end-of-sequence token the reward model was trained on is lost. Ours reads the rollout's own token ids.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..functional.batching import length_chunks
from .ensembles import is_reward_ensemble, load_reward_ensemble
from .hub import is_inside_repo, local_folder
from .reward_checkpoints import is_saved_critic
from .roles import REWARD, SCORE_AND_VALUE
from .score_wrappers import EnsembleSpread, ScoreWrapper
from .scoring import ModelReward, checked_reward, last_token_scores, load_reward_model
from .token_rewards import TokenModelReward, checked_token_reward


class AdapterReward:
    """Reward function that scores the rollout's ids with the `reward` adapter on the policy's base.

    Args:
        model (`nn.Module`):
            The model of [`~rlhf_ext.models.build.Roles`].
        pad_token_id (`int`):
            Fills the rows; never decides where they end.
        batch_size (`int`):
            Rows per forward.
        is_normalized (`bool`, *optional*, defaults to `False`):
            Whether gain and bias were saved with the adapter; the head applies them.
        with_values (`bool`, *optional*, defaults to `False`):
            Whether the same forward gives the values of a critic that shares the trunk.

    Attributes:
        values (`list[torch.Tensor]`):
            Of the last call, with `with_values`: one `(P + C,)` per row, for the tokens of prompt and completion.
    """

    __name__ = "reward_adapter"

    def __init__(
        self,
        model: nn.Module,
        pad_token_id: int,
        batch_size: int,
        is_normalized: bool = False,
        with_values: bool = False,
    ):
        self.is_normalized = is_normalized
        self.model, self.pad_token_id, self.batch_size = model, pad_token_id, batch_size
        self.with_values, self.values = with_values, []

    @torch.no_grad()
    def __call__(
        self, prompts: list, completions: list, completion_ids: list, prompt_ids: list | None = None, **kwargs: Any
    ) -> list[float]:
        rows = [torch.tensor([*p, *c]) for p, c in zip(prompt_ids or [], completion_ids, strict=True)]
        device = next(self.model.parameters()).device
        scores, self.values = [0.0] * len(rows), [torch.empty(0)] * len(rows)
        for places in length_chunks([len(row) for row in rows], self.batch_size):
            chunk = [rows[place] for place in places]
            ids = nn.utils.rnn.pad_sequence(chunk, batch_first=True, padding_value=self.pad_token_id).to(device)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in chunk], batch_first=True).to(device)
            role = SCORE_AND_VALUE if self.with_values else REWARD
            token_scores = self.model(input_ids=ids, attention_mask=mask, role=role)
            if self.with_values:
                token_scores, values = token_scores.unbind(dim=-1)
                for place, row in zip(places, values, strict=True):
                    self.values[place] = row[: len(rows[place])]
            for place, score in zip(places, last_token_scores(token_scores, mask).tolist(), strict=True):
                scores[place] = score
        return scores


def resolve_rewards(
    reward_funcs: Any,
    reward_processing_classes: Any,
    policy_processing_class: PreTrainedTokenizerBase,
    batch_size: int,
    trust_remote_code: bool = False,
) -> list[Callable[..., Any]]:
    """One checked function per reward.

    Args:
        reward_funcs (`str`, `nn.Module`, `Callable`, or a list of these):
            A folder or id of a reward model, the folder of a reward ensemble (its mean), a sequence classifier with
            one label, or a Python function with TRL's signature `(prompts, completions, completion_ids, **columns) ->
            list[float | None]`; or a wrapper of [`~rlhf_ext.models.score_wrappers`] around one.
        reward_processing_classes (tokenizer or list of tokenizers, *optional*):
            One per reward, `None` for functions. A model without one gets the tokenizer of its own folder, or the
            policy's where it was built in memory.

    Returns:
        `list[Callable]`: functions that check what they return, with the reward itself as attribute `reward`.

    Raises:
        ValueError: the lengths differ, or a wrapper does not fit what it holds.
    """
    funcs = _as_list(reward_funcs)
    tokenizers = reward_processing_classes
    if not isinstance(tokenizers, list):
        tokenizers = [tokenizers] * len(funcs)
    if len(tokenizers) != len(funcs):
        raise ValueError(
            f"reward_processing_classes has {len(tokenizers)} entries for {len(funcs)} reward_funcs. Give one per "
            "reward, None for a Python function."
        )

    def leaf(func: Any, tokenizer: PreTrainedTokenizerBase | None) -> Any:
        if is_reward_ensemble(func):
            options = {"batch_size": batch_size, "trust_remote_code": trust_remote_code}
            return load_reward_ensemble(func, policy_processing_class=policy_processing_class, **options).mean
        model, tokenizer = load_reward(func, tokenizer, policy_processing_class, trust_remote_code)
        return func if model is None else ModelReward(model, tokenizer, policy_processing_class, batch_size=batch_size)

    return [
        resolve_reward(func, lambda inner, own=tokenizer: leaf(inner, own), policy_processing_class)
        for func, tokenizer in zip(funcs, tokenizers, strict=True)
    ]


def resolve_probes(
    probe_funcs: Any, policy_processing_class: PreTrainedTokenizerBase, **options: Any
) -> list[Callable[..., Any]]:
    """As [`resolve_rewards`], for rewards that are only looked at; they are not awaited.

    Raises:
        ValueError: a probe is a coroutine.
    """
    for func in _as_list(probe_funcs):
        _refuse_async(func, "probe_funcs")
    return resolve_rewards(probe_funcs, None, policy_processing_class, **options)


def resolve_token_rewards(
    token_reward_funcs: Any,
    policy_processing_class: PreTrainedTokenizerBase,
    batch_size: int,
    trust_remote_code: bool = False,
) -> list[Callable[..., list[list[float]]]]:
    """One checked function per reward of single tokens; takes what [`resolve_rewards`] takes, but no wrappers.

    Raises:
        ValueError: a model's score is no sum over the policy's tokens, or a wrapper of whole scores was given.
    """
    resolved = []
    for func in _as_list(token_reward_funcs):
        if isinstance(func, (ScoreWrapper, EnsembleSpread)):
            raise ValueError(f"{type(func).__name__} treats whole scores and cannot stand in token_reward_funcs.")
        _refuse_async(func, "token_reward_funcs")
        model, tokenizer = load_reward(func, None, policy_processing_class, trust_remote_code)
        if model is not None:
            func = TokenModelReward(model, tokenizer, policy_processing_class, batch_size=batch_size)
        resolved.append(checked_token_reward(func))
    return resolved


def load_reward(
    func: Any,
    processing_class: PreTrainedTokenizerBase | None,
    policy_processing_class: PreTrainedTokenizerBase,
    trust_remote_code: bool,
) -> tuple[nn.Module | None, PreTrainedTokenizerBase | None]:
    """The frozen reward model that `func` is or names, and its tokenizer; `None` for a Python function."""
    if isinstance(func, str):
        func = local_folder(func) if is_inside_repo(func) else func
        if is_saved_critic(func):
            raise ValueError(f"{func!r} is a critic that PPO saved: its values are no scores. Pass a reward model.")
        func = load_reward_model(func, dtype=torch.float32, trust_remote_code=trust_remote_code)
    if not isinstance(func, nn.Module):
        return None, None
    name = getattr(func.config, "_name_or_path", "")
    if processing_class is None:
        processing_class = (
            AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            if name
            else policy_processing_class
        )
    func.requires_grad_(False)
    return func.eval(), processing_class


def resolve_reward(
    func: Any, leaf: Callable[[Any], Any], policy_processing_class: PreTrainedTokenizerBase
) -> Callable[..., list[float | None]]:
    """A checked function, with the reward as attribute `reward`: wrappers keep their order around what `leaf` makes of
    the innermost one. The caller's wrappers stay as they are."""
    if isinstance(func, ScoreWrapper):
        _refuse_async(func.inner, type(func).__name__)
        func = copy.copy(func)
        func.inner = resolve_reward(func.inner, leaf, policy_processing_class)
        func.bind(policy_processing_class)
    elif isinstance(func, EnsembleSpread):
        for member in func.members:
            _refuse_async(member, type(func).__name__)
        func = copy.copy(func)
        func.members = [resolve_reward(member, leaf, policy_processing_class) for member in func.members]
    else:
        func = leaf(func)
    checked = checked_reward(func)
    checked.reward = func
    return checked


def adapter_of(reward_adapter: Any) -> str | None:
    """The folder of a reward adapter, without the wrappers around it.

    Raises:
        ValueError: what the wrappers hold is no folder.
    """
    while isinstance(reward_adapter, ScoreWrapper):
        reward_adapter = reward_adapter.inner
    if reward_adapter is not None and not isinstance(reward_adapter, str):
        raise ValueError(
            f"reward_adapter is a {type(reward_adapter).__name__}. Pass the folder or id of a reward adapter, with "
            "wrappers of `models.score_wrappers` around it if you like."
        )
    return reward_adapter


def _as_list(funcs: Any) -> list[Any]:
    if funcs is None:
        return []
    return list(funcs) if isinstance(funcs, (list, tuple)) else [funcs]


def _refuse_async(func: Any, where: str) -> None:
    from trl.trainer.utils import is_async_callable  # here, because importing TRL takes seconds

    if callable(func) and is_async_callable(func):
        raise ValueError(f"{where} takes no coroutine, such as {func!r}. Await it in a function of your own.")
