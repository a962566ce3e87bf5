"""The critic: which position a value is read at, what follows a cut completion, what warm-up moves, what is saved."""

import itertools

import pytest
import torch
from transformers import TrainerCallback

from rlhf_ext.models.scoring import load_critic, token_scores
from rlhf_ext.trainers.ppo_checkpoint import is_critic
from rlhf_ext.trainers.ppo_rollout import token_mask
from tests.tiny import tiny_reward_model, tiny_tokenizer
from tests.trainers.ppo_runs import make_trainer
from tests.trainers.ppo_runs import rollout as ragged_rollout
from tests.trainers.resume_run import assert_same_end, end_of, prepare
from tests.trainers.resume_run import build as resumable
from tests.trainers.test_ppo_roles import build, one_base, rollout, weights


def even_first_token(prompts, completions, completion_ids, **kwargs):
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_s27_a_value_knows_the_tokens_before_its_own(tmp_path, kind):
    """V(s_t) is read at position t-1: another token t changes the values after it and none up to its own."""
    trainer = make_trainer(tmp_path, kind)
    batch = ragged_rollout(trainer)
    with torch.no_grad():
        before = trainer._values(batch, "train")["values"]
        changed = dict(batch, completion_ids=batch["completion_ids"].clone())
        changed["completion_ids"][:, 2] = (changed["completion_ids"][:, 2] + 7) % 30 + 5
        after = trainer._values(changed, "train")["values"]
    long = batch["completion_mask"][:, 3].bool()
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert ((after - before)[long, 3].abs() > 1e-4).all()


def test_s27_a_return_that_hangs_on_one_token_is_fitted_exactly(tmp_path):
    """One prompt, and the first token decides: the value before it is the mean, every value after it the return."""
    config = {"kl_coef": 0.0, "gamma": 1.0, "gae_lambda": 1.0, "epsilon_value": None, "whiten_advantages": False}
    trainer = build(tmp_path, reward_funcs=even_first_token, config={**config, "vf_coef": 1.0})
    batch = rollout(trainer, [{"prompt": "the cat"}] * 8)
    returns, mask = batch["returns"], token_mask(batch)
    assert 0 < returns[:, 0].sum() < 8, "both outcomes are needed"
    critic = [p for n, p in trainer.model.named_parameters() if is_critic(n)]
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    optimizer = torch.optim.Adam(critic, lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        trainer._compute_loss(trainer.model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        values = trainer._values(batch, "train")["values"]
    later = mask.clone()
    later[:, 0] = False
    assert (values - returns)[later].abs().max() < 0.1
    assert (values[:, 0] - returns[:, 0].mean()).abs().max() < 0.1


def test_s28_the_value_follows_a_cut_completion_and_no_finished_one(tmp_path):
    found, kept = {}, {}
    for bootstrap in (False, True):
        trainer = build(
            tmp_path,
            reward_funcs=tiny_reward_model("llama", tiny_tokenizer(), seed=1),
            config={
                "gamma": 0.9,
                "gae_lambda": 0.8,
                "kl_coef": 0.0,
                "whiten_advantages": False,
                "bootstrap_truncated": bootstrap,
                "max_completion_length": 4,
            },
        )
        stock = trainer.compute_advantages
        trainer.compute_advantages = lambda rows, stock=stock: kept.update(rows) or stock(rows)
        found[bootstrap] = rollout(trainer)
    plain, bootstrapped = found[False], found[True]
    assert torch.equal(plain["completion_ids"], bootstrapped["completion_ids"])
    mask, eos = token_mask(plain), tiny_tokenizer().eos_token_id
    is_cut = [eos not in row[real] for row, real in zip(plain["completion_ids"], mask, strict=True)]
    assert any(is_cut) and not all(is_cut)
    for row, real in enumerate(mask):
        difference = (bootstrapped["advantages"] - plain["advantages"])[row][real]
        if not is_cut[row]:
            assert difference.abs().max() == 0
            continue
        prompt = plain["prompt_ids"][row][plain["prompt_mask"][row].bool()]
        ids = torch.cat([prompt, plain["completion_ids"][row][real]])[None]
        critic = trainer.roles.base.critic
        with torch.no_grad():
            after = critic.score(critic.model(input_ids=ids).last_hidden_state)[0, -1, 0]
        # gamma V enters the last delta and goes back with gamma lambda per token.
        by_hand = [0.9 * after.item() * 0.72 ** (len(difference) - 1 - t) for t in range(len(difference))]
        assert difference.tolist() == pytest.approx(by_hand, abs=1e-5)
        assert kept["bootstrap_values"][row].item() == pytest.approx(after.item(), abs=1e-5)


def test_r19_warm_up_moves_the_critic_alone(tmp_path):
    config = {"max_steps": 6, "num_iterations": 2, "learning_rate": 1e-2, "weight_decay": 0.1}
    trainer = make_trainer(tmp_path, critic_warmup_rollouts=2, **config)
    before, seen = weights(trainer.model), []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(weights(model))

    trainer.add_callback(Keep())
    trainer.train()
    for step, now in enumerate(seen):
        moved = {name for name in now if not torch.equal(now[name], before[name])}
        assert any(is_critic(name) for name in moved)
        assert any(not is_critic(name) for name in moved) == (step >= 4), step


def test_controllers_wait_for_the_policy(tmp_path):
    """A policy that stands still has a KL of 0, which says nothing about the coefficients."""
    config = {"max_steps": 5, "num_iterations": 1, "critic_warmup_rollouts": 4}
    trainer = make_trainer(tmp_path, policy_objective="penalty", penalty_kl_target=0.02, **config)
    trainer.train()
    assert [row["policy/penalty_coef"] for row in trainer.state.log_history[:-1]] == [1.0] * 5
    trainer = make_trainer(tmp_path, adaptive_kl_target=6.0, kl_horizon=20, **config)
    trainer.train()
    coefs = [row["kl_coef"] for row in trainer.state.log_history[:-1]]
    assert coefs == [0.05] * 5 and trainer.kl_coef < 0.05, "the fifth rollout moves it"


def test_the_critic_rests_after_its_epochs(tmp_path, monkeypatch):
    """Three epochs a rollout, the critic in the first: then no forward of it, and Adam's memory moves no weight."""
    config = {"max_steps": 9, "num_iterations": 3, "critic_epochs": 1, "learning_rate": 1e-2, "weight_decay": 0.1}
    trainer = make_trainer(tmp_path, critic_warmup_rollouts=1, **config)
    seen, forwards, loss = [weights(trainer.model)], [], trainer._compute_loss
    trainer.roles.base.critic.score.register_forward_hook(lambda *_: forwards.append("critic"))

    def counted(model, inputs):
        before = len(forwards)
        found = loss(model, inputs)
        seen.append(len(forwards) - before)
        return found

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(weights(model))

    monkeypatch.setattr(trainer, "_compute_loss", counted)
    trainer.add_callback(Keep())
    trainer.train()
    states = [part for part in seen if isinstance(part, dict)]
    for step, (before, now) in enumerate(itertools.pairwise(states)):
        moved = {is_critic(name) for name in now if not torch.equal(now[name], before[name])}
        # The first rollout warms the critic up, in every epoch.
        assert moved == ({True} if step < 3 else {True, False} if step % 3 == 0 else {False}), step
    micro_batches = [part for part in seen if isinstance(part, int)]
    per_step = len(micro_batches) // 9
    assert micro_batches == [int(step < 3 or step % 3 == 0) for step in range(9) for _ in range(per_step)]


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_s14_r04_a_checkpoint_holds_the_critic_with_its_head(tmp_path, adapters, kind):
    config = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    if kind == "model":
        reward = tiny_reward_model("llama", tiny_tokenizer(), seed=1)
        trainer = build(tmp_path, reward_funcs=reward, config=config)
    else:
        trainer = one_base(tmp_path, adapters, **config)
    ids = torch.tensor([[5, 6, 7, 8, 1], [9, 10, 11, 0, 0]])
    mask = (ids > 0).long()
    with torch.no_grad():
        start = trainer.model(input_ids=ids, attention_mask=mask, role="critic")
    trainer.train()
    with torch.no_grad():
        expected = trainer.model(input_ids=ids, attention_mask=mask, role="critic")
        found = token_scores(load_critic(str(tmp_path / "out" / "checkpoint-2")), ids, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)
    assert (expected - start)[mask.bool()].abs().max() > 1e-3, "a critic that stood still would prove nothing"


def test_r05_a_run_resumed_inside_a_rollout_is_the_uninterrupted_one(tmp_path):
    """Weights of all roles, optimizer, KL coefficient, data and logs, bit by bit; more in `test_ppo_resume.py`."""
    prepare(tmp_path)
    config = {"max_steps": 10, "save_steps": 6, "save_strategy": "steps"}
    whole = resumable(tmp_path, "one_base", tmp_path / "whole", **config)
    whole.train()
    again = resumable(tmp_path, "one_base", tmp_path / "again", **config)
    torch.manual_seed(99)  # nothing may lean on the random numbers of a fresh process
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert_same_end(end_of(whole), end_of(again))
    assert again.kl_coef == whole.kl_coef != 0.05, "the controller has moved"
