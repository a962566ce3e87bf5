"""An ensemble's preference and its doubt, against sums over all pairs of pairs and numbers worked by hand."""

import math

import pytest
import torch

from rlhf_ext.functional.doubt import auroc, ensemble_preference, pair_doubt
from rlhf_ext.functional.statistics import perplexity


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_preference_is_the_mean_of_the_members_in_their_own_units():
    gaps = torch.tensor([[2.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
    found = ensemble_preference(gaps, factors=[0.5, 3.0], noises=[0.0, 0.2])
    first = (sigmoid(1.0) + 0.8 * sigmoid(-3.0) + 0.1) / 2
    second = (sigmoid(0.25) + 0.8 * sigmoid(1.5) + 0.1) / 2
    assert found.tolist() == pytest.approx([first, second])
    # Not the preference of the mean gap, which is surer
    sure = ensemble_preference(torch.tensor([[6.0, -2.0]]), factors=[1.0, 1.0], noises=[0.0, 0.0]).item()
    assert sure == pytest.approx((sigmoid(6) + sigmoid(-2)) / 2, abs=1e-6) and sure < sigmoid(2.0) - 0.2


def test_auroc_is_the_share_of_pairs_in_order():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 6, (40,), generator=generator).double()
    positive = torch.rand(40, generator=generator) < 0.3
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in values[positive] for b in values[~positive]]
    assert auroc(values, positive) == pytest.approx(sum(wins) / len(wins)) != 0.5
    assert auroc(-values, positive) == pytest.approx(1 - sum(wins) / len(wins))
    assert auroc(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, False])) == 1.0
    assert auroc(torch.ones(3), torch.tensor([True, False, False])) == 0.5
    assert math.isnan(auroc(torch.ones(2), torch.ones(2, dtype=torch.bool)))


def test_doubt_by_hand():
    # Gaps of the members: (1, 3), (-1, 3), (2, -4), (1, -1), (5, 5)
    first = torch.tensor([[1.0, 3.0], [0.0, 4.0], [2.0, 0.0], [1.0, 0.0], [5.0, 6.0]], dtype=torch.float64)
    second = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 4.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    # Means 2, 1, -1, 0, 5: right, wrong, wrong, undecided, a tie in the label. Spreads of the gaps 1, 2, 3, 1, 0.
    found = pair_doubt(first, second, torch.tensor([1.0, 0.0, 0.9, 1.0, 0.5]))
    assert (found["judged"], found["errors"]) == (3, 2)
    assert found["spread_auroc"] == 1.0 and found["closeness_auroc"] == 1.0
    assert found["gap_spread_mean"] == pytest.approx((1 + 2 + 3 + 1 + 0) / 5)
    spreads = [1, 2, 1, 0.5, 0.5, 0, 0, 2, 0.5, 0.5]
    assert found["spread_mean"] == pytest.approx(sum(spreads) / 10)
    # The other way round is the same pairs
    turned = pair_doubt(second, first, torch.tensor([0.0, 1.0, 0.1, 0.0, 0.5]))
    assert turned == pytest.approx(found)
    # Sure where it is wrong
    sure = pair_doubt(first[[0, 4]], second[[0, 4]], torch.tensor([1.0, 0.0]))
    assert sure["spread_auroc"] == 0.0 and sure["closeness_auroc"] == 0.0
    assert math.isnan(pair_doubt(first[:1], second[:1], torch.tensor([1.0]))["spread_auroc"])
    # What a member adds to both completions of a pair decides nothing
    shift = torch.tensor([[0.0, 100.0]])
    assert pair_doubt(first + shift, second + shift, torch.ones(5))["gap_spread_mean"] == found["gap_spread_mean"]


def test_perplexity_by_hand():
    # Two answers of one and two tokens, every token with probability 1/8, in nats
    value, nll = perplexity(torch.tensor([-math.log(8), -2 * math.log(8)], dtype=torch.float64), num_tokens=3)
    assert (value.item(), nll.item()) == (pytest.approx(8.0), pytest.approx(math.log(8)))
    # Pooled over tokens, not averaged over answers: 1/2 once and 1/4 four times
    value, _ = perplexity(torch.tensor([-math.log(2), -4 * math.log(4)]), num_tokens=5)
    assert value.item() == pytest.approx(2 ** (9 / 5), rel=1e-6) and value.dtype == torch.float64


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ensemble_preference(torch.zeros(3, 2), factors=[1.0], noises=[0.0, 0.0]), r"\(3, 2\).*1 `factors`"),
        (lambda: ensemble_preference(torch.zeros(1, 1), factors=[-1.0], noises=[0.0]), "factor.*-1"),
        (lambda: auroc(torch.zeros(2), torch.zeros(3, dtype=torch.bool)), "values.*shape"),
        (lambda: auroc(torch.tensor([math.nan]), torch.ones(1, dtype=torch.bool)), "values.*finite"),
        (lambda: pair_doubt(torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(2)), "two members"),
        (lambda: pair_doubt(torch.zeros(2, 2), torch.zeros(2, 3), torch.ones(2)), "second.*shape"),
        (lambda: pair_doubt(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([2.0])), "targets.*2.0"),
        (lambda: perplexity(torch.zeros(2), num_tokens=0), "num_tokens.*0"),
        (lambda: perplexity(torch.zeros(2, 2), num_tokens=1), r"logps.*\(2, 2\)"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
