"""Logged numbers: right by hand, blind to padding (pitfall S24), finite without a single token."""

import functools
import math

import pytest
import torch

from rlhf_ext.functional.statistics import (
    completion_statistics,
    distinct_ngrams,
    explained_variance,
    is_below_zero,
    pooled_statistic,
    ratio_statistics,
    rollout_statistics,
)


MASK = torch.tensor([[True, True, False], [True, False, False], [False, True, True]])
NAMES = ("kl", "rewards", "advantages", "values", "returns")


def inputs(mask=MASK, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    found = {name: torch.randn(mask.shape).to(dtype) for name in NAMES}
    return {"scores": torch.randn(len(mask)).to(dtype), "mask": mask, **found}


def padded(x, left=2, right=3):
    """More columns on either side, and NaN wherever there is padding."""
    fill = False if x.dtype == torch.bool else math.nan
    return torch.nn.functional.pad(x.float(), (left, right), value=fill).to(x.dtype)


def everything(mask=MASK, change=lambda x: x, dtype=torch.float32):
    """All numbers of the module; `change` is applied to every `(B, T)` tensor."""
    given = inputs(mask, dtype=dtype)
    given = {name: change(x) if x.dim() == 2 else x for name, x in given.items()}
    ratios = ratio_statistics(given["advantages"], given["values"], given["mask"])
    return {**rollout_statistics(**given), **ratios}


def test_padding_changes_nothing():
    plain = everything()
    assert len(plain) == 11

    def with_nan(x):
        return x if x.dtype == torch.bool else torch.where(MASK, x, math.nan)

    for change in (padded, with_nan, lambda x: padded(with_nan(x), 0, 7)):
        for name, value in everything(change=change).items():
            torch.testing.assert_close(value, plain[name], msg=name)


def test_ratio_extremes_are_those_of_real_tokens():
    logps, old = torch.tensor([[0.2, 0.4], [0.1, 0.3]]), torch.zeros(2, 2)
    mask = torch.tensor([[True, True], [True, False]])
    found = ratio_statistics(logps, old, mask)
    # All above 1, then all below: a padded position counted as 1 would be the extreme.
    assert found["policy/ratio_min"].item() == pytest.approx(math.exp(0.1))
    assert found["policy/ratio_max"].item() == pytest.approx(math.exp(0.4))
    below = ratio_statistics(-logps, old, mask)
    assert below["policy/ratio_max"].item() == pytest.approx(math.exp(-0.1))
    by_hand = sum(math.exp(x) - 1 - x for x in (0.2, 0.4, 0.1)) / 3
    assert found["policy/approx_kl"].item() == pytest.approx(by_hand, rel=1e-5)


def test_small_distances_are_not_lost():
    """exp(x) - 1 - x at 1e-3 is 5e-7: below what float32 keeps of r - 1 alone, if expm1 is not used."""
    tiny = torch.full((1, 4), 1e-3)
    found = ratio_statistics(tiny, torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool))
    assert found["policy/approx_kl"].item() == pytest.approx(5e-7, rel=1e-3)


def test_rollout_statistics_by_hand():
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    kl = torch.tensor([[0.5, 0.1], [0.2, 9.0], [0.3, 9.0]])
    rewards = torch.tensor([[1.0, 2.0], [4.0, 9.0], [50.0, 9.0]])
    values = torch.tensor([[1.0, 2.0], [3.0, 9.0], [5.0, 9.0]])
    scores = torch.tensor([1.0, 2.0, math.nan])
    found = rollout_statistics(scores, kl, rewards, values, mask, values, values)
    assert found["kl"].item() == pytest.approx(1.1 / 3), "summed per sequence, mean over sequences"
    assert found["kl_per_token"].item() == pytest.approx(1.1 / 4)
    assert found["rlhf_reward"].item() == pytest.approx(3.5), "the row without a score is left out"
    # The row without a score teaches nothing, and its 5 is in no moment.
    assert found["advantages/mean"].item() == pytest.approx(2)
    assert found["advantages/std"].item() == pytest.approx(math.sqrt(14 / 3 - 4))
    assert found["value/mean"].item() == found["returns/mean"].item() == pytest.approx(2)
    assert found["value/explained_variance"] == 1
    assert set(rollout_statistics(scores, kl, rewards, values, mask)) == {
        name for name in found if not name.startswith(("value", "returns"))
    }


def test_explained_variance():
    mask = torch.ones(1, 4, dtype=torch.bool)
    returns = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert explained_variance(returns + 7, returns, mask) == 1, "an offset is no variance"
    assert explained_variance(torch.zeros(1, 4), returns, mask) == 0
    assert explained_variance(-returns, returns, mask) == -3
    assert explained_variance(returns, torch.ones(1, 4), mask) == 0, "no variance to explain"


def test_an_empty_mask_gives_finite_numbers():
    found = everything(torch.zeros(2, 3, dtype=torch.bool))
    for name, value in found.items():
        assert value == 0, name
    for name, value in everything(torch.zeros(0, 3, dtype=torch.bool)).items():
        assert torch.isfinite(value), name
    given = inputs()
    given["scores"] = torch.full((3,), math.nan)
    assert rollout_statistics(**given)["rlhf_reward"] == 0


@pytest.mark.parametrize("sizes", [(9,), (1, 8), (2, 3, 4), (0, 9)], ids=str)
def test_a_whole_has_one_number_however_it_is_cut(sizes):
    torch.manual_seed(0)
    whole = torch.rand(9)
    parts, weights = whole.split(sizes), torch.tensor([float(n) for n in sizes])
    for kind, number in (("mean", torch.mean), ("max", torch.max), ("min", torch.min)):
        values = torch.stack([number(part) if len(part) else torch.tensor(-3.0) for part in parts])
        torch.testing.assert_close(pooled_statistic(values, weights, kind=kind), number(whole), msg=kind)
    for kind in ("mean", "max", "min"):
        whole_of = functools.partial(pooled_statistic, torch.tensor([math.nan, 2.0]), kind=kind)
        assert whole_of(torch.tensor([0.0, 3.0])) == 2
        assert whole_of(torch.tensor([1.0, 3.0])).isnan(), "a run that has diverged must not log a number"
        assert whole_of(torch.tensor([0.0, 0.0])) == 0
    with pytest.raises(ValueError, match="`kind` is 'median': set it to 'mean', 'max' or 'min'"):
        pooled_statistic(whole, whole, kind="median")
    with pytest.raises(ValueError, match="`values` has shape"):
        pooled_statistic(whole, whole[:1])


def test_half_precision_is_raised_and_nothing_has_a_gradient():
    for name, value in everything(dtype=torch.bfloat16).items():
        assert value.dtype == torch.float32, name
    logps = torch.zeros(1, 2, requires_grad=True)
    found = ratio_statistics(logps, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("name", [*NAMES, "scores"])
def test_wrong_shapes_are_named(name):
    given = inputs()
    given[name] = given[name][:1]
    with pytest.raises(ValueError, match=f"`{name}` has shape"):
        rollout_statistics(**given)
    given[name] = inputs()[name].long()
    with pytest.raises(ValueError, match=f"`{name}` has dtype"):
        rollout_statistics(**given)


def test_a_mask_of_integers_is_refused():
    with pytest.raises(ValueError, match="`mask` has dtype"):
        ratio_statistics(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2).long())
    with pytest.raises(ValueError, match="`old_logps` has shape"):
        ratio_statistics(torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool))


IDS = torch.tensor([[5, 6, 5, 6], [5, 6, 1, 9], [7, 1, 9, 9]])
REAL = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()


def test_distinct_ngrams_by_hand():
    """Tokens 5 6 5 6 | 5 6 1 | 7 1: unigrams 5 6 1 7 of 9; bigrams 56 65 61 71 of 6; trigrams 565 656 561 of 3."""
    found = [distinct_ngrams(IDS, REAL, n=n).item() for n in (1, 2, 3, 4, 5)]
    assert found == pytest.approx([4 / 9, 4 / 6, 1.0, 1.0, 0.0])
    one = torch.ones(2, 3, dtype=torch.bool)
    assert distinct_ngrams(torch.full((2, 3), 7), one, n=2).item() == 0.25
    assert distinct_ngrams(torch.arange(6).view(2, 3), one, n=2).item() == 1.0, "no n-gram reaches into the next row"


def test_an_ngram_has_no_hole():
    mask = torch.tensor([[True, False, True, True]])
    assert distinct_ngrams(torch.tensor([[3, 4, 3, 4]]), mask, n=2).item() == 1.0
    assert distinct_ngrams(torch.tensor([[3, 4, 3, 4]]), mask, n=1).item() == pytest.approx(2 / 3)


def test_completion_statistics_by_hand():
    found = completion_statistics(IDS, REAL, eos_token_ids=[1, 9])
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {"completions/eos_rate": 2 / 3, "completions/distinct_1": 4 / 9, "completions/distinct_2": 4 / 6}
    )
    assert completion_statistics(IDS, REAL, eos_token_ids=[9])["completions/eos_rate"] == 0, "padding ends nothing"
    wider = completion_statistics(
        torch.nn.functional.pad(IDS, (0, 3), value=1), torch.nn.functional.pad(REAL, (0, 3)), eos_token_ids=[1, 9]
    )
    assert wider == found
    for empty in (completion_statistics(IDS, torch.zeros_like(REAL), eos_token_ids=[1]), _nothing()):
        assert all(value == 0 for value in empty.values())


def _nothing():
    return completion_statistics(torch.zeros(0, 3).long(), torch.zeros(0, 3).bool(), eos_token_ids=[1])


def test_token_ids_are_checked():
    with pytest.raises(ValueError, match="`ids` is torch.float32 of shape .3, 4.*pass the token ids"):
        distinct_ngrams(IDS.float(), REAL, n=1)
    with pytest.raises(ValueError, match="`ids` is torch.int64 of shape .3, 3"):
        completion_statistics(IDS[:, :3], REAL, eos_token_ids=[1])
    with pytest.raises(ValueError, match="n"):
        distinct_ngrams(IDS, REAL, n=0)


def test_a_kl_below_zero_beyond_noise():
    mask = torch.ones(16, 2, dtype=torch.bool)
    noise = torch.linspace(-1, 1, 16)[:, None].expand(16, 2) / 2
    assert not is_below_zero(noise, mask) and not is_below_zero(noise - 0.2, mask)
    assert is_below_zero(noise - 1.0, mask) and not is_below_zero(noise + 1.0, mask)
    assert not is_below_zero(noise[:7] - 9.0, mask[:7])  # too few
    hidden = torch.where(torch.tensor([True, False]), noise, torch.nan)
    assert not is_below_zero(hidden, mask & ~hidden.isnan())
