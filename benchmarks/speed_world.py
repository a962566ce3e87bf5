"""What both sides of `speed.py` share: model, prompts, forced lengths, and how time and memory are taken.

Only torch, transformers, PEFT and datasets are imported, so that this runs in the environment of TRL 1.12 as well.
"""

import ctypes
import gc
import json
import random
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TrainerCallback,
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
    """Equal on both sides, or they do not train the same model."""
    return sum(parameter.detach().double().abs().sum().item() for parameter in model.parameters())


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


class ForcedLengths(LogitsProcessor):
    """No end of sequence and no padding is ever sampled; with `ragged`, each row ends at the length of its prompt."""

    def __init__(self, run: Run, never: list[int]):
        self.ragged, self.never = run.ragged, never

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, self.never] = -torch.inf
        if self.ragged:
            mark = (input_ids == MARK).int().argmax(1)
            wanted = input_ids.gather(1, mark[:, None] - 1)[:, 0] - FIRST_LENGTH
            last = input_ids.size(1) - mark >= wanted  # the token that is chosen now is the last one
            scores[last] = -torch.inf
            scores[last, EOS] = 0.0
        return scores


class Meter(TrainerCallback):
    """Seconds and work of each iteration: `steps` calls of `on_step_end` make one.

    An iteration goes from the end of the one before to its own end, so logging and loading of data are in it. Rollout
    = inside of `generate`; scoring = from there to the first forward with gradients; update = the rest.
    """

    def __init__(self, steps: int):
        self.steps, self.calls, self.marks, self.phases = steps, 0, [], []
        self.first, self.generated, self.generations = None, 0.0, []
        self.optimizer_steps, self.tokens = 0, 0

    def watch(self, run: Run, base: Any, trained: Any) -> None:
        """`base`: the causal language model that generates; `trained`: the module whose forward has gradients."""
        generate, never = base.generate, {PAD, EOS, UNKNOWN, MARK}
        if run.model:
            ids = base.generation_config.eos_token_id
            never = {base.config.pad_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
        lengths = ForcedLengths(run, sorted(never))

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = generate(*args, **kwargs, logits_processor=LogitsProcessorList([lengths]))
            self.generated += time.perf_counter() - start
            sequences = getattr(output, "sequences", output)
            width = kwargs.get("input_ids", args[0] if args else None).size(1)
            new = sequences[:, width:]
            self.tokens += int((new != PAD).sum()) if not run.model else new.numel()
            self.generations.append([len(new), new.size(1)])
            return output

        base.generate = timed
        trained.register_forward_pre_hook(self._forward)
        register_optimizer_step_post_hook(self._step)

    def _forward(self, module: Any, args: Any) -> None:
        if self.first is None and torch.is_grad_enabled():
            self.first = time.perf_counter()

    def _step(self, *args: Any) -> None:
        self.optimizer_steps += 1

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        if self.calls % self.steps:
            return
        now, before = time.perf_counter(), self.marks[-1]
        phases = {"rollout": self.generated, "update": now - self.first}
        self.phases.append({**phases, "scoring": now - before - sum(phases.values())})
        self.marks.append(now)
        self.first, self.generated = None, 0.0

    def result(self) -> dict[str, Any]:
        seconds = [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)]
        return {
            "warm_up": seconds[0],
            "seconds": seconds[1:],
            "phases": {name: [row[name] for row in self.phases[1:]] for name in self.phases[0]},
            "tokens": self.tokens,
            "optimizer_steps": self.optimizer_steps,
            "generations": self.generations,
        }


def release() -> None:
    """Give what is free back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` the peak since `forget_peak`."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def trained_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
