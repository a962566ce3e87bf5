"""Tiny offline models and tokenizers that every test room shares."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|> ' if message['role'] == 'user' else '<|assistant|> ' }}"
    "{{ message['content'] + ' ' + eos_token + ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
"""Closes every turn by EOS, so that a prompt of messages holds EOS itself (pitfall S4)."""

WORDS = tuple(f"w{i}" for i in range(24)) + ("good", "bad", "fine", "the", "cat", "sat", "on", "mat", "?", ".")

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
"""Of every family whose config has these names."""


def tiny_tokenizer(pad_is_eos: bool = False, words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """
    A word-level tokenizer with a chat template.

    Args:
        pad_is_eos (`bool`, *optional*, defaults to `False`):
            Whether the padding token is the end-of-sequence token; otherwise it is a token of its own.
        words (`Sequence[str]`, *optional*):
            Words of the vocabulary, after the special tokens.

    Returns:
        `PreTrainedTokenizerFast`: ids 0 to 4 are pad, eos, unk and the two turn markers.
    """
    special = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
    vocab = {token: index for index, token in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<eos>" if pad_is_eos else "<pad>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(kind: str, tokenizer: PreTrainedTokenizerBase, **kwargs) -> PretrainedConfig:
    """A two-layer config of hidden size 16 for `tokenizer`: `kind` is `"llama"`, `"gpt2"`, or `"gemma3"`, whose first
    layer sees a window of 8 tokens."""
    shared = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    if kind == "llama":
        sizes = {"num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False}
        return LlamaConfig(**{**shared, **SIZES, **sizes, **kwargs})
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
        return GPT2Config(**{**shared, **sizes, **kwargs})
    if kind == "gemma3":
        sizes = {
            "num_key_value_heads": 1,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "max_position_embeddings": 128,
        }
        return Gemma3TextConfig(**{**shared, **SIZES, **sizes, **kwargs})
    raise ValueError(f"`kind` is {kind!r}; choose 'llama', 'gpt2' or 'gemma3'.")


def tiny_causal_lm(
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **kwargs,
) -> PreTrainedModel:
    """A seeded causal language model of `kind` in eval mode; `kwargs` go to the config."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, tokenizer, **kwargs))
    return _spread(model).to(dtype).eval()


def tiny_reward_model(
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **kwargs,
) -> PreTrainedModel:
    """A seeded sequence-classification model of `kind` with one label, in eval mode; `kwargs` go to the config."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(tiny_config(kind, tokenizer, num_labels=1, **kwargs))
    return _spread(model).to(dtype).eval()


def _spread(model: PreTrainedModel) -> PreTrainedModel:
    """Widen the matrices: at the default std of .02 a tiny model gives nearly one and the same score to every row."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
    return model


def word_count(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """A gold score that tells almost any two completions of an untrained model apart."""
    return [float(len(set(text.split()))) for text in completions]
