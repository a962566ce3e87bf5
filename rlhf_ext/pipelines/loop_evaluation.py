"""The last step of a round: the new policy on held-out prompts, beside the SFT policy's answers to the same."""

from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..data.functions import import_function
from ..data.jsonl import read_jsonl
from ..models.generation import Samples, completion_text
from .evaluation_policy import (
    PolicyEvaluation,
    PolicySettings,
    Reference,
    evaluate_policy,
    wins_by_score,
)
from .evaluation_scorers import Scorer, load_scorer
from .loop_asynchronous import newest_reward_folder
from .loop_policies import Policies
from .loop_run import SFT, LoopRun, as_completion, write_jsonl
from .loop_training import probe_names


REWARD = "reward"
"""Name of the round's reward model among the scorers."""

_ANSWERS = "answers.jsonl"


def evaluate_round(run: LoopRun, round_: int, folder: Path) -> dict[str, Any]:
    """
    Answers to the held-out prompts with their scores, `answers.jsonl`, and what is measured of them.

    Round 0 is the SFT policy itself, scored by functions alone: it has no reward model. Later rounds score its answers
    and their own by the round's reward model, so that the two are compared in one unit.
    """
    name = SFT if round_ == 0 else f"round_{round_}"
    scorers = [Scorer(score.rpartition(":")[2], function=import_function(score)) for score in probe_names(run)]
    if round_ > 0:
        scorers = [_reward_scorer(run, round_), *scorers]
    settings = PolicySettings(
        num_samples=run.args.eval_samples,
        max_completion_length=run.max_completion_length,
        temperature=run.temperature,
        batch_size=run.args.eval_batch_size,
        seed=run.seed(0, "evaluation"),  # the same in every round: the noise of sampling is shared
    )
    policies = Policies(run)
    with policies.use(name) as model:
        reference = None if round_ == 0 else Reference(policies.reference(), run.tokenizer)
        found = evaluate_policy(
            name,
            model,
            run.tokenizer,
            [row["prompt"] for row in run.eval_prompts],
            scorers,
            settings,
            reference=reference,
            columns=_columns(run),
            progress=True,
        )
    metrics: dict[str, Any] = dict(found.metrics)
    if round_ > 0:
        metrics["win_rate"] = wins_by_score(found, _baseline(run, scorers, settings))
    write_jsonl(folder / _ANSWERS, _answer_rows(run, found))
    return metrics


def check_scorer_names(run: LoopRun) -> None:
    """
    Refuse functions whose scores would overwrite each other's: the evaluation names them without their modules.

    Raises:
        ValueError: naming them.
    """
    names = [REWARD, *(score.rpartition(":")[2] for score in probe_names(run))]
    if odd := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"`gold_func` and `score_funcs` {probe_names(run)} name {odd} more than once ({REWARD!r} is the round's "
            "reward model). Give each function a name of its own."
        )


def _reward_scorer(run: LoopRun, round_: int) -> Scorer:
    folder = newest_reward_folder(run) if run.args.asynchronous else run.step(round_, "reward")
    return load_scorer(
        str(folder),
        REWARD,
        batch_size=run.args.eval_batch_size,
        device=PartialState().device,
        dtype="auto",
        trust_remote_code=run.args.trust_remote_code,
    )


def _columns(run: LoopRun) -> dict[str, list[Any]]:
    rows = run.eval_prompts
    return {name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")}


def _answer_rows(run: LoopRun, found: PolicyEvaluation) -> list[dict[str, Any]]:
    samples = found.samples
    return [
        {
            "prompt": prompt,
            "completion": as_completion(prompt, completion_text(run.tokenizer, samples, place)),
            "text": samples.texts[place],
            "prompt_ids": samples.prompt_ids[place],
            "completion_ids": samples.completion_ids[place],
            "truncated": samples.truncated[place],
            "scores": {name: scores[place] for name, scores in found.scores.items()},
        }
        for place, prompt in enumerate(samples.prompts)
    ]


def _baseline(run: LoopRun, scorers: list[Scorer], settings: PolicySettings) -> PolicyEvaluation:
    """What SFT answered in round 0, under the scorers of this round."""
    rows = read_jsonl(run.step(0, "evaluation") / _ANSWERS)
    samples = Samples(
        prompts=[row["prompt"] for row in rows],
        texts=[row["text"] for row in rows],
        prompt_ids=[row["prompt_ids"] for row in rows],
        completion_ids=[row["completion_ids"] for row in rows],
        truncated=[row["truncated"] for row in rows],
    )
    baseline = PolicyEvaluation(SFT, samples, settings.num_samples)
    columns = {key: [v for v in vs for _ in range(settings.num_samples)] for key, vs in _columns(run).items()}
    for scorer in scorers:
        if scorer.name in rows[0]["scores"]:
            baseline.scores[scorer.name] = [row["scores"][scorer.name] for row in rows]
        else:
            baseline.scores[scorer.name] = scorer.score(samples, run.tokenizer, columns, settings.batch_size)
    return baseline
