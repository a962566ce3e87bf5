"""What must hold whatever the numbers: limits, symmetries, and the meeting of estimates and expectations."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_ext import functional as F
from tests.functional.batches import dirty, log_probs, normal, preference_batch, ragged_mask


MASK = ragged_mask()
HOLES = ragged_mask(seed=3, holes=True)


@pytest.mark.parametrize("mask", [MASK, HOLES])
def test_gae_limits(mask):
    rewards, values = normal(*mask.shape, seed=1), normal(*mask.shape, seed=2)
    one, returns = F.compute_gae(rewards, values, mask, gamma=0.9, gae_lambda=1.0)
    to_go = F.discounted_returns(rewards, mask, gamma=0.9)
    assert_close(returns, to_go)
    assert_close(one, torch.where(mask, to_go - values, 0.0))
    # lambda = 0 does not look past the next value: perturb the reward two tokens on and nothing moves.
    zero, _ = F.compute_gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0)
    rewards[1, -1] += 5.0
    moved, _ = F.compute_gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0)
    assert_close(moved[1, :-2], zero[1, :-2])


def test_undiscounted_gae_telescopes():
    mask = torch.ones(2, 6, dtype=torch.bool)
    scores, values = normal(2, seed=1), normal(2, 6, seed=2)
    rewards = F.shape_rewards(scores, torch.zeros(2, 6).double(), mask, kl_coef=0.1)
    advantages, _ = F.compute_gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    assert_close(advantages[:, 0], scores - values[:, 0])


def test_a_bootstrap_of_zero_is_an_end_and_moves_no_finished_row():
    rewards, values = normal(*MASK.shape, seed=1), normal(*MASK.shape, seed=2)
    plain = F.compute_gae(rewards, values, MASK, gamma=0.99, gae_lambda=0.95)
    bootstrap = torch.zeros(len(MASK)).double()
    bootstrap[1] = 3.0
    cut = F.compute_gae(rewards, values, MASK, gamma=0.99, gae_lambda=0.95, bootstrap_values=bootstrap)
    rest = torch.arange(len(MASK)) != 1
    assert torch.equal(plain[0][rest], cut[0][rest])
    steps = torch.arange(MASK.shape[1] - 1, -1, -1).double()
    assert_close(cut[0][1] - plain[0][1], 0.99 * 3.0 * (0.99 * 0.95) ** steps)


def test_leave_one_out_is_a_scaled_centering_and_ignores_a_shift():
    returns = normal(8)
    advantages = F.leave_one_out_advantages(returns, group_size=4)
    groups = returns.view(2, 4)
    assert_close(advantages, (4 / 3 * (groups - groups.mean(1, keepdim=True))).flatten())
    assert_close(F.leave_one_out_advantages(returns + 5, group_size=4), advantages)


def test_shaped_rewards_sum_to_the_penalised_score():
    kl, scores = normal(*HOLES.shape, seed=1), normal(len(HOLES), seed=2)
    rewards = F.shape_rewards(scores, dirty(kl, HOLES), HOLES, kl_coef=0.2)
    wanted = scores - 0.2 * torch.where(HOLES, kl, 0).sum(1)
    wanted[~HOLES.any(1)] = 0.0
    assert_close(rewards.sum(1), wanted)


def test_whitened_moments():
    x = 3 * normal(*HOLES.shape, seed=1) + 100
    white = F.masked_whiten(x, HOLES)
    # The 1e-8 beside the variance of about 9 leaves 1e-9.
    assert_close(F.masked_mean(white, HOLES), torch.tensor(0.0).double(), rtol=0, atol=1e-8)
    assert_close(F.masked_var(white, HOLES), torch.tensor(1.0).double(), rtol=0, atol=1e-8)
    kept = F.masked_whiten(x, HOLES, shift_mean=False)
    assert_close(F.masked_mean(kept, HOLES), F.masked_mean(x, HOLES))
    assert_close(F.masked_whiten(2 * x + 7, HOLES), white, rtol=0, atol=1e-8)


def test_whitening_one_token_or_none():
    x = torch.tensor([[4.0, float("nan")]])
    mask = torch.tensor([[True, False]])
    assert F.masked_whiten(x, mask).tolist() == [[0.0, 0.0]]
    assert F.masked_whiten(x, mask, shift_mean=False).tolist() == [[4.0, 0.0]]
    assert F.masked_whiten(x, torch.zeros_like(mask)).tolist() == [[0.0, 0.0]]


def test_before_the_first_update_the_ratio_is_one():
    logps, advantages = log_probs(*MASK.shape), normal(*MASK.shape, seed=1)
    loss, metrics = F.ppo_clip_loss(logps, logps.clone(), advantages, MASK, epsilon=0.2)
    assert_close(loss, -advantages[MASK].mean())
    assert metrics["clip_fraction"] == metrics["clip_fraction_binding"] == metrics["approx_kl"] == 0
    assert metrics["ratio_mean"] == metrics["ratio_min"] == metrics["ratio_max"] == 1
    penalty, _ = F.ppo_penalty_loss(logps, logps, advantages, torch.zeros_like(logps), MASK, penalty_coef=1.0)
    assert_close(penalty, loss)


def test_on_policy_all_policy_losses_have_one_gradient():
    logps, advantages = log_probs(*MASK.shape).requires_grad_(), normal(*MASK.shape, seed=1)
    zero = torch.zeros_like(advantages)
    losses = [
        F.policy_gradient_loss(logps, advantages, MASK)[0],
        F.ppo_clip_loss(logps, logps, advantages, MASK, epsilon=0.2)[0],
        F.ppo_penalty_loss(logps, logps, advantages, zero, MASK, penalty_coef=1.0)[0],
    ]
    grads = [torch.autograd.grad(loss, logps)[0] for loss in losses]
    assert_close(grads[0], torch.where(MASK, -advantages / MASK.sum(), 0.0))
    for grad in grads[1:]:
        assert_close(grad, grads[0])


def test_an_epsilon_that_never_binds_is_the_plain_surrogate():
    logps, old, advantages = log_probs(*MASK.shape), log_probs(*MASK.shape, seed=1), normal(*MASK.shape, seed=2)
    clip, _ = F.ppo_clip_loss(logps, old, advantages, MASK, epsilon=1e6)
    penalty, _ = F.ppo_penalty_loss(logps, old, advantages, 0 * logps, MASK, penalty_coef=0.0)
    assert_close(clip, penalty)


@pytest.mark.parametrize("delta", [None, 2.0])
def test_clip_equals_the_parents_lines(delta):
    """`GRPOTrainer._compute_loss` of TRL 1.16, its three lines restated for one micro-batch."""
    logps, old, advantages = log_probs(*MASK.shape), log_probs(*MASK.shape, seed=1), normal(*MASK.shape, seed=2)
    coef_1 = torch.exp(logps - old)
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
    coef_1 = coef_1 if delta is None else torch.clamp(coef_1, max=delta)
    wanted = (-torch.min(coef_1 * advantages, coef_2 * advantages) * MASK).sum()
    ours, _ = F.ppo_clip_loss(
        logps, old, advantages, MASK, epsilon=0.2, epsilon_high=0.28, delta=delta, reduction="sum"
    )
    assert_close(ours, wanted)


def test_delta_takes_the_gradient_of_a_runaway_ratio():
    logps = torch.tensor([[math.log(5.0)]], dtype=torch.float64, requires_grad=True)
    zero, bad = torch.zeros(1, 1).double(), torch.full((1, 1), -2.0).double()
    one = torch.ones(1, 1, dtype=torch.bool)
    bounded, _ = F.ppo_clip_loss(logps, zero, bad, one, epsilon=0.2, delta=3.0)
    assert_close(bounded.detach(), torch.tensor(6.0).double())
    assert torch.autograd.grad(bounded, logps)[0].item() == 0
    free, _ = F.ppo_clip_loss(logps, zero, bad, one, epsilon=0.2)
    assert_close(torch.autograd.grad(free, logps)[0], torch.tensor([[10.0]]).double())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_overflowing_ratio_leaves_no_nan(sign):
    logps = torch.tensor([[0.0, 500.0, -500.0]], requires_grad=True)
    old, advantages = torch.zeros(1, 3), torch.full((1, 3), sign)
    loss, metrics = F.ppo_clip_loss(logps, old, advantages, torch.ones(1, 3, dtype=torch.bool), epsilon=0.2)
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


def test_kl_estimators_on_a_sampled_policy():
    """Their means meet the exact KL, and k3 is never negative; a policy near its reference keeps its digits."""
    logits, ref_logits = normal(6, seed=1), normal(6, seed=2)
    logps, ref = logits.log_softmax(0), ref_logits.log_softmax(0)
    exact = (logps.exp() * (logps - ref)).sum()
    tokens = torch.multinomial(logps.exp(), 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    for name in ("k1", "k3"):
        sample = F.estimate_kl(logps[tokens].view(100, -1), ref[tokens].view(100, -1), estimator=name)
        error = (sample.mean() - exact).abs()
        assert error < 4 * sample.std() / sample.numel() ** 0.5
        if name == "k3":
            assert (sample >= 0).all()
    near = F.estimate_kl(torch.tensor([[1e-4]]), torch.tensor([[0.0]]), estimator="k3")
    assert_close(near.double(), torch.tensor([[5e-9]]).double(), rtol=1e-3, atol=0)


def test_expected_gradient_of_k1_is_zero_and_of_k2_is_that_of_the_kl():
    """Why k1 belongs in the reward and not in a loss: its gradient is E[grad log pi] = 0."""
    logits, ref = normal(5, seed=1).requires_grad_(), normal(5, seed=2).log_softmax(0)
    logps = logits.log_softmax(0)
    exact = torch.autograd.grad((logps.exp() * (logps - ref)).sum(), logits, retain_graph=True)[0]
    grads = {}
    for name in ("k1", "k2"):
        kl = F.estimate_kl(logps.unsqueeze(0), ref.unsqueeze(0), estimator=name)[0]
        grads[name] = torch.autograd.grad((logps.detach().exp() * kl).sum(), logits, retain_graph=True)[0]
    assert_close(grads["k1"], torch.zeros(5).double())
    assert_close(grads["k2"], exact)


@pytest.mark.parametrize("k", [2, 3, 7])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_equal_scores_cost_ln_k(k, noise):
    rewards = torch.full((3, k), 2.5).double()
    targets = preference_batch(3, k)[1]
    assert_close(F.preference_loss(rewards, targets, prediction_noise=noise)[0], torch.tensor(math.log(k)).double())


def test_preference_loss_ignores_a_shift_and_follows_a_permutation():
    for k in (2, 4):
        rewards, targets, _ = preference_batch(6, k)
        loss, metrics = F.preference_loss(rewards, targets, prediction_noise=0.1)
        shifted, shifted_metrics = F.preference_loss(rewards + normal(6, 1, seed=9), targets, prediction_noise=0.1)
        assert_close(shifted, loss)
        assert_close(shifted_metrics["margin"], metrics["margin"])
        flipped, _ = F.preference_loss(rewards.flip(1), targets.flip(1), prediction_noise=0.1)
        assert_close(flipped, loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen", [0, 1])
def test_a_pair_is_the_parents_loss_bit_for_bit(chosen, dtype):
    rewards = (3 * normal(33, 2, seed=5)).to(dtype).requires_grad_()
    rows = torch.nn.functional.one_hot(torch.full((33,), chosen), 2).to(dtype)
    parent = -torch.nn.functional.logsigmoid(rewards[:, chosen] - rewards[:, 1 - chosen]).mean()
    for mask in (None, torch.ones(33, 2, dtype=torch.bool)):
        ours, metrics = F.preference_loss(rewards, rows, mask=mask)
        assert torch.equal(ours, parent)
        assert torch.equal(
            torch.autograd.grad(ours, rewards)[0], torch.autograd.grad(parent, rewards, retain_graph=True)[0]
        )
        difference = (rewards[:, chosen] - rewards[:, 1 - chosen]).detach()
        assert_close(metrics["margin"], difference.mean())
        assert_close(metrics["accuracy"], (difference > 0).to(dtype).mean())


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_extreme_scores_stay_finite(k, noise):
    rewards = torch.zeros(2, k)
    rewards[0, 0], rewards[0, 1] = 400.0, -400.0
    rewards[1, 0], rewards[1, 1] = -400.0, 400.0
    rewards.requires_grad_()
    targets = torch.nn.functional.one_hot(torch.zeros(2, dtype=torch.long), k).float()
    loss, _ = F.preference_loss(rewards, targets, prediction_noise=noise)
    loss.backward()
    assert loss.isfinite() and rewards.grad.isfinite().all()
    # One row costs nothing, the other the whole gap (800 nats), or no more than the noise allows.
    right, wrong = (0.0, 800.0) if noise == 0 else (-math.log(1 - noise + noise / k), -math.log(noise / k))
    assert_close(loss.detach(), torch.tensor((right + wrong) / 2))


def accuracy(rewards, targets, mask=None):
    mask = None if mask is None else torch.tensor([mask])
    return F.preference_loss(torch.tensor([rewards]), torch.tensor([targets]), mask=mask)[1]["accuracy"].item()


def test_accuracy_counts_ties_by_half():
    assert accuracy([1.0, 0.0], [0.9, 0.1]) == 1.0
    assert accuracy([0.0, 1.0], [0.9, 0.1]) == 0.0
    assert accuracy([1.0, 1.0], [1.0, 0.0]) == 0.5
    assert accuracy([5.0, 1.0], [0.5, 0.5]) == 0.5
    assert accuracy([1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]) == pytest.approx(1 / 3)
    assert accuracy([1.0, 1.0, 0.0], [0.0, 0.0, 1.0]) == 0.0
    assert accuracy([3.0, 1.0, 0.0], [0.5, 0.5, 0.0]) == 0.5
    assert accuracy([1.0, 0.0, 9.0], [1.0, 0.0, 0.0], [True, True, False]) == 1.0


def test_explained_variance():
    returns = normal(*MASK.shape)
    assert_close(F.value_loss(returns, returns, returns, MASK)[1]["explained_variance"], torch.tensor(1.0).double())
    constant = torch.full_like(returns, F.masked_mean(returns, MASK).item())
    # A constant prediction explains nothing; a constant target has no variance to explain.
    assert_close(F.value_loss(constant, constant, returns, MASK)[1]["explained_variance"], torch.tensor(0.0).double())
    assert F.value_loss(returns, returns, torch.ones_like(returns), MASK)[1]["explained_variance"] == 0


def test_top_p_keeps_what_it_must():
    logits = normal(4, 10)
    assert F.top_p_mask(logits, top_p=1.0, min_tokens=1, keep_ids=None).all()
    tight = F.top_p_mask(logits, top_p=1e-6, min_tokens=1, keep_ids=None)
    assert (tight.sum(-1) == 1).all() and torch.equal(tight.int().argmax(-1), logits.argmax(-1))
    assert (F.top_p_mask(logits, top_p=1e-6, min_tokens=3, keep_ids=None).sum(-1) == 3).all()
    kept = F.top_p_mask(logits, top_p=1e-6, min_tokens=1, keep_ids=torch.tensor([0, 9]))
    assert kept[:, [0, 9]].all() and (kept.sum(-1) <= 3).all()
    # Probabilities .5 .25 .25: .5 is reached, not exceeded, by the first; the second crosses.
    exact = torch.tensor([0.5, 0.25, 0.25]).double().log()
    assert F.top_p_mask(exact, top_p=0.5, min_tokens=1, keep_ids=None).tolist() == [True, True, False]
    banned = torch.tensor([0.0, -math.inf, -math.inf])
    assert F.top_p_mask(banned, top_p=0.9, min_tokens=1, keep_ids=None).tolist() == [True, False, False]


def test_controllers_remember_and_refuse():
    adaptive = F.AdaptiveKLController(0.2, target=6.0, horizon=100)
    assert adaptive.update(torch.tensor(12.0), 50) == adaptive.kl_coef == pytest.approx(0.2 * 1.1)
    again = F.AdaptiveKLController(1.0, target=6.0, horizon=100)
    again.load_state_dict(adaptive.state_dict())
    assert again.kl_coef == adaptive.kl_coef
    penalty = F.AdaptivePenaltyController(1.0, target=0.01)
    assert [penalty.update(kl) for kl in (1.0, 1.0, 0.01, 0.0)] == [2.0, 4.0, 4.0, 2.0]
    other = F.AdaptivePenaltyController(9.0, target=0.01)
    other.load_state_dict(penalty.state_dict())
    assert other.penalty_coef == 2.0
