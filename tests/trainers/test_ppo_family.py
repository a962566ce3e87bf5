"""The rest of the family over several steps: PPO-Penalty, early stop, critic warm-up. Losses: `test_ppo_pairs.py`."""

import copy

import pytest
import torch
from transformers import TrainerCallback

from rlhf_ext.trainers.ppo_checkpoint import is_critic
from tests.trainers.ppo_runs import PROMPTS, make_trainer, rollout, stir
from tests.trainers.test_ppo_roles import logged, weights


def test_an_evaluation_keeps_the_head_of_the_rollout_in_use(tmp_path):
    trainer = make_trainer(tmp_path, policy_objective="penalty")
    rollout(trainer)
    kept = trainer._old_heads["train"].clone()
    stir(trainer)
    trainer.model.eval()
    trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS])
    assert torch.equal(trainer._old_heads["train"], kept)
    assert not torch.equal(trainer._old_heads["eval"], kept)


def test_the_penalty_follows_the_kl_after_each_update(tmp_path):
    """2x and 1/2 by the KL that is measured once the rollout's last step is taken."""
    config = {"learning_rate": 3e-3, "penalty_coef": 0.5, "max_steps": 10, "num_iterations": 2, "logging_steps": 1}
    trainer = make_trainer(tmp_path, policy_objective="penalty", penalty_kl_target=0.02, **config)
    trainer.train()
    coefs, measured = logged(trainer, "policy/penalty_coef"), logged(trainer, "policy/kl_after_update")
    assert coefs[0] == 0.5 and len(measured) == len(coefs) - 1
    for before, kl, after in zip(coefs, measured, coefs[1:], strict=False):
        assert after == before * (0.5 if kl < 0.02 / 1.5 else 2.0 if kl > 0.03 else 1.0)
    assert len(set(coefs)) > 1
    # The loss sees it before each step, so 0 at the first one of a rollout; the controller must not.
    assert logged(trainer, "policy/penalty_kl")[0] < 1e-6 < min(measured)


class Snapshots(TrainerCallback):
    def __init__(self):
        self.weights, self.states = [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights.append(weights(model))
        self.states.append(copy.deepcopy(optimizer.state_dict()["state"]))


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("objective", ["clip", "penalty"])
def test_early_stop_leaves_weights_and_optimizer_as_they_were(tmp_path, objective):
    """8 prompts, one rollout of 4 steps: a target between the KL of the 2nd and of the 3rd step stops the 3rd."""
    config = {
        "policy_objective": objective,
        "learning_rate": 1e-2,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 2,
        "num_iterations": 4,
        "max_steps": 8,
        "logging_steps": 1,
        "weight_decay": 0.1,
    }
    free = make_trainer(tmp_path / "free", **config)
    free.train()
    kls = logged(free, "policy/approx_kl")
    assert kls[1] < kls[2]
    trainer = make_trainer(tmp_path / "stopped", target_kl=(kls[1] + kls[2]) / 2, **config)
    seen = Snapshots()
    trainer.add_callback(seen)
    trainer.train()
    assert trainer.state.global_step == 8
    skipped = logged(trainer, "policy/skipped")
    assert skipped[:4] == [0.0, 0.0, 1.0, 1.0] and skipped[4] == 0.0, "the next rollout starts afresh"
    assert not same(seen.weights[0], seen.weights[1])
    assert same(seen.weights[1], seen.weights[2]) and same(seen.weights[2], seen.weights[3])
    assert not same(seen.weights[3], seen.weights[4])
    for before, after in ((1, 2), (2, 3)):
        for key, state in seen.states[before].items():
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(seen.states[after][key][n])) for n, v in state.items()
            )
    # Before the stop it is the run without one.
    assert logged(trainer, "policy/approx_kl")[:3] == pytest.approx(kls[:3], abs=1e-7)


def test_warm_up_moves_the_critic_alone(tmp_path):
    config = {"max_steps": 6, "num_iterations": 2, "learning_rate": 1e-2, "weight_decay": 0.1}
    trainer = make_trainer(tmp_path, critic_warmup_rollouts=2, **config)
    before, seen = weights(trainer.model), Snapshots()
    trainer.add_callback(seen)
    trainer.train()
    for step, now in enumerate(seen.weights):
        moved = {name for name in now if not torch.equal(now[name], before[name])}
        assert any(is_critic(name) for name in moved)
        assert any(not is_critic(name) for name in moved) == (step >= 4), step


def test_zero_terms_change_nothing(tmp_path):
    """The defaults, spelled out, give the bits of a run that names none of the fields."""
    spelled = {"entropy_bonus_coef": 0.0, "critic_warmup_rollouts": 0, "kl_estimator": "k1", "target_kl": 1e9}
    found = []
    for name, config in (("plain", {}), ("spelled", spelled)):
        trainer = make_trainer(tmp_path / name, max_steps=4, **config)
        trainer.train()
        found.append(weights(trainer.model))
    assert same(*found)


def test_models_that_change_their_logits_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, policy_objective="penalty")
    trainer.roles.base.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="penalty.*final_logit_softcapping"):
        trainer._check_update()
