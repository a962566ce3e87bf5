"""Runs of TRL's own PPO as it was last released, in 1.12, for `compare.py`, which starts this in another environment.

    PYTHONPATH=. ENVIRONMENT/bin/python benchmarks/compare_trl112.py JOBS.json

Needs trl 1.12 and no trainer of ours. Each job leaves `updates.json` and the trained policy in its folder. That
trainer takes rewards as modules only and hands them token ids; gold is put behind the two names that it reads.
"""

import contextlib
import copy
import io
import json
import os
import shutil
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, set_seed
from trl.experimental.ppo import PPOConfig, PPOTrainer

from rlhf_ext.toyworld.corpus import prompt_rows
from rlhf_ext.toyworld.gold import gold_reward
from rlhf_ext.toyworld.tiny import build_tokenizer


class GoldModule(nn.Module):
    """A reward model as TRL 1.12 reads one: `score` of the last hidden state of the backbone, which here is gold."""

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: Any):
        super().__init__()
        self.backbone, self.score = _Backbone(tokenizer), nn.Identity()


class _Backbone(nn.Module):
    def __init__(self, tokenizer: Any):
        super().__init__()
        self.tokenizer = tokenizer
        self.question = tokenizer.convert_tokens_to_ids("?")
        self.rollouts: list[dict[str, float]] = []
        self.start = time.perf_counter()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        prompts, completions, lengths = [], [], []
        for row, mask in zip(input_ids, attention_mask.bool(), strict=True):
            ids = row[mask].tolist()
            first = ids.index(self.question) + 1  # a prompt ends with its question mark and holds no other
            prompts.append(self.tokenizer.decode(ids[:first]))
            completions.append(self.tokenizer.decode(ids[first:], skip_special_tokens=True))
            lengths.append(len(ids) - first)
        gold = torch.tensor(gold_reward(prompts, completions))
        seconds = time.perf_counter() - self.start
        note = {"gold": gold.mean().item(), "length": sum(lengths) / len(lengths), "seconds": seconds}
        self.rollouts.append({"episodes": len(gold), **note})
        return SimpleNamespace(hidden_states=[gold[:, None, None].expand(*input_ids.shape, 1)])


def critic_of(policy: PreTrainedModel) -> PreTrainedModel:
    """The policy's trunk with a head of zeros: the critic that the other arms start from.

    As `critic_from_policy` in rlhf_ext/models/critics.py, which needs PEFT, and this environment has none.
    """
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    critic = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    getattr(critic, critic.base_model_prefix).load_state_dict(policy.base_model.state_dict())
    nn.init.zeros_(critic.score.weight)
    return critic


def trainer_of(args: Any, policy: Any, reference: Any, reward: GoldModule, tokenizer: Any, rows: list) -> PPOTrainer:
    """The trainer with a critic that starts from the policy; it takes tokenised prompts alone."""
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic_of(policy),
        train_dataset=Dataset.from_dict({"input_ids": tokenizer([row["prompt"] for row in rows])["input_ids"]}),
    )


def run(arm: dict[str, Any], world: dict[str, Any], seed: int, sft: str, folder: str) -> list[dict[str, Any]]:
    """Train one seed; the policy goes to `folder`. One row per update, as in `compare_arms.run_arm`."""
    tokenizer = build_tokenizer()
    set_seed(seed)
    policy, reference = (AutoModelForCausalLM.from_pretrained(sft, dtype=torch.float32) for _ in range(2))
    rows = prompt_rows(world["episodes"], seed, split="ppo")
    args = PPOConfig(
        output_dir=folder,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        num_sample_generations=0,
        per_device_train_batch_size=arm["rollout_size"],
        local_rollout_forward_batch_size=arm["rollout_size"],
        num_ppo_epochs=arm["epochs"],
        total_episodes=world["episodes"],
        response_length=world["max_completion_length"],
        temperature=1.0,
        stop_token="eos",
        missing_eos_penalty=world["missing_eos_penalty"],
        kl_coef=world["kl_coef"],
        learning_rate=arm["learning_rate"],
        **arm["args"],
    )
    reward = GoldModule(tokenizer)
    trainer = trainer_of(args, policy, reference, reward, tokenizer, rows)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    updates, episodes = [], 0
    for note, log in zip(reward.backbone.rollouts, logs, strict=True):
        episodes += note["episodes"]
        found = {"kl": log["objective/kl"], "policy/approx_kl": log["policy/approxkl_avg"]}
        found["clip_ratio/region_mean"] = log["policy/clipfrac_avg"]
        updates.append({**note, "episodes": episodes, **found})
    policy.save_pretrained(os.path.join(folder, "policy"))
    return updates


def main() -> None:
    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for job in jobs:
        done = os.path.join(job["folder"], "updates.json")  # written last
        if os.path.exists(done):
            continue
        shutil.rmtree(job["folder"], ignore_errors=True)
        updates = run(job["arm"], job["world"], job["seed"], job["sft"], job["folder"])
        with open(done + ".part", "w") as file:
            json.dump(updates, file)
        os.rename(done + ".part", done)
        gold = sum(row["gold"] for row in updates) / len(updates)
        print(f"{job['arm']['name']}, seed {job['seed']}: area {gold:.3f}", flush=True)


if __name__ == "__main__":
    main()
