"""The masked policy: bits, log-probabilities against a float64 reference, gradients, padding."""

import math

import pytest
import torch

from rlhf_ext.functional import top_p_mask
from rlhf_ext.functional.nlpo import masked_logps, pack_mask, unpack_mask


def inputs(vocab=13, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 4, 5, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, 5, generator=generator, dtype=dtype)
    bias = torch.randn(vocab, generator=generator, dtype=dtype)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    other = torch.randn(2, 4, vocab, generator=generator, dtype=dtype)
    allowed = top_p_mask(other * 2, top_p=0.6, min_tokens=1, keep_ids=[0])
    ids = torch.where(allowed, other, -math.inf).argmax(-1)
    return hidden, weight, bias, ids, allowed, mask


@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 130])
def test_bits_come_back(vocab):
    allowed = torch.rand(3, 2, vocab, generator=torch.Generator().manual_seed(0)) < 0.4
    packed = pack_mask(allowed)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, -(-vocab // 8))
    assert torch.equal(unpack_mask(packed, vocab), allowed)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_against_the_definition(with_bias, chunk_size):
    hidden, weight, bias, ids, allowed, mask = inputs()
    bias = bias if with_bias else None
    logps, entropy = masked_logps(
        hidden, weight, bias, ids, pack_mask(allowed), mask, temperature=0.7, chunk_size=chunk_size
    )
    for i, t in mask.nonzero().tolist():
        z = [sum(w * h for w, h in zip(row, hidden[i, t].tolist(), strict=True)) for row in weight.tolist()]
        z = [(v + (bias[k].item() if with_bias else 0.0)) / 0.7 for k, v in enumerate(z)]
        total = sum(math.exp(v) for k, v in enumerate(z) if allowed[i, t, k])
        probs = [math.exp(v) / total if allowed[i, t, k] else 0.0 for k, v in enumerate(z)]
        assert logps[i, t].item() == pytest.approx(math.log(probs[ids[i, t]]), abs=1e-9)
        assert entropy[i, t].item() == pytest.approx(-sum(p * math.log(p) for p in probs if p), abs=1e-9)
    assert (logps[~mask] == 0).all() and (entropy[~mask] == 0).all()


def test_everything_allowed_is_the_plain_policy():
    hidden, weight, bias, ids, allowed, mask = inputs()
    logps, _ = masked_logps(
        hidden, weight, bias, ids, pack_mask(torch.ones_like(allowed)), mask, temperature=1.0, chunk_size=3
    )
    plain = (hidden @ weight.T + bias).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(logps, torch.where(mask, plain, 0.0))


def test_gradients():
    hidden, weight, bias, ids, allowed, mask = inputs()
    packed = pack_mask(allowed)

    def both(h, w, b):
        return masked_logps(h, w, b, ids, packed, mask, temperature=0.7, chunk_size=3)

    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(both, leaves)
    logps, entropy = both(*leaves)
    (logps.sum() + entropy.sum()).backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)
    assert (leaves[0].grad[~mask] == 0).all()


def test_padding_may_hold_nan():
    hidden, weight, bias, ids, allowed, mask = inputs()
    options = {"temperature": 1.0, "chunk_size": 3}
    expected = masked_logps(hidden, weight, bias, ids, pack_mask(allowed), mask, **options)
    hidden[~mask] = math.nan
    allowed[~mask] = False
    found = masked_logps(hidden, weight, bias, ids, pack_mask(allowed), mask, **options)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_errors():
    hidden, weight, bias, ids, allowed, mask = inputs()
    with pytest.raises(ValueError, match="`allowed` is torch.int64"):
        pack_mask(allowed.long())
    with pytest.raises(ValueError, match="`packed` is torch.uint8 of width 1, expected torch.uint8 of width 2 for 13"):
        unpack_mask(pack_mask(allowed)[..., :1], 13)
    with pytest.raises(ValueError, match="is not allowed by `packed`"):
        masked_logps(hidden, weight, bias, ids, pack_mask(~allowed), mask, temperature=1.0, chunk_size=3)
    with pytest.raises(ValueError, match="temperature"):
        masked_logps(hidden, weight, bias, ids, pack_mask(allowed), mask, temperature=0.0, chunk_size=3)
