"""Rows without their padding: the same hidden states and gradients, in fewer columns."""

import pytest
import torch

from rlhf_ext.models.dense_rows import compute_dense_rows
from rlhf_ext.models.positions import count_positions_from_mask, positions_from_mask
from tests.tiny import tiny_causal_lm, tiny_tokenizer


# Prompts padded on the left, completions on the right, and no row that fills both.
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0]])


def backbone(kind):
    model = tiny_causal_lm(kind, tiny_tokenizer()).base_model.double().eval()
    count_positions_from_mask(model)
    ids = torch.randint(3, 30, MASK.shape, generator=torch.Generator().manual_seed(0))
    return model, ids


def run(model, **inputs):
    model.zero_grad()
    hidden = model(use_cache=False, **inputs).last_hidden_state
    mask = inputs["attention_mask"].bool()
    (hidden[mask] * torch.linspace(-1, 1, hidden.size(-1), dtype=hidden.dtype)).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("with_positions", [False, True])
def test_hidden_states_and_gradients_are_the_same(kind, with_positions):
    model, ids = backbone(kind)
    inputs = {"input_ids": ids, "attention_mask": MASK}
    if with_positions:
        inputs["position_ids"] = positions_from_mask(MASK)
    plain, plain_grads = run(model, **inputs)
    widths = []
    compute_dense_rows(model)
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: widths.append(out.shape[1]))
    found, grads = run(model, **inputs)
    assert widths == [6]
    # Gemma's norms work in fp32 whatever the model's dtype is.
    close = {"rtol": 1e-4, "atol": 1e-5} if kind == "gemma3" else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(found[MASK.bool()], plain[MASK.bool()], **close)
    assert not found[~MASK.bool()].any()
    assert grads.keys() == plain_grads.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], plain_grads[name], **close, msg=name)


def test_what_is_dense_already_is_left_alone_bit_for_bit():
    model, ids = backbone("llama")
    right = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 6 + [0] * 2])
    plain, _ = run(model, input_ids=ids, attention_mask=right)
    compute_dense_rows(model)
    found, _ = run(model, input_ids=ids, attention_mask=right)
    assert torch.equal(found, plain)


def test_generation_and_layer_outputs_pass_by():
    model, ids = backbone("llama")
    compute_dense_rows(model)
    out = model(input_ids=ids, attention_mask=MASK, output_hidden_states=True, use_cache=False)
    assert out.hidden_states[0].shape[1] == out.last_hidden_state.shape[1] == 8
    cached = model(input_ids=ids, attention_mask=MASK, use_cache=True)
    assert cached.past_key_values.get_seq_length() == 8
