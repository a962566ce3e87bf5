"""One run of the comparison: the toy world's SFT model, one arm, one seed.

What an arm may set, and what all arms have in common, stands in `arms.yaml`; here both become a trainer. The reward of
every arm is gold itself, so that optimisers are compared and not reward models.
"""

import contextlib
import io
import os
import shutil
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlhf_ext import NLPOConfig, NLPOTrainer, PPOConfig, PPOTrainer
from rlhf_ext.models.generation import Samples, completion_logps
from rlhf_ext.pipelines.quickstart import QuickstartSettings, quick, train_sft
from rlhf_ext.pipelines.quickstart_evaluation import evaluate, mean
from rlhf_ext.toyworld.corpus import prompt_rows
from rlhf_ext.toyworld.gold import gold_reward
from rlhf_ext.toyworld.grammar import ErrorMix
from rlhf_ext.toyworld.tiny import build_tokenizer


TRAINERS: dict[str, tuple[type, type]] = {
    "ppo": (PPOConfig, PPOTrainer),
    "nlpo": (NLPOConfig, NLPOTrainer),
    "rloo": (RLOOConfig, RLOOTrainer),
    "grpo": (GRPOConfig, GRPOTrainer),
}
KL_FIELD = {"ppo": "kl_coef", "nlpo": "kl_coef", "rloo": "beta", "grpo": "beta"}

# Further numbers of the trainers' logs that help to find a cause.
DIAGNOSTICS = (
    "entropy",
    "grad_norm",
    "value/explained_variance",
    "policy/approx_kl",
    "policy/ratio_max",
    "clip_ratio/region_mean",
    "nlpo/allowed_tokens",
)


class Observer:
    """The reward function of a run: gold, less a penalty for an answer without an end. It notes each rollout's means.

    Args:
        penalty (`float`):
            What a completion that was cut by length loses.
    """

    __name__ = "gold"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, penalty: float):
        self.tokenizer, self.penalty = tokenizer, penalty
        self.rollouts: list[dict[str, float]] = []
        # (policy, reference) where the trainer's own log has no KL summed per sequence
        self.models: tuple[torch.nn.Module, torch.nn.Module] | None = None
        self.start = time.perf_counter()

    def __call__(self, prompts: list[str], completions: list[str], completion_ids: list, **kwargs: Any) -> list[float]:
        gold = gold_reward(prompts, completions)
        note = {"gold": mean(gold), "length": mean([len(ids) for ids in completion_ids])}
        if self.models is not None:
            note["kl"] = self._kl(prompts, completions, completion_ids)
        self.rollouts.append({"episodes": len(gold), **note, "seconds": time.perf_counter() - self.start})
        end = self.tokenizer.eos_token_id
        return [
            value - (0.0 if ids[-1] == end else self.penalty) for value, ids in zip(gold, completion_ids, strict=True)
        ]

    def _kl(self, prompts: list[str], completions: list[str], completion_ids: list) -> float:
        prompt_ids = self.tokenizer(prompts)["input_ids"]
        samples = Samples(prompts, completions, prompt_ids, completion_ids, [False] * len(prompts))
        policy, reference = (
            completion_logps(model, samples, pad_token_id=self.tokenizer.pad_token_id) for model in self.models
        )
        return (policy - reference).mean().item()


def sft_model(folder: str, world: dict[str, Any], seed: int) -> str:
    """Folder of the SFT model of this seed; trained on the first call, under another name until it is whole."""
    path = os.path.join(folder, f"seed{seed}", "sft")
    if not os.path.exists(path):
        aside = os.path.join(folder, f"seed{seed}.part")
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):
            train_sft(aside, build_tokenizer(), settings_of(world), seed, ErrorMix(**world["sft_errors"]))
        shutil.rmtree(os.path.dirname(path), ignore_errors=True)
        os.rename(aside, os.path.dirname(path))
    return path


def settings_of(world: dict[str, Any]) -> QuickstartSettings:
    names = ("model_size", "max_completion_length", "sft_rows", "sft_steps", "test_prompts")
    return quick(**{name: world[name] for name in names})


def training_prompts(world: dict[str, Any], seed: int) -> list[dict[str, str]]:
    """One row per episode: the same set for every arm of a seed."""
    return prompt_rows(world["episodes"], seed, split="ppo")


def arguments(arm: dict[str, Any], world: dict[str, Any], seed: int, output_dir: str) -> Any:
    """The trainer's configuration of an arm: the common part, then what the arm sets itself."""
    size, parts, epochs = arm["rollout_size"], arm["minibatches"], arm["epochs"]
    updates = world["episodes"] // size
    return TRAINERS[arm["trainer"]][0](
        output_dir=output_dir,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=size // parts,
        steps_per_generation=parts,
        gradient_accumulation_steps=1,
        num_iterations=epochs,
        max_steps=updates * parts * epochs,
        logging_steps=parts * epochs,
        max_completion_length=world["max_completion_length"],
        learning_rate=arm["learning_rate"],
        **{KL_FIELD[arm["trainer"]]: world["kl_coef"]},
        **arm["args"],
    )


def run_arm(
    arm: dict[str, Any], world: dict[str, Any], seed: int, sft: str, output_dir: str
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Train one arm on one seed.

    Returns:
        One row per update (`episodes` so far, `gold`, `kl` summed per sequence, `length`, `seconds`, diagnostics), and
        the metrics on held-out prompts.
    """
    tokenizer = build_tokenizer()
    observer = Observer(tokenizer, world["missing_eos_penalty"])
    set_seed(seed)
    trainer = TRAINERS[arm["trainer"]][1](
        model=sft,
        reward_funcs=observer,
        args=arguments(arm, world, seed, output_dir),
        train_dataset=Dataset.from_list(training_prompts(world, seed)),
        processing_class=tokenizer,
    )
    if arm["trainer"] == "grpo":
        observer.models = (trainer.model, trainer.ref_model)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "entropy" in entry]
    if len(logs) != len(observer.rollouts):
        raise RuntimeError(f"{arm['name']}: {len(logs)} log entries for {len(observer.rollouts)} rollouts.")
    updates, episodes = [], 0
    for note, log in zip(observer.rollouts, logs, strict=True):
        episodes += note["episodes"]
        # RLOO logs the mean per token of all tokens; times the mean length it is the mean sum per sequence.
        kl = note.get("kl", log.get("kl", 0.0) * (note["length"] if arm["trainer"] == "rloo" else 1.0))
        found = {name: log[name] for name in DIAGNOSTICS if name in log}
        updates.append({**note, "episodes": episodes, "kl": kl, **found})
    return updates, held_out(trainer.model, sft, world, seed)


def held_out(policy: PreTrainedModel, sft: str, world: dict[str, Any], seed: int) -> dict[str, float]:
    """Gold, its parts, and KL to the SFT model on prompts that no arm has seen."""
    prompts = [row["prompt"] for row in prompt_rows(world["test_prompts"], seed, split="test")]
    reference = AutoModelForCausalLM.from_pretrained(sft)
    length = world["max_completion_length"]
    return evaluate(policy.eval(), reference, build_tokenizer(), prompts, length, seed).metrics
