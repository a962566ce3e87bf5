"""Agreement: numbers worked by hand, those of Krippendorff's paper, and an independent implementation."""

import krippendorff
import numpy as np
import pytest
import torch

from rlhf_ext.functional.agreement import krippendorff_alpha, percent_agreement


# Four observers, twelve units: Krippendorff 2011, part C. 0 is a missing value.
PAPER = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]


def counts_of(ratings, num_values):
    rows = np.asarray(ratings)
    return torch.tensor([[int((column == value + 1).sum()) for value in range(num_values)] for column in rows.T])


def test_numbers_worked_by_hand():
    # Three units: two people agree on 0; two disagree; three say 0, 0, 1.
    counts = torch.tensor([[2, 0], [1, 1], [2, 1], [1, 0]])  # the last has one label and is left out
    # P: 1, 0, and one of three pairs.
    torch.testing.assert_close(percent_agreement(counts), torch.tensor(4 / 9, dtype=torch.float64))
    # Coincidences: o00 = 2 + 0 + 2*1/2 = 3, o01 = 0 + 1 + 2*1/2 = 2, o11 = 0; marginals 5 and 2, n = 7.
    # alpha = 1 - 6 * (2 + 2) / (5*2 + 2*5) = 1 - 24/20.
    wanted = torch.tensor(-0.2, dtype=torch.float64)
    torch.testing.assert_close(krippendorff_alpha(counts, metric="nominal"), wanted)
    # Two values have one distance between them, which cancels.
    torch.testing.assert_close(krippendorff_alpha(counts, metric="ordinal"), wanted)


def test_ordinal_by_hand():
    # A, tie, B: (A, tie), (tie, B), (A, A), (B, B). o_At = o_tA = o_tB = o_Bt = 1, o_AA = o_BB = 2; n = 3, 2, 3.
    counts = torch.tensor([[1, 1, 0], [0, 1, 1], [2, 0, 0], [0, 0, 2]])
    # d2(A, t) = (3 + 2 - 2.5)^2 = 6.25 = d2(t, B); d2(A, B) = (8 - 3)^2 = 25.
    # Observed 4 * 6.25 = 25; expected 2 * (3*2*6.25 + 2*3*6.25 + 3*3*25) = 600; alpha = 1 - 7 * 25 / 600.
    wanted = torch.tensor(1 - 175 / 600, dtype=torch.float64)
    torch.testing.assert_close(krippendorff_alpha(counts, metric="ordinal"), wanted)
    # Nominal: observed 4; expected 2 * (6 + 6 + 9) = 42; alpha = 1 - 7 * 4 / 42 = 1/3.
    wanted = torch.tensor(1 / 3, dtype=torch.float64)
    torch.testing.assert_close(krippendorff_alpha(counts, metric="nominal"), wanted)


def test_numbers_of_the_paper():
    counts = counts_of(PAPER, 5)
    assert round(float(krippendorff_alpha(counts, metric="nominal")), 3) == 0.743
    assert round(float(krippendorff_alpha(counts, metric="ordinal")), 3) == 0.815


@pytest.mark.parametrize("metric", ["nominal", "ordinal"])
def test_an_independent_implementation_agrees(metric):
    rng = np.random.default_rng(0)
    for num_people, num_units, num_values in [(2, 30, 2), (3, 50, 3), (7, 20, 5), (4, 200, 4)]:
        ratings = rng.integers(0, num_values + 1, (num_people, num_units))
        reference = krippendorff.alpha(
            value_counts=counts_of(ratings, num_values).numpy(), level_of_measurement=metric
        )
        ours = float(krippendorff_alpha(counts_of(ratings, num_values), metric=metric))
        assert ours == pytest.approx(reference, abs=1e-12)


def test_identities():
    agreeing = torch.tensor([[3, 0, 0], [0, 2, 0], [0, 0, 4]])
    for metric in ("nominal", "ordinal"):
        assert float(krippendorff_alpha(agreeing, metric=metric)) == 1.0
        assert krippendorff_alpha(torch.tensor([[2, 0], [3, 0]]), metric=metric).isnan()
        assert krippendorff_alpha(torch.tensor([[1, 0], [0, 1]]), metric=metric).isnan()
    assert float(percent_agreement(agreeing)) == 1.0
    assert percent_agreement(torch.zeros(0, 3)).isnan()
    # Alpha of random labels is 0 within 4 standard errors: 1 / sqrt(U) for two labels out of two values.
    drawn = torch.randint(2, (4000, 2), generator=torch.Generator().manual_seed(0))
    chance = torch.stack([(drawn == value).sum(dim=1) for value in (0, 1)], dim=1)
    assert abs(float(krippendorff_alpha(chance, metric="nominal"))) < 4 / 4000**0.5


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`metric` is 'interval'"):
        krippendorff_alpha(torch.ones(2, 2), metric="interval")
    for bad in (torch.ones(3), torch.full((2, 2), 0.5), -torch.ones(2, 2), [[1, 2]]):
        with pytest.raises(ValueError, match="`counts`"):
            percent_agreement(bad)
