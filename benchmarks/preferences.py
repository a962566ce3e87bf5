"""Reward models on the toy world, where the truth is known: arms by seeds, paired; what is done is not run again.

    python benchmarks/preferences.py --seeds 5 --output_dir runs/preferences

Per seed every arm has the same SFT trunk, prompts, samples and test sets. A run leaves the raw score of every test
answer and nothing else; tables and verdicts are made of those (`preferences_report.py`).
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from compare import commit_of_head, slug
from datasets import Dataset
from transformers import AutoModelForCausalLM, set_seed

from rlhf_ext import PreferenceRewardConfig, PreferenceRewardTrainer
from rlhf_ext.feedback.simulated import SimulatedLabeller
from rlhf_ext.models.critics import critic_from_policy
from rlhf_ext.models.generation import sample_completions
from rlhf_ext.models.lm_head import lm_logps
from rlhf_ext.models.scoring import ModelReward
from rlhf_ext.pipelines.quickstart import quick, train_sft
from rlhf_ext.toyworld.corpus import prompt_rows
from rlhf_ext.toyworld.gold import gold_reward
from rlhf_ext.toyworld.tiny import build_tokenizer


ROOT = Path(__file__).resolve().parents[1]
K = 4
SETS = ("reference", "in_distribution", "out_of_distribution")


def read_arms(path: Path) -> dict[str, Any]:
    """The file of arms with the defaults filled in.

    Raises:
        ValueError: an arm has an unknown field, or two share a name.
    """
    spec = yaml.safe_load(path.read_text())
    known = {"name", *spec["defaults"]}
    for arm in spec["arms"]:
        if set(arm) - known:
            raise ValueError(
                f"{path.name}: arm {arm.get('name')!r} has {sorted(set(arm) - known)}, not {sorted(known)}."
            )
    names = [arm["name"] for arm in spec["arms"]]
    if len(set(names)) != len(names):
        raise ValueError(f"{path.name}: arms share a name in {names}. Give each its own: it is its file.")
    spec["arms"] = [{**spec["defaults"], **arm} for arm in spec["arms"]]
    return spec


class World:
    """What all arms of a seed share: trunk, pool of samples, test sets, each with its gold."""

    def __init__(self, spec: dict[str, Any], seed: int, folder: Path):
        world, self.seed, self.spec = spec["world"], seed, spec
        self.tokenizer = build_tokenizer()
        settings = quick(**world["sft"])
        path = folder / f"sft-{seed}"
        if not path.exists():
            shutil.rmtree(folder / f"sft-{seed}.part", ignore_errors=True)
            with contextlib.redirect_stdout(io.StringIO()):
                train_sft(str(folder / f"sft-{seed}.part"), self.tokenizer, settings, seed)
            (folder / f"sft-{seed}.part").rename(path)
        self.sft = AutoModelForCausalLM.from_pretrained(path / "sft").eval()
        set_seed(seed)
        pool = [row["prompt"] for row in prompt_rows(world["pool_prompts"], seed, split="labels")]
        self.pool = self._sample(pool, settings.max_completion_length)
        self.sets = {"reference": self.pool[: world["test_prompts"] // 2]}
        for name in SETS[1:]:
            prompts = [row["prompt"] for row in prompt_rows(world["test_prompts"], seed, **world[name])]
            self.sets[name] = self._sample(prompts, settings.max_completion_length)

    def _sample(self, prompts: list[str], length: int) -> list[dict[str, Any]]:
        texts = sample_completions(
            self.sft, self.tokenizer, prompts, num_samples=K, max_new_tokens=length, batch_size=1024
        ).texts
        rows = []
        for index, prompt in enumerate(prompts):
            completions = [" " + text for text in texts[K * index : K * index + K]]
            rows.append({"prompt": prompt, "completions": completions, "gold": gold_reward([prompt] * K, completions)})
        return rows

    def labels(self, arm: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows that the arm trains on."""
        labeller = SimulatedLabeller(
            gold_reward,
            temperature=arm["temperature"],
            tie_band=arm["tie_band"],
            error_rate=arm["error_rate"],
            seed=self.seed,
        )
        asked = self.pool[: arm["labels"]]
        if arm["kind"] == "best_of":
            rows = [labeller.best_of(row["prompt"], row["completions"]) for row in asked]
        else:
            rows = [labeller.pair(row["prompt"], row["completions"][:2]) for row in asked]
        if arm["kind"] == "pair_no_ties":
            rows = [row for row in rows if max(row["target"]) == 1.0]
        if arm["bootstrap"] is not None:
            chance = random.Random(f"member {arm['bootstrap']} of {self.seed}")
            rows = [chance.choice(rows) for _ in rows]  # one label a prompt: rows are prompts
        return rows


def train(world: World, arm: dict[str, Any], folder: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    settings, rows = world.spec["world"], world.labels(arm)
    # Members start from different heads; every other arm of a seed from the same one.
    set_seed(world.seed + 1000 * (0 if arm["bootstrap"] is None else 1 + arm["bootstrap"]))
    model = critic_from_policy(world.sft)
    torch.nn.init.normal_(model.score.weight, std=(model.config.hidden_size + 1) ** -0.5)
    trainer = PreferenceRewardTrainer(
        model=model,
        args=PreferenceRewardConfig(
            str(folder),
            seed=world.seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_steps=50,
            disable_tqdm=True,
            per_device_train_batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
            num_train_epochs=settings["epochs"],
            lr_scheduler_type="cosine",
            warmup_steps=10,
            adam_beta2=0.95,
            max_length=96,
            reward_aggregation="sum",
            **arm["trainer"],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=world.tokenizer,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    shutil.rmtree(folder, ignore_errors=True)
    return trainer.model.eval(), {"rows": len(rows), "log": trainer.state.log_history[-2]}


@torch.no_grad()
def preferred_nll(model: torch.nn.Module, world: World, rows: list[dict[str, Any]]) -> float:
    """Nats per token of the answers with the highest gold, under the language-modelling head."""
    total, count = 0.0, 0
    for start in range(0, len(rows), 128):
        texts = [
            (r["prompt"], r["completions"][max(range(K), key=r["gold"].__getitem__)])
            for r in rows[start : start + 128]
        ]
        lengths = [len(world.tokenizer(prompt)["input_ids"]) for prompt, _ in texts]
        ids = [torch.tensor([*world.tokenizer(p + c)["input_ids"], world.tokenizer.eos_token_id]) for p, c in texts]
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        picked = (torch.arange(batch.shape[1]) >= torch.tensor(lengths)[:, None]) & mask.bool()
        hidden = model.base_model(input_ids=batch, attention_mask=mask, use_cache=False).last_hidden_state
        total -= lm_logps(model, hidden, batch, picked).sum().item()
        count += int(picked.sum())
    return total / count


def measure(world: World, model: torch.nn.Module) -> dict[str, Any]:
    reward = ModelReward(model, world.tokenizer, world.tokenizer, batch_size=256)
    found: dict[str, Any] = {"scores": {}, "gold": {}, "nll": {}}
    for name, rows in world.sets.items():
        completions = [text for row in rows for text in row["completions"]]
        prompts = [row["prompt"] for row in rows for _ in range(K)]
        ids = [[*world.tokenizer(text)["input_ids"], world.tokenizer.eos_token_id] for text in completions]
        scores = [round(score, 4) for score in reward(prompts, completions, ids)]
        found["scores"][name] = [scores[i : i + K] for i in range(0, len(scores), K)]
        found["gold"][name] = [[round(value, 4) for value in row["gold"]] for row in rows]
        if name != "reference":
            found["nll"][name] = preferred_nll(model, world, rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, default=ROOT / "benchmarks" / "preference_arms.yaml")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this, less one")
    parser.add_argument("--first_seed", type=int, default=0, help="leave out the seeds before, for a second process")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/preferences"))
    args = parser.parse_args()
    spec, commit = read_arms(args.arms), commit_of_head()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for seed in range(args.first_seed, args.seeds):  # seed by seed, so that an interrupted comparison is a paired one
        paths = {arm["name"]: args.output_dir / f"{slug(arm['name'])}-{seed}.json" for arm in spec["arms"]}
        todo = []
        for arm in spec["arms"]:
            asked = {"arm": arm, "world": spec["world"], "seed": seed}
            if paths[arm["name"]].exists():
                before = json.loads(paths[arm["name"]].read_text())
                if {key: before[key] for key in asked} == asked:
                    continue
                raise ValueError(f"{paths[arm['name']]} was run with other settings. Take another --output_dir.")
            todo.append((arm, asked))
        if not todo:
            continue
        world = World(spec, seed, args.output_dir)
        for arm, asked in todo:
            start = time.perf_counter()
            model, facts = train(world, arm, args.output_dir / "scratch")
            found = {**asked, "commit": commit, **facts, **measure(world, model)}
            found["seconds"] = time.perf_counter() - start
            aside = paths[arm["name"]].with_suffix(".part")
            aside.write_text(json.dumps(found))
            aside.rename(paths[arm["name"]])
            print(f"seed {seed}, {arm['name']}: {found['rows']} rows, {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
