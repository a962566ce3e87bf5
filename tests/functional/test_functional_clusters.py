"""Rows of one prompt count for less than as many prompts."""

import math

import pytest

from rlhf_ext.functional.clusters import (
    effective_trials,
    grouped_interval,
    grouped_mean_interval,
    grouped_standard_error,
)
from rlhf_ext.functional.intervals import wilson_interval


def test_effective_number_by_hand():
    # p = .5; group sums of (credit - p): a 1, b -1; v = 2 / 1 * (1 + 1) / 16 = 1/4; .25 / .25 = 1
    assert effective_trials([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b"]) == pytest.approx(1.0)
    # p = 2/3; sums a 2/3, b 2/3 - 1 = -1/3 ... each prompt once: the variance of independent rows, capped at n
    credits = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    v = 6 / 5 * sum((c - 2 / 3) ** 2 for c in credits) / 36
    assert effective_trials(credits, range(6)) == pytest.approx((2 / 9) / v)
    assert effective_trials(credits, range(6)) <= 6
    # Nobody disagrees: as many as there are prompts
    assert effective_trials([1.0] * 6, [0, 0, 0, 1, 1, 1]) == 2.0
    assert effective_trials([1.0, 0.0], [0, 0]) == 1.0


def test_six_copies_of_a_row_are_one_row():
    credits = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    copies = [c for c in credits for _ in range(6)]
    groups = [i for i in range(8) for _ in range(6)]
    low, high = grouped_interval(copies, groups)
    alone = grouped_interval(credits, range(8))
    assert (low, high) == (pytest.approx(alone[0]), pytest.approx(alone[1]))
    naive = wilson_interval(sum(copies), len(copies))
    assert high - low > 1.9 * (naive[1] - naive[0])


def test_interval_holds_its_promise_under_groups():
    """Prompts that are all right or all wrong: 95% intervals over rows would miss far too often."""
    import torch

    generator, hits, naive = torch.Generator().manual_seed(0), 0, 0
    for _ in range(400):
        right = (torch.rand(60, generator=generator) < 0.7).double()
        credits = right.repeat_interleave(6).tolist()
        groups = [i for i in range(60) for _ in range(6)]
        low, high = grouped_interval(credits, groups)
        hits += low <= 0.7 <= high
        low, high = wilson_interval(sum(credits), len(credits))
        naive += low <= 0.7 <= high
    assert hits / 400 > 0.92 and naive / 400 < 0.75


@pytest.mark.parametrize(
    "credits, groups, words",
    [([], [], "groups.*0"), ([1.0], [1, 2], "groups.*2"), ([1.5], [1], "credits.*1.5"), ([math.nan], [1], "nan")],
)
def test_bad_input_is_named(credits, groups, words):
    with pytest.raises(ValueError, match=words):
        effective_trials(credits, groups)


def test_standard_error_over_groups_by_hand():
    # Means 1 and 3 of two groups: sd sqrt(2), over sqrt(2)
    assert grouped_standard_error([0.0, 2.0, 3.0, 3.0], 2) == pytest.approx(1.0)
    assert math.isnan(grouped_standard_error([1.0, 2.0], 2))
    with pytest.raises(ValueError, match="3 `values` are no groups of 2"):
        grouped_standard_error([1.0, 2.0, 3.0], 2)


def test_mean_and_interval_by_hand():
    # Mean 2, sd 1 of three values, standard error 1 / sqrt(3)
    assert grouped_mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 1.96 / 3**0.5, 2 + 1.96 / 3**0.5))
    # The groups of the test above, shifted: mean 1, standard error 1
    assert grouped_mean_interval([-1.0, 1.0, 2.0, 2.0], 2) == pytest.approx((1.0, -0.96, 2.96))
