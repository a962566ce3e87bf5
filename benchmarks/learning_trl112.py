"""One run of TRL 1.12's PPO for `learning.py`, which starts this in the environment of TRL 1.12.

PYTHONPATH=. ENVIRONMENT/bin/python benchmarks/learning_trl112.py JOB.json
"""

import json
import sys
from typing import Any

import torch
from compare_trl112 import GoldModule, trainer_of
from learning_clock import Snapshots
from transformers import AutoModelForCausalLM, set_seed
from trl.experimental.ppo import PPOConfig

from rlhf_ext.toyworld.corpus import prompt_rows
from rlhf_ext.toyworld.tiny import build_tokenizer


def main() -> None:
    with open(sys.argv[1]) as file:
        job: dict[str, Any] = json.load(file)
    torch.set_num_threads(1)
    world, setting = job["world"], job["setting"]
    tokenizer = build_tokenizer()
    set_seed(job["seed"])
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["sft"], dtype=torch.float32) for _ in range(2))
    rows = prompt_rows(world["episodes"], job["seed"], split="ppo")
    size = setting["rollout_size"]
    args = PPOConfig(
        output_dir=job["folder"],
        seed=job["seed"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        num_sample_generations=0,
        per_device_train_batch_size=size,
        local_rollout_forward_batch_size=size,
        total_episodes=world["episodes"],
        response_length=world["max_completion_length"],
        temperature=1.0,
        stop_token="eos",
        kl_coef=world["kl_coef"],
        learning_rate=setting["learning_rate"],
        lr_scheduler_type="constant",
        **job["args"],
    )
    reward = GoldModule(tokenizer)
    trainer = trainer_of(args, policy, reference, reward, tokenizer, rows)
    notes = reward.backbone.rollouts
    Snapshots(job, policy, 1, lambda: [note["gold"] for note in notes]).train(trainer)


if __name__ == "__main__":
    main()
