"""A policy on prompts: scores, win rate over a baseline, KL, diversity, length, and its texts side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from ..feedback.judge import AIJudge
from ..functional.pairs import paired_wins, win_rate
from ..metrics.diversity import Diversity
from ..metrics.insult_rate import DEFAULT_WORDS, InsultRate
from ..metrics.length import Length
from ..metrics.reference_perplexity import ReferencePerplexity
from ..models.generation import Samples, completion_logps, sample_completions


Prompt = str | list[dict[str, Any]]


@dataclass
class Sampling:
    """How answers are drawn."""

    num_samples: int = 4
    max_new_tokens: int = 64
    temperature: float = 1.0
    batch_size: int = 16
    seed: int = 0


def render_prompts(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Prompts as the text that the tokenizer turns into ids; of messages, the chat template's up to the answer."""
    texts = []
    for prompt in prompts:
        if isinstance(prompt, str):
            texts.append(prompt)
            continue
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        # Tokenising adds the token once more.
        texts.append(text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token else text)
    return texts


def sample_answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], sampling: Sampling, title: str
) -> Samples:
    """`num_samples` answers to each prompt; those of prompt `j` start at `j * num_samples`."""
    set_seed(sampling.seed)
    return sample_completions(
        model,
        tokenizer,
        render_prompts(prompts, tokenizer),
        num_samples=sampling.num_samples,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        batch_size=sampling.batch_size,
        progress=title,
    )


def score_answers(
    rewards: Mapping[str, Callable[..., list[float | None]]], prompts: Sequence[Prompt], samples: Samples
) -> dict[str, list[float]]:
    """Each reward's score of each answer.

    Raises:
        ValueError: a reward gives no score for an answer.
    """
    each = len(samples.texts) // len(prompts)
    repeated = [prompt for prompt in prompts for _ in range(each)]
    texts = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(repeated, samples.texts, strict=True)
    ]
    given = {"completion_ids": samples.completion_ids, "prompt_ids": samples.prompt_ids}
    found = {}
    for name, reward in rewards.items():
        scores = reward(prompts=repeated, completions=texts, **given)
        lost = [place for place, score in enumerate(scores) if score is None]
        if lost:
            raise ValueError(f"The reward {name!r} gave no score for answers {lost[:8]} ({len(lost)} in all).")
        found[name] = [float(score) for score in scores]
    return found


def describe_answers(
    samples: Samples, num_prompts: int, *, encoder: Any = None, insult_words: Sequence[str] | None = None
) -> dict[str, Any]:
    """Length, EOS rate, insults, and, with two samples a prompt or more, diversity."""
    each = len(samples.texts) // num_prompts
    grouped = [samples.texts[each * j : each * (j + 1)] for j in range(num_prompts)]
    found = {
        **Length().compute(
            predictions=[len(ids) for ids in samples.completion_ids], finished=[not cut for cut in samples.truncated]
        ),
        **InsultRate().compute(predictions=samples.texts, words=list(insult_words or DEFAULT_WORDS)),
    }
    if each > 1 and num_prompts > 1:
        found |= Diversity().compute(predictions=grouped, encoder=encoder)
    return found


def distance(
    policy: nn.Module,
    reference: nn.Module,
    samples: Samples,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
) -> dict[str, float]:
    """KL(policy || reference) in nats per answer and per token, estimated on the policy's samples (k1), and how likely
    these are under the reference.

    Log-probabilities are taken at the temperature of the samples; greedy answers at temperature 1, where the number is
    a log-ratio and no KL.
    """
    options = {
        "pad_token_id": tokenizer.pad_token_id,
        "temperature": sampling.temperature or 1.0,
        "batch_size": sampling.batch_size,
    }
    log_ratio = completion_logps(policy, samples, **options) - completion_logps(reference, samples, **options)
    tokens = sum(map(len, samples.completion_ids))
    half = 1.96 * (log_ratio.double().var().item() / len(log_ratio)) ** 0.5 if len(log_ratio) > 1 else float("nan")
    mean = log_ratio.mean().item()
    perplexity = ReferencePerplexity().compute(
        predictions=samples.completion_ids,
        references=samples.prompt_ids,
        model=reference,
        pad_token_id=tokenizer.pad_token_id,
        batch_size=sampling.batch_size,
    )
    return {
        "kl": mean,
        "kl_low": mean - half,
        "kl_high": mean + half,
        "kl_per_token": log_ratio.sum().item() / tokens,
        "reference_perplexity": perplexity["perplexity"],
    }


def compare_answers(
    scores: Mapping[str, list[float]], baseline_scores: Mapping[str, list[float]], each: int
) -> dict[str, dict[str, float]]:
    """Win rate by each reward: the first answer to each prompt against the baseline's first."""
    found = {}
    for name, values in scores.items():
        mine, theirs = (torch.tensor(v[::each], dtype=torch.float64) for v in (values, baseline_scores[name]))
        found[name] = win_rate(paired_wins(mine, theirs))
    return found


def judge_answers(
    judge: AIJudge, prompts: Sequence[str], samples: Samples, baseline: Samples, each: int
) -> dict[str, float]:
    """Win rate by a judge that sees both orders: the first answer to each prompt against the baseline's first."""
    verdicts = judge.compare(list(prompts), samples.texts[::each], baseline.texts[::each], progress="judging")
    return win_rate(verdicts.first_as_a.mean(1), swapped=1 - verdicts.second_as_a.mean(1))


def mean_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, its 95% interval (1.96 standard errors) and standard deviation."""
    tensor = torch.tensor(values, dtype=torch.float64)
    std = tensor.std().item() if len(values) > 1 else float("nan")
    half = 1.96 * std / len(values) ** 0.5
    mean = tensor.mean().item()
    return {"mean": mean, "low": mean - half, "high": mean + half, "std": std}
