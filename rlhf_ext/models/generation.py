"""Sampling outside a trainer: batches of prompts in, completions and their log-probabilities out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .live_sampling import only_live_rows
from .positions import positions_from_mask
from .roles import base_of


@contextmanager
def without_generation_defaults(model: nn.Module) -> Iterator[None]:
    """Sample from what is asked for alone: `generate` fills every unset field from the checkpoint's own config.

    A `no_repeat_ngram_size` or `min_new_tokens` that comes in that way changes the distribution behind the back of
    log-probabilities taken from plain logits. The checkpoint's config is put back, so that it is saved as it was.
    """
    base = base_of(model)
    given, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = given


@dataclass
class Samples:
    """Completions of a list of prompts, in the order of the prompts.

    Attributes:
        prompts: The prompts, each as often as it was sampled.
        texts: Decoded completions without special tokens.
        prompt_ids: Token ids of the prompts.
        completion_ids: Token ids, the end-of-sequence token included where it was sampled.
        truncated: Whether the completion was cut by length.
    """

    prompts: list[str] | list[list[dict[str, Any]]]
    texts: list[str]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    truncated: list[bool]


@torch.no_grad()
def sample_completions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str] | list[list[dict[str, Any]]],
    *,
    num_samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 256,
    progress: str | None = None,
    eos_token_ids: Sequence[int] | None = None,
    add_special_tokens: bool = True,
) -> Samples:
    """Sample `num_samples` completions of each prompt from the plain distribution at `temperature` (0: greedy).

    Args:
        prompts (`list[str]` or `list[list[dict]]`):
            Texts, or messages, which go through the chat template; sample `i` of prompt `j` stands at
            `j * num_samples + i`.
        progress (`str`, *optional*):
            Title of a progress bar.
        eos_token_ids (`Sequence[int]`, *optional*):
            Ids that end an answer; by default the tokenizer's own alone.
        add_special_tokens (`bool`, *optional*, defaults to `True`):
            Off for texts that a chat template has written its special tokens into.

    Raises:
        ValueError: a prompt and its completion would not fit into the model's context.
    """
    prompts = list(prompts)
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    samples = Samples(repeated, [], [], [], [])
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    ends = list(eos_token_ids) if eos_token_ids is not None else [tokenizer.eos_token_id]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
        **sampling,
    )
    device = next(model.parameters()).device
    _check_room(model, tokenizer, prompts, add_special_tokens, max_new_tokens)
    training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(repeated), batch_size), desc=progress, disable=progress is None):
            batch = _padded_prompts(tokenizer, repeated[start : start + batch_size], add_special_tokens)
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            with without_generation_defaults(model), only_live_rows(model):
                out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.size(1) :]
            for prompt_row, keep, row in zip(ids, mask.bool(), out.tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in ends), None)
                row = row if end is None else row[: end + 1]
                samples.prompt_ids.append(prompt_row[keep].tolist())
                samples.completion_ids.append(row)
                samples.truncated.append(end is None)
                samples.texts.append(tokenizer.decode(row, skip_special_tokens=True))
    finally:
        model.train(training)
    return samples


def _check_room(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list, add_special_tokens: bool, max_new_tokens: int
) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None or getattr(type(base_of(model)), "_is_stateful", False):  # recurrent families read on
        return
    longest = max(_lengths(tokenizer, prompts, add_special_tokens), default=0)
    if longest + max_new_tokens > context:
        raise ValueError(
            f"A prompt of {longest} tokens and `max_new_tokens` {max_new_tokens} do not fit into the model's context "
            f"of {context}. Shorten the prompts, or sample fewer tokens."
        )


def _lengths(tokenizer: PreTrainedTokenizerBase, prompts: list, add_special_tokens: bool) -> list[int]:
    if prompts and isinstance(prompts[0], str):
        return [len(ids) for ids in tokenizer(prompts, add_special_tokens=add_special_tokens)["input_ids"]]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return [len(ids) for ids in tokenizer.apply_chat_template(prompts, **options)["input_ids"]] if prompts else []


def prompt_length(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]]) -> int:
    """Tokens of a prompt as [`sample_completions`] reads it."""
    return _lengths(tokenizer, [prompt], add_special_tokens=True)[0]


def end_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends an answer: the tokenizer's, and those of the checkpoint's own generation config."""
    own = getattr(base_of(model).generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *own} - {None})


def _padded_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list, add_special_tokens: bool) -> Any:
    if isinstance(prompts[0], str):
        special = {"add_special_tokens": add_special_tokens}
        return tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt", **special)
    # The template writes the special tokens: tokenising its text would add them once more.
    ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=True, return_dict=True)
    return tokenizer.pad({"input_ids": ids["input_ids"]}, padding=True, padding_side="left", return_tensors="pt")


def completion_text(tokenizer: PreTrainedTokenizerBase, samples: Samples, place: int) -> str:
    """A sample's text as it joins its prompt: with a space in front where the text alone would be read otherwise.

    Many tokenizers leave out the space of the first word when they decode, and prompt and completion would grow into
    one word where a reward model reads them.
    """
    prompt, text = samples.prompts[place], samples.texts[place]
    if not isinstance(prompt, str):
        return text
    ids = [*samples.prompt_ids[place], *samples.completion_ids[place]]
    ids = ids if samples.truncated[place] else ids[:-1]
    for joined in (text, f" {text}"):
        if tokenizer(prompt + joined)["input_ids"] == ids:
            return joined
    return text


@torch.no_grad()
def completion_logps(
    model: nn.Module, samples: Samples, *, pad_token_id: int, temperature: float = 1.0, batch_size: int = 256
) -> torch.Tensor:
    """Log-probability of each completion given its prompt, summed over its tokens, `(N,)` in nats."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    sums = []
    pairs = list(zip(samples.prompt_ids, samples.completion_ids, strict=True))
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        rows = [torch.tensor([*prompt, *completion]) for prompt, completion in chunk]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id).to(device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions_from_mask(mask)).logits
        logps = (logits[:, :-1].float() / temperature).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        starts = torch.tensor([len(prompt) for prompt, _ in chunk], device=device)[:, None]
        steps = torch.arange(1, ids.size(1), device=device)
        sums.append(torch.where((steps >= starts) & mask[:, 1:].bool(), logps, 0.0).sum(-1))
    model.train(training)
    return torch.cat(sums)
