"""The KL to the reference: its unit, its sign, its mask, its estimator, and the coefficient that follows it."""

import logging

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import pad

from rlhf_ext import PPOConfig
from rlhf_ext.functional import estimate_kl, shape_rewards
from rlhf_ext.trainers.ppo_rollout import token_mask
from tests.tiny import tiny_reward_model, tiny_tokenizer
from tests.trainers.ppo_runs import make_trainer, stir
from tests.trainers.ppo_runs import rollout as ragged_rollout
from tests.trainers.test_ppo_roles import PROMPTS, build, logged


def test_s23_the_controller_is_fed_nats_per_sequence(tmp_path):
    """Summed over a completion, not per token, and not times `kl_coef`."""
    config = {"adaptive_kl_target": 0.2, "kl_horizon": 100, "kl_coef": 0.5}
    trainer = make_trainer(tmp_path, **config)
    stir(trainer)
    fed, stock = [], trainer.kl_controller.update
    trainer.kl_controller.update = lambda *args: fed.append(args) or stock(*args)
    batch = ragged_rollout(trainer)
    mask = token_mask(batch)
    with torch.no_grad():
        reference = trainer._reference_logps(batch, "train")
    per_sequence = torch.where(mask, batch["old_per_token_logps"] - reference, 0.0).sum(1)
    expected = per_sequence.mean().item()
    assert abs(expected) > 0.1
    assert fed[-1] == (pytest.approx(expected, rel=1e-4), len(PROMPTS))
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(expected, rel=1e-4)
    assert trainer._metrics["train"]["kl_per_token"][-1] == pytest.approx(
        per_sequence.sum().item() / mask.sum().item(), rel=1e-4
    )


def test_r21_the_coefficient_follows_its_rule_and_evaluation_does_not_move_it(tmp_path):
    rows = Dataset.from_dict({"prompt": PROMPTS})
    trainer = build(
        tmp_path,
        reward_funcs=tiny_reward_model("llama", tiny_tokenizer(), seed=1),
        eval_dataset={"held out": rows.select(range(4))},
        config={
            "adaptive_kl_target": 0.2,
            "kl_horizon": 100,
            "max_steps": 5,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "per_device_eval_batch_size": 4,
        },
    )
    trainer.train()
    kl, coef = logged(trainer, "kl"), logged(trainer, "kl_coef")
    expected = [0.05]
    for value in kl:
        error = min(max(value / 0.2 - 1, -0.2), 0.2)
        expected.append(expected[-1] * (1 + error * len(PROMPTS) / 100))
    assert coef == pytest.approx(expected[:-1], rel=1e-5)
    assert trainer.kl_coef == pytest.approx(expected[-1], rel=1e-5)
    assert len(set(coef)) == 5 and max(kl) > 0.2 > min(kl), "both directions"
    evaluated = [entry for entry in trainer.state.log_history if any(key.startswith("eval_") for key in entry)]
    assert len(evaluated) >= 5
    names = set().union(*evaluated)
    for name in ("kl", "rlhf_reward", "value/explained_variance"):
        assert f"eval_held out_{name}" in names or f"eval_{name}" in names, names


@pytest.mark.parametrize("fields", [{"adaptive_kl_target": 0.0}, {"kl_horizon": 0}], ids=str)
def test_r21_a_target_or_horizon_of_zero_is_refused(tmp_path, fields):
    config = {"adaptive_kl_target": 1.0, **fields}
    with pytest.raises(ValueError, match=f"{next(iter(fields))}=.* must be positive"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **config)


def take_metrics(trainer):
    trainer._log_step("train")
    found = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    return found


@pytest.mark.parametrize("objective", ["clip", "penalty"])
def test_s24_no_logged_number_depends_on_padding(tmp_path, objective):
    """Two more columns before the prompts, three behind the completions, and garbage where a number may stand."""
    trainer = make_trainer(tmp_path, policy_objective=objective, entropy_bonus_coef=0.1, target_kl=1.0)
    stir(trainer)
    batch = ragged_rollout(trainer)
    stir(trainer)
    take_metrics(trainer)
    wide = dict(batch)
    for name in ("prompt_ids", "prompt_mask"):
        wide[name] = pad(batch[name], (2, 0))
    for name in ("completion_ids", "completion_mask"):
        wide[name] = pad(batch[name], (0, 3))
    for name in ("old_per_token_logps", "advantages", "values", "returns"):
        wide[name] = pad(batch[name], (0, 3), value=7.0)
    if "old_hidden" in batch:
        wide["old_hidden"] = pad(batch["old_hidden"], (0, 0, 0, 3), value=7.0)
    found = [{}, {}]
    for numbers, rows in zip(found, (batch, wide), strict=True):
        trainer._step_kl.zero_()
        numbers["loss"] = trainer._compute_loss(trainer.model, rows).item()
        numbers["step_kl"] = (trainer._step_kl[0] / trainer._step_kl[1]).item()
        numbers |= take_metrics(trainer)
    for numbers, rows in zip(found, (batch, wide), strict=True):
        fresh = {name: tensor for name, tensor in rows.items() if name != "old_per_token_logps"}
        with torch.no_grad():
            trainer._log_rollout(trainer._complete_rollout(fresh, "train"), "train")
        numbers |= take_metrics(trainer)
    assert found[0].keys() == found[1].keys()
    assert {"kl", "entropy", "policy/approx_kl", "policy/ratio_max", "value_loss", "clip_ratio/region_mean"} <= set(
        found[0]
    )
    assert found[0]["policy/approx_kl"] > 1e-3 and abs(found[0]["kl"]) > 1e-3
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_s26_only_k1_in_the_reward_has_the_gradient_of_the_kl(tmp_path, caplog):
    """A policy over 5 actions, 1e6 samples: the default estimator within 4 sigma of the exact gradient, k3 far off."""
    torch.manual_seed(0)
    logits, reference = torch.randn(5).double(), torch.randn(5).double().log_softmax(0)
    logits.requires_grad_()
    logps = logits.log_softmax(0)
    exact = torch.autograd.grad((logps.exp() * (logps - reference)).sum(), logits)[0]
    logps = logps.detach()
    actions = torch.multinomial(logps.exp(), 1_000_000, replacement=True)
    scores = torch.nn.functional.one_hot(actions, 5).double() - logps.exp()  # grad log pi of each sample
    mask = torch.ones(len(actions), 1, dtype=torch.bool)

    def sigmas(estimator):
        kl = estimate_kl(logps[actions][:, None], reference[actions][:, None], estimator=estimator)
        paid = shape_rewards(torch.zeros(len(actions)).double(), kl, mask, kl_coef=1.0)
        samples = -paid * scores  # descent on the KL is ascent on the reward
        return ((samples.mean(0) - exact) / (samples.std(0) / len(samples) ** 0.5)).abs().max()

    default = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False).kl_estimator
    assert sigmas(default) < 4
    assert sigmas("k3") > 40
    # As a term of a loss k1 pushes nowhere: its gradient is that of log pi alone.
    mean, error = scores.mean(0), scores.std(0) / len(scores) ** 0.5
    assert (mean / error).abs().max() < 4 and exact.abs().max() > 40 * error.max()
    with caplog.at_level(logging.WARNING):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, kl_estimator="k3")
    assert "biased gradient" in caplog.text
