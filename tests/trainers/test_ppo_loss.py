"""What trains is what is proved: loss and gradient of `PPOTrainer` equal `functional` on plain logits."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from rlhf_ext import PPOConfig, PPOTrainer
from rlhf_ext.functional import policy_gradient_loss, ppo_clip_loss, value_loss
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer


PROMPTS = ["the cat", "good fine the mat sat on", "bad", "w1 w2 w3 w4 w5 w6 w7", "sat", "on the", "mat ?", "w9 w8 w7"]


def make_trainer(tmp_path, kind="llama", lora=False, reward=None, tokenizer=None, **config):
    tokenizer = tokenizer or tiny_tokenizer()
    policy = tiny_causal_lm(kind, tokenizer)
    reward = tiny_reward_model(kind, tokenizer, seed=1) if reward is None else reward
    defaults = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 7,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return PPOTrainer(
        model=policy,
        reward_funcs=reward,
        args=PPOConfig(output_dir=str(tmp_path), **{**defaults, **config}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None,
    )


def rollout(trainer) -> dict[str, torch.Tensor]:
    """One rollout of all prompts, ragged and left-padded, in the order of the rows."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    for seed in range(50):
        torch.manual_seed(seed)
        batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS])
        if len(set(batch["completion_mask"].sum(1).tolist())) > 2:
            return batch
    raise AssertionError("no ragged rollout in 50 seeds")


def micro_batches(batch, count):
    size = len(batch["prompt_ids"]) // count
    for start in range(0, size * count, size):
        yield {k: v[start : start + size] if v.dim() else v for k, v in batch.items()}


def gradients(trainer) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return found


def plain_logps(model, prompt, completion, temperature):
    """Log-probabilities of one row without padding, from an ordinary forward."""
    ids = torch.cat([prompt, completion])[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float() / temperature
    first = len(prompt)
    return logits[first - 1 : -1].log_softmax(-1).gather(-1, completion[:, None]).squeeze(-1)


def plain_values(critic, prompt, completion):
    ids = torch.cat([prompt, completion])[None]
    hidden = getattr(critic, critic.base_model_prefix)(input_ids=ids).last_hidden_state
    return critic.score(hidden)[0, len(prompt) - 1 : -1, 0]


def proved_loss(trainer, batch):
    """The same objective from `functional`, row by row without padding, over one common number of tokens."""
    args, total, tokens = trainer.args, 0.0, int(batch["completion_mask"].sum())
    base = trainer.roles.base
    for i in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        real = batch["completion_mask"][i].bool()
        completion = batch["completion_ids"][i][real]
        mask = torch.ones(1, len(completion), dtype=torch.bool)
        logps = plain_logps(trainer.model, prompt, completion, args.temperature)[None]
        advantages = batch["advantages"][i][real][None]
        if args.policy_objective == "pg":
            loss, _ = policy_gradient_loss(logps, advantages, mask, reduction="sum")
        else:
            old = batch["old_per_token_logps"][i][real][None]
            loss, _ = ppo_clip_loss(
                logps,
                old,
                advantages,
                mask,
                epsilon=args.epsilon,
                epsilon_high=args.epsilon_high,
                delta=args.delta,
                reduction="sum",
            )
        total = total + loss
        if trainer.critic != "none":
            values = plain_values(base.critic, prompt, completion)[None]
            critic_loss, _ = value_loss(
                values,
                batch["values"][i][real][None],
                batch["returns"][i][real][None],
                mask,
                epsilon_value=args.epsilon_value,
                reduction="sum",
            )
            total = total + args.vf_coef * critic_loss
    return total / tokens


def stir(trainer):
    """Move the weights away from the rollout's, so that ratios leave 1 and clips bind."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


CASES = {
    "clip": {},
    "clip, wide, two-sided, hot": {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.5, "temperature": 0.7},
    "clip, no value clip, whitened rewards": {"epsilon_value": None, "whiten_rewards": True, "vf_coef": 0.5},
    "pg, actor-critic": {"policy_objective": "pg", "num_iterations": 1, "advantage_estimator": "returns"},
    "pg, no critic": {
        "policy_objective": "pg",
        "num_iterations": 1,
        "advantage_estimator": "leave_one_out",
        "num_generations": 2,
    },
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_functional_on_plain_logits(tmp_path, kind, case):
    trainer = make_trainer(tmp_path, kind, **CASES[case])
    batch = rollout(trainer)
    assert len(set(batch["prompt_mask"].sum(1).tolist())) > 1, "prompts must be ragged"
    assert len(set(batch["completion_mask"].sum(1).tolist())) > 1, "completions must be ragged"
    stir(trainer)

    losses = []
    for part in micro_batches(batch, 2):
        loss = trainer._compute_loss(trainer.model, part)
        loss.backward()
        losses.append(loss.item())
    ours = gradients(trainer)
    expected = proved_loss(trainer, batch)
    expected.backward()
    proved = gradients(trainer)

    assert sum(losses) == pytest.approx(expected.item(), abs=1e-6)
    assert ours.keys() == proved.keys()
    largest = max(g.abs().max() for g in proved.values())
    for name, gradient in proved.items():
        assert (ours[name] - gradient).abs().max() <= 1e-6 * max(1.0, largest), name
    moved = {n for n, g in ours.items() if g.abs().max() > 0}
    assert any("critic" in n for n in moved) == (trainer.critic != "none")
    assert any("critic" not in n for n in moved)
