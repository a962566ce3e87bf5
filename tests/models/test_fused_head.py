"""The fused head on a CPU against TRL's own: same numbers, same gradients, no position that nobody reads."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.utils import add_fused_lm_head

from rlhf_ext.functional import token_logps
from rlhf_ext.models.fused_head import tile_fused_head
from tests.tiny import tiny_causal_lm, tiny_tokenizer


class Largest(TorchDispatchMode):
    """The largest tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() == tensor.untyped_storage().nbytes() // 4:
                self.size = max(self.size, tensor.numel())
        return out


def batch(tokenizer):
    ids = torch.randint(3, len(tokenizer), (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    mask[1, -4:] = 0  # a completion that ended
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100  # prompts
    return ids, mask, labels


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_numbers_and_gradients_are_those_of_trl(kind, frozen_head):
    tokenizer = tiny_tokenizer()
    found = []
    for ours in (True, False):
        model = tiny_causal_lm(kind, tokenizer)
        if frozen_head:
            model.get_output_embeddings().weight.requires_grad_(False)
        add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
        if ours:
            tile_fused_head(model, 0.7)
        ids, mask, labels = batch(tokenizer)
        output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        (output.log_probs * torch.linspace(-1, 1, 11)).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((output.log_probs, output.entropy, output.loss, output.label_mask, grads))
        assert model(input_ids=ids).logits.shape == (3, 12, len(tokenizer)), "generation needs the stock forward"
    ours, theirs = found
    for one, other in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)
    assert torch.equal(ours[3], theirs[3]) and ours[4].keys() == theirs[4].keys()
    for name, grad in ours[4].items():
        torch.testing.assert_close(grad, theirs[4][name], rtol=1e-4, atol=1e-6, msg=name)


def test_no_tensor_of_the_size_of_all_logits(monkeypatch):
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(token_logps, "TILE", 4 * len(tokenizer))
    model = tiny_causal_lm("llama", tokenizer)
    whole = copy.deepcopy(model)
    sizes = []
    for tiled in (True, False):
        one = model if tiled else whole
        add_fused_lm_head(one, outputs=("log_probs", "entropy"))
        if tiled:
            tile_fused_head(one, 1.0)
        ids, mask, labels = batch(tokenizer)
        with Largest() as largest:
            one(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs.sum().backward()
        sizes.append(largest.size)
    rows, vocabulary = 3 * 11, len(tokenizer)
    assert sizes[1] >= rows * vocabulary, "the measure sees TRL's tile"
    assert sizes[0] < rows * vocabulary


def test_an_empty_completion_hangs_on_the_graph():
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm("llama", tokenizer)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    tile_fused_head(model, 1.0)
    ids, mask, labels = batch(tokenizer)
    output = model(input_ids=ids, attention_mask=mask, labels=torch.full_like(labels, -100), fused_lm_head=True)
    output.log_probs.sum().backward()
    assert output.log_probs.shape == (3, 11) and not output.log_probs.any()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
