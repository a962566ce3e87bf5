"""From the flags of an evaluation to its numbers and its report."""

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..data.arguments import select_rows
from ..data.evaluation_arguments import EvaluationArguments
from ..data.loading import require_columns
from ..feedback.constitution import DEFAULT_CONSTITUTION, load_constitution
from ..feedback.judge import AIJudge
from ..models.build import load_policy
from ..models.ensembles import is_reward_ensemble, load_reward_ensemble
from ..models.hub import check_model_name
from ..models.reward_functions import ModelReward, checked_reward
from ..models.scoring import load_reward_model
from .evaluation_report import write_evaluation
from .policy_evaluation import (
    Sampling,
    compare_answers,
    describe_answers,
    distance,
    judge_answers,
    mean_with_interval,
    render_prompts,
    sample_answers,
    score_answers,
)
from .reward_benchmark import evaluate_reward_model


def run_evaluation(args: EvaluationArguments, functions: dict[str, Callable] | None = None) -> dict[str, Any]:
    """
    Evaluate what the flags name; write `evaluation.json`, `evaluation.md` and `report.html`.

    Args:
        args ([`EvaluationArguments`]):
            The flags.
        functions (`dict[str, Callable]`, *optional*):
            Rewards by their name, for `reward_funcs`.

    Returns:
        `dict`: what stands in `evaluation.json`.
    """
    for name in ("policy_model_path", "baseline_model_path", "reference_model_path", "judge_model_path"):
        if getattr(args, name):
            check_model_name(getattr(args, name), name, None)
    for path in args.reward_model_path or []:
        if not is_reward_ensemble(path):
            check_model_name(path, "reward_model_path", None)
    start = time.perf_counter()
    evaluate = _evaluate_policy if args.policy_model_path else _evaluate_reward
    found, samples = evaluate(args, functions or {})
    found = {
        "model": args.policy_model_path or args.reward_model_path[0],
        "dataset": args.dataset_name,
        "seed": args.seed,
        **found,
        "seconds": time.perf_counter() - start,
    }
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    write_evaluation(folder, found, samples)
    return found


def _evaluate_reward(args: EvaluationArguments, functions: dict[str, Callable]) -> tuple[dict[str, Any], list]:
    rows = select_rows(args, args.dataset_test_split)
    reward, tokenizer = _reward_of(args.reward_model_path[0], args, None)
    found = evaluate_reward_model(reward, tokenizer, rows, source_column=args.source_column, three_h=args.three_h)
    return {"kind": "reward model", **found}, []


def _evaluate_policy(args: EvaluationArguments, functions: dict[str, Callable]) -> tuple[dict[str, Any], list]:
    rows = select_rows(args, args.dataset_test_split)
    require_columns(rows, ["prompt"], what="the prompts of the evaluation")
    prompts = list(rows["prompt"])
    tokenizer = _tokenizer(args.policy_model_path, args)
    sampling = Sampling(args.num_samples, args.max_new_tokens, args.temperature, args.batch_size, args.seed)
    dtype = getattr(torch, args.dtype)
    options = {"dtype": dtype, "trust_remote_code": args.trust_remote_code}

    policy = load_policy(args.policy_model_path, **options).eval().requires_grad_(False)
    samples = sample_answers(policy, tokenizer, prompts, sampling, "policy")
    found: dict[str, Any] = {"kind": "policy", "prompts": len(prompts), "sampling": vars(sampling)}
    encoder = args.encoder
    found["answers"] = describe_answers(samples, len(prompts), encoder=encoder, insult_words=args.insult_words)
    if args.reference_model_path:
        reference = load_policy(args.reference_model_path, **options).eval().requires_grad_(False)
        found["distance"] = distance(policy, reference, samples, tokenizer, sampling)
        del reference
    del policy
    gc.collect()

    baseline = None
    if args.baseline_model_path:
        other = load_policy(args.baseline_model_path, **options).eval().requires_grad_(False)
        baseline = sample_answers(other, tokenizer, prompts, sampling, "baseline")
        found["baseline"] = args.baseline_model_path
        found["baseline_answers"] = describe_answers(
            baseline, len(prompts), encoder=encoder, insult_words=args.insult_words
        )
        del other
        gc.collect()

    rewards = {name: checked_reward(functions[name]) for name in args.reward_funcs or []}
    for path in args.reward_model_path or []:
        rewards[path.rstrip("/").split("/")[-1]] = _reward_of(path, args, tokenizer)[0]
    scores = score_answers(rewards, prompts, samples)
    found["scores"] = {name: mean_with_interval(values) for name, values in scores.items()}
    if baseline is not None:
        theirs = score_answers(rewards, prompts, baseline)
        found["baseline_scores"] = {name: mean_with_interval(values) for name, values in theirs.items()}
        found["win_rate"] = compare_answers(scores, theirs, sampling.num_samples)
        if args.judge_model_path:
            model = AutoModelForCausalLM.from_pretrained(args.judge_model_path, use_safetensors=True, **options)
            judge = AIJudge(
                model,
                _tokenizer(args.judge_model_path, args),
                load_constitution(args.constitution or DEFAULT_CONSTITUTION),
                batch_size=args.batch_size,
                seed=args.seed,
            )
            texts = render_prompts(prompts, tokenizer)
            found["win_rate"]["judge"] = judge_answers(judge, texts, samples, baseline, sampling.num_samples)
    each = sampling.num_samples
    table = [
        {
            "prompt": samples.prompts[each * j],
            "answer": samples.texts[each * j],
            "baseline": None if baseline is None else baseline.texts[each * j],
            "scores": {name: values[each * j] for name, values in scores.items()},
        }
        for j in range(len(prompts))
    ]
    return found, table


def _reward_of(
    path: str, args: EvaluationArguments, policy_tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Callable, PreTrainedTokenizerBase]:
    if is_reward_ensemble(path):
        ensemble = load_reward_ensemble(
            path,
            policy_processing_class=policy_tokenizer,
            batch_size=args.batch_size,
            trust_remote_code=args.trust_remote_code,
        )
        return ensemble.mean, ensemble.members[0].processing_class
    model = load_reward_model(path, trust_remote_code=args.trust_remote_code).requires_grad_(False)
    tokenizer = _tokenizer(path, args)
    return ModelReward(model, tokenizer, policy_tokenizer or tokenizer, batch_size=args.batch_size), tokenizer


def _tokenizer(path: str, args: EvaluationArguments) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
