"""A policy on prompts: scores, KL, diversity, length, and how often it wins against a baseline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from ..data.prompts import check_prompts, check_tokenizer
from ..data.texts import text_of
from ..feedback.constitution import Principle
from ..feedback.judge import AIJudge
from ..functional.clusters import grouped_standard_error
from ..functional.pairs import paired_wins, win_rate
from ..functional.scores import ensemble_mean, ensemble_spread
from ..functional.statistics import perplexity
from ..metrics.diversity import Diversity
from ..metrics.insult_rate import DEFAULT_WORDS, InsultRate
from ..metrics.length import Length
from ..models.generation import Samples, completion_logps, end_token_ids, sample_completions
from .evaluation_scorers import Scorer


@dataclass
class Reference:
    """The model that KL and perplexity are measured by."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase


@dataclass
class PolicySettings:
    """How policies are sampled and measured; the fields are those of the recipe."""

    num_samples: int = 4
    max_completion_length: int = 128
    temperature: float = 1.0
    batch_size: int = 16
    seed: int = 42
    insult_words: Sequence[str] | None = None
    encoder: str | Callable | None = None
    nli: Callable | None = None


@dataclass
class PolicyEvaluation:
    """
    What was measured of one policy.

    Attributes:
        name (`str`): of the reports.
        samples ([`Samples`]): answers, `num_samples` per prompt.
        scores (`dict[str, list[float]]`): by scorer, one per answer.
        spreads (`dict[str, list[float]]`): by scorer that is an ensemble, its members' deviation, one per answer.
        num_samples (`int`): answers to each prompt, which stand side by side.
        metrics (`dict[str, float]`): see docs/measures.md.
    """

    name: str
    samples: Samples
    num_samples: int = 1
    scores: dict[str, list[float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, list[float]] = field(default_factory=dict)


def evaluate_policy(
    name: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    scorers: Sequence[Scorer],
    settings: PolicySettings,
    *,
    reference: Reference | None = None,
    columns: dict[str, list] | None = None,
    progress: bool = False,
) -> PolicyEvaluation:
    """
    Sample a policy and measure its answers.

    Args:
        prompts (`Sequence[str]` or `Sequence[list[dict]]`):
            Texts, or messages for a model with a chat template.
        columns (`dict[str, list]`, *optional*):
            Further columns of the prompts, one entry each; Python functions get them.

    Raises:
        ValueError: a tokenizer without an end of sequence, one of another vocabulary than the reference's, a prompt
            that leaves no room for an answer, or a scorer that fails.
    """
    if reference is not None:
        check_reference(name, tokenizer, reference)
    set_seed(settings.seed)
    samples = sample_completions(
        model,
        tokenizer,
        list(prompts),
        num_samples=settings.num_samples,
        max_new_tokens=settings.max_completion_length,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
        progress=f"{name}: answers" if progress else None,
        eos_token_ids=end_token_ids(model, tokenizer),
    )
    repeated = {
        key: [v for v in values for _ in range(settings.num_samples)] for key, values in (columns or {}).items()
    }
    found = PolicyEvaluation(name, samples, settings.num_samples)
    for scorer in scorers:
        members = scorer.score_members(samples, tokenizer, repeated, settings.batch_size)
        measured = {"score": ensemble_mean(members).tolist()}
        found.scores[scorer.name] = measured["score"]
        if members.shape[1] > 1:
            found.spreads[scorer.name] = measured["spread"] = ensemble_spread(members).tolist()
        for kind, values in measured.items():
            found.metrics[f"{kind}/{scorer.name}"] = sum(values) / len(values)
            found.metrics[f"{kind}/{scorer.name}_se"] = grouped_standard_error(values, settings.num_samples)
    if reference is not None:
        found.metrics |= reference_metrics(model, reference, samples, tokenizer, settings)
    found.metrics |= text_metrics(samples, settings)
    return found


def check_reference(name: str, tokenizer: PreTrainedTokenizerBase, reference: Reference) -> None:
    """Raises `ValueError` where the policy `name` has another vocabulary than the reference."""
    if reference.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{name!r} and the reference have different vocabularies, so no KL is defined between them. Give a "
            "`reference_model_path` with the policy's tokenizer, or none."
        )


def reference_metrics(
    model: nn.Module, reference: Reference, samples: Samples, tokenizer: PreTrainedTokenizerBase, s: PolicySettings
) -> dict[str, float]:
    """
    `kl`: mean over answers of log pi(y|x) - log ref(y|x), nats per sequence, at the temperature of sampling (k1:
    without bias, not below 0 but for noise), with its standard error over prompts; not for greedy answers, which are
    no samples. `perplexity`: exp(-sum log ref / tokens) at temperature 1.
    """
    kwargs = {"pad_token_id": tokenizer.pad_token_id, "batch_size": s.batch_size}
    of_reference = completion_logps(reference.model, samples, **kwargs).double()
    tokens = sum(len(ids) for ids in samples.completion_ids)
    found = {"perplexity": perplexity(of_reference, num_tokens=tokens)[0].item()}
    if s.temperature > 0:
        kwargs["temperature"] = s.temperature
        if s.temperature != 1.0:
            of_reference = completion_logps(reference.model, samples, **kwargs).double()
        log_ratio = completion_logps(model, samples, **kwargs).double() - of_reference
        found |= {"kl": log_ratio.mean().item(), "kl_se": grouped_standard_error(log_ratio.tolist(), s.num_samples)}
    return found


def text_metrics(samples: Samples, s: PolicySettings) -> dict[str, float]:
    """Length, end of sequence, insults and diversity of answers."""
    k = s.num_samples
    found = Length().compute(
        predictions=[len(ids) for ids in samples.completion_ids], finished=[not cut for cut in samples.truncated]
    )
    insults = InsultRate().compute(predictions=samples.texts, words=list(s.insult_words or DEFAULT_WORDS))
    found["insult_rate"] = insults["insult_rate"]
    by_prompt = [samples.texts[start : start + k] for start in range(0, len(samples.texts), k)]
    if len(samples.texts) < 2:
        return found
    return found | Diversity().compute(predictions=by_prompt, encoder=s.encoder, nli=s.nli)


def wins_by_score(policy: PolicyEvaluation, baseline: PolicyEvaluation) -> dict[str, dict]:
    """Per scorer [`~rlhf_ext.functional.pairs.win_rate`]: i-th answers are compared, and a prompt's mean counts."""
    found = {}
    for name in policy.scores:
        ours, theirs = (torch.tensor(e.scores[name], dtype=torch.float64) for e in (policy, baseline))
        found[name] = win_rate(paired_wins(ours, theirs).view(-1, policy.num_samples).mean(dim=1))
    return found


def build_judge(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    question: str,
    template: str | None = None,
    labels: Sequence[str] | None = None,
    batch_size: int = 16,
) -> AIJudge:
    """
    A causal language model as a judge of one question, which stands in the place of a constitution's.

    Args:
        template, labels:
            As in [`~rlhf_ext.feedback.judge.AIJudge`].

    Raises:
        ValueError: the tokenizer cannot tell the labels apart, or the template cannot be filled.
    """
    if template is not None:
        check_template(template)
    principle = Principle(name="better", critique="", revision="", question=question)
    how = {"template": template, "labels": None if labels is None else tuple(labels), "batch_size": batch_size}
    return AIJudge(model, tokenizer, [principle], **how)


def check_template(template: str) -> None:
    """Raises `ValueError` for a format string of a judge that does not hold the prompt and both answers."""
    parts = {"prompt": "\0prompt", "question": "\0question", "first": "\0first", "second": "\0second"}
    try:
        text = template.format(**parts, few_shots="")
    except (AttributeError, LookupError, ValueError) as error:
        raise ValueError(
            f"`judge_template` cannot be filled in ({type(error).__name__}: {error}). Its fields are "
            "{prompt}, {question}, {first} and {second}; any other brace is written twice."
        ) from error
    missing = [name for name in ("prompt", "first", "second") if parts[name] not in text]
    if missing:
        raise ValueError(f"`judge_template` has no {missing}: the judge would not read them. Write {{name}} for each.")


def wins_by_judge(
    judge: AIJudge, policy: PolicyEvaluation, baseline: PolicyEvaluation, progress: str | None = None
) -> dict[str, float]:
    """
    A judge asked about the first answer of both, in both orders, through log-probabilities of (A) and (B). The credit
    is its probability, both orders averaged.

    Returns:
        `dict[str, float]`: [`~rlhf_ext.functional.pairs.win_rate`] of both orders, and `decided`: the win rate that
        counts each prompt by its averaged winner alone, however sure the judge was.

    Raises:
        ValueError: a question is longer than the judge's context.
    """
    firsts = range(0, len(policy.samples.texts), policy.num_samples)
    verdicts = judge.compare(
        [text_of(policy.samples.prompts[place]) for place in firsts],
        [policy.samples.texts[place] for place in firsts],
        [baseline.samples.texts[place] for place in firsts],
        progress=progress,
    )
    wins, swapped = verdicts.first_as_a.mean(dim=1), 1 - verdicts.second_as_a.mean(dim=1)
    decided = win_rate((1 + torch.sign((wins + swapped) / 2 - 0.5)) / 2)["win_rate"]
    return win_rate(wins, swapped=swapped) | {"decided": decided}


def check_sampling(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, max_length: int, context: int | None, name: str = ""
) -> None:
    """
    Refuse prompts and tokenizers that sampling would stumble over, and give a tokenizer without padding one.

    Args:
        context (`int`, *optional*): the policy's, in tokens.
        name (`str`, *optional*): the policy's, for messages.
    """
    check_tokenizer(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_prompts(
        dataset,
        f"The prompt data set (read by {name!r})" if name else "The prompt data set",
        tokenizer,
        max_completion_length=max_length,
        max_positions=context,
    )
