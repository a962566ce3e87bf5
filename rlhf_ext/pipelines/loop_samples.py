"""The first two steps of a round: what is sampled, and which of it is worth a label."""

import random
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import set_seed

from ..models.ensembles import load_reward_ensemble
from ..models.generation import completion_text, end_token_ids, sample_completions
from .loop_policies import Policies
from .loop_run import ROWS_FILE, SFT, LoopRun, as_completion, write_jsonl


REFERENCE = "reference"
"""Name of an answer that came with its prompt."""


def write_samples(run: LoopRun, round_: int, folder: Path) -> dict[str, Any]:
    """Sample `pool_factor` comparisons for each label of the round; `rows.jsonl`."""
    args = run.args
    prompts = run.prompts_of(round_, run.labels_before_training * args.pool_factor)
    writers = [_draw_writers(run, round_, place, row) for place, row in enumerate(prompts)]
    candidates: list[list[dict[str, Any]]] = [[{}] * args.num_candidates for _ in prompts]
    for name in sorted({name for names in writers for name in names}):
        slots = [(row, slot) for row, names in enumerate(writers) for slot, who in enumerate(names) if who == name]
        texts = [prompts[row]["prompt"] for row, _ in slots]
        if name == REFERENCE:
            found = [_reference_answer(run, prompts[row]["completion"]) for row, _ in slots]
        else:
            found = answers_of(run, name, texts, run.seed(round_, f"samples of {name}"))
        for (row, slot), answer in zip(slots, found, strict=True):
            candidates[row][slot] = {**answer, "policy": name}
    rows = []
    for prompt, answers in zip(prompts, candidates, strict=True):
        completions = [as_completion(prompt["prompt"], answer["text"]) for answer in answers]
        if all(text == completions[0] for text in completions):
            continue  # nothing to choose
        rows.append(
            {
                "prompt": prompt["prompt"],
                "completions": completions,
                "completion_ids": [answer["ids"] for answer in answers],
                "policies": [answer["policy"] for answer in answers],
                "truncated": [answer["truncated"] for answer in answers],
            }
        )
    if not rows:
        raise ValueError(
            f"Round {round_}: all candidates of each of {len(prompts)} prompts are the same text. Raise the "
            "temperature in `ppo`, or the number of prompts."
        )
    write_jsonl(folder / ROWS_FILE, rows)
    return {"comparisons": len(rows), "identical": len(prompts) - len(rows)}


def answers_of(run: LoopRun, name: str, prompts: list[Any], seed: int, policies: Policies | None = None) -> list[dict]:
    """One answer of a policy to each prompt: `text` as it joins the prompt, `ids`, `truncated`."""
    with (policies or Policies(run)).use(name) as model:
        set_seed(seed)
        samples = sample_completions(
            model,
            run.tokenizer,
            prompts,
            max_new_tokens=run.max_completion_length,
            temperature=run.temperature,
            batch_size=run.args.eval_batch_size,
            progress=f"answers of {name}",
            eos_token_ids=end_token_ids(model, run.tokenizer),
        )
    return [
        {"text": completion_text(run.tokenizer, samples, place), "ids": ids, "truncated": cut}
        for place, (ids, cut) in enumerate(zip(samples.completion_ids, samples.truncated, strict=True))
    ]


def write_selection(run: LoopRun, round_: int, folder: Path) -> dict[str, Any]:
    """Choose what is labelled among the samples of the round; `rows.jsonl`."""
    rows, count = run.rows_of(round_, "samples"), run.labels_before_training
    chance = random.Random(run.seed(round_, "selection"))
    places, found = list(range(len(rows))), {"disagreement_mean": None, "disagreement_selected": None}
    if run.args.selection == "disagreement" and round_ > 1:  # in the first round there is nobody to disagree
        doubts = disagreements(run, run.step(round_ - 1, "reward"), rows)
        chosen = sorted(sorted(places, key=doubts.__getitem__, reverse=True)[:count])
        found = {
            "disagreement_mean": sum(doubts) / len(doubts),
            "disagreement_selected": sum(doubts[place] for place in chosen) / len(chosen),
        }
    else:
        chosen = sorted(chance.sample(places, min(count, len(places))))
    write_jsonl(folder / ROWS_FILE, [rows[place] for place in chosen])
    return {"candidates": len(rows), "selected": len(chosen), **found}


def disagreements(run: LoopRun, ensemble_folder: Path, rows: list[dict[str, Any]]) -> list[float]:
    """Per comparison, the variance of the ensemble's predicted preference, the largest over pairs of candidates."""
    ensemble = load_reward_ensemble(
        ensemble_folder,
        policy_processing_class=run.tokenizer,
        device=PartialState().device,
        batch_size=run.args.eval_batch_size,
        trust_remote_code=run.args.trust_remote_code,
    )
    largest = [0.0] * len(rows)
    for first in range(run.args.num_candidates):
        for second in range(first):
            doubts = ensemble.disagreement(
                [row["prompt"] for row in rows],
                [row["completions"][first] for row in rows],
                [row["completions"][second] for row in rows],
                [row["completion_ids"][first] for row in rows],
                [row["completion_ids"][second] for row in rows],
            )
            largest = [max(pair) for pair in zip(largest, doubts, strict=True)]
    return largest


def _draw_writers(run: LoopRun, round_: int, place: int, row: dict[str, Any]) -> list[str]:
    """Who writes the candidates of one comparison: the newest policy, and others drawn from `sources`."""
    newest = SFT if round_ == 1 else f"round_{round_ - 1}"
    names = {newest}
    if "previous" in run.args.sources:
        names |= {f"round_{earlier}" for earlier in range(1, round_ - 1)}
    if "sft" in run.args.sources:
        names.add(SFT)
    chance = random.Random(f"{run.args.seed} writers {round_} {place}")
    drawn = [newest, *chance.choices(sorted(names), k=run.args.num_candidates - 1)]
    if "references" in run.args.sources and row.get("completion"):
        drawn[chance.randrange(1, len(drawn))] = REFERENCE
    return drawn


def _reference_answer(run: LoopRun, completion: Any) -> dict[str, Any]:
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    ids = run.tokenizer(text, add_special_tokens=False)["input_ids"]
    return {"text": text, "ids": [*ids, run.tokenizer.eos_token_id], "truncated": False}
