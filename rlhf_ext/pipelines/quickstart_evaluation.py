"""Samples of a policy on the toy world's held-out prompts, and what gold says of them."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..functional.clusters import grouped_mean_interval
from ..functional.pairs import paired_wins, win_rate
from ..models.generation import Samples, completion_logps, sample_completions
from ..toyworld.gold import GOLD_MAX, gold_scores


@dataclass
class Evaluation:
    """Samples of one policy on the test prompts, the gold score of each, and the means."""

    samples: Samples
    gold: list[float]
    metrics: dict[str, float]


def evaluate(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_completion_length: int,
    seed: int,
) -> Evaluation:
    """One sample per prompt at temperature 1. `kl`: mean log-ratio to `reference`, nats per sequence (0 if None)."""
    set_seed(seed)
    samples = sample_completions(policy, tokenizer, prompts, max_new_tokens=max_completion_length)
    scores = [gold_scores(p, c) for p, c in zip(samples.prompts, samples.texts, strict=True)]
    kl = 0.0
    if reference is not None:
        pad = tokenizer.pad_token_id
        log_ratio = completion_logps(policy, samples, pad_token_id=pad) - completion_logps(
            reference, samples, pad_token_id=pad
        )
        kl = log_ratio.mean().item()
    bigrams = [pair for text in samples.texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    names = ("helpful", "honest", "harmless", "grammatical")
    metrics = {
        "gold_reward": mean([score["gold"] for score in scores]),
        **{name: mean([score[name] for score in scores]) for name in names},
        "kl": kl,
        "length": mean([len(ids) for ids in samples.completion_ids]),
        "truncated": mean([float(cut) for cut in samples.truncated]),
        "distinct_2": len(set(bigrams)) / max(len(bigrams), 1),
    }
    return Evaluation(samples, [score["gold"] for score in scores], metrics)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def gain_over(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """What PPO gained on the same prompts: share of the gap to the best gold, mean, its 95% interval, and win rate."""
    golds, baseline = torch.tensor(after.gold), torch.tensor(before.gold)
    gain, low, high = grouped_mean_interval((golds - baseline).tolist())
    return {
        "gap_closed": gain / (GOLD_MAX - before.metrics["gold_reward"]),
        "gain": gain,
        "gain_interval": [low, high],
        "win_rate": win_rate(paired_wins(golds, baseline))["win_rate"],
    }
