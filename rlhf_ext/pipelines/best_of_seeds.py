"""The same reward training with several seeds, and the one that is best on validation rows.

Stiennon et al. 2020, appendix B.1, train 3 to 10 and keep the best. The accuracy of the best of several is biased
upwards, because it was chosen by that number: mean and spread over the seeds are reported beside it, and a fair number
of the winner needs rows of its own.
"""

import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from ..models.generation import Samples
from ..trainers.reward_config import PreferenceRewardConfig
from .finished_runs import digest_of, has_checkpoint, read_run, run_once
from .reward_builder import RewardBuilder
from .reward_evaluation import score_rows
from .reward_normalization import normalize_after, normalize_before, unit_settings


SEEDS_FILE = "seeds.json"
BEST = "best"


def train_best_of_seeds(
    model: str,
    args: PreferenceRewardConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    processing_class: PreTrainedTokenizerBase,
    *,
    num_seeds: int = 3,
    keep_seeds: bool = False,
    peft_config: PeftConfig | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    samples: Samples | None = None,
    scale: bool = True,
) -> dict[str, Any]:
    """
    Train with the seeds `args.seed`, `args.seed + 1`, ..., and keep the most accurate in `output_dir/best`.

    Seeds draw the head, the adapters and the order of the rows. `output_dir/seed_S` says of each what came out; a
    seed that is finished is not trained again, and more of them may be added later. The first of equals wins.

    Args:
        model (`str`):
            Folder or Hub id that every seed starts from.
        args ([`PreferenceRewardConfig`]):
            Configuration of all of them.
        train_dataset, eval_dataset (`Dataset`):
            Preference rows; the seeds are judged on the second.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        num_seeds (`int`, *optional*, defaults to 3):
            At least 2.
        keep_seeds (`bool`, *optional*, defaults to `False`):
            Whether the weights of every seed stay in its folder; else only those of the best are kept.
        peft_config, quantization_config:
            As for [`PreferenceRewardTrainer`]. With adapters the base is loaded once.
        samples ([`~rlhf_ext.models.generation.Samples`], *optional*), scale (`bool`):
            As for [`~rlhf_ext.pipelines.reward_ensemble.train_reward_ensemble`].

    Returns:
        `dict`: what stands in `seeds.json`: `best` (a seed), its `accuracy` and 95% `interval`, `accuracy_mean` and
        `accuracy_std` over all seeds, and `seeds`, each with accuracy and interval.

    Raises:
        ValueError: too few seeds, no validation rows, finished seeds of other settings, or the weights of the best
            were removed by an earlier call.
    """
    if num_seeds < 2:
        raise ValueError(f"`num_seeds` is {num_seeds}; the best of several needs two or more.")
    if eval_dataset is None:
        raise ValueError("The best of several seeds is chosen on validation rows, but there are none. Hold some out.")
    builder = RewardBuilder(model, args, processing_class, peft_config, quantization_config)
    shared = {
        **builder.settings,
        "rows": digest_of(train_dataset),
        "eval_rows": digest_of(eval_dataset),
        **unit_settings(samples, scale),
    }
    folder, records = Path(args.output_dir), []
    for seed in range(args.seed, args.seed + num_seeds):

        def train(aside: Path, seed: int = seed) -> dict[str, Any]:
            trainer = builder.build(aside, seed, train_dataset, eval_dataset)
            if samples is not None:
                normalize_before(trainer, samples, scale=scale)
            result = trainer.train(resume_from_checkpoint=has_checkpoint(aside))
            trainer.save_model(str(aside))
            trainer.save_metrics("train", result.metrics)
            if samples is not None:
                normalize_after(trainer, aside, samples, scale=scale)
            found = score_rows(trainer, trainer.eval_dataset)
            trainer.create_model_card(Path(args.output_dir).name)
            builder.release(trainer)
            return found.summary()

        records.append({"seed": seed, **run_once(folder / f"seed_{seed}", {**shared, "seed": seed}, train)})
    best = max(records, key=lambda record: record["accuracy"])
    accuracies = [record["accuracy"] for record in records]
    report = {
        "best": best["seed"],
        "accuracy": best["accuracy"],
        "interval": best["interval"],
        "note": "the best of several is biased upwards, and so is its interval; the mean over seeds is not",
        "accuracy_mean": statistics.mean(accuracies),
        "accuracy_std": statistics.stdev(accuracies),
        "seeds": records,
    }
    if PartialState().is_main_process:
        _keep_best(folder, best["seed"], [record["seed"] for record in records], keep_seeds)
        (folder / SEEDS_FILE).write_text(json.dumps(report, indent=1), encoding="utf-8")
    PartialState().wait_for_everyone()
    return report


def _keep_best(folder: Path, best: int, seeds: list[int], keep_seeds: bool) -> None:
    source, target, aside = folder / f"seed_{best}", folder / BEST, folder / f"_unfinished_{BEST}"
    if not target.exists() or read_run(target)["settings"] != read_run(source)["settings"]:
        if not list(source.glob("*.safetensors")):
            raise ValueError(
                f"Seed {best} is the best, but its weights in {str(source)!r} were removed by an earlier call. Remove "
                "that folder to train it again."
            )
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(source, aside)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(aside, target)
    if not keep_seeds:
        for seed in seeds:
            for file in (folder / f"seed_{seed}").rglob("*.safetensors"):
                file.unlink()
