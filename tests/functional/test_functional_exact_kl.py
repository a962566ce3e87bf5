"""`exact_kl` against full logits: values, gradients, and what it keeps in memory."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_ext import functional as F
from tests.functional.batches import normal, ragged_mask


B, T, H, V = 5, 7, 3, 11
MASK = ragged_mask(B, T, seed=1, holes=True)


def inputs(bias=True):
    heads = [(normal(V, H, seed=i), normal(V, seed=i + 1) if bias else None) for i in (1, 3)]
    return normal(B, T, H, seed=5), heads[0], normal(B, T, H, seed=6), heads[1]


def full(old_hidden, old_head, hidden, head, mask):
    old = torch.nn.functional.linear(old_hidden, *old_head).log_softmax(-1)
    new = torch.nn.functional.linear(hidden, *head).log_softmax(-1)
    return torch.where(mask, torch.nn.functional.kl_div(new, old, log_target=True, reduction="none").sum(-1), 0.0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_equals_full_logits_with_gradients(chunk_size, bias):
    old_hidden, old_head, hidden, head = inputs(bias)
    leaves = [x.requires_grad_() for x in (hidden, *head) if x is not None]
    constants = [x.requires_grad_() for x in (old_hidden, *old_head) if x is not None]
    weights = normal(B, T, seed=8)
    wanted = full(old_hidden, old_head, hidden, head, MASK)
    kl = F.exact_kl(
        old_hidden, old_head if bias else old_head[0], hidden, head if bias else head[0], MASK, chunk_size=chunk_size
    )
    assert_close(kl, wanted)
    expected = torch.autograd.grad((wanted * weights).sum(), leaves)
    (kl * weights).sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert_close(leaf.grad, gradient)
    assert all(x.grad is None for x in constants)


def test_gradcheck_and_garbage_under_the_mask():
    old_hidden, old_head, hidden, head = inputs()

    def call(hidden, weight, bias):
        return F.exact_kl(old_hidden, old_head, hidden, (weight, bias), MASK, chunk_size=4)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in (hidden, *head)])
    spoiled = torch.where(MASK.unsqueeze(-1), hidden.detach(), float("nan")).requires_grad_()
    spoiled_old = torch.where(MASK.unsqueeze(-1), old_hidden, float("inf"))
    kl = F.exact_kl(spoiled_old, old_head, spoiled, head, MASK, chunk_size=4)
    assert_close(kl, call(hidden, *head))
    kl.sum().backward()
    assert spoiled.grad.isfinite().all() and (spoiled.grad[~MASK] == 0).all()


def test_order_sign_and_zero():
    old_hidden, old_head, hidden, head = inputs()
    forward = F.exact_kl(old_hidden, old_head, hidden, head, MASK, chunk_size=4)
    backward = F.exact_kl(hidden, head, old_hidden, old_head, MASK, chunk_size=4)
    assert (forward >= 0).all() and not torch.allclose(forward, backward)
    leaf = old_hidden.clone().requires_grad_()
    itself = F.exact_kl(old_hidden, old_head, leaf, old_head, MASK, chunk_size=4)
    itself.sum().backward()
    assert (itself == 0).all()
    assert_close(leaf.grad, torch.zeros_like(leaf))


class LargestTensor(TorchDispatchMode):
    """Records the largest result of any operation, forward and backward."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    vocabulary = 200  # B * T * V = 7000, the head has 600 entries
    old_head, head = normal(vocabulary, H, seed=1), normal(vocabulary, H, seed=2).requires_grad_()
    hidden = normal(B, T, H).requires_grad_()
    mask = torch.ones(B, T, dtype=torch.bool)
    with LargestTensor() as seen:
        F.exact_kl(hidden, old_head, hidden, head, mask, chunk_size=4).sum().backward()
    assert seen.largest <= 4 * vocabulary


def test_the_graph_keeps_no_logits():
    vocabulary, kept = 200, []
    old_head, head = normal(vocabulary, H, seed=1), normal(vocabulary, H, seed=2).requires_grad_()
    hidden = normal(B, T, H).requires_grad_()
    mask = torch.ones(B, T, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        F.exact_kl(hidden, old_head, hidden, head, mask, chunk_size=4)
    assert not any(len(shape) > 1 and shape[-1] == vocabulary for shape in kept)


def test_without_gradient_half_precision_and_excluded_tokens():
    old_hidden, old_head, hidden, head = inputs()
    with torch.no_grad():
        kl = F.exact_kl(old_hidden, old_head, hidden, head, MASK, chunk_size=4)
    assert_close(kl, full(old_hidden, old_head, hidden, head, MASK))
    half = F.exact_kl(
        old_hidden.bfloat16(), old_head[0].bfloat16(), hidden.bfloat16(), head[0].bfloat16(), MASK, chunk_size=4
    )
    assert half.dtype == torch.float32
    # A token neither policy can take adds nothing.
    banned = torch.zeros(V).double()
    banned[2] = -float("inf")
    leaf = hidden.clone().requires_grad_()
    kl = F.exact_kl(old_hidden, (old_head[0], banned), leaf, (head[0], banned), MASK, chunk_size=4)
    kl.sum().backward()
    keep = torch.arange(V) != 2
    zero = torch.zeros(V - 1).double()
    assert_close(kl, full(old_hidden, (old_head[0][keep], zero), leaf, (head[0][keep], zero), MASK))
    assert leaf.grad.isfinite().all()


def test_nothing_real_is_zero_and_still_has_a_graph():
    old_hidden, old_head, hidden, head = inputs()
    leaves = [x.requires_grad_() for x in (hidden, *head)]
    kl = F.exact_kl(old_hidden, old_head, hidden, head, torch.zeros_like(MASK), chunk_size=4)
    assert (kl == 0).all()
    kl.sum().backward()
    assert all((leaf.grad == 0).all() for leaf in leaves)
