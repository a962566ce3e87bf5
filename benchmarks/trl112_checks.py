"""
The checks of tests/invariants/ that can be put to TRL 1.12's PPO; `invariants_trl112.py` runs them in its environment.

Each says what was measured, and whether the invariant holds; nothing is taken from documentation.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from trl.experimental.ppo import PPOConfig, ppo_trainer
from trl112_run import (
    PROMPTS,
    InnerSteps,
    build,
    clean_run,
    finished_rows,
    largest,
    launch_two,
    real_tokens,
    rows_of,
    run,
)

from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer


HOLDS, FAILS, NO_OPTION = "holds", "fails", "no such option"
CHECKS: dict[str, Callable[[], tuple[str, str]]] = {}


def check(number: str) -> Callable:
    """Register a check under the number that `invariants.yaml` gives it."""

    def register(function: Callable) -> Callable:
        CHECKS[number] = function
        return function

    return register


# Padding and EOS


@check("S1")
def eos_in_the_policy_loss() -> tuple[str, str]:
    trained = {}
    for pad_is_eos in (True, False):
        rollout = clean_run(pad_is_eos=pad_is_eos).rollouts[0]
        ended = finished_rows(rollout, 1)
        trained[pad_is_eos] = (sum(not rollout["padding_mask"][row, column] for row, column in ended), len(ended))
    same, other = trained[True], trained[False]
    measured = f"EOS is trained in {same[0]} of {same[1]} finished rows; with pad != eos in {other[0]} of {other[1]}"
    return measured, HOLDS if same[0] == same[1] else FAILS


@check("S2")
def eos_read_by_the_reward_model() -> tuple[str, str]:
    tokenizer = tiny_tokenizer(pad_is_eos=True)
    model, eos = tiny_reward_model("llama", tokenizer), tokenizer.eos_token_id
    with torch.no_grad():
        finished = ppo_trainer.get_reward(model, torch.tensor([[5, 6, 7, eos, eos]]), eos, 1)[1]
        cut = ppo_trainer.get_reward(model, torch.tensor([[5, 6, 7]]), eos, 1)[1]
    apart = largest(finished - cut)
    return f"score with EOS minus score without, pad == eos: {apart:.2g}", HOLDS if apart > 1e-3 else FAILS


@check("S5")
def score_at_eos() -> tuple[str, str]:
    found = clean_run(kl_coef=0.0, gamma=0.9, lam=0.8)
    rollout = found.rollouts[0]
    offsets = {int(rollout["rewards"][row].nonzero()[-1]) - column for row, column in finished_rows(rollout, 1)}
    stop = real_tokens(rollout, 1)
    worst = 0.0
    for row, real in enumerate(stop):
        rewards = [0.0] * int(real.sum())
        rewards[-1] = rollout["scores"][row].item()
        values, carry = rollout["values"][row][real].tolist(), 0.0
        for t in reversed(range(len(rewards))):
            carry = rewards[t] + 0.9 * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] + 0.72 * carry
            worst = max(worst, abs(carry - rollout["advantages"][row][t].item()))
    measured = (
        f"score {offsets.pop()} slot after EOS; advantages off by up to {worst:.2g} from those of each row alone"
    )
    return measured, HOLDS if worst < 1e-4 else FAILS


@check("R10")
def returns_by_hand() -> tuple[str, str]:
    rollout = clean_run(kl_coef=0.0, gamma=0.5, lam=1.0).rollouts[0]
    row, column = finished_rows(rollout, 1)[0]
    first = (rollout["advantages"] + rollout["values"])[row, 0].item() / rollout["scores"][row].item()
    expected = 0.5**column
    measured = f"return of the first token {first:.4g} of the score at discount .5, by hand {expected:.4g}"
    return measured, HOLDS if abs(first - expected) < 1e-4 else FAILS


@check("S6")
def left_padding() -> tuple[str, str]:
    worst = 0.0
    for kind in ("llama", "gpt2"):
        model = tiny_causal_lm(kind, tiny_tokenizer())
        row = torch.tensor([[5, 6, 7, 8, 9]])
        with torch.no_grad():
            rows = [torch.nn.functional.pad(row, (pads, 0)) for pads in (0, 1, 7)]
            logits = [ppo_trainer.forward(model, padded, 0).logits[:, -5:].log_softmax(-1) for padded in rows]
        worst = max(worst, *(largest(other - logits[0]) for other in logits[1:]))
    return f"log-probabilities with 0, 1 and 7 pads differ by {worst:.1g}", HOLDS if worst < 1e-5 else FAILS


@check("S11, R11")
def several_ids_that_end() -> tuple[str, str]:
    policy, tokenizer = tiny_causal_lm("llama", tiny_tokenizer()), tiny_tokenizer()
    policy.generation_config.eos_token_id = [1, 7]
    kept_ids = build(policy=policy, tokenizer=tokenizer).policy_model.generation_config.eos_token_id
    return f"EOS ids [1, 7] of the checkpoint become {kept_ids}", HOLDS if kept_ids == [1, 7] else FAILS


@check("S11, penalty")
def stop_that_is_not_the_eos() -> tuple[str, str]:
    tokenizer = tiny_tokenizer()
    policy = tiny_causal_lm("llama", tokenizer)
    with torch.no_grad():
        policy.lm_head.weight[7] *= 3.0
    config = {"stop_token": None, "stop_token_id": 7, "missing_eos_penalty": 1000.0, "learning_rate": 0.0}
    rollout = clean_run(7, policy=policy, tokenizer=tokenizer, **config).rollouts[0]
    real = real_tokens(rollout, 7)
    rows = [row for row, _ in finished_rows(rollout, 7) if not (rollout["responses"][row][real[row]] == 1).any()]
    assert rows, "an answer that ended by the other token is needed"
    penalised = sum(rollout["scores"][row].item() < -500 for row in rows)
    measured = f"{penalised} of {len(rows)} answers that stopped at another id than the tokenizer's EOS pay it"
    return measured, HOLDS if penalised == 0 else FAILS


# The ratio


def ratio_error(**config: Any) -> float:
    found = run(learning_rate=0.0, num_ppo_epochs=2, **config)
    return max(largest(update["ratio"] - 1) for update in found.updates)


@check("S7, R13")
def ratio_before_the_first_update() -> tuple[str, str]:
    worst = {
        kind: ratio_error(kind=kind, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        for kind in ("llama", "gpt2")
    }
    measured = ", ".join(f"{kind} {error:.1g}" for kind, error in worst.items())
    return f"largest distance of a ratio from 1: {measured}", HOLDS if max(worst.values()) < 1e-5 else FAILS


@check("S8")
def dropout() -> tuple[str, str]:
    policy = tiny_causal_lm("llama", tiny_tokenizer(), attention_dropout=0.3)
    of_modules = ratio_error(policy=tiny_causal_lm("gpt2", tiny_tokenizer()), kind="gpt2")
    of_attention = ratio_error(policy=policy)
    measured = f"ratio off 1 by {of_modules:.1g} with dropout modules, by {of_attention:.2g} with attention_dropout=.3"
    return measured, HOLDS if max(of_modules, of_attention) < 1e-5 else FAILS


@check("S9")
def temperature() -> tuple[str, str]:
    found = clean_run(temperature=0.5, learning_rate=0.0)
    rollout, real = found.rollouts[0], real_tokens(found.rollouts[0], 1)
    with torch.no_grad():
        logits = ppo_trainer.forward(found.trainer.policy_model, rollout["query_responses"], 0).logits
    first = rollout["query_responses"].size(1) - rollout["responses"].size(1)
    logps = (logits[:, first - 1 : -1] / 0.5).log_softmax(-1).gather(-1, rollout["responses"][..., None])[..., 0]
    apart = largest((logps - rollout["logprobs"])[real])
    return f"stored log-probabilities at T=.5 off by {apart:.1g}", HOLDS if apart < 1e-4 else FAILS


@check("S10")
def generation_defaults() -> tuple[str, str]:
    policy = tiny_causal_lm("llama", tiny_tokenizer())
    policy.generation_config.update(no_repeat_ngram_size=1, min_new_tokens=12)
    found = run(policy=policy, total_episodes=32, learning_rate=0.0)
    repeats, short, worst = 0, 0, 0.0
    for rollout in found.rollouts:
        for ids, real in zip(rollout["responses"], real_tokens(rollout, 1), strict=True):
            tokens = ids[real].tolist()
            repeats += len(set(tokens)) != len(tokens)
            short += len(tokens) < 12
    worst = max(largest(update["ratio"] - 1) for update in found.updates)
    measured = (
        f"with no_repeat_ngram_size=1 and min_new_tokens=12 in the checkpoint {repeats} of 32 answers repeat a word, "
        f"{short} end early, and the ratio is off 1 by {worst:.2g}"
    )
    return measured, HOLDS if repeats and short and worst < 1e-5 else FAILS


@check("S34")
def cache_in_rollouts() -> tuple[str, str]:
    trainer = build(gradient_checkpointing=True)
    widths: list[int] = []
    stock = ppo_trainer.generate

    def generate(model, *args, **kwargs):
        handle = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        try:
            return stock(model, *args, **kwargs)
        finally:
            handle.remove()

    ppo_trainer.generate = generate
    try:
        run(trainer)
    finally:
        ppo_trainer.generate = stock
    one = all(width == 1 for width in widths[1:])
    return f"tokens per forward after the first: {max(widths[1:])}", HOLDS if one else FAILS


# Counting


@check("S12, R14")
def optimizer_steps() -> tuple[str, str]:
    found: dict[int, list[int]] = {3: [], 1: []}
    promised = []
    for minibatches in (1, 2, 4, 8):
        promised.append(2 * minibatches)
        for passes, counts in found.items():
            trainer = build(
                num_mini_batches=minibatches,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=8,
                num_ppo_epochs=2,
                rows=rows_of(tiny_tokenizer(), PROMPTS * passes),
            )
            steps = InnerSteps(trainer)
            run(trainer)
            counts.append(len(steps.norms))
    measured = (
        f"optimizer steps {found[3]} where {promised} are promised (num_mini_batches 1, 2, 4, 8; 2 epochs); "
        f"{found[1]} on the last batch of the data"
    )
    return measured, HOLDS if found[3] == found[1] == promised else FAILS


@check("S13")
def max_grad_norm() -> tuple[str, str]:
    trainer = build(max_grad_norm=1e-9)
    steps = InnerSteps(trainer)
    run(trainer)
    measured = f"max_grad_norm=1e-9 leaves a norm of {max(steps.norms):.4g} at the optimizer"
    return measured, HOLDS if max(steps.norms) < 1e-8 else FAILS


@check("S13, checkpointing")
def gradient_checkpointing() -> tuple[str, str]:
    trainer = build(gradient_checkpointing=True)
    counts = {"policy": 0, "critic": 0}
    for name, model in (("policy", trainer.policy_model), ("critic", trainer.value_model)):
        model.model.layers[0].mlp.register_forward_pre_hook(
            lambda module, args, name=name: counts.update({name: counts[name] + torch.is_grad_enabled()})
        )
    run(trainer)
    measured = f"forwards of a layer per micro-batch: policy {counts['policy']}, critic {counts['critic']} (2 = on)"
    return measured, HOLDS if set(counts.values()) == {2} else FAILS


@check("S15, R14")
def split_of_a_batch() -> tuple[str, str]:
    found = {}
    for size in (8, 2):
        trainer = build(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        steps = InnerSteps(trainer)
        found[size] = (run(trainer), steps.gradients[0])
    assert torch.equal(*(found[size][0].rollouts[0]["responses"] for size in (8, 2))), "the same samples are needed"
    whole, parts = (found[size][1] for size in (8, 2))
    apart = max(largest(parts[name] - gradient) for name, gradient in whole.items())
    scale = max(largest(gradient) for gradient in whole.values())
    measured = f"gradients of 8x1 and 2x4 differ by {apart:.2g}, the largest entry is {scale:.2g}"
    return measured, HOLDS if apart < 1e-5 * scale else FAILS


@check("S16")
def whitening() -> tuple[str, str]:
    alone = ppo_trainer.masked_whiten(torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]]))[0, 0].item()
    means = [float(word) for word in launch_two("s16")]
    measured = (
        f"two processes: means of their own rows {means[0]:.1g} and {means[1]:.1g}, before whitening {means[2]:.2g} "
        f"and {means[3]:.2g}; a single token becomes {alone}"
    )
    is_global = max(abs(mean) for mean in means[:2]) > 1e-3
    return measured, HOLDS if is_global and alone == 0 else FAILS


def whitened_means() -> None:
    found = run(rows=rows_of(tiny_tokenizer(), PROMPTS * 4), total_episodes=16, learning_rate=0.0)
    mask, raw = ~found.rollouts[0]["padding_mask"], found.rollouts[0]["advantages"]
    # The advantages of the update, which come in one micro-batch, are 0 on padding.
    means = torch.stack([found.updates[0]["mb_advantage"].sum() / mask.sum(), raw[mask].mean()])
    everywhere = found.trainer.accelerator.gather(means[None])
    if found.trainer.accelerator.is_main_process:
        print("MEANS", *everywhere.T.flatten().tolist())


# KL and logged numbers


@check("S24")
def logged_numbers() -> tuple[str, str]:
    found = clean_run(num_ppo_epochs=2, learning_rate=1e-2)
    update, trainer = found.updates[-1], found.trainer
    log = trainer.state.log_history[-1]
    shuffle = np.random.RandomState(0)  # as seeded by `run`
    order = [shuffle.permutation(8) for _ in range(2)][-1]
    real = real_tokens(found.rollouts[0], 1)[torch.as_tensor(order)]
    over_padding = 0.5 * (update["logprobs_diff"] ** 2).mean().item()
    right = 0.5 * (update["logprobs_diff"] ** 2)[real].mean().item()
    ratio, right_ratio = update["ratio"].mean().item(), update["ratio"][real].mean().item()
    assert abs(sum(half_square(u) for u in found.updates) / 2 - log["policy/approxkl_avg"]) < 1e-6
    measured = (
        f"approximate KL {over_padding:.3g} with padding, {right:.3g} over real tokens; "
        f"ratio {ratio:.4f} and {right_ratio:.4f}"
    )
    return measured, HOLDS if abs(over_padding - right) < 1e-3 * right else FAILS


def half_square(update: dict[str, Any]) -> float:
    return 0.5 * (update["logprobs_diff"] ** 2).mean().item()


@check("S23")
def unit_of_the_kl() -> tuple[str, str]:
    found = run(learning_rate=1e-2, total_episodes=16)
    rollout, real = found.rollouts[1], real_tokens(found.rollouts[1], 1)
    by_hand = torch.where(real, rollout["logprobs"] - rollout["ref_logprobs"], 0.0).sum(1).mean().item()
    logged = found.trainer.state.log_history[1]["objective/kl"]
    measured = f"objective/kl {logged:.4g}, summed per sequence by hand {by_hand:.4g}; no controller reads it"
    return measured, HOLDS if abs(logged - by_hand) < 1e-4 else FAILS


# The value side


@check("S27")
def value_index() -> tuple[str, str]:
    found = clean_run(learning_rate=0.0)
    rollout, real = found.rollouts[0], real_tokens(found.rollouts[0], 1)
    first = rollout["query_responses"].size(1) - rollout["responses"].size(1)
    critic = found.trainer.accelerator.unwrap_model(found.trainer.model).value_model
    with torch.no_grad():
        before = ppo_trainer.get_reward(critic, rollout["query_responses"], 0, first)[0][:, first - 1 : -1, 0]
    apart = largest((before - rollout["values"])[real])
    return f"values differ from those read before each token by {apart:.1g}", HOLDS if apart < 1e-5 else FAILS


@check("S28")
def bootstrap() -> tuple[str, str]:
    rollout = run(kl_coef=0.0, gamma=0.9, lam=0.8, response_length=4).rollouts[0]
    cut = next(row for row, ids in enumerate(rollout["responses"].tolist()) if 1 not in ids)
    last = (rollout["advantages"] + rollout["values"])[cut, -1].item()
    follows = last - rollout["scores"][cut].item()
    measured = f"value after the last token of a cut answer: {follows:.2g}; no argument asks for it"
    return measured, NO_OPTION


@check("S14, R4")
def critic_in_the_checkpoint() -> tuple[str, str]:
    from safetensors import safe_open

    trainer = build(save_strategy="steps", save_steps=1)
    run(trainer)
    folder = os.path.join(trainer.args.output_dir, "checkpoint-1")
    with safe_open(os.path.join(folder, "model.safetensors"), framework="pt") as file:
        keys = list(file.keys())
    state = torch.load(os.path.join(folder, "optimizer.pt"), weights_only=True)
    covered = sum(len(group["params"]) for group in state["param_groups"])
    has_critic = any("score" in key or "value" in key for key in keys)
    measured = f"{len(keys)} tensors, {'a' if has_critic else 'no'} score head; the optimizer's state covers {covered}"
    return measured, HOLDS if has_critic else FAILS


@check("R5")
def resume() -> tuple[str, str]:
    return refused(lambda: build().train(resume_from_checkpoint=True), "train(resume_from_checkpoint=True)")


def refused(call: Callable[[], Any], what: str) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return f"{what}: {type(error).__name__}, {str(error).splitlines()[0][:90]}".replace("|", "/"), FAILS
    return f"{what} goes through", HOLDS


# What it can be given


def constant(prompts: list, completions: list, **kwargs: Any) -> list[float]:
    return [1.0] * len(prompts)


@check("R1")
def reward_function() -> tuple[str, str]:
    return refused(lambda: run(reward=constant), "a Python function as reward_model")


@check("R2")
def reward_model_with_another_tokenizer() -> tuple[str, str]:
    other = tiny_reward_model("llama", tiny_tokenizer(words=["mat", "the", "cat"]))
    tokenizer = tiny_tokenizer()
    config = {"tokenizer": tokenizer, "policy": tiny_causal_lm("llama", tokenizer)}

    def call():
        trainer = build(**config)
        trainer.reward_model = other
        run(trainer)

    return refused(call, "a reward model of 8 words under a policy of 39")


@check("R18")
def critic_from_the_reward_model() -> tuple[str, str]:
    return no_field("value_model is left to the caller; fields about it", "critic", "value_model")


@check("R19")
def critic_warm_up() -> tuple[str, str]:
    return no_field("fields for warm-up or a rate of the critic", "critic", "warmup_rollouts", "value_learning")


@check("R20")
def stop_on_kl() -> tuple[str, str]:
    return no_field("fields for a stop on the KL", "target_kl", "early_stop")


@check("R21")
def adaptive_coefficient() -> tuple[str, str]:
    return no_field("fields for an adaptive coefficient", "adaptive", "horizon", "kl_target")


def no_field(what: str, *words: str) -> tuple[str, str]:
    found = [f.name for f in dataclasses.fields(PPOConfig) if any(word in f.name for word in words)]
    return f"{what}: {', '.join(found) or 'none'}", HOLDS if found else NO_OPTION


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="JSON file of the measurements")
    parser.add_argument("--only", nargs="+", help="numbers as they stand in invariants.yaml")
    parser.add_argument("--process", help="what one of two processes does")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.process:
        whitened_means()
        return
    found = []
    for number, function in CHECKS.items():
        if arguments.only is None or number in arguments.only:
            found.append([number, *function()])
            print(*found[-1], sep=" | ", file=sys.stderr, flush=True)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main()
