"""
What one process of a launch does: train each case a few steps, and leave its numbers where the test reads them.

    torchrun --nproc_per_node 2 tests/distributed/worker.py --world WORLD --output OUT --cases ppo-lora reward-full

The batch of a case is that of the world, whatever the number of processes: a process takes its share of the rows. A
case is a trainer (`ppo` or `reward`), its weights (`full`, `lora`, `nf4`) and what else stands in its name.
"""

import argparse
import copy
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
    TrainingArguments,
)

from rlhf_ext import PPOConfig, PPOTrainer, PreferenceRewardConfig, PreferenceRewardTrainer
from rlhf_ext.models.sharding import gathered
from rlhf_ext.trainers import ppo_rollout


ROWS = 8  # of one optimizer step, over all processes
STEPS = 3
IDS = torch.arange(5, 25).view(4, 5)
ARGUMENTS = {
    "max_steps": STEPS,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "seed": 3,
}


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step, clipping being off."""

    def __init__(self):
        self.model, self.found = None, {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.found:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def watch_deepspeed(self):
        """DeepSpeed steps inside `backward`, where no callback is asked; its pieces are put together by it."""
        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.utils import safe_get_full_grad

        stock = DeepSpeedEngine.step
        stock = getattr(stock, "stock", stock)

        def step(engine, *args, **kwargs):
            if not self.found and engine.is_gradient_accumulation_boundary():
                named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
                self.found = {n: safe_get_full_grad(p).detach().cpu().clone() for n, p in named}
            return stock(engine, *args, **kwargs)

        step.stock = stock
        DeepSpeedEngine.step = step


def share(arguments: dict, accumulation: int) -> dict:
    """The part of the global batch that one process and one micro-batch take."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        **arguments,
        "per_device_train_batch_size": ROWS // processes // accumulation,
        "gradient_accumulation_steps": accumulation,
    }


def options(case: str, output: Path) -> dict:
    words = case.split("-")
    arguments = {**ARGUMENTS, "output_dir": str(output / case), "gradient_checkpointing": "ckpt" in words}
    arguments["bf16"] = "bf16" in words
    if "adamw" in words:
        arguments |= {"optim": "adamw_torch", "max_grad_norm": 1.0}
    if "resume" in words:
        arguments |= {"save_strategy": "steps", "save_steps": 1}
    return share(arguments, 2 if "accumulate" in words else 1)


def in_small_pieces(args: TrainingArguments) -> TrainingArguments:
    """ZeRO-3 leaves small tensors whole, and these models have no others."""
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return args


def lora(case: str = "", **kwargs) -> LoraConfig:
    upper = {"layers_to_transform": [1], "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    places = upper if "upper" in case.split("-") else {"target_modules": "all-linear"}
    return LoraConfig(r=4, init_lora_weights=False, **places, **kwargs)


def quantization(case: str) -> BitsAndBytesConfig | None:
    if "nf4" not in case.split("-"):
        return None
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def build_reward(case: str, world: Path, output: Path) -> PreferenceRewardTrainer:
    torch.manual_seed(0)  # adapters start at random
    adapter = "lora" in case or "nf4" in case
    rows = load_from_disk(str(world / "preferences"))
    args = PreferenceRewardConfig(
        **options(case, output),
        learning_rate=1e-3 if "adamw" in case else 0.05,
        reward_aggregation="sum" if "sum" in case.split("-") else "last",
        lm_coef=0.5 if "lm" in case.split("-") else 0.0,
    )
    return PreferenceRewardTrainer(
        # A language model where its head is kept
        model=str(world / ("base" if "lm" in case.split("-") else "reward_full")),
        args=in_small_pieces(args),
        train_dataset=rows.to_iterable_dataset() if "stream" in case.split("-") else rows,
        processing_class=AutoTokenizer.from_pretrained(world / "base"),
        quantization_config=quantization(case),
        peft_config=lora(task_type="SEQ_CLS", modules_to_save=["score"]) if adapter else None,
    )


def build_ppo(case: str, world: Path, output: Path) -> PPOTrainer:
    sampled = "sampled" in case.split("-")
    args = PPOConfig(
        **options(case, output),
        learning_rate=1e-3 if "adamw" in case else 0.05,
        steps_per_generation=2 if "accumulate" in case else 1,
        num_iterations=2,
        max_completion_length=8,
        kl_coef=0.1,
        **({"adaptive_kl_target": 0.1, "kl_horizon": 100} if sampled else {}),
        vf_coef=0.5,
        whiten_rewards=sampled,
        critic="shared" if "shared" in case.split("-") else None,
        target_kl=1.0 if "stop" in case.split("-") else None,
        critic_epochs=1 if "rest" in case.split("-") else None,
    )
    shared = {
        "args": in_small_pieces(args),
        "train_dataset": load_from_disk(str(world / "prompts")),
        "processing_class": AutoTokenizer.from_pretrained(world / "base"),
        "model": str(world / "base"),
        "quantization_config": quantization(case),
    }
    if "full" in case:
        return PPOTrainer(**shared, reward_funcs=str(world / "reward_full"))
    adapter = world / ("reward_upper" if "upper" in case.split("-") else "reward")
    return PPOTrainer(**shared, reward_adapter=str(adapter), peft_config=lora(case, task_type="CAUSAL_LM"))


def pin(trainer: PPOTrainer) -> None:
    """Greedy completions, which depend on the prompt and the weights alone."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    stock = model.generate

    def generate(*args, generation_config, **kwargs):
        config = copy.deepcopy(generation_config)
        config.do_sample, config.temperature, config.top_k, config.top_p = False, None, None, None
        return stock(*args, generation_config=config, **kwargs)

    model.generate = generate


def watch(trainer: PPOTrainer) -> dict:
    """What every process must agree on, and the completions, on which they must not."""
    seen = {"moments": [], "tokens": [], "kl_coef": [], "completions": []}
    whiten, score = ppo_rollout.masked_whiten, trainer._generate_and_score_completions

    def masked_whiten(rows, mask, **kwargs):
        real = rows[mask].double()
        seen["moments"].append((len(real), real.mean().item(), real.var(correction=0).item()))
        return getattr(whiten, "stock", whiten)(rows, mask, **kwargs)

    def generate_and_score(inputs):
        batch = score(inputs)
        seen["tokens"].append(int(batch["num_items_in_batch"]))
        seen["kl_coef"].append(trainer.kl_coef)
        seen["completions"].append(batch["completion_ids"].tolist())
        return batch

    masked_whiten.stock = getattr(whiten, "stock", whiten)
    ppo_rollout.masked_whiten = masked_whiten
    trainer._generate_and_score_completions = generate_and_score
    return seen


def straddle(trainer: PPOTrainer, seen: dict) -> None:
    """Put `target_kl` between the KLs of the processes: each by itself would decide another way."""
    stock, seen["own_kl"], seen["stopped"] = trainer._drop_gradients, [], []

    def drop() -> None:
        total, tokens = trainer._step_kl
        own = trainer.accelerator.gather((total / tokens.clamp(min=1)).reshape(1))
        trainer.args.target_kl = ((2 * own.min() + own.max()) / 3).item() + 1e-9
        stock()
        seen["own_kl"].append(own.tolist())
        seen["stopped"].append(trainer._stopped)

    trainer._drop_gradients = drop


def spoken(model: torch.nn.Module, reward_adapter: bool) -> dict[str, torch.Tensor]:
    """What every role says of fixed rows, on all processes at once: logits of the policy, scores `(B, T)`."""
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():  # in training mode, which without dropout is the same: bitsandbytes repacks weights in eval
        said = {"policy": model(**inputs).logits, "critic": model(**inputs, role="critic")}
        if reward_adapter:
            said["reward"] = model(**inputs, role="reward")
    return {role: numbers.float().cpu().clone() for role, numbers in said.items()}


def run(case: str, world: Path, output: Path) -> None:
    trainer = (build_ppo if case.startswith("ppo") else build_reward)(case, world, output)
    gradients, seen = Gradients(), {}
    trainer.add_callback(gradients)
    if trainer.is_deepspeed_enabled:
        gradients.watch_deepspeed()
    if "sampled" in case:
        seen = watch(trainer)
        if "stop" in case:
            straddle(trainer, seen)
    elif case.startswith("ppo"):
        pin(trainer)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    result = {}
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    result["pieces"] = sum(hasattr(p, "ds_id") and not p.ds_persist for p in parameters.values())
    with gathered(parameters.values()):
        result["weights"] = {n: p.detach().cpu().clone() for n, p in parameters.items() if n in start}
    result |= {
        "gradients": gradients.found,
        "start": start,
        "seen": seen,
        "metrics": {k: v for k, v in trainer.state.log_history[0].items() if isinstance(v, float)},
    }
    if case.startswith("ppo"):
        result["replayed"] = trainer.trunk.num_replayed if trainer.trunk is not None else None
        result |= spoken(trainer.model, reward_adapter="full" not in case)
        trainer.save_model(str(output / case / "saved"))
    torch.save(result, output / f"{case}.rank{trainer.accelerator.process_index}.pt")
    trainer.accelerator.wait_for_everyone()


def run_twice(case: str, world: Path, output: Path) -> None:
    """A whole run, and one that goes on from the checkpoint of the first step, in the middle of a rollout's epochs."""
    build = build_ppo if case.startswith("ppo") else build_reward
    ends = []
    for checkpoint in (None, str(output / case / "checkpoint-1")):
        trainer = build(case, world, output)
        trainer.train(resume_from_checkpoint=checkpoint)
        parameters = dict(trainer.model.named_parameters())
        with gathered(parameters.values()):
            ends.append({name: parameter.detach().cpu().clone() for name, parameter in parameters.items()})
    torch.save(ends, output / f"{case}.rank{trainer.accelerator.process_index}.pt")
    trainer.accelerator.wait_for_everyone()


def build_world(folder: Path) -> Path:
    """A tiny base, a reward adapter on it, a reward model of its own, ragged prompts and ragged preferences."""
    from peft import get_peft_model

    from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    base = tiny_causal_lm("llama", tokenizer)
    with torch.no_grad():
        base.lm_head.weight[tokenizer.eos_token_id] *= 3.0  # some greedy completions end early
    base.save_pretrained(folder / "base")
    full = tiny_reward_model("llama", tokenizer, seed=1)
    full.save_pretrained(folder / "reward_full")
    for name in ("base", "reward_full", "reward", "reward_upper"):
        tokenizer.save_pretrained(folder / name)
    for name, case in (("reward", ""), ("reward_upper", "upper")):
        classifier = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
        adapter = get_peft_model(classifier, lora(case, task_type="SEQ_CLS", modules_to_save=["score"]))
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter_name, parameter in adapter.named_parameters():
                if "lora_B" in parameter_name or "modules_to_save" in parameter_name:
                    parameter.normal_(std=0.3)
        adapter.save_pretrained(folder / name)
    words = [*(f"w{i}" for i in range(24)), "good", "bad", "fine", "the", "cat", "sat"]
    generator = torch.Generator().manual_seed(0)

    def text(longest: int) -> str:
        size = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return " ".join(words[i] for i in torch.randint(len(words), (size,), generator=generator).tolist())

    prompts = [text(9) for _ in range(ROWS * STEPS)]
    Dataset.from_dict({"prompt": prompts}).save_to_disk(str(folder / "prompts"))
    # Pairs, best of three, soft labels of four, rankings of five: in each half of a batch another number of sequences.
    rows = []
    for index in range(ROWS * STEPS):
        count = 2 + index % 4
        row = {"prompt": text(6) + " ", "completions": [text(9) for _ in range(count)]}
        row |= {"target": None, "best": None, "ranking": None}
        row |= [
            {"best": 0},
            {"best": 1},
            {"target": [0.1, 0.2, 0.3, 0.4]},
            {"ranking": [2, 0, 1, 4, 3]},
        ][index % 4]
        rows.append(row)
    Dataset.from_list(rows).save_to_disk(str(folder / "preferences"))
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", required=True)
    parsed = parser.parse_args(arguments)
    parsed.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        import deepspeed

        # Gloo alone: at its first start DeepSpeed would compile a faster way between processes of one machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for case in parsed.cases:
        (run_twice if "resume" in case else run)(case, parsed.world, parsed.output)
    # Gloo's threads that still stand at the end of the interpreter abort the process, sometimes.
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
    # So do those of DeepSpeed's own groups. All is written: nothing is left for the interpreter to take down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
