"""The rest of the family over several steps: PPO-Penalty, early stop, critic warm-up. Losses: `test_ppo_pairs.py`."""

import pytest
import torch

from tests.trainers.ppo_runs import PROMPTS, make_trainer, rollout, stir
from tests.trainers.test_ppo_roles import logged, weights


def test_an_evaluation_keeps_the_head_of_the_rollout_in_use(tmp_path):
    trainer = make_trainer(tmp_path, policy_objective="penalty")
    rollout(trainer)
    kept = trainer._old_heads["train"][0].clone()
    stir(trainer)
    trainer.model.eval()
    trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS])
    assert torch.equal(trainer._old_heads["train"][0], kept)
    assert not torch.equal(trainer._old_heads["eval"][0], kept)


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


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


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
