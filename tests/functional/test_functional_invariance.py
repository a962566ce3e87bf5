"""Padding, garbage under the mask, splits of a batch, precision and gradients: one table of calls for all functions.

Every entry of `CALLS` maps `(tensors, mask)` to an output; all tensors are (B, T) in float64.
"""

import pytest
import torch
from torch.testing import assert_close

from rlhf_ext import functional as F
from tests.functional.batches import dirty, log_probs, normal, poison, preference_batch, ragged_mask, widen


MASKS = {"ragged": ragged_mask(), "holes": ragged_mask(seed=3, holes=True)}

# name: (number of (B, T) tensors, which of them carry a gradient, call)
LOSSES = {
    "policy_gradient_loss": (2, [0], lambda x, m, **k: F.policy_gradient_loss(x[0], x[1], m, **k)),
    "ppo_clip_loss": (3, [0], lambda x, m, **k: F.ppo_clip_loss(x[0], x[1], x[2], m, epsilon=0.3, **k)),
    "ppo_clip_loss_delta": (
        3,
        [0],
        lambda x, m, **k: F.ppo_clip_loss(x[0], x[1], x[2], m, epsilon=0.3, epsilon_high=0.4, delta=1.9, **k),
    ),
    "ppo_penalty_loss": (
        4,
        [0, 3],
        lambda x, m, **k: F.ppo_penalty_loss(x[0], x[1], x[2], x[3], m, penalty_coef=0.7, **k),
    ),
    "value_loss": (3, [0], lambda x, m, **k: F.value_loss(x[0], x[1], x[2], m, **k)),
    "value_loss_clip": (3, [0], lambda x, m, **k: F.value_loss(x[0], x[1], x[2], m, epsilon_value=0.3, **k)),
    "entropy_loss": (1, [0], lambda x, m, **k: F.entropy_loss(x[0], m, **k)),
    "lm_loss": (1, [0], lambda x, m, **k: F.lm_loss(x[0], m, **k)),
}
TOKENS = {
    "masked_whiten": (1, [0], lambda x, m: F.masked_whiten(x[0], m)),
    "masked_whiten_kept": (1, [0], lambda x, m: F.masked_whiten(x[0], m, shift_mean=False)),
    "discounted_returns": (1, [], lambda x, m: F.discounted_returns(x[0], m, gamma=0.9)),
    "compute_gae": (2, [], lambda x, m: F.compute_gae(x[0], x[1], m, gamma=0.9, gae_lambda=0.8)[0]),
    "compute_gae_returns": (2, [], lambda x, m: F.compute_gae(x[0], x[1], m, gamma=0.9, gae_lambda=0.8)[1]),
    "shape_rewards": (
        2,
        [],
        lambda x, m: F.shape_rewards(torch.arange(len(m)).to(x[0].dtype), x[0], m, kl_coef=0.2, token_rewards=x[1]),
    ),
}
MOMENTS = {
    "masked_mean": (1, [0], lambda x, m: F.masked_mean(x[0], m)),
    "masked_var": (1, [0], lambda x, m: F.masked_var(x[0], m)),
}
ROWWISE = ["discounted_returns", "compute_gae", "compute_gae_returns"]


def tensors(count, mask):
    return [0.5 * normal(*mask.shape, seed=20 + i) for i in range(count)]


def outputs(result):
    """Everything a call gives, as a flat dict."""
    if isinstance(result, tuple):
        return {"loss": result[0], **result[1]}
    return {"value": result}


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert_close(first[name], second[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(params=MASKS)
def mask(request):
    return MASKS[request.param]


@pytest.mark.parametrize("name", [*LOSSES, *MOMENTS])
@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -1e30, "mixed"])
def test_garbage_and_extra_columns_change_nothing(name, fill, mask):
    count, _, call = {**LOSSES, **MOMENTS}[name]
    x = tensors(count, mask)
    garbage = [poison(t, mask) if fill == "mixed" else dirty(t, mask, fill) for t in x]
    same(outputs(call(x, mask)), outputs(call(garbage, mask)))
    same(outputs(call(x, mask)), outputs(call([widen(t) for t in x], widen(mask))))


@pytest.mark.parametrize("name", TOKENS)
def test_masked_outputs_are_zero_and_padding_changes_nothing(name, mask):
    count, _, call = TOKENS[name]
    x = tensors(count, mask)
    clean, garbage = call(x, mask), call([poison(t, mask) for t in x], mask)
    assert_close(clean, garbage)
    assert (garbage[~mask] == 0).all()
    wide = call([widen(t) for t in x], widen(mask))
    assert_close(wide[:, :-3], clean)
    assert (wide[:, -3:] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_sums_of_any_split_add_up(name, mask):
    count, _, call = LOSSES[name]
    x = tensors(count, mask)
    whole, metrics = call(x, mask, reduction="sum")
    for cut in range(1, len(mask)):
        parts = [call([t[rows] for t in x], mask[rows], reduction="sum")[0] for rows in (slice(cut), slice(cut, None))]
        assert_close(sum(parts), whole)
    mean, mean_metrics = call(x, mask)
    assert_close(mean * mask.sum(), whole)
    same(metrics, mean_metrics)


@pytest.mark.parametrize("name", ROWWISE)
def test_rows_do_not_meet(name, mask):
    count, _, call = TOKENS[name]
    x = tensors(count, mask)
    alone = torch.cat([call([t[b : b + 1] for t in x], mask[b : b + 1]) for b in range(len(mask))])
    assert torch.equal(alone, call(x, mask))


@pytest.mark.parametrize("name", [*LOSSES, *TOKENS, *MOMENTS])
@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3)])
def test_nothing_real_gives_zero_and_zero_gradients(name, shape):
    count, grads, call = {**LOSSES, **TOKENS, **MOMENTS}[name]
    x = [torch.full(shape, float("nan")).double().requires_grad_() for _ in range(count)]
    found = outputs(call(x, torch.zeros(shape, dtype=torch.bool)))
    assert all((value == 0).all() for value in found.values())
    if grads:
        next(iter(found.values())).sum().backward()
        assert all((x[i].grad == 0).all() for i in grads)


@pytest.mark.parametrize("name", [*LOSSES, *MOMENTS, "masked_whiten", "masked_whiten_kept"])
def test_gradients(name, mask):
    count, grads, call = {**LOSSES, **MOMENTS, **TOKENS}[name]
    x = tensors(count, mask)
    leaves = [dirty(t, mask, 0.0).requires_grad_(i in grads) for i, t in enumerate(x)]

    def value(*leaves):
        return next(iter(outputs(call(leaves, mask)).values()))

    assert torch.autograd.gradcheck(value, leaves)
    # Garbage under the mask: the same gradient, 0 there, never NaN.
    weights = normal(*value(*leaves).shape, seed=77)
    wanted = torch.autograd.grad((value(*leaves) * weights).sum(), [leaves[i] for i in grads])
    spoiled = [poison(t, mask).requires_grad_(i in grads) for i, t in enumerate(x)]
    found = torch.autograd.grad((value(*spoiled) * weights).sum(), [spoiled[i] for i in grads])
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)
        assert (one[~mask] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_constants_get_no_gradient_and_metrics_are_detached_scalars(name, mask):
    count, grads, call = LOSSES[name]
    x = [t.requires_grad_() for t in tensors(count, mask)]
    loss, metrics = call(x, mask)
    loss.backward()
    for i, t in enumerate(x):
        assert (t.grad is not None) == (i in grads)
    assert loss.dim() == 0
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", [*LOSSES, *TOKENS, *MOMENTS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_float32(name, dtype, mask):
    count, _, call = {**LOSSES, **TOKENS, **MOMENTS}[name]
    x = [t.to(dtype) for t in tensors(count, mask)]
    wanted_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    found, wanted = outputs(call(x, mask)), outputs(call([t.to(wanted_dtype) for t in x], mask))
    for key, value in found.items():
        if name != "shape_rewards":  # the scores of the table come in the same half precision
            assert torch.equal(value, wanted[key]), key
        assert value.dtype == wanted_dtype, key


@pytest.mark.parametrize("k, ragged", [(2, False), (4, False), (4, True)])
@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("soft", [True, False])
def test_preference_loss(k, ragged, noise, soft):
    rewards, targets, mask = preference_batch(6, k, ragged=ragged, soft=soft)
    leaf = torch.where(mask, rewards, 0.0).requires_grad_()

    def value(rewards, targets=targets, mask=mask):
        return F.preference_loss(rewards, targets, prediction_noise=noise, mask=mask)[0]

    assert torch.autograd.gradcheck(value, leaf)
    spoiled = poison(rewards, mask).requires_grad_()
    loss = value(spoiled, poison(targets, mask))
    assert_close(loss, value(leaf))
    found, wanted = torch.autograd.grad(loss, spoiled)[0], torch.autograd.grad(value(leaf), leaf)[0]
    assert_close(found, wanted)
    assert (found[~mask] == 0).all()
    # More candidates that are not real: nothing changes, even from a pair to the general path.
    wide = F.preference_loss(widen(rewards), widen(targets), prediction_noise=noise, mask=widen(mask))
    same(outputs(wide), outputs(F.preference_loss(rewards, targets, prediction_noise=noise, mask=mask)))
    parts = [
        F.preference_loss(rewards[i], targets[i], prediction_noise=noise, mask=mask[i], reduction="sum")[0]
        for i in (slice(2), slice(2, None))
    ]
    assert_close(sum(parts) / 6, loss)


def test_preference_loss_of_no_rows():
    rewards = torch.zeros(0, 2, requires_grad=True)
    loss, metrics = F.preference_loss(rewards, torch.zeros(0, 2))
    loss.backward()
    assert loss == 0 and all(value == 0 for value in metrics.values())


def test_preference_loss_in_bfloat16_is_computed_in_float32():
    rewards, targets, _ = preference_batch(5, 3, soft=False)
    loss, _ = F.preference_loss(rewards.bfloat16(), targets.bfloat16())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.preference_loss(rewards.bfloat16().float(), targets.float())[0])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimate_kl(estimator):
    logps, ref = log_probs(2, 3).requires_grad_(), log_probs(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: F.estimate_kl(a, b, estimator=estimator), (logps, ref))
    assert F.estimate_kl(logps.bfloat16(), ref.bfloat16(), estimator=estimator).dtype == torch.float32


def test_empty_row_loses_its_score_even_if_that_is_nan():
    mask = torch.tensor([[False, False], [True, False]])
    rewards = F.shape_rewards(torch.tensor([float("nan"), 2.0]), torch.zeros(2, 2), mask, kl_coef=0.1)
    assert rewards.tolist() == [[0.0, 0.0], [2.0, 0.0]]


@pytest.mark.parametrize("function", ["returns", "gae", "shape", "leave_one_out"])
def test_targets_carry_no_graph(function):
    x, mask = normal(4, 2).requires_grad_(), torch.ones(4, 2, dtype=torch.bool)
    result = {
        "returns": lambda: F.discounted_returns(x, mask, gamma=1.0),
        "gae": lambda: F.compute_gae(x, x, mask, gamma=1.0, gae_lambda=0.9)[0],
        "shape": lambda: F.shape_rewards(x[:, 0], x, mask, kl_coef=0.1),
        "leave_one_out": lambda: F.leave_one_out_advantages(x[:, 0], group_size=2),
    }[function]()
    assert not result.requires_grad
