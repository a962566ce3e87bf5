"""
TRL 1.12's PPO on tiny models, with its numbers in reach; for `trl112_checks.py`, in the environment of TRL 1.12.

Its `train()` is one function, so they are read out of its frame, when it calls the whitening of the advantages and the
means of the loss.
"""

import copy
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer


CHECKS = Path(__file__).with_name("trl112_checks.py")
PROMPTS = ["the cat", "good fine the mat sat on", "bad", "w1 w2 w3 w4 w5 w6 w7", "sat", "on the", "mat ?", "w9 w8 w7"]


@dataclasses.dataclass
class Run:
    """One run: the trainer, and copies of the local variables of `train()` at two places."""

    trainer: Any
    rollouts: list[dict[str, Any]]
    updates: list[dict[str, Any]]


def rows_of(tokenizer: Any, prompts: list[str]) -> Dataset:
    return Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})


def build(kind: str = "llama", pad_is_eos: bool = False, **config: Any) -> PPOTrainer:
    """A trainer on tiny models; keywords that are no field of `PPOConfig` replace the models and the rows."""
    tokenizer = config.pop("tokenizer", None) or tiny_tokenizer(pad_is_eos)
    tokenizer.padding_side = "left"
    policy = config.pop("policy", None) or tiny_causal_lm(kind, tokenizer)
    reward = config.pop("reward", None) or tiny_reward_model(kind, tokenizer, seed=1)
    rows = config.pop("rows", None) or rows_of(tokenizer, PROMPTS * 3)
    defaults = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_ppo_epochs": 1,
        "total_episodes": 8,
        "response_length": 12,
        "num_sample_generations": 0,
        "stop_token": "eos",
        "temperature": 1.0,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    critic = copy.deepcopy(reward) if isinstance(reward, torch.nn.Module) else tiny_reward_model(kind, tokenizer)
    torch.manual_seed(0)
    return PPOTrainer(
        args=PPOConfig(**{**defaults, **config}),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=critic,
        train_dataset=rows,
    )


def kept(frame: Any) -> dict[str, Any]:
    """The tensors among the local variables of a frame, as they are now."""
    return {n: v.detach().clone() for n, v in frame.f_locals.items() if isinstance(v, torch.Tensor)}


def run(trainer: PPOTrainer | None = None, **config: Any) -> Run:
    """Train, with the frame of `train()` read at the whitening of the advantages and in each update."""
    trainer = build(**config) if trainer is None else trainer
    found = Run(trainer, [], [])
    whiten, mean = ppo_trainer.masked_whiten, ppo_trainer.masked_mean

    def masked_whiten(values, mask, shift_mean=True):
        if shift_mean:
            found.rollouts.append(kept(sys._getframe(1)))
        return whiten(values, mask, shift_mean)

    def masked_mean(values, mask, axis=None):
        caller = sys._getframe(1)
        if caller.f_code.co_name == "train" and "pg_loss_max" in caller.f_locals and "loss" not in caller.f_locals:
            found.updates.append(kept(caller))
        return mean(values, mask, axis)

    ppo_trainer.masked_whiten, ppo_trainer.masked_mean = masked_whiten, masked_mean
    np.random.seed(0)
    try:
        trainer.train()
    finally:
        ppo_trainer.masked_whiten, ppo_trainer.masked_mean = whiten, mean
    return found


def clean_run(stop: int = 1, **config: Any) -> Run:
    """A run whose first rollout has two finished answers and no sampled padding id, which TRL takes for an end."""
    for seed in range(60):
        trainer = build(seed=seed, **config)
        pad = trainer.processing_class.pad_token_id
        found = run(trainer)
        real = real_tokens(found.rollouts[0], stop)
        responses = found.rollouts[0]["responses"]
        sampled_pad = pad != stop and bool((responses[real] == pad).any())
        if not sampled_pad and (responses[:, :-1] == stop).any(1).sum() >= 2:
            return found
    raise AssertionError("no such rollout in 60 seeds")


def real_tokens(rollout: dict[str, Any], stop: int) -> torch.Tensor:
    """Up to and with the first stop token of each response, `(B, T)`."""
    is_stop = (rollout["responses"] == stop).long()
    return (is_stop.cumsum(1) - is_stop) == 0


def finished_rows(rollout: dict[str, Any], stop: int) -> list[tuple[int, int]]:
    """Row and column of each first stop token that is not in the last column."""
    ended = [(row, ids.index(stop)) for row, ids in enumerate(rollout["responses"].tolist()) if stop in ids[:-1]]
    assert ended, "a finished completion is needed"
    return ended


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


class InnerSteps:
    """The steps that reach torch's optimizer, with the gradients they find."""

    def __init__(self, trainer: PPOTrainer):
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        self.norms, self.gradients, step = [], [], optimizer.step

        def counted(*args, **kwargs):
            named = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
            self.norms.append(torch.stack([g.norm() for g in named.values()]).norm().item())
            self.gradients.append({n: g.clone() for n, g in named.items()})
            return step(*args, **kwargs)

        optimizer.step = counted


def launch_two(what: str) -> list[str]:
    """The numbers that two processes of this file print."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533", CHECKS]
    done = subprocess.run([*line, "--process", what], capture_output=True, text=True, timeout=300, check=True)
    return next(text for text in done.stdout.splitlines() if text.startswith("MEANS")).split()[1:]
