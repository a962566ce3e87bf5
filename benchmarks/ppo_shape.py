"""One PPO run of a stated shape, for the benchmarks of time and memory: random Llama, full rows, one reward model.

Prompts and completions have exactly the lengths that are asked for, so that the work of an iteration is known from
the shape alone. Imports that take seconds stand inside the functions: a parent that only starts processes needs none.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
ROLES = ("policy", "reference", "critic", "reward")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of one PPO iteration on it. `roles`: how many of `ROLES`, each a model of its own."""

    layers: int = 8
    hidden: int = 384
    intermediate: int = 768
    head_size: int = 64
    vocabulary: int = 8192
    episodes: int = 32
    num_generations: int = 1
    prompt: int = 32
    completion: int = 64
    epochs: int = 4
    micro_batch: int = 32
    roles: int = 4

    def __post_init__(self) -> None:
        if self.episodes % self.micro_batch or self.episodes % self.num_generations:
            raise ValueError(
                f"episodes={self.episodes} is no multiple of micro_batch={self.micro_batch} and "
                f"num_generations={self.num_generations}."
            )
        if not 1 <= self.roles <= len(ROLES):
            raise ValueError(f"roles={self.roles} has to lie between 1 and {len(ROLES)}: {', '.join(ROLES)}.")

    @property
    def length(self) -> int:
        """Tokens of a whole row."""
        return self.prompt + self.completion


W1 = Shape()
"""Workload W1 of `docs/performance.md`: 15 M parameters, 32 episodes of 32 + 64 tokens, 4 epochs of one step."""


def offline(threads: int) -> dict[str, str]:
    """Environment of a process that trains on so many threads."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
    }


def make_policy(shape: Shape) -> Any:
    """A causal language model with random weights, the same ones in each call."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.hidden // shape.head_size,
            num_key_value_heads=shape.hidden // shape.head_size,
            max_position_embeddings=max(1024, shape.length),
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        ),
        dtype=torch.float32,
    )


def make_tokenizer(shape: Shape) -> Any:
    """One token per word, `w3` to `wV`: any sampled id has a text that reads back as it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, shape.vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>", padding_side="left"
    )


def make_prompts(shape: Shape, count: int) -> list[str]:
    """Prompts of `shape.prompt` words."""
    span = shape.vocabulary - 3
    return [" ".join(f"w{3 + (17 * i + 7 * j) % span}" for j in range(shape.prompt)) for i in range(count)]


def full_length(prompts: list[str], completions: list[str], completion_ids: list, **kwargs: Any) -> list[float]:
    """The reward of a run without a reward model: even ids, as a share."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def make_trainer(shape: Shape, folder: Path, iterations: int) -> Any:
    """Our trainer on full fine-tuning in fp32, for so many rollouts with their updates."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    from rlhf_ext import PPOConfig, PPOTrainer

    policy, tokenizer = make_policy(shape), make_tokenizer(shape)
    config = type(policy.config)(**{**policy.config.to_dict(), "num_labels": 1})

    def classifier() -> Any:
        torch.manual_seed(1)
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)

    micro_batches = shape.episodes // shape.micro_batch
    without_critic = {"critic": "none", "advantage_estimator": "returns"} if shape.roles < 3 else {}
    args = PPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=shape.micro_batch,
        steps_per_generation=micro_batches,
        gradient_accumulation_steps=micro_batches,
        num_generations=shape.num_generations,
        num_iterations=shape.epochs,
        max_completion_length=shape.completion,
        max_steps=iterations * shape.epochs,
        kl_coef=0.05 if shape.roles > 1 else 0.0,
        learning_rate=1e-6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=shape.epochs,
        disable_tqdm=True,
        seed=0,
        **without_critic,
    )
    trainer = PPOTrainer(
        model=policy,
        reward_funcs=classifier() if shape.roles > 3 else full_length,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": make_prompts(shape, shape.episodes * iterations)}),
        processing_class=tokenizer,
        reward_processing_classes=[tokenizer],
        critic_model=classifier() if shape.roles > 2 else None,
    )
    # No end before the full length: the work of an iteration is then the one that is counted.
    trainer.generation_config.min_new_tokens = shape.completion
    return trainer
