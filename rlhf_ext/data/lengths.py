"""Rows in tokens: how long prompt and completions are, and whether their border survives joining."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .loading import is_empty, shared_start


CHUNK = 1000  # Rows tokenised at once: token ids of a whole data set would not fit in memory.


@dataclass
class RowLengths:
    """
    One row in tokens.

    Parameters:
        prompt (`int`):
            Tokens of the prompt, with the special tokens that the tokenizer puts before or around text.
        completions (`list[int]`):
            Tokens of each completion, with the end-of-sequence token.
        longest (`int`):
            Tokens of the prompt and its longest completion, read as one text, as reward training reads them.
        mismatches (`int`):
            Completions for which tokens(prompt) + tokens(completion) are not tokens(prompt + completion). Where that
            is so, a model trained on joined text reads other tokens than one that continues the prompt's tokens.
    """

    prompt: int
    completions: list[int] = field(default_factory=list)
    longest: int = 0
    mismatches: int = 0


def candidates(row: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Prompt and completions of a row of any kind; text without a prompt column is read whole, as a completion."""
    if not is_empty(row.get("messages")):
        return row["messages"][:-1], [row["messages"][-1:]]
    prompt = "" if row.get("prompt") is None else row["prompt"]
    if row.get("completions") is not None:
        return prompt, list(row["completions"])
    if row.get("chosen") is not None and row.get("rejected") is not None:
        chosen, rejected = row["chosen"], row["rejected"]
        if prompt or isinstance(chosen, str):
            return prompt, [chosen, rejected]
        prompt = shared_start(chosen, rejected)
        return prompt, [chosen[len(prompt) :], rejected[len(prompt) :]]
    for column in ("completion", "text"):
        if row.get(column) is not None:
            return prompt, [row[column]]
    return prompt, []


def measure_rows(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[RowLengths]:
    """The [`RowLengths`] of every row."""
    rows = []
    for start in range(0, len(dataset), CHUNK):
        chunk = dataset.select(range(start, min(start + CHUNK, len(dataset))))
        rendered = [list(_render(*candidates(row), tokenizer)) for row in chunk]
        texts = sorted({text for parts in rendered for part in parts for text in part})
        ids = dict(zip(texts, _tokenize(texts, tokenizer), strict=True))
        rows += [_measure(parts, ids, tokenizer, _is_chat(row)) for parts, row in zip(rendered, chunk, strict=True)]
    return rows


def _measure(
    parts: list[tuple[str, str, str]], ids: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, chat: bool
) -> RowLengths:
    # A chat template writes its special tokens itself, the one that ends a turn too.
    around, end = (0, 0) if chat else (tokenizer.num_special_tokens_to_add(), 1)
    return RowLengths(
        prompt=len(ids[parts[0][0]]) + around,
        completions=[len(ids[completion]) + end for _, completion, _ in parts if completion],
        longest=max(len(ids[joined]) + around + (end if completion else 0) for _, completion, joined in parts),
        mismatches=sum(ids[prompt] + ids[completion] != ids[joined] for prompt, completion, joined in parts),
    )


def _render(prompt: Any, completions: list[Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str, str]]:
    """(prompt, completion, both) as text, once per completion, or once with an empty completion if there is none."""
    if isinstance(prompt, str) and all(isinstance(completion, str) for completion in completions):
        for completion in completions or [""]:
            yield prompt, completion, prompt + completion
        return
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    opened = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) if prompt else ""
    for completion in completions or [[]]:
        turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        joined = tokenizer.apply_chat_template(prompt + turns, tokenize=False) if turns else opened
        # A template that rewrites the prompt once it is answered has no border at all; that counts as a mismatch.
        yield opened, joined.removeprefix(opened), joined


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _is_chat(row: dict[str, Any]) -> bool:
    prompt, completions = candidates(row)
    return not isinstance(prompt, str) or any(not isinstance(completion, str) for completion in completions)
