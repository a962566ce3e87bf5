"""A word-level tokenizer and causal LMs small enough to pretrain in a minute on two CPU cores, built from a config."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .words import vocabulary


PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

# hidden size, layers, heads, intermediate size
SIZES: dict[str, tuple[int, int, int, int]] = {
    "tiny": (64, 2, 4, 128),  # 0.1 M parameters: unit tests and the many-seed tables
    # 0.8 M parameters: the quickstart. To see at the end of an answer that its claim is false, a reward model has to
    # find the fact, compare, and carry the verdict to the last token: with three layers that took far longer.
    "small": (128, 4, 4, 384),
}


def build_tokenizer(extra_words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token per word, divided at whitespace; decoding joins words by single spaces.

    Pad is not EOS (a pad that is EOS hides the end of a completion from the mask), there is no BOS, and nothing is
    added around a text, so that ids of prompt + completion are those of the prompt followed by those of the completion
    wherever the completion begins with a space. `extra_words` follow the world's own.
    """
    words = list(dict.fromkeys([PAD, EOS, UNK, *vocabulary(), *extra_words]))
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, size: str = "small") -> LlamaForCausalLM:
    """A randomly initialised Llama in fp32 (seed with `torch.manual_seed` before the call)."""
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; choose one of {tuple(SIZES)}.")
    hidden_size, num_layers, num_heads, intermediate_size = SIZES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        # The usual 0.02 suits a width of 1000; at this width it costs some hundred steps before anything is learnt.
        initializer_range=0.08,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    _match_tokens(model)
    return model


def _match_tokens(model: LlamaForCausalLM) -> None:
    """Half the heads of the inner layers begin with equal query and key weights, so that a word attends to itself.

    That a word of the answer stands in the facts is then seen from the start. A random start has to discover it, the
    step that pretraining gives to large models: the reward model did not within 700 steps, and does within 200 so.
    """
    heads, size = model.config.num_attention_heads // 2, model.config.head_dim
    with torch.no_grad():
        for layer in model.model.layers[1:-1]:
            attention = layer.self_attn
            attention.k_proj.weight[: heads * size] = attention.q_proj.weight[: heads * size]
