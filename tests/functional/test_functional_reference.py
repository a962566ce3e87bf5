"""Ours against the loops of `tests/reference.py`, on random ragged batches in float64."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_ext import functional as F
from tests import reference
from tests.functional.batches import log_probs, normal, poison, preference_batch, ragged_mask


SEEDS = range(4)


def same(actual, expected):
    assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@pytest.fixture(params=[(seed, holes) for seed in SEEDS for holes in (False, True)], ids=str)
def batch(request):
    seed, holes = request.param
    return seed, ragged_mask(seed=seed, holes=holes)


def draw(batch, count):
    seed, mask = batch
    return [poison(normal(*mask.shape, seed=10 * seed + i), mask) for i in range(count)]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_discounted_returns(batch, gamma):
    (rewards,) = draw(batch, 1)
    mask = batch[1]
    same(F.discounted_returns(rewards, mask, gamma=gamma), reference.discounted_returns(rewards.tolist(), mask, gamma))


@pytest.mark.parametrize("bootstrapped", [False, True])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.0), (0.9, 0.5), (0.99, 1.0), (0.0, 0.5)])
def test_gae(batch, gamma, lam, bootstrapped):
    rewards, values = draw(batch, 2)
    mask = batch[1]
    bootstrap = normal(len(mask), seed=99) if bootstrapped else None
    ours = F.compute_gae(rewards, values, mask, gamma=gamma, gae_lambda=lam, bootstrap_values=bootstrap)
    wanted = reference.gae(
        rewards.tolist(), values.tolist(), mask, gamma, lam, bootstrap.tolist() if bootstrapped else None
    )
    same(ours[0], wanted[0])
    same(ours[1], wanted[1])


@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_leave_one_out(group_size):
    returns = normal(12)
    same(
        F.leave_one_out_advantages(returns, group_size=group_size),
        reference.leave_one_out(returns.tolist(), group_size),
    )


@pytest.mark.parametrize("with_token_rewards", [False, True])
def test_shape_rewards(batch, with_token_rewards):
    kl, token_rewards = draw(batch, 2)
    mask = batch[1]
    scores = normal(len(mask), seed=7)
    ours = F.shape_rewards(scores, kl, mask, kl_coef=0.3, token_rewards=token_rewards if with_token_rewards else None)
    extra = token_rewards.tolist() if with_token_rewards else None
    same(ours, reference.shaped_rewards(scores.tolist(), kl.tolist(), mask, 0.3, extra))


@pytest.mark.parametrize("shift", [True, False])
def test_moments_and_whitening(batch, shift):
    (x,) = draw(batch, 1)
    mask = batch[1]
    real = reference.real_values(x.tolist(), mask)
    same(F.masked_mean(x, mask), reference.mean(real))
    same(F.masked_var(x, mask), reference.variance(real))
    same(F.masked_whiten(x, mask, shift_mean=shift), reference.whiten(x.tolist(), mask, shift))


@pytest.mark.parametrize("low, high, delta", [(0.2, None, None), (0.1, 0.4, None), (0.2, 0.2, 1.5), (0.3, 0.5, 1.6)])
def test_ppo_clip(batch, low, high, delta):
    logps, old, advantages = draw(batch, 3)
    mask = batch[1]
    logps = poison(old + 0.5 * logps, mask)
    total, metrics = F.ppo_clip_loss(
        logps, old, advantages, mask, epsilon=low, epsilon_high=high, delta=delta, reduction="sum"
    )
    mean, _ = F.ppo_clip_loss(logps, old, advantages, mask, epsilon=low, epsilon_high=high, delta=delta)
    lists = (x.tolist() for x in (logps, old, advantages))
    wanted, wanted_metrics = reference.ppo_clip(*lists, mask, low, low if high is None else high, delta)
    same(total, wanted)
    same(mean, wanted / max(int(mask.sum()), 1))
    assert set(metrics) == set(wanted_metrics)
    for name, value in wanted_metrics.items():
        same(metrics[name], value)


@pytest.mark.parametrize("epsilon", [None, 0.2, 1.0])
def test_value_loss(batch, epsilon):
    values, old, returns = draw(batch, 3)
    mask = batch[1]
    total, metrics = F.value_loss(values, old, returns, mask, epsilon_value=epsilon, reduction="sum")
    same(total, reference.value_loss(*(x.tolist() for x in (values, old, returns)), mask, epsilon))
    targets = reference.real_values(returns.tolist(), mask)
    rest = reference.real_values((returns - values).tolist(), mask)
    same(metrics["explained_variance"], 1 - reference.variance(rest) / reference.variance(targets))
    same(metrics["value_mean"], reference.mean(reference.real_values(values.tolist(), mask)))


def test_losses_that_are_plain_sums(batch):
    logps, old, advantages, kl = draw(batch, 4)
    mask = batch[1]
    new_, old_, adv_, kl_ = (
        torch.tensor(reference.real_values(x.tolist(), mask), dtype=torch.float64)
        for x in (logps, old, advantages, kl)
    )
    assert_close(F.policy_gradient_loss(logps, advantages, mask, reduction="sum")[0], -(new_ * adv_).sum())
    assert_close(F.policy_gradient_loss(logps, advantages, mask)[0], -(new_ * adv_).mean())
    penalty = -((new_ - old_).exp() * adv_).mean() + 0.7 * kl_.mean()
    assert_close(F.ppo_penalty_loss(logps, old, advantages, kl, mask, penalty_coef=0.7)[0], penalty)
    total = F.ppo_penalty_loss(logps, old, advantages, kl, mask, penalty_coef=0.7, reduction="sum")[0]
    assert_close(total, penalty * len(new_))
    for function in (F.entropy_loss, F.lm_loss):
        assert_close(function(logps, mask)[0], -new_.mean())
        assert_close(function(logps, mask, reduction="sum")[0], -new_.sum())


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("k, ragged", [(2, False), (3, False), (5, True)])
@pytest.mark.parametrize("seed", SEEDS)
def test_preference_loss(seed, k, ragged, soft, noise):
    rewards, targets, mask = preference_batch(k=k, seed=seed, ragged=ragged, soft=soft)
    loss, metrics = F.preference_loss(
        poison(rewards, mask), poison(targets, mask), prediction_noise=noise, mask=mask if ragged else None
    )
    total, _ = F.preference_loss(rewards, targets, prediction_noise=noise, mask=mask, reduction="sum")
    rows = [(rewards[i][mask[i]].tolist(), targets[i][mask[i]].tolist()) for i in range(len(rewards))]
    wanted = [reference.preference_row(r, t, noise) for r, t in rows]
    same(total, sum(wanted))
    same(loss, sum(wanted) / len(wanted))
    same(metrics["accuracy"], reference.mean([reference.preference_accuracy_row(r, t) for r, t in rows]))
    same(metrics["margin"], reference.mean([reference.preference_margin_row(r, t) for r, t in rows]))
    flat = [x for r, _ in rows for x in r]
    same(metrics["mean_reward"], reference.mean(flat))
    same(metrics["min_reward"], min(flat))
    same(metrics["max_reward"], max(flat))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("min_tokens", [1, 4, 50])
def test_top_p(top_p, min_tokens):
    logits = 2 * normal(3, 2, 12)
    keep = F.top_p_mask(logits, top_p=top_p, min_tokens=min_tokens, keep_ids=[3, 7])
    for i in range(3):
        for j in range(2):
            assert keep[i, j].tolist() == reference.top_p(logits[i, j].tolist(), top_p, min_tokens, [3, 7])


def test_exact_kl():
    mask = ragged_mask(seed=1, holes=True)
    old_hidden, hidden = normal(*mask.shape, 3, seed=1), normal(*mask.shape, 3, seed=2)
    old_head, head = (normal(6, 3, seed=3), normal(6, seed=4)), (normal(6, 3, seed=5), normal(6, seed=6))
    kl = F.exact_kl(old_hidden, old_head, hidden, head, mask, chunk_size=4)
    for b, t in mask.nonzero().tolist():
        old_logits = old_head[0] @ old_hidden[b, t] + old_head[1]
        logits = head[0] @ hidden[b, t] + head[1]
        same(kl[b, t], reference.kl_divergence(old_logits.tolist(), logits.tolist()))
    assert (kl[~mask] == 0).all()


def test_estimators():
    logps, ref = log_probs(3, 4, seed=1), log_probs(3, 4, seed=2)
    d = logps - ref
    for name, wanted in {"k1": d, "k2": d**2 / 2, "k3": ref.exp() / logps.exp() - 1 + d}.items():
        assert_close(F.estimate_kl(logps, ref, estimator=name), wanted)
