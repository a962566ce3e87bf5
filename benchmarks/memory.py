"""
Memory of one PPO step: four roles on one base against four models, and the plan beside what was measured.

```bash
python benchmarks/memory.py --output_dir runs/memory --result benchmarks/results/memory.json
python benchmarks/memory.py --output_dir runs/memory_gemma --model google/gemma-3-270m --result ...
```

Each arm is a process of its own with the same settings. Measured is the highest resident memory of the process while
it trains, less what it held after its imports, before anything was built. Freed blocks go back to the system at once
(glibc's mmap threshold is fixed), so that what is measured is what is alive; `--allocator default` leaves that out.
Peaks of loading a checkpoint lie before training and are not counted.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
WORDS = [f"w{i}" for i in range(60)]


@dataclass
class Arm:
    """Settings of one process: the model's shape, how it is loaded, and the run's sizes."""

    what: str
    hidden: int = 512
    layers: int = 8
    vocabulary: int = 2048
    nf4: bool = True
    dtype: str = "float32"
    lora: bool = True
    copies: bool = False
    checkpointing: bool = False
    rows: int = 4
    steps_per_generation: int = 2
    accumulation: int = 2
    prompt: int = 36
    completion: int = 12
    model: str | None = None


ARMS = {
    "one_base": Arm("four roles on one NF4 base", hidden=1024, checkpointing=True, rows=2, prompt=8, completion=16),
    "lora_fp32": Arm("LoRA, four roles on one fp32 base", nf4=False),
    "lora_nf4": Arm("LoRA, four roles on one NF4 base"),
    "full": Arm("full fine-tuning, critic of its own", hidden=384, layers=6, nf4=False, lora=False, accumulation=1),
    "lora_nf4_checkpointing": Arm("LoRA on NF4, checkpointing", checkpointing=True, rows=8),
}
ARMS["four_copies"] = replace(ARMS["one_base"], what="four NF4 models", copies=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", help="folder of a causal language model instead of a random one")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of --model")
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=["one_base", "four_copies"])
    parser.add_argument("--allocator", choices=["returning", "default"], default="returning")
    parser.add_argument("--result", type=Path, help="JSON for benchmarks/results.py")
    parser.add_argument("--run", choices=sorted(ARMS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        arm = ARMS[arguments.run]
        if arguments.model:
            arm = replace(arm, model=arguments.model, dtype=arguments.dtype)
        print(json.dumps(run(arm, arguments.output_dir / arguments.run)))
        return 0
    measured = {name: measure(name, arguments) for name in arguments.arms}
    for name, numbers in measured.items():
        print(name, json.dumps(numbers, indent=1))
    if {"one_base", "four_copies"} <= set(measured):
        ratio = measured["one_base"]["peak"] / measured["four_copies"]["peak"]
        print(f"peak of one base / peak of four models: {ratio:.3f}")
    if arguments.result:
        arguments.result.write_text(json.dumps(result(measured, arguments), indent=1) + "\n")
    return 0


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one arm in a process of its own and read the line it prints last."""
    line = [sys.executable, __file__, "--run", name, "--output_dir", str(arguments.output_dir)]
    line += ["--model", arguments.model, "--dtype", arguments.dtype] if arguments.model else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= ALLOCATOR if arguments.allocator == "returning" else {}
    process = subprocess.run(line, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}:\n{process.stdout[-2000:]}{process.stderr[-6000:]}")
    return json.loads(process.stdout.splitlines()[-1])


MEASURED = (
    "Resident memory of the process while it trains two steps, less what it held after its imports and a tiny run."
)
NOTES = {
    "Plan and measured peak, MiB": MEASURED + " LoRA r=16 on every linear layer, fp32 AdamW, micro-batches of 4 rows "
    "of 48 tokens, with checkpointing 8; NF4 with double quantisation.",
    "One base against four models, MiB": MEASURED + " Both arms: NF4 with double quantisation, LoRA r=16 on every "
    "linear layer of what trains, fp32 AdamW, checkpointing, one optimizer step per rollout of 4 rows in "
    "micro-batches of 2. Four models: policy, reference, critic and reward model, each on its own quantised base. "
    "The reward model is in evaluation mode, where bitsandbytes repacks it on a CPU with AVX512-BF16.",
}


def result(measured: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """What `benchmarks/results.py` renders: MiB, one row per arm."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    against, mib = "four_copies" in measured, 2**20
    rows = []
    for numbers in measured.values():
        row = [numbers["what"], *(round(numbers[key] / mib, 1) for key in ("weights", "optimizer", "peak"))]
        if "planned" in numbers:
            row += [round(numbers["planned"] / mib, 1), f"{numbers['planned'] / numbers['peak'] - 1:+.1%}"]
        else:
            row += [None, None]
        if against:
            row.append(f"{numbers['peak'] / measured['four_copies']['peak']:.3f}")
        rows.append(row)
    title = list(NOTES)[against]
    line = f"python benchmarks/memory.py --output_dir {arguments.output_dir}"
    if arguments.model:
        line += f" --model MODEL --dtype {arguments.dtype}"
    if arguments.arms != ["one_base", "four_copies"]:
        line += f" --arms {' '.join(arguments.arms)}"
    return {
        "title": f"{Path(arguments.model).name}: {title}" if arguments.model else title,
        "command": line,
        "commit": commit.strip(),
        "seed": 42,
        "columns": ["run", "weights", "optimizer", "peak", "planned peak", "plan against peak"]
        + (["peak / four models"] if against else []),
        "rows": rows,
        "notes": NOTES[title],
    }


def run(arm: Arm, folder: Path) -> dict[str, Any]:
    """Train two steps, each with a rollout of its own; bytes."""
    import torch
    import trl  # noqa: F401
    from transformers import AutoTokenizer

    from rlhf_ext import PPOTrainer  # noqa: F401
    from rlhf_ext.models import memory, memory_plan, reward_functions  # noqa: F401

    torch.set_num_threads(1)
    # Much is imported, and many pools are made, on first use: a tiny run brings them in before the count begins.
    tiny = replace(arm, hidden=256, layers=1, model=None, rows=1, steps_per_generation=1, accumulation=1)
    trainer, _ = build(tiny, folder / "tiny")
    trainer.train()
    del trainer
    tokenizer = AutoTokenizer.from_pretrained(arm.model) if arm.model else None  # large vocabularies take 200 MiB
    release()
    meter = memory.PeakMemory()
    baseline = meter.now()
    trainer, shape = build(arm, folder, tokenizer)
    release()
    built = meter.now() - baseline
    meter.reset()
    trainer.train()
    peak = meter.peak() - baseline
    models = {"policy": memory.model_bytes(trainer.model)}
    others = [trainer.reference, *(getattr(f, "reward", None) for f in trainer.reward_funcs)]
    for number, other in enumerate(getattr(o, "model", o) for o in others):
        if isinstance(other, torch.nn.Module) and other is not trainer.roles.model:
            models[f"other {number}"] = memory.model_bytes(other)
    numbers = {
        "what": arm.what,
        "peak": peak,
        "built": built,
        "weights": sum(sum(owners.values()) for owners in models.values()),
        "owners": models,
        "optimizer": memory.optimizer_bytes(trainer.optimizer),
    }
    if shape is not None:
        plan = memory_plan.plan_memory(shape)
        numbers |= {"planned": plan.peak, "phase": plan.peak_phase, "parts": plan.parts}
    return numbers


def release() -> None:
    """Give what is free back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def off_the_file(model: Any) -> Any:
    """Copy what is still a view of the mapped checkpoint: its pages would count as this process's, those of quantised
    weights too, for as long as one tensor is left on it. On a GPU nothing stays on it."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
    return model


def build(arm: Arm, folder: Path, tokenizer: Any = None) -> tuple[Any, Any]:
    """The trainer of an arm, and what to plan (None for copies, which no user would train)."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig
    from trl.trainer.utils import add_fused_lm_head

    from rlhf_ext import PPOConfig, PPOTrainer
    from rlhf_ext.models.build import load_policy
    from rlhf_ext.models.memory_shape import RunShape
    from rlhf_ext.models.positions import count_positions_from_mask
    from rlhf_ext.models.scoring import ModelReward

    dtype = getattr(torch, arm.dtype)
    source, tokenizer = (arm.model, tokenizer) if arm.model else make_model(arm, folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score"],
    )
    loading = {"dtype": dtype, **({"quantization_config": quantization} if arm.nf4 else {})}
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    reward_lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")

    def classifier() -> Any:
        model = off_the_file(AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, **loading))
        model.score.float()
        return model

    adapter = folder / "reward"
    if arm.lora:
        plain = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32)
        reward_lora.modules_to_save = ["score"]
        get_peft_model(plain, reward_lora).save_pretrained(adapter)
        del plain
    args = PPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=arm.rows,
        steps_per_generation=arm.steps_per_generation,
        gradient_accumulation_steps=arm.accumulation,
        num_iterations=1,
        max_completion_length=arm.completion,
        max_steps=2 * arm.steps_per_generation // arm.accumulation,
        learning_rate=1e-5,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=arm.checkpointing,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"prompt": [" ".join(WORDS[i % 8 : i % 8 + arm.prompt]) for i in range(64)]})
    prompt = max(len(ids) for ids in tokenizer(list(rows["prompt"]))["input_ids"])
    kwargs: dict[str, Any] = {"reward_adapter": str(adapter)}
    if not arm.lora:
        kwargs = {"reward_funcs": classifier()}
    elif arm.copies:
        model = PeftModel.from_pretrained(classifier(), adapter).eval().requires_grad_(False)
        reward = ModelReward(model, tokenizer, tokenizer, batch_size=arm.rows)
        kwargs = {"reward_funcs": reward, "critic": PeftModel.from_pretrained(classifier(), adapter)}
    policy = off_the_file(load_policy(source, **loading))
    critic = kwargs.pop("critic", None)
    if critic is not None:
        args.critic = "model"
    trainer = PPOTrainer(
        model=policy,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora if arm.lora else None,
        critic_model=critic,
        **kwargs,
    )
    if arm.copies:
        # With adapters ours is the base without them; here it is a model of its own, as elsewhere.
        trainer.reference = off_the_file(load_policy(source, **loading)).requires_grad_(False)
        add_fused_lm_head(trainer.reference, temperature=trainer.temperature)
        count_positions_from_mask(trainer.reference.base_model)
        return trainer, None
    config = AutoConfig.from_pretrained(source)
    shape = RunShape(
        config=config,
        dtype=dtype,
        quantization=quantization if arm.nf4 else None,
        lora=lora if arm.lora else None,
        reward_lora=reward_lora if arm.lora else None,
        reference="base" if arm.lora else "copy",
        critic="adapter" if arm.lora else "model",
        reward_configs=[] if arm.lora else [config],
        rows=arm.rows,
        rollout=arm.rows * arm.steps_per_generation,
        prompt_length=prompt,
        completion_length=arm.completion,
        gradient_checkpointing=arm.checkpointing,
        accumulates=arm.accumulation > 1,
        optim=args.optim if isinstance(args.optim, str) else args.optim.value,
        device="cpu",
    )
    return trainer, shape


def make_model(arm: Arm, folder: Path) -> tuple[str, Any]:
    """Folder of a base with random weights, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    config = LlamaConfig(
        vocab_size=arm.vocabulary,
        hidden_size=arm.hidden,
        intermediate_size=arm.hidden * 11 // 4,
        num_hidden_layers=arm.layers,
        num_attention_heads=arm.hidden // 64,
        num_key_value_heads=max(1, arm.hidden // 128),
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return str(folder / "base"), tokenizer


if __name__ == "__main__":
    sys.exit(main())
