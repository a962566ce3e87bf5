"""A tiny PPO trainer, one rollout of it, and the gradients of its loss, for every test of the trainers."""

import torch
from datasets import Dataset
from peft import LoraConfig

from rlhf_ext import PPOConfig, PPOTrainer
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer


PROMPTS = ["the cat", "good fine the mat sat on", "bad", "w1 w2 w3 w4 w5 w6 w7", "sat", "on the", "mat ?", "w9 w8 w7"]
ARGUMENTS = {
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


def make_trainer(tmp_path, kind="llama", lora=False, reward=None, tokenizer=None, **config):
    tokenizer = tokenizer or tiny_tokenizer()
    policy = tiny_causal_lm(kind, tokenizer)
    return PPOTrainer(
        model=policy,
        reward_funcs=tiny_reward_model(kind, tokenizer, seed=1) if reward is None else reward,
        args=PPOConfig(output_dir=str(tmp_path), **{**ARGUMENTS, **config}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None,
    )


def rollout(trainer, rows=PROMPTS, seeds=range(50)) -> dict[str, torch.Tensor]:
    """One rollout of all prompts, ragged, left-padded and partly cut by length, in the order of the rows."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    for seed in seeds:
        torch.manual_seed(seed)
        batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in rows])
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


def stir(trainer, seed=5, scale=0.05):
    """Move the trained weights, so that ratios leave 1 and clips bind."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
