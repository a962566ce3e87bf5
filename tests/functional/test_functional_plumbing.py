"""Formulas that the trainers use between the named ones: scores together, baselines, rows of candidates, row means."""

import math

import pytest
import torch

from rlhf_ext.functional import preference_loss
from rlhf_ext.functional.advantages import baseline_advantages
from rlhf_ext.functional.candidates import arrange_rewards, candidates_loss, center_loss
from rlhf_ext.functional.rewards import combine_scores
from rlhf_ext.functional.statistics import row_means


NAN = math.nan


def test_scores_together():
    scores = torch.tensor([[1.0, 10.0], [2.0, NAN], [NAN, NAN], [NAN, -4.0]])
    found = combine_scores(scores, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(found, torch.tensor([20.5, 1.0, NAN, -8.0]), equal_nan=True)
    assert combine_scores(scores.bfloat16(), torch.tensor([0.5, 2.0])).dtype == torch.float32
    with pytest.raises(ValueError, match="weights"):
        combine_scores(scores, torch.ones(3))


def test_returns_against_a_baseline():
    mask = torch.tensor([[True, True, False]])
    returns, values = torch.tensor([[3.0, 1.0, NAN]]), torch.tensor([[0.5, 2.0, NAN]])
    assert baseline_advantages(returns, values, mask).tolist() == [[2.5, -1.0, 0.0]]
    assert baseline_advantages(returns, None, mask).tolist() == [[3.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match="baseline"):
        baseline_advantages(returns, values[:, :2], mask)


def test_row_means():
    mask = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
    x = torch.tensor([[1.0, 4.0, NAN], [NAN, 5.0, NAN], [NAN, NAN, NAN]])
    assert row_means(x, mask).tolist() == [2.5, 5.0, 0.0]


def test_rows_of_candidates():
    """Scores come by candidate and then by row; a row of two leaves the third place empty."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = arrange_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), mask)
    assert found.tolist() == [[1.0, 3.0, 5.0], [2.0, 4.0, 0.0]]


def test_a_ranking_is_all_its_pairs_and_counts_once():
    rewards = torch.tensor([[0.2, 1.0, -0.5], [2.0, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    targets = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    rankings = torch.tensor([[1, 0, 2], [-1, -1, -1]])
    loss, metrics = candidates_loss(rewards, targets, rankings, mask)

    def pair(better, worse):
        return math.log1p(math.exp(worse - better))

    ranked = (pair(1.0, 0.2) + pair(1.0, -0.5) + pair(0.2, -0.5)) / 3
    assert loss.item() == pytest.approx((ranked + pair(0.5, 2.0)) / 2, abs=1e-12)
    # Ranked pairs are all right, the other row is wrong; margins 0.8, 1.5, 0.7 and -1.5.
    assert metrics["accuracy"].item() == pytest.approx(0.5)
    assert metrics["margin"].item() == pytest.approx(((0.8 + 1.5 + 0.7) / 3 - 1.5) / 2)
    assert torch.autograd.gradcheck(lambda r: candidates_loss(r, targets, rankings, mask)[0], rewards)


def test_a_ranking_may_begin_with_the_first_candidate():
    """A row is ranked where its first entry is no -1; candidate 0 is an entry like any other."""
    rewards = torch.tensor([[1.0, 0.2, -0.5]], dtype=torch.float64)
    targets, mask = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    loss, metrics = candidates_loss(rewards, targets, torch.tensor([[0, 1, 2]]), mask)
    gaps = (0.8, 1.5, 0.7)
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in gaps) / 3, abs=1e-12)
    assert metrics["accuracy"] == 1.0 and metrics["margin"].item() == pytest.approx(1.0)


def test_a_margin_is_taken_from_the_first_reward():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    none, real = torch.full((2, 2), -1), torch.ones(2, 2, dtype=torch.bool)
    margin = torch.tensor([0.25, 1.0], dtype=torch.float64)
    loss, metrics = candidates_loss(rewards, targets, none, real, margin=margin)
    expected = (math.log1p(math.exp(-0.75)) + math.log1p(math.exp(1.5))) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert metrics["margin"].item() == pytest.approx(0.25)  # without the margin
    plain, _ = candidates_loss(rewards, targets, none, real)
    assert torch.equal(plain, preference_loss(rewards, targets)[0])


def test_centring():
    assert center_loss(torch.tensor([[1.0, 2.0], [0.5, -1.5]])).item() == pytest.approx((9.0 + 1.0) / 2)
    with pytest.raises(ValueError, match="centring works with pairs"):
        center_loss(torch.ones(2, 3))
