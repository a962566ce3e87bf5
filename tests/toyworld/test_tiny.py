"""The tokenizer round trip, ids of concatenated texts, and the size of the models."""

import pytest
import torch

from rlhf_ext.toyworld.corpus import sft_rows
from rlhf_ext.toyworld.tiny import build_model, build_tokenizer
from rlhf_ext.toyworld.words import vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_round_trip_and_concatenation(tokenizer):
    for row in sft_rows(200, 0, trap_share=0.3):
        prompt, completion = row["prompt"], row["completion"]
        ids = tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"]
        assert tokenizer(prompt + completion)["input_ids"] == ids
        assert len(ids) == len((prompt + completion).split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == prompt + completion


def test_special_tokens(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token is None
    assert len(tokenizer) == len(vocabulary()) + 3
    completion = "friend , the lamp is red ."
    ids = tokenizer(completion + tokenizer.eos_token)["input_ids"]
    assert ids == tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == completion
    assert tokenizer("sofa")["input_ids"] == [tokenizer.unk_token_id]


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = sft_rows(1, 0)[0]["prompt"]
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.pad_token, loaded.eos_token, loaded.padding_side) == ("<pad>", "<eos>", "left")


@pytest.mark.parametrize(("size", "low", "high"), [("tiny", 0.03e6, 0.2e6), ("small", 0.3e6, 3e6)])
def test_model_size(tokenizer, size, low, high):
    torch.manual_seed(0)
    model = build_model(tokenizer, size)
    assert low <= model.num_parameters() <= high
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="size"):
        build_model(tokenizer, "huge")


def test_model_is_reproducible(tokenizer):
    torch.manual_seed(0)
    first = build_model(tokenizer, "tiny").state_dict()
    torch.manual_seed(0)
    second = build_model(tokenizer, "tiny").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inner_heads_begin_by_attending_to_the_same_word(tokenizer):
    torch.manual_seed(0)
    layers = build_model(tokenizer, "small").model.layers
    half = layers[0].self_attn.q_proj.weight.size(0) // 2
    for index, layer in enumerate(layers):
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        assert torch.equal(query[:half], key[:half]) == (index in (1, 2))
        assert not torch.equal(query[half:], key[half:])
