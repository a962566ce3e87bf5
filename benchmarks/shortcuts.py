"""
Learning curves of PPO on the toy world with each shortcut that can be switched off, and without any.

    python benchmarks/shortcuts.py --output_dir runs/shortcuts --seeds 5 --result benchmarks/results/shortcuts.json

LoRA on the upper half of the layers; policy, critic and reward are adapters on one base. Every arm of a seed starts
from the same SFT model and reward adapter, on the same prompts; what differs is in `ARMS`. An exact shortcut may
change a logged loss by rounding alone; of the others the gold reward is compared, paired by seed. Each run is a
process of one thread, a file says what it found, and a second call runs what is missing.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from compare import commit_of_head, slug
from compare_statistics import interval
from ppo_shape import offline


WORLD = {
    "model_size": "small",  # 4 layers of width 128
    "max_completion_length": 16,
    "sft_rows": 20_000,
    "sft_steps": 600,
    "sft_errors": {"insult": 0.75},
    "test_prompts": 512,
    "episodes": 2048,
}
PLAIN = {"skip_padding": False, "trunk_cache_gib": 0.0, "critic": "adapter"}
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "frozen layers once": {"trunk_cache_gib": 1.0},
    "no padding": {"skip_padding": True},
    "critic in one of four epochs": {"critic_epochs": 1},
    "critic as a head on the reward adapter": {"critic": "shared"},
}
EXACT = ("frozen layers once",)
ADAPTED = [2, 3]
LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
EVALUATION_SEED = 7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5, help="seeds up to this, less one")
    parser.add_argument("--result", type=Path, help="JSON for benchmarks/results.py")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.output_dir.resolve()
    if arguments.run:
        arm, seed = arguments.run[0], int(arguments.run[1])
        path = file_of(folder, arm, seed)
        path.with_suffix(".aside").write_text(json.dumps(run(folder, arm, seed), indent=1) + "\n")
        path.with_suffix(".aside").rename(path)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    seeds, found = range(arguments.first_seed, arguments.seeds), {}
    for seed in seeds:
        for arm in ARMS:
            found[arm, seed] = measure(folder, arm, seed)
            gold = found[arm, seed]["gold"]
            print(f"{arm}, seed {seed}: gold {gold:.3f} in {found[arm, seed]['cpu_seconds']:.0f} s", flush=True)
    if arguments.first_seed == 0:
        summary = result(found, list(seeds))
        print(json.dumps(summary, indent=1))
        if arguments.result:
            arguments.result.write_text(json.dumps(summary, indent=1) + "\n")
    return 0


def file_of(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{slug(arm)}-seed{seed}.json"


def measure(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    path = file_of(folder, arm, seed)
    if not path.exists():
        line = [sys.executable, __file__, "--output_dir", str(folder), "--run", arm, str(seed)]
        with open(path.with_suffix(".log"), "w") as log:
            subprocess.run(line, env=offline(1), stdout=log, stderr=subprocess.STDOUT, check=True)
    return json.loads(path.read_text())


def run(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm on one seed: gold of each rollout, loss of each step, gold on held-out prompts at the end."""
    import torch
    from compare_arms import PPOConfig, PPOTrainer, build_tokenizer, evaluate, gold_reward, prompt_rows, sft_model
    from datasets import Dataset

    torch.set_num_threads(1)
    sft, tokenizer = sft_model(str(folder / "sft"), WORLD, seed), build_tokenizer()
    args = PPOConfig(
        **shared(folder / "ppo", seed),
        per_device_train_batch_size=32,
        steps_per_generation=4,
        gradient_accumulation_steps=1,
        num_iterations=4,
        max_steps=WORLD["episodes"] // 128 * 16,
        max_completion_length=WORLD["max_completion_length"],
        learning_rate=1e-3,
        kl_coef=0.5,
        epsilon_value=None,
        **{**PLAIN, **ARMS[arm]},
    )

    def gold(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        return gold_reward(prompts, completions)

    trainer = PPOTrainer(
        model=sft,
        reward_adapter=reward_adapter(folder, sft, seed),
        args=args,
        train_dataset=Dataset.from_list(prompt_rows(WORLD["episodes"], seed, split="ppo")),
        processing_class=tokenizer,
        peft_config=lora("CAUSAL_LM"),
        probe_funcs=gold,
    )
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    logs = trainer.state.log_history
    prompts = [row["prompt"] for row in prompt_rows(WORLD["test_prompts"], seed, split="test")]
    length = WORLD["max_completion_length"]
    held_out = evaluate(trainer.model.eval(), None, tokenizer, prompts, length, EVALUATION_SEED).metrics
    return {
        "commit": commit_of_head(),
        "cpu_seconds": seconds,
        "losses": [entry["loss"] for entry in logs if "loss" in entry],
        "training": [entry["probe/gold/mean"] for entry in logs if "probe/gold/mean" in entry],
        "gold": held_out["gold_reward"],
    }


def shared(folder: Path, seed: int) -> dict[str, Any]:
    quiet = {"report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    return {
        "output_dir": str(folder),
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    } | quiet


def lora(task_type: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, layers_to_transform=ADAPTED, task_type=task_type)


def reward_adapter(folder: Path, sft: str, seed: int) -> str:
    """Folder of the reward adapter of this seed, trained on best-of-4 labels by gold on the first call."""
    from compare_arms import AutoModelForCausalLM, build_tokenizer, gold_reward, prompt_rows, set_seed
    from datasets import Dataset

    from rlhf_ext import PreferenceRewardConfig, PreferenceRewardTrainer
    from rlhf_ext.feedback.simulated import SimulatedLabeller
    from rlhf_ext.models.generation import sample_completions

    path = folder / "reward" / f"seed{seed}"
    if path.exists():
        return str(path)
    set_seed(seed)
    tokenizer, policy = build_tokenizer(), AutoModelForCausalLM.from_pretrained(sft).eval()
    prompts = [row["prompt"] for row in prompt_rows(3000, seed, split="labels")]
    length = WORLD["max_completion_length"]
    samples = sample_completions(policy, tokenizer, prompts, num_samples=4, max_new_tokens=length, batch_size=1024)
    labeller = SimulatedLabeller(gold_reward, seed=seed)
    texts = [[" " + text for text in samples.texts[4 * i : 4 * i + 4]] for i in range(len(prompts))]
    rows = [labeller.best_of(*pair, skip_ties=True) for pair in zip(prompts, texts, strict=True)]
    args = PreferenceRewardConfig(
        **shared(path.with_suffix(".part"), seed),
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        max_steps=300,
        max_length=64,
    )
    trainer = PreferenceRewardTrainer(
        model=sft,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora("SEQ_CLS"),
    )
    trainer.train()
    trainer.save_model()
    path.with_suffix(".part").rename(path)
    return str(path)


def result(found: dict[tuple[str, int], dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """What `benchmarks/results.py` renders; differences are paired by seed."""
    rows = []
    for arm in ARMS:
        runs, plain = ([found[name, seed] for seed in seeds] for name in (arm, "none"))
        pairs = list(zip(runs, plain, strict=True))
        losses = max(abs(a - b) for x, y in pairs for a, b in zip(x["losses"], y["losses"], strict=True))
        seconds = statistics.median(run["cpu_seconds"] for run in runs)
        ends, means = ([number(run) for run in runs] for number in (end, mean))
        row = [arm, f"{seconds:.0f}", shown(ends), shown(means)]
        if arm == "none":
            row += ["-", "-", "-"]
        else:
            differences = [[number(x) - number(y) for x, y in pairs] for number in (end, mean)]
            row += [*map(shown, differences), f"{losses:.2g}" if arm in EXACT else "other samples or steps"]
        rows.append(row)
    columns = ["shortcut", "CPU seconds", "gold, held out", "gold, all episodes"]
    columns += ["held out, less none", "all episodes, less none", "largest change of a logged loss"]
    return {
        "title": "PPO with each shortcut and without: gold reward on the toy world",
        "command": f"python benchmarks/shortcuts.py --output_dir runs/shortcuts --seeds {len(seeds)}",
        "commit": ", ".join(sorted({run["commit"] for run in found.values()})),
        "seed": f"{seeds[0]} to {seeds[-1]}",
        "columns": columns,
        "rows": rows,
        "notes": [
            f"Means over {len(seeds)} seeds with 95% t-intervals; {WORLD['episodes']:,} episodes, four epochs each."
        ],
    }


def end(run: dict[str, Any]) -> float:
    return run["gold"]


def mean(run: dict[str, Any]) -> float:
    """The area under the learning curve, per episode."""
    return sum(run["training"]) / len(run["training"])


def shown(values: list[float]) -> str:
    centre, low, high = interval(values)
    return f"{centre:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
