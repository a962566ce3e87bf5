"""Log-probabilities in tiles against float64 logits: values, gradients, families' transforms; and TRL's kernel."""

import pytest
import torch
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from rlhf_ext.functional import token_logps as module
from rlhf_ext.functional.token_logps import token_logps


TRANSFORMS = [{}, {"temperature": 0.7}, {"logit_scale": 0.3, "softcap": 2.0, "temperature": 1.5}]


def data(dtype=torch.float64, tokens=37, hidden=6, vocabulary=11):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return rows.to(dtype), weight.to(dtype), bias.to(dtype), targets


def by_definition(rows, weight, bias, targets, temperature=1.0, logit_scale=1.0, softcap=None):
    logits = (rows @ weight.t() + (0.0 if bias is None else bias)) * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logps = (logits / temperature).log_softmax(-1)
    return logps.gather(-1, targets[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


@pytest.fixture(autouse=True, params=[11, 4], ids=["whole rows", "rows in pieces"])
def small_tiles(monkeypatch, request):
    monkeypatch.setattr(module, "COLUMNS", request.param)  # in pieces: 4, 4 and 3 of the vocabulary of 11
    monkeypatch.setattr(module, "TILE", 8 * request.param)  # 37 tokens are 5 tiles, the last one ragged


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("trains", ["hidden", "all", "entropy", "head"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_plain_logits(transform, trains, with_bias):
    found = []
    for function in (token_logps, by_definition):
        rows, weight, bias, targets = data()
        bias = bias if with_bias else None
        rows.requires_grad_(trains != "head")
        for tensor in (weight, bias):
            if tensor is not None:
                tensor.requires_grad_(trains != "hidden")
        if function is token_logps:
            options = {**transform, "entropy_gradient": trains == "entropy"}
            logps, entropies = token_logps(rows, weight, targets, bias=bias, **options)
        else:
            logps, entropies = by_definition(rows, weight, bias, targets, **transform)
        upstream = torch.linspace(-1, 2, len(rows), dtype=rows.dtype)
        loss = (upstream * logps).sum()
        if trains == "entropy":
            loss = loss + (upstream.flip(0) * entropies).sum()
        loss.backward()
        grads = [t.grad for t in (rows, weight, bias) if t is not None]
        found.append([logps.detach(), entropies.detach(), *[g for g in grads if g is not None]])
    assert len(found[0]) == len(found[1]) > 2
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_the_entropy_alone_has_a_gradient_and_is_no_constant():
    rows, weight, _, targets = data()
    rows.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: token_logps(h, w, targets, entropy_gradient=True), (rows, weight.requires_grad_())
    )
    _, entropies = token_logps(rows, weight.detach(), targets)
    assert not entropies.requires_grad


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_are_those_of_the_kernel_of_trl(dtype, atol):
    found = []
    for function in ("ours", "theirs"):
        rows, weight, _, targets = data(dtype)
        rows.requires_grad_()
        if function == "ours":
            logps, entropies = token_logps(rows, weight, targets, temperature=0.7)
        else:
            logps, entropies, *_ = ChunkedLogProbFunction.apply(
                rows, weight, None, targets, 0.7, 4, None, 1.0, ("log_probs", "entropy")
            )
        logps.sum().backward()
        found.append([logps.detach(), entropies.detach(), rows.grad.float()])
        assert logps.dtype == torch.float32
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def test_autocast_cuts_the_products_and_not_the_entropy():
    rows, weight, _, targets = data(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, entropies = token_logps(rows, weight, targets)
    logits = (rows.bfloat16() @ weight.bfloat16().t()).double()
    wanted = by_definition(logits, torch.eye(11, dtype=torch.float64), None, targets)
    torch.testing.assert_close(entropies, wanted[1].float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(logps, wanted[0].float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("trains", ["hidden", "all"])
def test_gradients_keep_their_digits_where_a_token_is_nearly_certain(trains):
    """1 - p is 1e-5 here: p in float32 alone would leave two digits of it."""
    rows, weight, _, targets = data()
    targets = (rows @ weight.t()).argmax(-1)
    rows = rows * (12.0 / (rows @ weight.t()).topk(2).values.diff(dim=-1).abs())
    found = []
    for function, dtype in ((token_logps, torch.float32), (by_definition, torch.float64)):
        own = rows.to(dtype).requires_grad_()
        head = weight.to(dtype).requires_grad_(trains == "all")
        logps = function(own, head, targets)[0] if function is token_logps else function(own, head, None, targets)[0]
        logps.sum().backward()
        found.append((logps.detach().double(), own.grad.double()))
    (ours, our_grad), (exact, exact_grad) = found
    assert exact.max() > -1e-5 and exact.min() < -1e-6
    torch.testing.assert_close(our_grad, exact_grad, rtol=2e-3, atol=1e-10)
    torch.testing.assert_close(ours, exact, rtol=2e-2, atol=1e-9)


def test_large_logits_stay_finite_and_no_token_is_none():
    rows, weight, _, targets = data(torch.float32)
    logps, entropies = token_logps(rows * 1e4, weight, targets)
    assert logps.isfinite().all() and entropies.isfinite().all() and logps.max() <= 0
    rows = rows[:0].requires_grad_()
    logps, _ = token_logps(rows, weight, targets[:0])
    logps.sum().backward()
    assert logps.shape == (0,) and rows.grad.shape == (0, 6)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"targets": torch.zeros(3, dtype=torch.long)}, "targets"),
        ({"targets": torch.full((37,), -100)}, "`targets` has an id that is none of the 11 rows of `weight` .*-100"),
        ({"targets": torch.full((37,), 11)}, "none of the 11 rows of `weight` .*11 is out of bounds"),
        ({"targets": torch.zeros(37, dtype=torch.int32)}, "`targets` has dtype torch.int32, not torch.int64"),
        ({"weight": torch.zeros(11, 5)}, "weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"hidden": torch.zeros(37, 6, dtype=torch.long)}, "hidden"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    rows, weight, _, targets = data(torch.float32)
    given = {"hidden": rows, "weight": weight, "targets": targets, **change}
    with pytest.raises(ValueError, match=words):
        token_logps(**given)
