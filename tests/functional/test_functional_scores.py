"""What is done to a score before it is paid, against the worked numbers and by hand."""

import math

import pytest
import torch

from rlhf_ext.functional.scores import (
    as_rewards,
    as_scores,
    clip_scores,
    cut_length,
    ensemble_spread,
    normalize_scores,
    penalize_unfinished,
    score_moments,
    score_normalization,
)
from tests.functional.vectors import case, close


NAN = math.nan


def test_zieglers_scores_have_mean_0_and_std_1_under_the_reference():
    given, expected = case("rm.norm.ziegler")
    raw = torch.tensor(given["raw"], dtype=torch.float64)
    gain, bias = score_normalization(raw)
    assert gain == pytest.approx(expected["gain"], abs=1e-12) and bias == pytest.approx(expected["bias"], abs=1e-12)
    normalized = normalize_scores(raw, gain=gain, bias=bias)
    close(normalized, expected["normalized"], torch.float64)
    assert normalized.mean().item() == pytest.approx(0, abs=1e-12)
    assert normalized.square().mean().item() == pytest.approx(1, abs=1e-12)


def test_stiennons_reference_answers_score_0():
    given, expected = case("rm.norm.stiennon")
    gain, bias = score_normalization(torch.tensor(given["ref_scores"], dtype=torch.float64), scale=False)
    assert gain == 1.0 and bias == pytest.approx(-expected["bias"], abs=1e-12)
    close(
        normalize_scores(torch.tensor(given["scores"], dtype=torch.float64), gain=gain, bias=bias),
        expected["normalized"],
        torch.float64,
    )


def test_no_gain_is_made_of_equal_scores_or_of_none():
    for scores in (torch.full((5,), 3.0), torch.tensor([2.0])):
        with pytest.raises(ValueError, match="standard deviation"):
            score_normalization(scores)
    assert score_normalization(torch.tensor([2.0]), scale=False) == (1.0, -2.0)
    for scores in (torch.tensor([]), torch.tensor([1.0, NAN]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="one finite score"):
            score_normalization(scores)


def test_a_negative_gain_would_train_the_opposite():
    for gain in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="gain"):
            normalize_scores(torch.zeros(2), gain=gain, bias=0.0)
    assert normalize_scores(torch.tensor([1.0, NAN]).bfloat16(), gain=2.0, bias=-1.0).tolist()[0] == 1.0


def test_clip():
    clipped = clip_scores(torch.tensor([-9.0, 0.5, 9.0, NAN]), low=-1.0, high=2.0)
    torch.testing.assert_close(clipped, torch.tensor([-1.0, 0.5, 2.0, NAN]), equal_nan=True)
    with pytest.raises(ValueError, match="low"):
        clip_scores(torch.zeros(1), low=1.0, high=1.0)


def test_an_unfinished_answer_loses_at_either_sign_of_its_score():
    scores, finished = torch.tensor([2.0, 2.0, -3.0, -3.0, NAN]), torch.tensor([True, False, True, False, False])
    found = penalize_unfinished(scores, finished, penalty=1.5)
    torch.testing.assert_close(found, torch.tensor([2.0, 0.5, -3.0, -4.5, NAN]), equal_nan=True)
    with pytest.raises(ValueError, match="penalty"):
        penalize_unfinished(scores, finished, penalty=-1.0)


def test_zieglers_cut():
    given, expected = case("ziegler.truncate_filter")
    token, start, pad = given["truncate_token"], given["truncate_after"], given["pad"]
    lengths = [cut_length(ids, [token], min_index=start) for ids in given["responses"]]
    assert [length is not None for length in lengths] == expected["valid"]
    for ids, length, processed in zip(given["responses"], lengths, expected["processed"], strict=True):
        assert ids[:length] + [pad] * (len(ids) - len(ids[:length])) == processed
    assert cut_length([7, 9, 7], {7, 9}, min_index=1) == 2 and cut_length([], [7]) is None
    with pytest.raises(ValueError, match="token_ids"):
        cut_length([1], [])
    with pytest.raises(ValueError, match="min_index"):
        cut_length([1], [1], min_index=-1)


def test_spread_and_moments():
    assert ensemble_spread(torch.tensor([[1.0, 3.0], [2.0, 2.0]])).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="two members"):
        ensemble_spread(torch.ones(3, 1))
    mean, std = score_moments(torch.tensor([1.0, NAN, 5.0]))
    assert (mean.item(), std.item()) == (3.0, 2.0)


def test_none_and_nan_mean_the_same():
    assert as_rewards(as_scores([1.0, None, 2])) == [1.0, None, 2.0]
