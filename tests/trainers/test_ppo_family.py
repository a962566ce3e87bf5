"""The rest of the family: PPO-Penalty, entropy bonus, early stop, critic warm-up, baselines, estimators of the KL."""

import pytest
import torch

from rlhf_ext.functional import compute_gae, discounted_returns, estimate_kl, masked_mean, shape_rewards
from rlhf_ext.trainers.ppo_rollout import token_mask
from tests.trainers.test_ppo_loss import PROMPTS, gradients, make_trainer, micro_batches, proved_loss, rollout, stir
from tests.trainers.test_ppo_roles import logged, weights


def logits_of(model, prompt, completion, temperature):
    """Full distributions of one row without padding, from an ordinary forward: `(C, V)` log-probabilities."""
    ids = torch.cat([prompt, completion])[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float() / temperature
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def distributions(trainer, batch):
    """Of every row, as the policy is now."""
    return [
        logits_of(trainer.model, ids[mask.bool()], tokens[real.bool()], trainer.args.temperature)
        for ids, mask, tokens, real in zip(
            *(batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True
        )
    ]


def extra_terms(trainer, old, batch):
    """Penalty and entropy term by their definitions, over one common number of tokens."""
    args, penalty, entropy = trainer.args, 0.0, 0.0
    for then, now in zip(old, distributions(trainer, batch), strict=True):
        entropy = entropy - (now.exp() * now).sum()
        penalty = penalty + (then.exp() * (then - now)).sum()
    tokens = int(batch["completion_mask"].sum())
    return trainer.penalty_coef * penalty / tokens, -args.entropy_bonus_coef * entropy / tokens


CASES = {
    "penalty": {"policy_objective": "penalty", "penalty_coef": 0.7},
    "penalty, hot, entropy": {
        "policy_objective": "penalty",
        "penalty_coef": 2.0,
        "temperature": 0.7,
        "entropy_bonus_coef": 0.3,
    },
    "clip, entropy": {"entropy_bonus_coef": 0.3},
    "pg, entropy": {"policy_objective": "pg", "num_iterations": 1, "entropy_bonus_coef": 0.3},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_the_definition_on_plain_logits(tmp_path, kind, case):
    trainer = make_trainer(tmp_path, kind, **CASES[case])
    is_penalty = trainer.args.policy_objective == "penalty"
    batch = rollout(trainer)
    with torch.no_grad():
        old = distributions(trainer, batch)
    stir(trainer)

    losses = []
    for part in micro_batches(batch, 2):
        loss = trainer._compute_loss(trainer.model, part)
        loss.backward()
        losses.append(loss.detach())
    found = gradients(trainer)

    trainer.args.epsilon, trainer.args.epsilon_high, epsilon = (1.0, 1e9, 0.2) if is_penalty else (0.2, None, 0.2)
    penalty, entropy = extra_terms(trainer, old, batch)
    assert bool(penalty > 1e-4) and (entropy != 0) == ("entropy" in case)
    expected = proved_loss(trainer, batch) + entropy + (penalty if is_penalty else 0.0)
    expected.backward()
    torch.testing.assert_close(sum(losses), expected.detach(), atol=1e-6, rtol=1e-6)
    by_hand = gradients(trainer)
    assert found.keys() == by_hand.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, by_hand[name], atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_penalty_with_lora(tmp_path):
    """The head does not train, so none is kept; base and adapter are those of the old policy."""
    trainer = make_trainer(tmp_path, lora=True, policy_objective="penalty")
    batch = rollout(trainer)
    assert trainer._old_heads["train"] is None and batch["old_hidden"].shape[:2] == batch["completion_ids"].shape
    with torch.no_grad():
        old = distributions(trainer, batch)
    stir(trainer)
    trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        batch["completion_ids"].size(1),
    )
    kl = trainer._kl_to_old(batch, trainer._take_hidden(batch)).sum() / batch["completion_mask"].sum()
    expected, _ = extra_terms(trainer, old, batch)
    torch.testing.assert_close(kl, expected, atol=1e-6, rtol=1e-5)


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


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_batch_mean_is_subtracted_from_the_returns(tmp_path):
    config = {"advantage_estimator": "returns", "critic": "none", "whiten_advantages": False}
    trainer = make_trainer(tmp_path, baseline="batch_mean", **config)
    batch = rollout(trainer)
    mask = token_mask(batch)
    kept = {}
    stock = trainer.compute_advantages
    trainer.compute_advantages = lambda rows: kept.update(rows) or stock(rows)
    batch = rollout(trainer)
    mask, returns = kept["mask"], discounted_returns(kept["rewards"], kept["mask"], gamma=1.0)
    expected = torch.where(mask, returns - masked_mean(returns, mask), 0.0)
    torch.testing.assert_close(batch["advantages"], expected, atol=1e-6, rtol=0)
    assert abs(masked_mean(batch["advantages"], mask)) < 1e-6


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_other_estimators_charge_the_reward_and_nothing_else(tmp_path, estimator, caplog):
    trainer = make_trainer(tmp_path, kl_estimator=estimator, kl_coef=0.5, whiten_advantages=False)
    stir(trainer)  # away from the reference
    kept, stock = {}, trainer.compute_advantages
    trainer.compute_advantages = lambda rows: kept.update(rows) or stock(rows)
    batch = rollout(trainer)
    mask = kept["mask"]
    reference = torch.where(mask, trainer._reference_logps(batch, "train"), 0.0)
    k1, other = (estimate_kl(kept["old_per_token_logps"], reference, estimator=e) for e in ("k1", estimator))
    torch.testing.assert_close(kept["kl"], torch.where(mask, k1, 0.0), atol=1e-6, rtol=0)
    paid = shape_rewards(kept["scores"], torch.where(mask, other, 0.0), mask, kl_coef=0.5)
    torch.testing.assert_close(kept["rewards"], paid, atol=1e-5, rtol=0)
    assert (paid - shape_rewards(kept["scores"], kept["kl"], mask, kl_coef=0.5)).abs().max() > 1e-3
    advantages, _ = compute_gae(paid, kept["values"], mask, gamma=1.0, gae_lambda=0.95)
    torch.testing.assert_close(batch["advantages"], advantages, atol=1e-5, rtol=0)


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
