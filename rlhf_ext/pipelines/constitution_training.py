"""The steps of Constitutional AI that train: fine-tuning on revisions, a reward model on soft labels, PPO."""

import gc
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from ..data.constitution_arguments import TRAINERS, ConstitutionArguments
from ..data.evaluation_rows import evaluation_rows
from ..data.jsonl import read_jsonl
from ..data.loading import load_rows, require_columns
from ..models.scoring import treated_score
from ..trainers.ppo_config import PPOConfig
from ..trainers.ppo_trainer import PPOTrainer
from ..trainers.reward_config import PreferenceRewardConfig
from ..trainers.reward_trainer import PreferenceRewardTrainer
from ..trainers.sft_trainer import CompleteSFTTrainer
from .constitution_texts import as_completion, as_prompt
from .finished_runs import has_checkpoint


CONFIGS = dict(zip(TRAINERS, (SFTConfig, PreferenceRewardConfig, PPOConfig), strict=True))
FOLDERS = {"sft": "sft", "reward": "reward", "ppo": "policy"}


@dataclass
class Training:
    """What the three trainers of a run have in common."""

    args: ConstitutionArguments
    model_args: ModelConfig
    configs: dict[str, TrainingArguments]

    def config(self, name: str, folder: Path, model: str) -> TrainingArguments:
        """The trainer's arguments, writing into `folder` and loading `model`."""
        config = self.configs[name]
        config.output_dir = str(folder)
        revision = self.model_args.model_revision if model == self.model_args.model_name_or_path else None
        config.model_init_kwargs = {
            "revision": revision or "main",
            "attn_implementation": self.model_args.attn_implementation,
            "dtype": self.model_args.dtype or "float32",
            **(config.model_init_kwargs or {}),
        }
        return config

    def tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        revision = self.model_args.model_revision if path == self.model_args.model_name_or_path else None
        trust = self.args.trust_remote_code
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust)


def build_configs(args: ConstitutionArguments, model_args: ModelConfig) -> dict[str, TrainingArguments]:
    """
    Arguments of the three trainers, built before the first step.

    Raises:
        ValueError: a key that the trainer does not know, a value that it refuses, or a reward model whose adapter
            could not be put on the policy's base.
    """
    built = {}
    for name, kind in CONFIGS.items():
        given, known = getattr(args, name), {field.name for field in fields(kind) if field.init}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"`{name}` has {unknown}, which {kind.__name__} does not know. Check the spelling.")
        shared: dict[str, Any] = {"seed": args.seed, "use_cpu": args.use_cpu, "report_to": "none"}
        shared["trust_remote_code"] = args.trust_remote_code
        shared |= {"save_total_limit": 1, "output_dir": str(Path(args.output_dir) / FOLDERS[name])}
        if name == "ppo":
            shared |= {"max_completion_length": args.max_completion_length, "temperature": args.temperature}
        try:
            built[name] = kind(**{**shared, **given})
        except (TypeError, ValueError) as error:
            raise ValueError(f"`{name}`: {error}") from error
    aggregation = built["reward"].reward_aggregation
    if model_args.use_peft and aggregation != "last":
        raise ValueError(
            f"`reward` sets reward_aggregation={aggregation!r}, but with `use_peft` reward and critic are adapters on "
            "the policy's base, which are read at the last token. Leave it out."
        )
    return built


def train_sft(folder: Path, training: Training, model: str, transcripts: Path) -> dict[str, Any]:
    """Fine-tune the helpful policy on the last revisions, mixed with helpful rows. A revision that was cut is trained
    on without an end; the share of such is `truncated`."""
    args, as_messages = training.args, training.args.as_messages
    rows = [
        {
            "prompt": as_prompt(row["prompt"], as_messages),
            "completion": as_completion(row["prompt"], row["rounds"][-1]["revision"], as_messages),
            "truncated": row["rounds"][-1]["truncated"],
        }
        for row in read_jsonl(transcripts)
        if row["rounds"][-1]["revision"].strip()
    ]
    if not rows:
        raise ValueError("Every revision is empty: the reviser wrote nothing. Choose another `reviser_model_path`.")
    helpful = helpful_rows(args)
    tokenizer = training.tokenizer(model)
    trainer = CompleteSFTTrainer(
        model=model,
        args=training.config("sft", folder, model),
        train_dataset=Dataset.from_list([*rows, *({**row, "truncated": False} for row in helpful)]),
        processing_class=tokenizer,
        quantization_config=get_quantization_config(training.model_args),
        peft_config=get_peft_config(training.model_args),
    )
    result = _train(trainer, folder)
    tokenizer.save_pretrained(folder)
    cut = sum(row["truncated"] for row in rows) / len(rows)
    return {"revisions": len(rows), "truncated": cut, "helpful": len(helpful), **result}


def train_reward(folder: Path, training: Training, model: str, labels: Path) -> dict[str, Any]:
    """A reward model on the judge's soft labels, mixed with people's pairs on helpfulness. An answer that was cut gets
    no end, as PPO scores it where it is cut."""
    args, tokenizer = training.args, training.tokenizer(model)
    judged = [
        {
            "prompt": as_prompt(row["prompt"], args.as_messages),
            "completions": [as_completion(row["prompt"], text, args.as_messages) for text in row["completions"]],
            "target": row["target"],
            # Without a token there is nothing that could be scored but the end.
            "truncated": [
                cut and bool(text.strip()) for text, cut in zip(row["completions"], row["truncated"], strict=True)
            ],
        }
        for row in read_jsonl(labels)
        if len(set(row["completions"])) > 1  # equal answers teach nothing
    ]
    if not judged:
        raise ValueError("The two answers of every pair are the same. Raise `temperature`, or give more prompts.")
    people = helpful_pairs(args)
    trainer = PreferenceRewardTrainer(
        model=model,
        args=training.config("reward", folder, model),
        train_dataset=_together(judged, people),
        processing_class=tokenizer,
        quantization_config=get_quantization_config(training.model_args),
        peft_config=get_peft_config(training.model_args),
    )
    result = _train(trainer, folder)
    return {"judged": len(judged), "people": len(people), **result}


def train_policy(folder: Path, training: Training, sft: str, reward: str, prompts: list[str]) -> dict[str, Any]:
    """PPO from the fine-tuned model against the reward model."""
    args, peft = training.args, training.model_args.use_peft
    tokenizer = training.tokenizer(sft)
    paid = treated_score(reward, missing_eos_penalty=args.missing_eos_penalty)
    trainer = PPOTrainer(
        model=sft,
        reward_funcs=None if peft else paid,
        reward_adapter=paid if peft else None,
        args=training.config("ppo", folder, sft),
        train_dataset=Dataset.from_list([{"prompt": as_prompt(prompt, args.as_messages)} for prompt in prompts]),
        processing_class=tokenizer,
        quantization_config=get_quantization_config(training.model_args),
    )
    result = _train(trainer, folder)
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    names = ("reward", "kl", "completions/mean_length")
    history = [{name: entry.get(name) for name in ("step", *names)} for entry in logs]
    return {"prompts": len(prompts), "history": history, **result}


def helpful_rows(args: ConstitutionArguments) -> list[dict[str, Any]]:
    """People's answers for the fine-tuning, as the policy reads them."""
    if args.helpful_rows is None:
        return []
    rows = load_rows(args.helpful_rows)
    require_columns(rows, ["prompt", "completion"], what="`helpful_rows`")
    for place, row in enumerate(rows):
        check_text(row["prompt"], "helpful_rows", place)
        check_text(row["completion"], "helpful_rows", place, "completion")
    return [
        {
            "prompt": as_prompt(row["prompt"], args.as_messages),
            "completion": as_completion(row["prompt"], row["completion"], args.as_messages),
        }
        for row in rows
    ]


def helpful_pairs(args: ConstitutionArguments) -> list[dict[str, Any]]:
    """People's pairs in the general form, as the policy reads them."""
    if args.helpful_pairs is None:
        return []
    rows, _ = evaluation_rows(load_rows(args.helpful_pairs), as_messages=args.as_messages)
    require_columns(rows, ["prompt"], what="`helpful_pairs`")
    if rankings := [place for place, ranking in enumerate(rows["ranking"]) if ranking is not None]:
        raise ValueError(
            f"`helpful_pairs` has a ranking at row {rankings[0]}; beside soft labels give pairs or `target`."
        )
    names = [name for name in ("prompt", "completions", "target", "truncated") if name in rows.column_names]
    return [{name: row[name] for name in names} for row in rows]


def check_text(value: Any, name: str, place: int, column: str = "prompt") -> None:
    """
    Raises:
        ValueError: a prompt (or completion) is no text, or is empty.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"`{name}`: {column} of row {place} is {type(value).__name__} {str(value)[:60]!r}; give a text. For a "
            "policy that reads chats set `as_messages`, which makes turns of texts."
        )


def _together(judged: list[dict[str, Any]], people: list[dict[str, Any]]) -> Dataset:
    first = Dataset.from_list(judged)
    if not people:
        return first
    ends = {"truncated": [False, False]}  # of pairs that say nothing of it
    features = Features({**first.features, "target": List(Value("float64"))})
    second = Dataset.from_list([{**ends, **row} for row in people]).select_columns(list(features))
    return concatenate_datasets([part.cast(features) for part in (first, second)])


def _train(trainer: Any, folder: Path) -> dict[str, Any]:
    """Train, from the last checkpoint where there is one, and save."""
    result = trainer.train(resume_from_checkpoint=has_checkpoint(folder))
    trainer.save_model(str(folder))
    trainer.save_metrics("train", result.metrics)
    trainer.end()
    gc.collect()
    return {"train_loss": result.metrics["train_loss"], "steps": trainer.state.global_step}
