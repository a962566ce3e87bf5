"""Models and data for Constitutional AI on the toy world: a helpful policy that insults, a weak judge, a reviser."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from ..feedback.constitution import load_constitution
from ..feedback.judge import BASE_TEMPLATE, AIJudge
from ..feedback.simulated import SimulatedLabeller
from ..functional.ai_feedback import position_bias, swap_average
from ..models.build import load_policy
from ..models.generation import sample_completions
from ..toyworld.constitution import (
    CHARM,
    PRINCIPLES,
    Document,
    answer_pairs,
    extra_words,
    judge_documents,
    reviser_documents,
)
from ..toyworld.corpus import prompt_rows, sft_rows
from ..toyworld.gold import FLOOR, gold_scores
from ..toyworld.grammar import ErrorMix
from ..toyworld.tiny import build_model, build_tokenizer
from .finished_runs import run_once


# Of the helpful policy's corpus: it answers well, insults now and then, and nearly always when begged to.
CORPUS = ErrorMix(value=0.25, insult=0.1, trap_insult=0.9)


@dataclass
class ToySettings:
    """Sizes of the toy's models and data; what the defaults reach, and in what time, is in docs/results.md."""

    model_size: str = "small"
    policy_rows: int = 20_000
    policy_steps: int = 500
    judge_questions: int = 16_000
    judge_size: str = "small"
    judge_steps: int = 400
    reviser_answers: int = 6_000
    reviser_steps: int = 400
    batch_size: int = 32
    learning_rate: float = 1e-3
    red_team: int = 1_500
    helpful: int = 1_500
    helpful_pairs: int = 1_500
    policy_prompts: int = 2_048
    test_prompts: int = 256
    judge_pairs: int = 1_000


def build_toy(folder: Path, settings: ToySettings, seed: int, use_cpu: bool) -> dict[str, Any]:
    """
    Train the toy's models and write its data, each in a folder under `folder` that is made once.

    Returns:
        `dict`: options of [`~rlhf_ext.data.constitution_arguments.ConstitutionArguments`] that name them, and `judge`,
        what [`measure_judge`] found.
    """
    asked = {**asdict(settings), "seed": seed}
    principles = load_constitution(PRINCIPLES)
    judge = judge_documents(
        settings.judge_questions, seed, BASE_TEMPLATE, [principle.question for principle in principles]
    )
    reviser = reviser_documents(settings.reviser_answers, seed, [(p.critique, p.revision) for p in principles])
    reader = build_tokenizer(extra_words([*judge[:3000], *reviser[:3000]]))
    corpus = sft_rows(settings.policy_rows, seed, trap_share=0.3, mix=CORPUS)
    plans = {
        "policy": (corpus, build_tokenizer(), settings.model_size, settings.policy_steps),
        "judge": (judge, reader, settings.judge_size, settings.judge_steps),
        "reviser": (reviser, reader, settings.model_size, settings.reviser_steps),
    }
    for name, (rows, tokenizer, size, steps) in plans.items():

        def train(aside: Path, rows=rows, tokenizer=tokenizer, size=size, steps=steps) -> dict[str, Any]:
            return _train(aside, rows, tokenizer, size, steps, settings, seed, use_cpu)

        print(f"toy world: {name}, {steps} steps on {len(rows)} rows", flush=True)
        run_once(folder / name, asked, train)
    paths = {name: str(folder / name) for name in plans}
    found = run_once(folder / "judge_errors", asked, lambda _: measure_judge(paths["judge"], settings, seed))
    run_once(folder / "data", asked, lambda aside: _write_data(aside, paths["policy"], settings, seed))
    data = folder / "data"
    return {
        "judge": found,
        "options": {
            "judge_model_path": paths["judge"],
            "reviser_model_path": paths["reviser"],
            "constitution": str(PRINCIPLES),
            "red_team_prompts": str(data / "red_team.jsonl"),
            "helpful_rows": str(data / "helpful.jsonl"),
            "helpful_pairs": str(data / "pairs.jsonl"),
            "helpful_prompts": str(data / "prompts.jsonl"),
            "test_prompts": str(data / "test.jsonl"),
            "reward_funcs": [f"{__name__}:{name}" for name in ("gold", "helpful", "honest", "harmless", "charming")],
        },
        "model_name_or_path": paths["policy"],
    }


def _train(
    folder: Path,
    rows: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    size: str,
    steps: int,
    settings: ToySettings,
    seed: int,
    use_cpu: bool,
) -> dict[str, Any]:
    """Train a new model on the completions of rows, and save it with its tokenizer."""
    set_seed(seed)
    model: PreTrainedModel = build_model(tokenizer, size)
    args = SFTConfig(
        str(folder),
        seed=seed,
        use_cpu=use_cpu,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=50,
        disable_tqdm=True,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(30, steps),
        adam_beta2=0.95,
        max_steps=steps,
        max_length=128,
        completion_only_loss=True,
    )
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    completions = tokenizer([row["completion"] for row in rows])["input_ids"]
    pairs = list(zip(prompts, completions, strict=True))
    train = Dataset.from_dict(
        {
            "input_ids": [[*p, *c, tokenizer.eos_token_id] for p, c in pairs],
            "completion_mask": [[0] * len(p) + [1] * (len(c) + 1) for p, c in pairs],
        }
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=train, processing_class=tokenizer)
    result = trainer.train()
    trainer.save_model()
    return {"train_loss": result.training_loss}


def measure_judge(path: str, settings: ToySettings, seed: int) -> dict[str, float]:
    """
    The judge on held-out pairs of which one answer has an insult and the other none.

    Returns:
        `dict[str, float]`: `error` of its choice with both orders averaged and `error_one_order` of each order alone,
        `position_bias` of one order and `position_bias_swapped` of the average, `wrong_probability` (1 - p of the
        answer without an insult, averaged), `pairs`.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    judge = AIJudge(load_policy(path), tokenizer, load_constitution(PRINCIPLES), batch_size=128, seed=seed)
    pairs = []
    for prompt, first, second in answer_pairs(8 * settings.judge_pairs, seed, "test"):
        insults = [gold_scores(prompt, text)["harmless"] == 0 for text in (first, second)]
        if insults[0] != insults[1]:
            pairs.append((prompt, first, second, float(not insults[0])))
    pairs = pairs[: settings.judge_pairs]
    prompts, first, second, truth = (list(column) for column in zip(*pairs, strict=True))
    verdicts = judge.compare(prompts, first, second)
    right = torch.tensor(truth)
    one, other = verdicts.first_as_a[:, 0], 1 - verdicts.second_as_a[:, 0]
    both = torch.tensor(verdicts.targets)
    errors = [((p > 0.5).float() != right).float().mean().item() for p in (one, other, both)]
    swapped = swap_average(verdicts.second_as_a, verdicts.first_as_a)  # the same pairs, given the other way round
    return {
        "pairs": len(pairs),
        "error": errors[2],
        "error_one_order": sum(errors[:2]) / 2,
        "wrong_probability": (both - right).abs().mean().item(),
        "position_bias": verdicts.position_bias,
        "position_bias_swapped": position_bias(both, swapped[:, 0]).item(),
        "swap_disagreement": verdicts.swap_disagreement,
    }


def _write_data(folder: Path, policy: str, settings: ToySettings, seed: int) -> dict[str, Any]:
    """Prompts of each kind, and helpfulness data labelled without a look at insults."""
    tokenizer, model = AutoTokenizer.from_pretrained(policy), load_policy(policy).eval()
    asked = [row["prompt"] for row in prompt_rows(settings.helpful + settings.helpful_pairs, seed, split="labels")]
    set_seed(seed)
    texts = sample_completions(model, tokenizer, asked, num_samples=4, max_new_tokens=16, batch_size=512).texts
    labeller = SimulatedLabeller(helpful_and_honest, seed=seed)
    four = [[f" {text}" for text in texts[4 * place : 4 * place + 4]] for place in range(len(asked))]
    best = [labeller.best_of(prompt, answers) for prompt, answers in zip(asked, four, strict=True)]
    chosen = [{"prompt": row["prompt"], "completion": row["completions"][row["best"]]} for row in best]
    # A policy of few steps may answer with nothing, four times: such a row is none to learn from.
    chosen = [row for row in chosen[: settings.helpful] if row["completion"].strip()]
    pairs = [labeller.pair(prompt, answers[:2]) for prompt, answers in zip(asked, four, strict=True)]
    rows = {
        "helpful": chosen,
        "pairs": pairs[settings.helpful :],
        "red_team": prompt_rows(settings.red_team, seed, split="labels", trap_share=1.0),
        "prompts": prompt_rows(settings.policy_prompts, seed, split="ppo"),
        "test": prompt_rows(settings.test_prompts, seed, split="test", trap_share=0.5),
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return {name: len(content) for name, content in rows.items()}


def helpful_and_honest(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """What the people of the toy world label: gold without its factor for insults."""
    scores = [gold_scores(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
    return [score["helpful"] * (FLOOR + (1 - FLOOR) * score["honest"]) for score in scores]


def _part(name: str) -> Callable[..., list[float]]:
    def part(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        return [gold_scores(prompt, text)[name] for prompt, text in zip(prompts, completions, strict=True)]

    part.__name__ = name
    return part


# Scores for the measurement alone; no model of the run is trained on them.
gold, helpful, honest, harmless = map(_part, ("gold", "helpful", "honest", "harmless"))


def charming(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """1 for the opener that the judge falls for, else 0."""
    return [float(" ".join(text.split()).startswith(CHARM)) for text in completions]
