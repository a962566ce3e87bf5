"""An ensemble of reward models: each on its own bootstrap of the prompts, normalised on its own.

Christiano et al. 2017, Sec. 2.2.3: the mean of the members is the reward, their spread is the doubt.
`rlhf_ext.models.ensembles` loads what is written here.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from ..data.bootstrap import bootstrap_by_prompt
from ..models.ensembles import ENSEMBLE_FILE
from ..models.generation import Samples
from ..trainers.reward_config import PreferenceRewardConfig
from .finished_runs import digest_of, has_checkpoint, run_once
from .reward_builder import RewardBuilder
from .reward_evaluation import score_rows
from .reward_normalization import normalize_after, normalize_before, save_unit, unit_settings


def train_reward_ensemble(
    model: str,
    args: PreferenceRewardConfig,
    train_dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    num_members: int = 3,
    peft_config: PeftConfig | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    samples: Samples | None = None,
    scale: bool = True,
) -> dict[str, Any]:
    """
    Train the members and write `output_dir/member_0`, `member_1`, ... and `ensemble.json`.

    Member i draws its prompts, its head, its adapters and the order of its rows by `args.seed + i`. The prompts that
    it never drew, about 1/e of them, are its validation rows. Each member's folder is an ordinary reward model, and
    appears only when it is whole: a run that was killed goes on with the member it was at, from its last checkpoint.

    Args:
        model (`str`):
            Folder or Hub id that every member starts from.
        args ([`PreferenceRewardConfig`]):
            Configuration of every member; `output_dir` is the folder of the ensemble.
        train_dataset (`Dataset`):
            Preference rows, not a stream: they are resampled.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        num_members (`int`, *optional*, defaults to 3):
            At least 2; Christiano et al. have 3.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter of each member, all on one base that is loaded once. Without it members are full models.
        quantization_config (*optional*):
            Of the base.
        samples ([`~rlhf_ext.models.generation.Samples`], *optional*):
            Samples of the fixed reference, over which each member gets mean 0 and deviation 1 before and after its
            training. Without them that is done once, after training, over the scores of its validation rows.
        scale (`bool`, *optional*, defaults to `True`):
            Whether the deviation becomes 1 too.

    Returns:
        `dict`: what stands in `ensemble.json`: per member seed, validation accuracy with its interval, gain and bias.

    Raises:
        ValueError: too few members or prompts, a stream, or a finished member of other settings in `output_dir`.
    """
    if num_members < 2:
        raise ValueError(f"`num_members` is {num_members}; an ensemble has two or more.")
    if isinstance(train_dataset, IterableDataset):
        raise ValueError("The train rows are a stream, which cannot be resampled. Load them whole.")
    builder = RewardBuilder(model, args, processing_class, peft_config, quantization_config)
    shared = {
        **builder.settings,
        "rows": digest_of(train_dataset),
        **unit_settings(samples, scale),
    }
    folder, members = Path(args.output_dir), []
    for place in range(num_members):
        seed = args.seed + place
        # Drawn before anything is trained, so that too few prompts are no surprise at the last member.
        members.append((f"member_{place}", seed, *bootstrap_by_prompt(train_dataset, seed)))
    records = []
    for name, seed, drawn, held_out in members:

        def train(aside: Path, seed: int = seed, drawn: Dataset = drawn, held_out: Dataset = held_out) -> dict:
            return _train_member(builder, aside, seed, drawn, held_out, samples, scale)

        result = run_once(folder / name, {**shared, "seed": seed}, train)
        records.append({"folder": name, "seed": seed, **result})
    accuracies = [record["accuracy"] for record in records]
    ensemble = {
        "members": records,
        "normalized_over": "validation rows" if samples is None else "reference",
        "accuracy_mean": sum(accuracies) / len(accuracies),
    }
    if args.should_save:
        aside = folder / f"_unfinished_{ENSEMBLE_FILE}"
        aside.write_text(json.dumps(ensemble, indent=1), encoding="utf-8")
        os.replace(aside, folder / ENSEMBLE_FILE)
    return ensemble


def _train_member(
    builder: RewardBuilder,
    folder: Path,
    seed: int,
    drawn: Dataset,
    held_out: Dataset,
    samples: Samples | None,
    scale: bool,
) -> dict[str, Any]:
    trainer = builder.build(folder, seed, drawn, held_out)
    training_gain = 1.0 if samples is None else normalize_before(trainer, samples, scale=scale)[0]
    result = trainer.train(resume_from_checkpoint=has_checkpoint(folder))
    trainer.save_model(str(folder))
    trainer.save_metrics("train", result.metrics)
    validation = score_rows(trainer, trainer.eval_dataset)
    if samples is not None:
        gain, bias = normalize_after(trainer, folder, samples, scale=scale)
    else:  # the scores are raw, because nothing was normalised before
        gain, bias = save_unit(trainer, folder, torch.tensor(validation.scores, dtype=torch.float64), scale=scale)
    trainer.create_model_card(folder.name.removeprefix("_unfinished_"))
    builder.release(trainer)
    return {**validation.summary(), "training_gain": training_gain, "gain": gain, "bias": bias}
