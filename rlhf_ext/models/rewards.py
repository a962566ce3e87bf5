"""What the caller passes as rewards, made into functions with TRL's signature.

A model becomes a function too: the parent feeds modules `prompt + decoded completion` without special tokens, so that
an end-of-sequence token the reward model was trained on is lost. Ours reads the rollout's own token ids.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .hub import is_inside_repo, local_folder
from .roles import REWARD, SCORE_AND_VALUE
from .scoring import ModelReward, checked_reward, last_token_scores, load_reward_model


class AdapterReward:
    """Reward function that scores the rollout's ids with the `reward` adapter on the policy's base.

    Args:
        model (`nn.Module`):
            The model of [`~rlhf_ext.models.build.Roles`].
        pad_token_id (`int`):
            Fills the rows; never decides where they end.
        batch_size (`int`):
            Rows per forward.
        with_values (`bool`, *optional*, defaults to `False`):
            Whether the same forward gives the values of a critic that shares the trunk.

    Attributes:
        values (`list[torch.Tensor]`):
            Of the last call, with `with_values`: one `(P + C,)` per row, for the tokens of prompt and completion.
    """

    __name__ = "reward_adapter"

    def __init__(self, model: nn.Module, pad_token_id: int, batch_size: int, with_values: bool = False):
        self.model, self.pad_token_id, self.batch_size = model, pad_token_id, batch_size
        self.with_values, self.values = with_values, []

    @torch.no_grad()
    def __call__(
        self, prompts: list, completions: list, completion_ids: list, prompt_ids: list | None = None, **kwargs: Any
    ) -> list[float]:
        rows = [torch.tensor([*p, *c]) for p, c in zip(prompt_ids or [], completion_ids, strict=True)]
        device = next(self.model.parameters()).device
        scores, self.values = [], []
        for start in range(0, len(rows), self.batch_size):
            chunk = rows[start : start + self.batch_size]
            ids = nn.utils.rnn.pad_sequence(chunk, batch_first=True, padding_value=self.pad_token_id).to(device)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in chunk], batch_first=True).to(device)
            role = SCORE_AND_VALUE if self.with_values else REWARD
            token_scores = self.model(input_ids=ids, attention_mask=mask, role=role)
            if self.with_values:
                token_scores, values = token_scores.unbind(dim=-1)
                self.values += [row[: len(tokens)] for row, tokens in zip(values, chunk, strict=True)]
            scores += last_token_scores(token_scores, mask).tolist()
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
            A folder or id of a reward model, a sequence classifier with one label, or a Python function with TRL's
            signature `(prompts, completions, completion_ids, **columns) -> list[float | None]`.
        reward_processing_classes (tokenizer or list of tokenizers, *optional*):
            One per reward, `None` for functions. A model without one gets the tokenizer of its own folder, or the
            policy's where it was built in memory.

    Returns:
        `list[Callable]`: functions that check what they return, with the reward itself as attribute `reward`.

    Raises:
        ValueError: the lengths differ.
    """
    funcs = (
        []
        if reward_funcs is None
        else list(reward_funcs)
        if isinstance(reward_funcs, (list, tuple))
        else [reward_funcs]
    )
    tokenizers = reward_processing_classes
    if not isinstance(tokenizers, list):
        tokenizers = [tokenizers] * len(funcs)
    if len(tokenizers) != len(funcs):
        raise ValueError(
            f"reward_processing_classes has {len(tokenizers)} entries for {len(funcs)} reward_funcs. Give one per "
            "reward, None for a Python function."
        )
    resolved = []
    for func, tokenizer in zip(funcs, tokenizers, strict=True):
        if isinstance(func, str):
            func = local_folder(func) if is_inside_repo(func) else func
            func = load_reward_model(func, dtype=torch.float32, trust_remote_code=trust_remote_code)
        if isinstance(func, nn.Module):
            name = getattr(func.config, "_name_or_path", "")
            if tokenizer is None:
                tokenizer = (
                    AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
                    if name
                    else policy_processing_class
                )
            func.requires_grad_(False)
            func = ModelReward(func.eval(), tokenizer, policy_processing_class, batch_size=batch_size)
        checked = checked_reward(func)
        checked.reward = func
        resolved.append(checked)
    return resolved
