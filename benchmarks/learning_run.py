"""One run of ours, or of TRL 1.16's RLOO or GRPO, for `learning.py`, which starts this as a process of its own.

PYTHONPATH=. python benchmarks/learning_run.py JOB.json
"""

import json
import sys
from typing import Any

import torch
from compare_arms import KL_FIELD, TRAINERS
from datasets import Dataset
from learning_clock import Snapshots
from transformers import set_seed

from rlhf_ext.pipelines.quickstart_evaluation import mean
from rlhf_ext.toyworld.corpus import prompt_rows
from rlhf_ext.toyworld.gold import gold_reward
from rlhf_ext.toyworld.tiny import build_tokenizer


def main() -> None:
    with open(sys.argv[1]) as file:
        job: dict[str, Any] = json.load(file)
    torch.set_num_threads(1)
    world, setting, golds = job["world"], job["setting"], []

    def gold(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        scores = gold_reward(prompts, completions)
        golds.append(mean(scores))
        return scores

    size = setting["rollout_size"]
    minibatches = size // min(size, job["minibatch"])
    config, trainer_class = TRAINERS[job["trainer"]]
    set_seed(job["seed"])
    args = config(
        output_dir=job["folder"],
        seed=job["seed"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=size // minibatches,
        steps_per_generation=minibatches,
        gradient_accumulation_steps=1,
        max_steps=world["episodes"] // size * minibatches * job["args"]["num_iterations"],
        max_completion_length=world["max_completion_length"],
        learning_rate=setting["learning_rate"],
        lr_scheduler_type="constant",
        **{KL_FIELD[job["trainer"]]: world["kl_coef"]},
        **job["args"],
    )
    trainer = trainer_class(
        model=job["sft"],
        reward_funcs=gold,
        args=args,
        train_dataset=Dataset.from_list(prompt_rows(world["episodes"], job["seed"], split="ppo")),
        processing_class=build_tokenizer(),
    )
    policy = trainer.model
    steps = minibatches * args.num_iterations
    Snapshots(job, policy, steps, lambda: golds).train(trainer)


if __name__ == "__main__":
    main()
