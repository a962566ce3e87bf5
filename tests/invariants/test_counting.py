"""How much of what is counted: steps, tokens, moments, stops, and arguments that have to have an effect."""

import copy

import pytest
import torch
from transformers import TrainerCallback

from rlhf_ext import PPOConfig
from rlhf_ext.functional import masked_whiten
from rlhf_ext.trainers.ppo_rollout import token_mask
from tests.trainers.ppo_runs import gradients, make_trainer, micro_batches, rollout, stir
from tests.trainers.test_ppo_roles import PROMPTS, Dataset, build, changed, length, logged, weights
from tests.trainers.test_ppo_roles import rollout as rollout_of


class Steps(TrainerCallback):
    """Weights after each step, the optimizer's state, and the norm of the gradients it was given."""

    def __init__(self):
        self.weights, self.states, self.norms = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        self.norms.append(torch.stack(found).norm().item() if found else 0.0)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights.append(weights(model))
        self.states.append(copy.deepcopy(optimizer.state_dict()["state"]))


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(("minibatches", "epochs"), [(1, 2), (2, 1), (4, 2)])
def test_s12_r14_every_minibatch_of_every_epoch_steps(tmp_path, minibatches, epochs):
    """Two rollouts of 8 prompts; a minibatch is `per_device_train_batch_size` x `gradient_accumulation_steps` rows."""
    split = {"per_device_train_batch_size": 2, "steps_per_generation": 4}
    split |= {"gradient_accumulation_steps": 4 // minibatches, "num_iterations": epochs}
    expected = 2 * epochs * minibatches
    trainer = build(tmp_path, reward_funcs=length, config={**split, "max_steps": expected})
    rollouts, taken, before = [], [], {}
    stock = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: rollouts.append(trainer.state.global_step) or stock(rows)

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, model=None, **kwargs):
            before.update(weights(model))

        def on_step_end(self, args, state, control, model=None, **kwargs):
            taken.append(bool(changed(model, before)))

    trainer.add_callback(Count())
    steps = []
    trainer.create_optimizer()
    inner = trainer.optimizer.step
    trainer.optimizer.step = lambda *args, **kwargs: steps.append(1) or inner(*args, **kwargs)
    trainer.train()
    assert rollouts == [0, epochs * minibatches]
    assert len(steps) == expected == trainer.state.global_step
    assert taken == [True] * expected
    assert trainer.args.optimizer_steps_per_rollout == epochs * minibatches


def test_s13_max_grad_norm_reaches_the_optimizer(tmp_path):
    trainer = build(tmp_path, reward_funcs=length, config={"max_grad_norm": 1e-9, "max_steps": 2})
    seen = Steps()
    trainer.add_callback(seen)
    trainer.train()
    assert all(norm < 1.1e-9 for norm in seen.norms) and len(seen.norms) == 2
    assert min(logged(trainer, "grad_norm")) > 1e-3, "what was asked for has to bind"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_s13_gradient_checkpointing_is_on_for_policy_and_critic(tmp_path, checkpointing):
    """Each layer runs once in the forward of a micro-batch, and once more in its backward."""
    config = {"gradient_checkpointing": checkpointing, "max_steps": 1, "num_iterations": 1}
    trainer = build(tmp_path, reward_funcs=length, config=config)
    runs = []
    layers = [*trainer.roles.base.model.layers, *trainer.roles.base.critic.model.layers]
    for index, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(
            lambda module, args, index=index: runs.append(index) if torch.is_grad_enabled() else None
        )
    trainer.train()
    micro_batches = trainer.args.gradient_accumulation_steps
    assert [runs.count(index) for index in range(4)] == [micro_batches * (1 + checkpointing)] * 4


@pytest.mark.parametrize(
    "fields",
    [
        {"penalty_coef": 2.0},
        {"target_kl": 0.1, "policy_objective": "pg", "num_iterations": 1},
        {"critic_learning_rate": 1e-3, "critic": "none", "advantage_estimator": "returns"},
        {"bootstrap_truncated": True, "advantage_estimator": "returns"},
        {"vllm_mode": "server"},
        {"label_smoothing_factor": 0.1},
        {"scale_rewards": "batch"},
    ],
    ids=str,
)
def test_s13_an_argument_without_effect_is_refused(tmp_path, fields):
    name = next(iter(fields))
    with pytest.raises(ValueError, match=f"{name}="):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **fields)


def test_s15_r14_the_gradient_is_the_same_for_every_split(tmp_path):
    """A token mean per micro-batch, then averaged, is another objective for each split of 8x1, 2x4 and 1x8."""
    found = {}
    for count in (1, 4, 8):
        trainer = make_trainer(
            tmp_path,
            per_device_train_batch_size=8 // count,
            steps_per_generation=count,
            gradient_accumulation_steps=count,
        )
        batch = rollout(trainer) if not found else found["batch"]
        found.setdefault("batch", batch)
        stir(trainer)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = count
        for part in micro_batches(batch, count):
            trainer._compute_loss(trainer.model, part).backward()
        found[count] = gradients(trainer)
    assert any("critic" in name for name in found[1]) and any("critic" not in name for name in found[1])
    for count in (4, 8):
        for name, gradient in found[1].items():
            torch.testing.assert_close(found[count][name], gradient, atol=1e-6, rtol=0)


def test_s16_moments_of_whitening_are_those_of_all_processes(tmp_path):
    """One process holds the first half of the rows; the other half comes through `gather`, as from a second one."""
    trainer = make_trainer(tmp_path, whiten_advantages=False)
    batch = rollout(trainer)
    rows, mask = batch["advantages"], token_mask(batch)
    everywhere = masked_whiten(rows, mask)
    real = everywhere[mask]
    assert real.mean().item() == pytest.approx(0, abs=1e-5)
    assert real.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    own, own_mask = rows[:4], mask[:4]
    parts = {own.dtype: rows[4:], torch.long: mask[4:].long()}
    trainer.accelerator.gather = lambda tensor: torch.cat([tensor, parts[tensor.dtype]])
    found = trainer._whiten(own, own_mask, shift_mean=True)
    torch.testing.assert_close(found, everywhere[:4], atol=1e-6, rtol=0)
    assert (masked_whiten(own, own_mask) - found).abs().max() > 1e-3, "moments of the half are others"


def test_s16_padding_changes_nothing_and_one_token_gives_zero(tmp_path):
    trainer = make_trainer(tmp_path, whiten_advantages=False)
    batch = rollout(trainer)
    rows, mask = batch["advantages"], token_mask(batch)
    expected = trainer._whiten(rows, mask, shift_mean=True)
    wide = torch.nn.functional.pad(rows, (0, 5), value=7.0)
    found = trainer._whiten(wide, torch.nn.functional.pad(mask, (0, 5)), shift_mean=True)
    torch.testing.assert_close(found[:, : rows.size(1)], expected)
    assert found[:, rows.size(1) :].abs().max() == 0
    assert trainer._whiten(torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]]), shift_mean=True).tolist() == [
        [0.0, 0.0]
    ]


@pytest.mark.parametrize("objective", ["clip", "penalty"])
def test_r20_a_step_above_target_kl_is_not_taken(tmp_path, objective):
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
    seen = Steps()
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


def test_s32_a_group_of_one_is_refused(tmp_path):
    """Its advantages would be 0, and training a silent no-op."""
    with pytest.raises(ValueError, match="leave_one_out.*num_generations=1"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, advantage_estimator="leave_one_out")
    config = {"advantage_estimator": "leave_one_out", "num_generations": 2}
    assert rollout(build(tmp_path, reward_funcs=length, config=config))["advantages"].abs().max() > 0


def test_r01_functions_get_their_columns_and_the_ids_of_the_rollout(tmp_path):
    seen = {}

    def reward(prompts, completions, completion_ids, prompt_ids, answer, **kwargs):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, prompt_ids=prompt_ids, answer=answer)
        return [float(len(text)) for text in answer]

    rows = Dataset.from_dict({"prompt": PROMPTS, "answer": [p[::-1] for p in PROMPTS]})
    trainer = build(tmp_path, rows=rows, reward_funcs=reward)
    batch = rollout_of(trainer, list(rows))
    assert seen["prompts"] == PROMPTS and seen["answer"] == rows["answer"][:]
    assert trainer._scores.tolist() == [float(len(p)) for p in PROMPTS]
    for row in range(len(PROMPTS)):
        real = batch["completion_mask"][row].bool()
        assert seen["ids"][row] == batch["completion_ids"][row][real].tolist()
        assert seen["prompt_ids"][row] == batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
