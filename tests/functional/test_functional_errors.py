"""Wrong inputs raise ValueError that names the field, what was found and what to do."""

import math

import pytest
import torch

from rlhf_ext import functional as F


X = torch.zeros(2, 3)
WIDE = torch.zeros(2, 4)
ROW = torch.zeros(1, 3)  # would broadcast
M = torch.ones(2, 3, dtype=torch.bool)
S = torch.zeros(2)
HID, HEAD = torch.zeros(2, 3, 4), torch.zeros(5, 4)
PAIR = torch.zeros(2, 2)
ONE = torch.tensor([[1.0, 0.0], [0.0, 1.0]])


# name: arguments by keyword; the tensors of TOKENS[name] have the shape of the mask
VALID = {
    "masked_mean": {"x": X, "mask": M},
    "masked_var": {"x": X, "mask": M},
    "masked_whiten": {"x": X, "mask": M},
    "discounted_returns": {"rewards": X, "mask": M, "gamma": 0.9},
    "compute_gae": {"rewards": X, "values": X, "mask": M, "gamma": 0.9, "gae_lambda": 0.9},
    "shape_rewards": {"scores": S, "kl": X, "mask": M, "kl_coef": 0.1, "token_rewards": X},
    "policy_gradient_loss": {"logps": X, "advantages": X, "mask": M},
    "ppo_clip_loss": {"logps": X, "old_logps": X, "advantages": X, "mask": M, "epsilon": 0.2},
    "ppo_penalty_loss": {"logps": X, "old_logps": X, "advantages": X, "kl": X, "mask": M, "penalty_coef": 1.0},
    "entropy_loss": {"entropy": X, "mask": M},
    "value_loss": {"values": X, "old_values": X, "returns": X, "mask": M},
    "lm_loss": {"logps": X, "mask": M},
    "preference_loss": {"rewards": PAIR, "targets": ONE, "mask": torch.ones(2, 2, dtype=torch.bool)},
    "exact_kl": {"old_hidden": HID, "old_head": HEAD, "hidden": HID, "head": HEAD, "mask": M, "chunk_size": 2},
    "estimate_kl": {"logps": X, "ref_logps": X, "estimator": "k1"},
    "leave_one_out_advantages": {"returns": S, "group_size": 2},
    "top_p_mask": {"logits": X, "top_p": 0.9, "min_tokens": 1, "keep_ids": None},
}
TENSORS = [
    (name, field)
    for name, arguments in VALID.items()
    for field, value in arguments.items()
    if isinstance(value, torch.Tensor) and field != "mask"
]
WITH_MASK = [name for name, arguments in VALID.items() if "mask" in arguments]


def call(name, **changes):
    return getattr(F, name)(**{**VALID[name], **changes})


def test_the_table_is_complete_and_valid():
    functions = {name for name in F.__all__ if name[0].islower()}
    assert functions == set(VALID)
    assert set(F.__all__) - functions == {"AdaptiveKLController", "AdaptivePenaltyController"}
    for name in VALID:
        call(name)


@pytest.mark.parametrize("name, field", TENSORS)
def test_integers_and_lists_are_refused(name, field):
    with pytest.raises(ValueError, match=rf"`{field}` has dtype torch.int64.*float"):
        call(name, **{field: VALID[name][field].long()})
    with pytest.raises(ValueError, match=rf"`{field}` is a list.*tensor"):
        call(name, **{field: VALID[name][field].tolist()})


@pytest.mark.parametrize(
    "name, field", [(n, f) for n, f in TENSORS if n not in ("leave_one_out_advantages", "top_p_mask", "exact_kl")]
)
@pytest.mark.parametrize("wrong", [WIDE, ROW, X[0], X[:, :1], X[0, 0]], ids=["wide", "row", "1d", "column", "0d"])
def test_shapes_are_never_broadcast(name, field, wrong):
    # Without a mask the first tensor sets the shape, so the second one is the one that does not fit.
    named = {("estimate_kl", "logps"): "ref_logps", ("preference_loss", "rewards"): "(rewards|targets)"}
    with pytest.raises(ValueError, match=rf"`{named.get((name, field), field)}` has shape \("):
        call(name, **{field: wrong})


@pytest.mark.parametrize("name", WITH_MASK)
def test_masks_must_be_bool(name):
    mask = VALID[name]["mask"]
    with pytest.raises(ValueError, match=r"`mask` has dtype torch.int64, not torch.bool.*\.bool\(\)"):
        call(name, mask=mask.long())
    with pytest.raises(ValueError, match="`mask` is a list"):
        call(name, mask=mask.tolist())
    with pytest.raises(ValueError, match="has shape"):
        call(name, mask=torch.ones(2, 9, dtype=torch.bool))


@pytest.mark.parametrize("name", [n for n in WITH_MASK if n not in ("masked_mean", "masked_var", "masked_whiten")])
def test_masks_must_be_two_dimensional(name):
    with pytest.raises(ValueError, match=r"`(mask|rewards)` has shape \(3,\)"):
        three = {k: torch.zeros(3) for k, v in VALID[name].items() if isinstance(v, torch.Tensor) and k != "scores"}
        call(name, **{**three, "mask": torch.ones(3, dtype=torch.bool)})


NAN, INF = math.nan, math.inf
SCALARS = [
    ("discounted_returns", "gamma", [-0.1, 1.1, NAN]),
    ("compute_gae", "gamma", [-0.1, 1.1, NAN]),
    ("compute_gae", "gae_lambda", [-0.1, 1.1, NAN]),
    ("shape_rewards", "kl_coef", [-0.1, NAN, INF]),
    ("ppo_clip_loss", "epsilon", [0.0, -0.2, NAN, INF]),
    ("ppo_clip_loss", "epsilon_high", [0.0, -0.2, NAN]),
    ("ppo_clip_loss", "delta", [1.0, 0.5, -1.0, NAN]),
    ("ppo_penalty_loss", "penalty_coef", [-0.1, NAN]),
    ("value_loss", "epsilon_value", [0.0, -0.2, NAN]),
    ("preference_loss", "prediction_noise", [-0.1, 1.0, NAN]),
    ("exact_kl", "chunk_size", [0, -1]),
    ("top_p_mask", "top_p", [0.0, 1.1, NAN]),
    ("top_p_mask", "min_tokens", [0, -1]),
    ("leave_one_out_advantages", "group_size", [0, 1, -2]),
]


@pytest.mark.parametrize("name, field, value", [(n, f, v) for n, f, values in SCALARS for v in values])
def test_scalars_out_of_range(name, field, value):
    with pytest.raises(ValueError, match=rf"`{field}` is {value!r}: set it to a finite number"):
        call(name, **{field: value})


@pytest.mark.parametrize("name", [name for name in VALID if name.endswith("_loss")])
@pytest.mark.parametrize("reduction", ["none", "batchmean", None])
def test_unknown_reduction(name, reduction):
    with pytest.raises(ValueError, match=rf"`reduction` is {reduction!r}: use 'mean'"):
        call(name, reduction=reduction)


def test_scalars_are_keyword_only():
    with pytest.raises(TypeError):
        F.compute_gae(X, X, M, 0.9, 0.9)
    with pytest.raises(TypeError):
        F.ppo_clip_loss(X, X, X, M, 0.2)
    with pytest.raises(TypeError):
        F.AdaptiveKLController(0.1, 6.0, 100)


def test_single_fields():
    with pytest.raises(ValueError, match=r"`bootstrap_values` has shape \(2, 3\), expected \(2,\)"):
        call("compute_gae", bootstrap_values=X)
    with pytest.raises(ValueError, match=r"`returns` has shape \(2, 3\), expected \(N,\)"):
        call("leave_one_out_advantages", returns=X)
    with pytest.raises(ValueError, match="`group_size` is 2, which does not divide the 5 returns"):
        call("leave_one_out_advantages", returns=torch.zeros(5))
    with pytest.raises(ValueError, match="`estimator` is 'k4': use 'k1', 'k2' or 'k3'"):
        call("estimate_kl", estimator="k4")
    for ids in ([3], [-1]):
        with pytest.raises(ValueError, match=r"`keep_ids` holds \[.*\]: every id must lie in \[0, 3\)"):
            call("top_p_mask", keep_ids=ids)
    with pytest.raises(ValueError, match="`logits` has no dimension"):
        call("top_p_mask", logits=torch.zeros(()))


def test_preference_rows():
    with pytest.raises(ValueError, match=r"`rewards` has shape \(2, 1\), expected \(N, K\), K >= 2"):
        F.preference_loss(torch.zeros(2, 1), torch.ones(2, 1))
    with pytest.raises(ValueError, match="`mask` leaves 1 candidates in row 1"):
        call("preference_loss", mask=torch.tensor([[True, True], [True, False]]))
    for row in ([0.5, 0.4], [1.2, -0.2], [0.0, 0.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match=r"`targets` row 1 is \[.*\]: give numbers >= 0 that sum to 1"):
            F.preference_loss(PAIR, torch.tensor([[1.0, 0.0], row]))
    # Weight on a candidate that is not real is missing from the real ones.
    with pytest.raises(ValueError, match="`targets` row 0"):
        F.preference_loss(torch.zeros(1, 3), torch.tensor([[0.5, 0.0, 0.5]]), mask=torch.tensor([[True, True, False]]))
    F.preference_loss(PAIR, torch.tensor([[1.0, 0.0], [0.50004, 0.50004]]))


def test_heads():
    with pytest.raises(ValueError, match=r"`hidden` has shape \(2, 4, 4\), expected \(2, 3, 'H'\)"):
        call("exact_kl", hidden=torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"`old_head` has shape \(4, 5\), expected \('V', 4\)"):
        call("exact_kl", old_head=HEAD.T)
    with pytest.raises(ValueError, match=r"`head bias` has shape \(4,\), expected \(5,\)"):
        call("exact_kl", head=(HEAD, torch.zeros(4)))
    with pytest.raises(ValueError, match="`old_head` has 6 tokens and `head` 5: one vocabulary"):
        call("exact_kl", old_head=torch.zeros(6, 4))


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF])
def test_controllers(bad):
    for field in ("kl_coef", "target", "horizon"):
        with pytest.raises(ValueError, match=f"`{field}` is"):
            F.AdaptiveKLController(**{"kl_coef": 0.1, "target": 6.0, "horizon": 100.0, field: bad})
    for field in ("penalty_coef", "target"):
        with pytest.raises(ValueError, match=f"`{field}` is"):
            F.AdaptivePenaltyController(**{"penalty_coef": 1.0, "target": 0.01, field: bad})
    adaptive, penalty = (
        F.AdaptiveKLController(0.1, target=6.0, horizon=100),
        F.AdaptivePenaltyController(1.0, target=1.0),
    )
    for controller, field in ((adaptive, "kl_coef"), (penalty, "penalty_coef")):
        with pytest.raises(ValueError, match=f"`{field}` is"):
            controller.load_state_dict({field: bad})
        with pytest.raises(ValueError, match=f"not '{field}'"):
            controller.load_state_dict({})
    if not math.isfinite(bad):
        with pytest.raises(ValueError, match="`kl` is (nan|inf)"):
            adaptive.update(bad, 10)
        with pytest.raises(ValueError, match="`kl` is (nan|inf)"):
            penalty.update(torch.tensor(bad))
    else:
        with pytest.raises(ValueError, match="`num_sequences` is"):
            adaptive.update(6.0, bad)
    with pytest.raises(ValueError, match="`num_sequences` is 500"):
        adaptive.update(0.0, 500)
    assert adaptive.kl_coef == 0.1 and penalty.penalty_coef == 1.0
