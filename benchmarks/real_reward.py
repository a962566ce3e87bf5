"""Reward models on human preferences: arms by seeds, one adapter each over the cached lower layers of one NF4 base.

    python benchmarks/real_reward.py --base_model MODEL --data runs/real --output_dir runs/real/arms

`pairs`: the pairwise loss; `pairs_lm`: with the language-modelling term; `groups`: K-way, OASST. Lower layers carry no
adapter, so their output is computed once for all runs (`rlhf_ext.models.trunk_cache`). Each run leaves its adapter
and `scores.json`, the raw scores of every test row; a run that has one is not repeated. `real_reward_report.py` makes
tables of them.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from compare import commit_of_head
from datasets import Dataset, load_dataset
from peft import LoraConfig
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from rlhf_ext import PreferenceRewardConfig, PreferenceRewardTrainer
from rlhf_ext.models.lm_head import lm_logps
from rlhf_ext.models.pooling import classifier_of
from rlhf_ext.models.trunk_cache import TrunkCache


LOWER, LAYERS = 12, 18
BATCH = 8
ARMS = {
    "pairs": {"train": "train", "tests": ("test", "traps")},
    "pairs_lm": {"train": "train", "tests": ("test", "traps"), "lm_coef": 0.1, "lm_reduction": "mean"},
    "groups": {"train": "groups_train", "tests": ("groups_test",)},
}


class Curve(TrainerCallback):
    """Scores of the test rows after each quarter of the steps."""

    def __init__(self, measure):
        self.measure, self.points = measure, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % max(state.max_steps // 4, 1) == 0 and state.global_step < state.max_steps - 3:
            self.points.append({"step": state.global_step, "scores": self.measure()})


def rows_of(path: Path) -> Dataset:
    return load_dataset("json", data_files=str(path), split="train")


def tokenized(trainer: PreferenceRewardTrainer, dataset: Dataset) -> Dataset:
    """Rows as the trainer reads them; whatever is longer than the training rows stays in."""
    args = copy.copy(trainer.args)
    args.max_length, args.lm_coef = None, 0.0
    return trainer._prepare_dataset(dataset, trainer.processing_class, args, "test")


def batches(dataset: Dataset, size: int = BATCH):
    """Sequences in order of length: places `(row, candidate)`, ids, mask."""
    flat = [((n, k), ids) for n, row in enumerate(dataset["candidate_ids"]) for k, ids in enumerate(row)]
    flat.sort(key=lambda item: len(item[1]))
    for start in range(0, len(flat), size):
        places, rows = zip(*flat[start : start + size], strict=True)
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        yield places, ids, mask


@torch.no_grad()
def scores_of(model, dataset: Dataset) -> list[list[float]]:
    training = model.training
    model.eval()
    scores = [[0.0] * len(row) for row in dataset["candidate_ids"]]
    for places, ids, mask in batches(dataset):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        for (n, k), score in zip(places, found.tolist(), strict=True):
            scores[n][k] = score
    model.train(training)
    return scores


@torch.no_grad()
def preferred_nll(model, dataset: Dataset) -> float:
    """Nats per token of the preferred completions of decisive rows, under the language-modelling head."""
    model.eval()
    base = classifier_of(model)
    total, count = 0.0, 0
    for places, ids, mask in batches(dataset):
        kept = [i for i, (n, k) in enumerate(places) if dataset["target"][n][k] == 1.0]
        if not kept:
            continue
        starts = torch.tensor([dataset["completion_starts"][places[i][0]][places[i][1]] for i in kept])
        picked = (torch.arange(ids.shape[1]) >= starts[:, None]) & mask[kept].bool()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = base.base_model(input_ids=ids[kept], attention_mask=mask[kept], use_cache=False).last_hidden_state
            total -= lm_logps(base, hidden, ids[kept], picked).sum().item()
        count += int(picked.sum())
    return total / count


def peak_memory(reset: bool = False) -> float:
    """Highest resident memory since the last reset, MiB (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=["groups:0", "pairs:0,1,2", "pairs_lm:0,1,2"])
    parser.add_argument("--max_rows", type=int, help="of each file, to try the script")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base_model)
    data = {
        name: rows_of(args.data / f"{name}.jsonl")
        for name in ("train", "test", "traps", "groups_train", "groups_test")
    }
    if args.max_rows:
        data = {name: rows.select(range(min(args.max_rows, len(rows)))) for name, rows in data.items()}
    jobs = [(arm, int(seed)) for part in args.runs for arm, seeds in [part.split(":")] for seed in seeds.split(",")]
    cache, untrained = None, None
    for arm, seed in jobs:
        folder = args.output_dir / f"{arm}-{seed}"
        if (folder / "scores.json").exists():
            continue
        settings = {key: value for key, value in ARMS[arm].items() if key.startswith("lm_")}
        trainer = PreferenceRewardTrainer(
            model=args.base_model,
            args=PreferenceRewardConfig(
                str(folder),
                max_length=256,
                overlong="drop",
                num_train_epochs=1,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=2e-4,
                lr_scheduler_type="cosine",
                warmup_steps=5,
                seed=seed,
                bf16=True,
                use_cpu=True,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                logging_steps=5,
                model_init_kwargs={"dtype": torch.bfloat16},
                **settings,
            ),
            train_dataset=data[ARMS[arm]["train"]],
            processing_class=tokenizer,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
            peft_config=LoraConfig(
                r=16,
                lora_alpha=32,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                layers_to_transform=list(range(LOWER, LAYERS)),
                layers_pattern="layers",
                modules_to_save=["score"],
                task_type="SEQ_CLS",
            ),
        )
        tests = {name: tokenized(trainer, data[name]) for name in ARMS[arm]["tests"]}
        cache = TrunkCache(trainer.model, LOWER, shared=cache)
        file = args.output_dir / "lower_layers.safetensors"
        if not cache.texts and file.exists():
            cache.load(file)
        start, known = time.perf_counter(), len(cache.texts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for dataset in (trainer.train_dataset, *tests.values()):
                for _, ids, mask in tqdm(batches(dataset), desc="lower layers", mininterval=20, ncols=80):
                    cache.fill(ids, mask)
        filling = time.perf_counter() - start
        if len(cache.texts) > known:
            cache.save(file)
        if arm != "groups" and untrained is None:
            untrained = preferred_nll(trainer.model, tests["test"])
        main_test = ARMS[arm]["tests"][0]
        curve = Curve(lambda: scores_of(trainer.model, tests[main_test]))  # noqa: B023
        if (arm, seed) == ("pairs", 0):
            trainer.add_callback(curve)
        peak_memory(reset=True)
        result = trainer.train().metrics
        peak = peak_memory()
        trainer.save_model()
        start = time.perf_counter()
        found = {
            "arm": arm,
            "seed": seed,
            "commit": commit_of_head(),
            "settings": settings,
            "rows": len(trainer.train_dataset),
            "tokens": sum(len(ids) for row in trainer.train_dataset["candidate_ids"] for ids in row),
            "steps": trainer.state.global_step,
            "train_seconds": result["train_runtime"],
            "lower_layers_seconds": filling,
            "peak_mib": peak,
            "report": str(trainer.preference_reports["train"]),
            "log": trainer.state.log_history,
            "curve": curve.points,
            "scores": {name: scores_of(trainer.model, rows) for name, rows in tests.items()},
            "lengths": {
                name: [[len(i) for i in row] for row in rows["candidate_ids"]] for name, rows in tests.items()
            },
            "nll": None if arm == "groups" else preferred_nll(trainer.model, tests["test"]),
            "nll_untrained": untrained,
        }
        found["scoring_seconds"] = time.perf_counter() - start
        (folder / "scores.part").write_text(json.dumps(found))
        (folder / "scores.part").rename(folder / "scores.json")
        print(f"{arm} seed {seed}: {result['train_runtime']:.0f} s, peak {peak:.0f} MiB", flush=True)
        cache.remove()


if __name__ == "__main__":
    main()
