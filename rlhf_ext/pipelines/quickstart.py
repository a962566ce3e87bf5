"""Classic RLHF from nothing, offline: SFT, best-of-4 labels, K-way reward model, PPO with a critic from it.

The toy world knows the true reward of every answer ("gold"). Only the simulated labeller reads it: PPO is driven by
the reward model that was trained on the labels (and a penalty for answers without an end), so that the table at the
end says what preferences achieved.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from ..feedback.simulated import SimulatedLabeller
from ..models.critics import critic_from_policy
from ..models.generation import sample_completions
from ..models.scoring import ModelReward, load_reward_model
from ..toyworld.corpus import prompt_rows, sft_rows
from ..toyworld.gold import GOLD_MAX, gold_reward
from ..toyworld.grammar import ErrorMix
from ..toyworld.tiny import build_model, build_tokenizer
from ..trainers.ppo_config import PPOConfig
from ..trainers.ppo_trainer import PPOTrainer
from ..trainers.reward_config import PreferenceRewardConfig
from ..trainers.reward_trainer import PreferenceRewardTrainer
from .quickstart_evaluation import evaluate, gain_over, mean
from .quickstart_report import print_table, write_report


@dataclass
class QuickstartSettings:
    """Sizes and rates of a run; what the defaults reach, and in what time, is in `docs/results.md`."""

    model_size: str = "small"
    max_completion_length: int = 16
    sft_rows: int = 20_000
    sft_batch_size: int = 32
    sft_learning_rate: float = 1e-3
    sft_steps: int = 600
    label_prompts: int = 8_000
    label_error_rate: float = 0.0
    reward_batch_size: int = 16
    reward_learning_rate: float = 1e-3
    reward_steps: int = 800
    ppo_prompts: int = 8_192
    num_updates: int = 40
    rollout_size: int = 256
    ppo_learning_rate: float = 3e-4
    critic_learning_rate: float = 1e-3
    ppo_epochs: int = 2
    minibatches: int = 4
    kl_coef: float = 1.0
    missing_eos_penalty: float = 5.0
    vf_coef: float = 0.1
    test_prompts: int = 512


def run_quickstart(output_dir: str, seed: int = 0, settings: QuickstartSettings | None = None) -> dict[str, Any]:
    """Run all steps, write `metrics.json`, `report.html` and the models under `output_dir`, and print the table.

    Args:
        output_dir (`str`):
            Folder of the run; `sft/`, `reward/` and `ppo/` (with `ppo/critic/`) are models that load on their own.
        seed (`int`, *optional*, defaults to 0):
            Seed of data, models and sampling.
        settings ([`QuickstartSettings`], *optional*):
            Sizes and rates.

    Returns:
        `dict`: what stands in `metrics.json`.
    """
    settings = settings or QuickstartSettings()
    os.makedirs(output_dir, exist_ok=True)
    clock = _Clock()
    tokenizer = build_tokenizer()
    test = [row["prompt"] for row in prompt_rows(settings.test_prompts, seed, split="test")]

    print(f"1/5 SFT: a corpus of good and bad answers, {settings.sft_steps} steps", flush=True)
    sft = train_sft(output_dir, tokenizer, settings, seed)
    clock.lap("sft")

    print(f"2/5 labels: 4 completions for each of {settings.label_prompts} prompts, the best one marked", flush=True)
    train, held_out = _label(sft, tokenizer, settings, seed)
    clock.lap("labels")

    print("3/5 reward model: K-way softmax over the 4 completions", flush=True)
    accuracy = _train_reward(output_dir, sft, tokenizer, train, held_out, settings, seed)
    clock.lap("reward")

    before = evaluate(sft, None, tokenizer, test, settings.max_completion_length, seed)
    print(f"4/5 PPO: {settings.num_updates} updates of {settings.rollout_size} episodes", flush=True)
    ppo, history = train_ppo(output_dir, tokenizer, settings, seed)
    clock.lap("ppo")

    print("5/5 evaluation on held-out prompts", flush=True)
    after = evaluate(ppo, sft, tokenizer, test, settings.max_completion_length, seed)
    metrics = {
        "seed": seed,
        "sft": before.metrics,
        "ppo": after.metrics,
        "gold_reward_max": GOLD_MAX,
        **gain_over(before, after),
        "reward_accuracy": accuracy,
        "seconds": clock.total,
        "seconds_by_step": clock.laps,
        "settings": asdict(settings),
    }
    with open(os.path.join(output_dir, "metrics.json"), "w") as file:
        json.dump(metrics, file, indent=2)
    report = write_report(output_dir, metrics, history, before.samples, after.samples, before.gold, after.gold)
    print_table(metrics)
    print(f"Models, metrics.json and {report} are in {output_dir}", flush=True)
    return metrics


class _Clock:
    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    @property
    def total(self) -> float:
        return time.perf_counter() - self.start


def _shared(output_dir: str, name: str, seed: int) -> dict[str, Any]:
    """Arguments that every trainer of the run has in common."""
    return {
        "output_dir": os.path.join(output_dir, name),
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 10,
    }


def train_sft(
    output_dir: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: QuickstartSettings,
    seed: int,
    mix: ErrorMix | None = None,
) -> PreTrainedModel:
    """Train on answers with mistakes drawn from `mix` (the corpus' own if `None`), and save under `output_dir`/sft."""
    set_seed(seed)
    model = build_model(tokenizer, settings.model_size)
    args = SFTConfig(
        **_shared(output_dir, "sft", seed),
        per_device_train_batch_size=settings.sft_batch_size,
        learning_rate=settings.sft_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        adam_beta2=0.95,
        max_steps=settings.sft_steps,
        max_length=64,
        completion_only_loss=True,
    )
    rows = sft_rows(settings.sft_rows, seed, mix=mix)
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    completions = tokenizer([row["completion"] for row in rows])["input_ids"]
    # Tokenised here in two calls: row by row the trainer would take half a minute for it.
    train = Dataset.from_dict(
        {
            "input_ids": [[*p, *c, tokenizer.eos_token_id] for p, c in zip(prompts, completions, strict=True)],
            "completion_mask": [[0] * len(p) + [1] * (len(c) + 1) for p, c in zip(prompts, completions, strict=True)],
        }
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=train, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return model.eval()


def _label(
    sft: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: QuickstartSettings, seed: int
) -> tuple[Dataset, Dataset]:
    set_seed(seed)
    prompts = [row["prompt"] for row in prompt_rows(settings.label_prompts, seed, split="labels")]
    samples = sample_completions(
        sft,
        tokenizer,
        prompts,
        num_samples=4,
        max_new_tokens=settings.max_completion_length,
        batch_size=1024,
        progress="sampling",
    )
    labeller = SimulatedLabeller(gold_reward, error_rate=settings.label_error_rate, seed=seed)
    rows = []
    for index, prompt in enumerate(prompts):
        completions = [" " + text for text in samples.texts[4 * index : 4 * index + 4]]
        rows.append(labeller.best_of(prompt, completions, skip_ties=True))
    # Held out before anything is skipped: what a tie is there to compare counts for the accuracy too.
    held_out = len(rows) // 20
    return Dataset.from_list(rows[held_out:]), Dataset.from_list(rows[:held_out])


def _train_reward(
    output_dir: str,
    sft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    held_out: Dataset,
    settings: QuickstartSettings,
    seed: int,
) -> float:
    """Train and save the reward model; the return is its accuracy on held-out pairs whose gold scores differ."""
    set_seed(seed)
    model = critic_from_policy(sft)
    torch.nn.init.normal_(model.score.weight, std=(model.config.hidden_size + 1) ** -0.5)
    args = PreferenceRewardConfig(
        **_shared(output_dir, "reward", seed),
        per_device_train_batch_size=settings.reward_batch_size,
        learning_rate=settings.reward_learning_rate,
        # A false value shows at its own token. Summed over tokens that is learnt in 400 steps; at the last token
        # alone, to which it has to be carried first, not reliably in 800.
        reward_aggregation="sum",
        max_steps=settings.reward_steps,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        adam_beta2=0.95,
        max_length=64,
    )
    trainer = PreferenceRewardTrainer(model=model, args=args, train_dataset=train, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    reward = ModelReward(load_reward_model(args.output_dir), tokenizer, tokenizer, batch_size=256)
    right, pairs = 0.0, 0
    for row in held_out:
        completions, prompts = row["completions"], [row["prompt"]] * len(row["completions"])
        ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in completions]
        scores, gold = reward(prompts, completions, ids), gold_reward(prompts, completions)
        for i in range(len(gold)):
            for j in range(i):
                if gold[i] != gold[j]:
                    pairs += 1
                    right += float((scores[i] > scores[j]) == (gold[i] > gold[j]))
    return right / max(pairs, 1)


def train_ppo(
    output_dir: str, tokenizer: PreTrainedTokenizerBase, settings: QuickstartSettings, seed: int
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """Train on `output_dir`/sft and `output_dir`/reward, save under `output_dir`/ppo; the policy, and its logs."""
    set_seed(seed)
    steps = settings.ppo_epochs * settings.minibatches
    args = PPOConfig(
        **{**_shared(output_dir, "ppo", seed), "logging_steps": steps},
        per_device_train_batch_size=settings.rollout_size // settings.minibatches,
        steps_per_generation=settings.minibatches,
        gradient_accumulation_steps=1,
        num_iterations=settings.ppo_epochs,
        max_steps=settings.num_updates * steps,
        learning_rate=settings.ppo_learning_rate,
        critic_learning_rate=settings.critic_learning_rate,
        kl_coef=settings.kl_coef,
        vf_coef=settings.vf_coef,
        # A clip of 0.2 is meant for scores of size 1: here they are of size 10, and the critic would creep.
        epsilon_value=None,
        max_completion_length=settings.max_completion_length,
    )
    reward = os.path.join(output_dir, "reward")
    trainer = PPOTrainer(
        model=os.path.join(output_dir, "sft"),
        reward_funcs=[reward, _unfinished(tokenizer, settings.missing_eos_penalty)],
        args=args,
        train_dataset=Dataset.from_list(prompt_rows(settings.ppo_prompts, seed, split="ppo")),
        processing_class=tokenizer,
        critic_model=reward,
    )
    gold: list[float] = []
    trainer.reward_funcs[0] = _observed(trainer.reward_funcs[0], gold)
    trainer.train()
    trainer.save_model()
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    history = [{**entry, "gold": value} for entry, value in zip(logs, gold, strict=False)]
    return trainer.model.eval(), history


def _unfinished(tokenizer: PreTrainedTokenizerBase, penalty: float) -> Any:
    """Minus `penalty` for a completion that was cut by length.

    The labels hold hardly any, so the reward model never learnt what an answer without an end is worth, and PPO would
    find that out: without this term a run with a high learning rate ended in endless text at the highest score.
    """

    def unfinished(prompts: list[str], completions: list[str], completion_ids: list, **kwargs: Any) -> list[float]:
        return [0.0 if ids[-1] == tokenizer.eos_token_id else -penalty for ids in completion_ids]

    return unfinished


def _observed(reward: Any, gold: list[float]) -> Any:
    """`reward` itself; beside it the mean gold score of each rollout is noted for the plots. PPO never sees it."""

    def observed(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float | None]:
        gold.append(mean(gold_reward(prompts, completions)))
        return reward(prompts=prompts, completions=completions, **kwargs)

    return observed


def quick(settings: QuickstartSettings | None = None, **changes: Any) -> QuickstartSettings:
    """Settings with some values changed; `None` leaves a value as it is."""
    return replace(settings or QuickstartSettings(), **{k: v for k, v in changes.items() if v is not None})
