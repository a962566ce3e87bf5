"""A short PPO run that saves inside its rollouts' epochs, to be interrupted and resumed."""

import os
import signal
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from rlhf_ext import PPOConfig, PPOTrainer
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.test_ppo_saving import lora, make_base, make_reward_adapter, varied


PROMPTS = [f"w{i} the cat w{i % 5} sat"[: 5 + 3 * (i % 6)] for i in range(12)]
# Rollouts of 4 prompts, 4 steps on each, 3 rollouts in an epoch: step 3 and 6 lie within a rollout's epochs, 12 ends
# an epoch, 15 lies within a rollout of the second one.
STEPS, SAVE_STEPS = 22, 3
ARGUMENTS = {
    "per_device_train_batch_size": 2,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 1,
    "num_iterations": 2,
    "max_completion_length": 5,
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "learning_rate": 1e-3,
    "critic_learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "adaptive_kl_target": 0.01,
    "kl_horizon": 40,
    "logging_steps": 2,
    "log_completions": True,
    "num_completions_to_print": 0,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
}


def prepare(folder):
    """What the runs start from: a base, a reward adapter on it, and an adapter of the policy's."""
    make_base(folder)
    make_reward_adapter(folder)
    from peft import get_peft_model

    policy = varied(get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), lora(lora_dropout=0.1)))
    policy.save_pretrained(folder / "sft")


def build(folder, kind, output_dir, callbacks=(), **config):
    """`one_base`: fresh LoRA, reward and critic adapters. `from_adapter`: goes on from an adapter. `full`: no LoRA.

    `shared`: one base with a critic that shares the reward's trunk. `stream`: as `full`, on rows that are streamed.
    """
    tokenizer = tiny_tokenizer()
    rows = Dataset.from_dict({"prompt": PROMPTS})
    if kind == "shared":
        config["critic"] = "shared"
    shared = {
        "args": PPOConfig(output_dir=str(output_dir), **{**ARGUMENTS, **config}),
        "train_dataset": rows.to_iterable_dataset() if kind == "stream" else rows,
        "processing_class": tokenizer,
        "callbacks": list(callbacks),
    }
    if kind in ("full", "stream"):
        reward = tiny_reward_model("llama", tokenizer, seed=1)
        return PPOTrainer(tiny_causal_lm("llama", tokenizer), reward_funcs=reward, **shared)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    reward = str(folder / "reward")
    if kind in ("one_base", "shared"):
        return PPOTrainer(base, reward_adapter=reward, peft_config=lora(lora_dropout=0.1), **shared)
    policy = PeftModel.from_pretrained(base, folder / "sft", is_trainable=True)
    return PPOTrainer(policy, reward_adapter=reward, **shared)


class Kill(TrainerCallback):
    """Ends the process without a word, as the out-of-memory killer does, at `step` of the phase `when`."""

    def __init__(self, when: str, step: int):
        self.when, self.step = when, step

    def install(self, trainer):
        if self.when == "generation":
            generate = trainer.roles.base.generate
            trainer.roles.base.generate = lambda *a, **k: self.die(trainer.state.global_step) or generate(*a, **k)
        if self.when == "saving":
            save = trainer._save_optimizer_and_scheduler
            trainer._save_optimizer_and_scheduler = lambda f: self.die(trainer.state.global_step) or save(f)
        if self.when == "update":
            trainer.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.die(state.global_step)

    def die(self, step):
        if step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def in_a_process(function, *args, **kwargs) -> int:
    """Run in a forked process and return its exit code, minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*args, **kwargs)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train_and_die(folder, kind, output_dir, when, step):
    trainer = build(folder, kind, output_dir)
    Kill(when, step).install(trainer)
    trainer.train()


def end_of(trainer):
    """Everything a run ends with: weights, and what it logged but for times."""
    timed = ("time", "runtime", "per_second", "total_flos", "train_loss")
    logs = [{k: v for k, v in entry.items() if not any(t in k for t in timed)} for entry in trainer.state.log_history]
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}, logs


def assert_same_end(one, other):
    weights, logs = one
    assert weights.keys() == other[0].keys()
    different = [name for name, tensor in weights.items() if not torch.equal(tensor, other[0][name])]
    assert not different, f"{len(different)} of {len(weights)} tensors differ, {different[:3]} first"
    assert [e for e in logs if "loss" in e] == [e for e in other[1] if "loss" in e]


def main(folder, output_dir, kind="one_base"):
    """One process of a run: resumes where there is a checkpoint, says when it starts, keeps its end."""
    rank = int(os.environ.get("RANK", 0))
    output_dir = Path(output_dir)
    trainer = build(Path(folder), kind, output_dir)
    (output_dir / f"started_{rank}").touch()
    trainer.train(resume_from_checkpoint=any(output_dir.glob("checkpoint-*")) or None)
    torch.save(end_of(trainer), output_dir / f"end_{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
