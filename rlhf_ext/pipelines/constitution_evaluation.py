"""The helpful policy, the fine-tuned one and PPO's on held-out prompts."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from ..data.constitution_arguments import ConstitutionArguments
from .constitution_texts import Loading, as_prompt
from .evaluation import load_reward
from .evaluation_checks import check_policies, check_readers
from .evaluation_policy import PolicySettings, Reference, Scorer, evaluate_policy, wins_by_score
from .evaluation_report import write_policy_report
from .evaluation_scorers import function_scorer


NAMES = ("helpful", "sl-cai", "rl-cai")
"""The three policies of a run, in the order they are made."""
SAMPLES = "samples.jsonl"


def measure_policies(
    folder: Path,
    args: ConstitutionArguments,
    loading: Loading,
    paths: dict[str, str],
    reward: str,
    prompts: list[str],
    revision: str | None,
) -> dict[str, Any]:
    """
    Scores by the reward model and by Python functions, KL to the helpful policy, diversity, and wins against it.

    Args:
        paths (`dict[str, str]`): the policies by `NAMES`.

    Returns:
        `dict`: `policies`, the measures of each, and `wins` of the second and third against the first.

    Raises:
        ValueError: before anything is sampled, for a policy without files, or a policy, reference or reward model that
            cannot read a prompt with an answer of full length.
    """
    asked = Dataset.from_list([{"prompt": as_prompt(prompt, args.as_messages)} for prompt in prompts])
    trust, length = loading.trust_remote_code, args.max_completion_length
    revisions = {NAMES[0]: revision}
    tokenizers = {
        name: AutoTokenizer.from_pretrained(path, revision=revisions.get(name), trust_remote_code=trust)
        for name, path in paths.items()
    }
    # All three before the first one answers.
    check_policies(paths, tokenizers, asked, length, trust, revisions)
    scorers = [Scorer("reward", *load_reward(reward, device=loading.device, dtype="auto", trust_remote_code=trust))]
    scorers += [function_scorer(name, []) for name in args.reward_funcs or []]
    settings = PolicySettings(
        num_samples=args.num_samples,
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    reference = Reference(*loading.model(paths[NAMES[0]], revision))
    check_readers(scorers, reference, tokenizers, asked["prompt"][:], length)
    found = []
    for name in NAMES:
        if name == NAMES[0]:
            policy, tokenizer = reference.model, reference.tokenizer
        else:
            policy, tokenizer = loading.model(paths[name])
        found.append(
            evaluate_policy(
                name, policy, tokenizer, asked["prompt"][:], scorers, settings, reference=reference, progress=True
            )
        )
        del policy  # one beside the reference
    baseline, *later = found
    wins = {policy.name: wins_by_score(policy, baseline) for policy in later}
    write_policy_report(str(folder), later, baseline, wins, {"policies": paths}, args.num_shown)
    with open(folder / SAMPLES, "w", encoding="utf-8", newline="\n") as file:
        for place, prompt in enumerate(prompts):
            answers = {policy.name: policy.samples.texts[place * args.num_samples] for policy in found}
            file.write(json.dumps({"prompt": prompt, "answers": answers}, ensure_ascii=False) + "\n")
    return {"policies": {policy.name: policy.metrics for policy in found}, "wins": wins, "prompts": len(prompts)}
