"""What both sides of `speed.py` share: the settings of a process, the models and the prompts.

Only torch, transformers, PEFT and datasets are imported, so that this runs in the environment of TRL 1.12 as well.
"""

import json
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)


PAD, EOS, UNKNOWN, MARK = range(4)
LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]  # of Llama and of Gemma 3
FIRST_LENGTH = 4  # the id of a length of 0; one of these stands before the mark that ends a prompt
LENGTHS = 65


@dataclass
class Run:
    """Settings of one process. `options` are further fields of the trainer's configuration."""

    workload: str
    side: str
    seed: int = 0
    iterations: int = 2
    """Measured ones; one more goes before them as warm-up."""
    episodes: int = 32
    epochs: int = 4
    prompt: tuple[int, int] = (32, 32)
    completion: tuple[int, int] = (64, 64)
    layers: int = 8
    hidden: int = 384
    vocabulary: int = 8192
    adapted_layers: int | None = None
    """LoRA r=16 on every linear layer of so many layers, counted from the top; None trains the whole model."""
    critic_lora: bool = False
    """Whether TRL 1.12's critic gets adapters too; ours always does."""
    model: str | None = None
    """Folder of a causal language model instead of a random one."""
    nf4: bool = False
    dtype: str = "float32"
    threads: int = 1
    micro_batch: int = 32
    rollout_batch: int = 32
    """Rows per forward without gradient, and per generation where the trainer splits it."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ragged(self) -> bool:
        return self.completion[0] < self.completion[1]

    def lora(self, config: Any, task_type: str) -> LoraConfig:
        layers = config.get_text_config().num_hidden_layers
        return LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=LINEAR,
            layers_to_transform=list(range(layers - min(self.adapted_layers, layers), layers)),
            task_type=task_type,
            modules_to_save=["score"] if task_type == "SEQ_CLS" else None,
        )

    def tiny(self) -> "Run":
        """The same kind of run, small: what is imported on first use is then there before memory is counted."""
        adapted = self.adapted_layers and (1 if self.adapted_layers < self.layers else 2)
        size = {"hidden": 64, "layers": 2, "adapted_layers": adapted, "model": None, "iterations": 0}
        return replace(self, **size, episodes=self.micro_batch, prompt=(8, 8), completion=(8, 8))


def read_run() -> tuple[Run, Path]:
    """`PROGRAM SETTINGS.json OUTPUT.json`"""
    return Run(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])


def config_of(run: Run) -> Any:
    """Llama of 14.95 M parameters at the default sizes (tied embeddings), or that of `run.model`."""
    if run.model:
        return AutoConfig.from_pretrained(run.model)
    return LlamaConfig(
        vocab_size=run.vocabulary,
        hidden_size=run.hidden,
        intermediate_size=2 * run.hidden,
        num_hidden_layers=run.layers,
        num_attention_heads=run.hidden // 64,
        num_key_value_heads=run.hidden // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )


def random_policy(run: Run) -> Any:
    torch.manual_seed(run.seed)
    return AutoModelForCausalLM.from_config(config_of(run), dtype=torch.float32)


def random_reward(run: Run) -> Any:
    """A reward model of the policy's shape; a critic starts as a copy of it on both sides."""
    config = config_of(run)
    config.num_labels = 1
    torch.manual_seed(run.seed + 1)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


def checksum(model: Any) -> float:
    """Equal on both sides, or they do not train the same model. In pieces: Gemma's embeddings in float64 take 1.3 GB,
    which would be the peak of W5."""
    pieces = (piece for p in model.parameters() for piece in p.detach().flatten().split(2**20))
    return sum(piece.double().abs().sum().item() for piece in pieces)


def tokenizer_of(run: Run) -> Any:
    if run.model:
        return AutoTokenizer.from_pretrained(run.model)
    words = ["<pad>", "<eos>", "<unk>", "<mark>", *(f"n{length}" for length in range(LENGTHS))]
    words += [f"w{index}" for index in range(len(words), run.vocabulary)]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>", padding_side="left"
    )


def prompts_of(run: Run, tokenizer: Any) -> Dataset:
    """Enough prompts that no epoch ends. Each carries the length of its completion, so any order gives the same."""
    draw = random.Random(run.seed)
    rows = []
    for _ in range(run.episodes * (run.iterations + 2)):
        length, wanted = draw.randint(*run.prompt), draw.randint(*run.completion)
        if run.model:
            rows.append(" ".join(draw.choice(COMMON) for _ in range(length - 1)))
        else:
            words = [f"w{draw.randrange(FIRST_LENGTH + LENGTHS, run.vocabulary)}" for _ in range(length - 2)]
            rows.append(" ".join([*words, f"n{wanted}", "<mark>"]))
    found = {len(ids) for ids in tokenizer(rows)["input_ids"]}
    assert min(found) >= run.prompt[0] and max(found) <= run.prompt[1], f"prompts of {found} tokens"
    return Dataset.from_dict({"prompt": rows})


# Each is one token of Gemma 3; the tokenizer puts one more in front of them.
COMMON = "the of and to in is that for it was on are as with at be this have from or had by not but what all".split()
