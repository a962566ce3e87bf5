"""docs/metrics.md and the logs name the same numbers, and the ones about tokens and speed are right."""

import re
import time
from pathlib import Path

import pytest
import torch

from rlhf_ext.models.lm_head import keep_lm_head
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.ppo_runs import make_trainer
from tests.trainers.test_nlpo import make_nlpo
from tests.trainers.test_ppo_roles import build, length, logged, zero
from tests.trainers.test_reward_trainer import PAIRS
from tests.trainers.test_reward_trainer import build as make_reward


PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def documented(heading):
    """Keys of the first column of the tables under a heading; those of `Trainer` stand in a sentence."""
    part = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    keys = [
        key
        for line in part.splitlines()
        if line.startswith("| `")
        for key in re.findall("`(.*?)`", line[: line.index("|", 1)])
    ]
    assert len(keys) == len(set(keys)), "a key stands twice"
    return set(keys)


def of_trainer():
    (line,) = [line for line in PAGE.splitlines() if line.startswith("Beside them stand those of `Trainer` itself")]
    return set(re.findall("`([a-z_]+)`", line))


def named(keys):
    return {re.sub("^((token_)?rewards|probe)/.*/", r"\1/NAME/", key) for key in keys}


def keys_of(trainer):
    trainer.train()
    return named(key for entry in trainer.state.log_history for key in entry)


def evaluated(trainer, rows=None):
    trainer.args.per_device_eval_batch_size = 4
    return named(
        key.removeprefix("eval_") for key in trainer.evaluate(trainer.train_dataset if rows is None else rows)
    )


def first_token(prompts, completion_ids, **kwargs):
    return [[1.0] + [0.0] * (len(ids) - 1) for ids in completion_ids]


def test_every_logged_number_of_ppo_is_on_the_page_and_the_other_way_round(tmp_path):
    trainers = [
        make_trainer(tmp_path, max_steps=2, target_kl=10.0),
        make_trainer(tmp_path, max_steps=2, policy_objective="penalty", penalty_kl_target=0.1, num_iterations=1),
        make_nlpo(tmp_path, max_steps=2),
        build(
            tmp_path, reward_funcs=zero, token_reward_funcs=first_token, probe_funcs=length, config={"max_steps": 2}
        ),
    ]
    found = set().union(*(keys_of(trainer) for trainer in trainers))
    assert found - of_trainer() == documented("PPO")
    assert of_trainer() - {key for key in of_trainer() if key.startswith("eval_")} <= found
    in_evaluation = set().union(*(evaluated(trainer) for trainer in trainers))
    assert {key for key in of_trainer() if key.startswith("eval_")} <= {f"eval_{key}" for key in in_evaluation}
    known = documented("PPO") | {key.removeprefix("eval_") for key in of_trainer()}
    assert in_evaluation <= known


def test_every_logged_number_of_the_reward_trainer_is_on_the_page(tmp_path):
    model = tiny_reward_model("llama", tiny_tokenizer())
    keep_lm_head(model, tiny_causal_lm("llama", tiny_tokenizer()).lm_head.state_dict())
    trainer = make_reward(tmp_path, PAIRS, max_steps=2, model=model, lm_coef=0.5)
    assert keys_of(trainer) - of_trainer() == documented("Reward model")
    assert evaluated(trainer) <= documented("Reward model") | {key.removeprefix("eval_") for key in of_trainer()}


def test_completions_are_counted_over_the_whole_rollout(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, learning_rate=0.0)
    seen, stock = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: seen.append(stock(inputs)) or seen[-1]
    trainer.train()
    (batch,) = seen
    rows = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    for n in (1, 2):
        grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
        assert logged(trainer, f"completions/distinct_{n}") == pytest.approx([len(set(grams)) / len(grams)])
    ended = sum(trainer.processing_class.eos_token_id in row for row in rows) / len(rows)
    assert 0 < ended < 1 and logged(trainer, "completions/eos_rate") == pytest.approx([ended])
    assert logged(trainer, "completions/clipped_ratio") == pytest.approx([1 - ended])


def test_every_token_of_a_step_weighs_the_same(tmp_path, monkeypatch):
    """Micro-batches by length have uneven rows and tokens; the numbers of a step are those of all of its tokens."""
    trainer = make_trainer(tmp_path, max_steps=4, num_iterations=2, learning_rate=0.01, epsilon=0.02)
    seen, forward, loss = [], trainer._get_per_token_logps_and_entropies, trainer._compute_loss

    def kept(*args, **kwargs):
        result = forward(*args, **kwargs)
        if result[0].requires_grad:
            seen[-1].append((result[0].detach(), result[1].detach()))
        return result

    def with_batch(model, inputs):
        seen.append([inputs])
        return loss(model, inputs)

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", kept)
    monkeypatch.setattr(trainer, "_compute_loss", with_batch)
    trainer.train()
    parts = trainer.args.gradient_accumulation_steps
    steps = [seen[i : i + parts] for i in range(0, len(seen), parts)]
    assert parts == 2 and len(steps) == 4
    assert any(len(step[0][0]["completion_mask"]) != len(step[1][0]["completion_mask"]) for step in steps)
    numbers = {name: [] for name in ("policy/approx_kl", "entropy", "clip_ratio/region_mean", "policy/ratio_max")}
    means = {name: [] for name in numbers}
    for step in steps:
        found = {name: [] for name in numbers}
        for batch, (logps, entropy) in step:
            mask = batch["completion_mask"].bool()
            ratio = (logps - batch["old_per_token_logps"])[mask].exp()
            advantages = batch["advantages"][mask]
            clipped = (ratio < 0.98) & (advantages < 0) | (ratio > 1.02) & (advantages > 0)
            found["policy/approx_kl"].append(ratio - 1 - ratio.log())
            found["entropy"].append(entropy[mask])
            found["clip_ratio/region_mean"].append(clipped.float())
            found["policy/ratio_max"].append(ratio)
        for name, values in found.items():
            pool = torch.max if "max" in name else torch.mean
            numbers[name].append(pool(torch.cat(values)).item())
            means[name].append(sum(pool(value).item() for value in values) / parts)
    for name, values in numbers.items():
        assert logged(trainer, name) == pytest.approx(values, rel=1e-6, abs=1e-6), name
        assert means[name] != pytest.approx(values, rel=2e-5, abs=1e-5), name


def test_tokens_per_second_of_rollout_and_update_apart(tmp_path, monkeypatch):
    """Rollouts take .2 s longer here, and micro-batches .05 s: neither is counted with the other."""
    trainer = make_trainer(tmp_path, max_steps=4, num_iterations=2)
    batches, sample, loss = [], trainer._generate_and_score_completions, trainer._compute_loss

    def slow_sample(inputs):
        time.sleep(0.2)
        batches.append(sample(inputs))
        return batches[-1]

    def slow_loss(model, inputs):
        time.sleep(0.05)
        return loss(model, inputs)

    monkeypatch.setattr(trainer, "_generate_and_score_completions", slow_sample)
    monkeypatch.setattr(trainer, "_compute_loss", slow_loss)
    start = time.perf_counter()
    trainer.train()
    spent = time.perf_counter() - start
    tokens = [int(batch["completion_mask"].sum()) for batch in batches]
    rollouts, updates = (logged(trainer, f"{part}/tokens_per_second") for part in ("rollout", "update"))
    assert len(rollouts) == 2 and len(updates) == 4, "one per rollout, one per optimizer step"
    rollout_seconds = [count / speed for count, speed in zip(tokens, rollouts, strict=True)]
    update_seconds = [count / speed for count, speed in zip([tokens[0]] * 2 + [tokens[1]] * 2, updates, strict=True)]
    assert all(seconds >= 0.2 for seconds in rollout_seconds) and all(seconds >= 0.1 for seconds in update_seconds)
    assert sum(rollout_seconds) + sum(update_seconds) <= spent


def test_steps_that_are_not_taken_are_no_speed(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, learning_rate=0.1, target_kl=1e-9)
    trainer.train()
    taken = [1 - skipped for skipped in logged(trainer, "policy/skipped")]
    assert 0 < sum(taken) < 4 and len(logged(trainer, "update/tokens_per_second")) == sum(taken)
