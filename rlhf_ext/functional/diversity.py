"""How much a policy's answers differ, per input and across inputs (Kirk et al. 2024, Sec. 3.2), and how good they are.

Kirk et al. (https://huggingface.co/papers/2310.06452): D is any diversity of a set of texts. Per input: the mean over
prompts of D(samples of the prompt). Across inputs: D(one sample of every prompt).
"""

import math
from collections.abc import Callable, Sequence

import torch

from . import _checks as checks


VOCABULARY_SIZE = 50257
"""V of the released code: the size of GPT-2's vocabulary, though words are counted."""

NLI_VALUES = {"entailment": -1.0, "neutral": 0.0, "contradiction": 1.0}


def words_of(text: str) -> list[str]:
    """Words as the released code counts them: divided at whitespace, full stops and newlines taken out."""
    return text.replace(".", "").replace("\n", "").split()


def distinct_n(texts: Sequence[str], *, n: int) -> float:
    """Different n-grams of words over all n-grams of a set of texts (Li et al. 2016); 0 without any.

    Raises:
        ValueError: If `n` is below 1.
    """
    found = _ngrams(texts, n)
    return len(set(found)) / len(found) if found else 0.0


def expectation_adjusted_distinct(
    texts: Sequence[str],
    *,
    min_n: int = 1,
    max_n: int = 5,
    vocabulary_size: int = VOCABULARY_SIZE,
) -> float:
    r"""EAD (Liu et al. 2022), averaged over n: distinct n-grams over the number that random words would give.

    EAD_n = N / (V (1 - ((V - 1) / V)^C)), N different and C all n-grams of the set. Unlike distinct-n it does not fall
    with the length of the texts alone. It can pass 1 by a hair.

    Args:
        texts (`Sequence[str]`): the set.
        min_n, max_n (`int`): words per n-gram, averaged over.
        vocabulary_size (`int`): V.

    Raises:
        ValueError: If `min_n` is below 1, above `max_n`, or V below 2.
    """
    checks.check_scalar("min_n", min_n, minimum=1, maximum=max_n)
    checks.check_scalar("vocabulary_size", vocabulary_size, minimum=2)
    values = []
    for n in range(min_n, max_n + 1):
        found = _ngrams(texts, n)
        # expm1 and log1p: 1 - ((V - 1) / V)^C loses digits for a small C.
        expected = -vocabulary_size * math.expm1(len(found) * math.log1p(-1 / vocabulary_size))
        values.append(len(set(found)) / expected if found else 0.0)
    return sum(values) / len(values)


def embedding_diversity(embeddings: torch.Tensor) -> float:
    """1 - mean cosine over all pairs of a set of sentence embeddings; 0 where all are alike.

    Args:
        embeddings (`torch.Tensor` of shape `(N, d)`): one per text, of any length but 0.

    Raises:
        ValueError: If there are fewer than two, or one is 0.
    """
    checks.check_tensor("embeddings", embeddings)
    if embeddings.dim() != 2 or embeddings.shape[0] < 2:
        raise ValueError(f"`embeddings` has shape {tuple(embeddings.shape)}, expected (N, d) with N of 2 or more.")
    norms = embeddings.double().norm(dim=1, keepdim=True)
    if bool((norms == 0).any()):
        raise ValueError("`embeddings` has a row of zeros, which has no direction: leave empty texts out.")
    unit = embeddings.double() / norms
    cosines = unit @ unit.T
    above = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    return 1 - cosines[above[0], above[1]].mean().item()


def nli_diversity(judgements: Sequence[tuple[str, float, str, float]]) -> float:
    """Mean over pairs of texts of what a natural-language-inference model says in both directions (Stasaski and Hearst
    2022): a label's probability, times +1 for a contradiction, -1 for an entailment, 0 for neutral.

    From -2 (all alike) to 2; higher is more diverse. The code released by Kirk et al. returns 1 minus this.

    Args:
        judgements (`Sequence[tuple[str, float, str, float]]`): per pair the label and its probability forth, and back.
            Labels in any case.

    Raises:
        ValueError: If there is no pair, a label is unknown or a probability outside [0, 1].
    """
    if not judgements:
        raise ValueError("`judgements` is empty: give at least one pair of texts.")
    total = 0.0
    for place, (forth, p_forth, back, p_back) in enumerate(judgements):
        for label, p in ((forth, p_forth), (back, p_back)):
            if label.lower() not in NLI_VALUES or not 0.0 <= p <= 1.0:
                raise ValueError(
                    f"`judgements` {place} has {label!r} with {p}: give one of {list(NLI_VALUES)} and a probability."
                )
            total += NLI_VALUES[label.lower()] * p
    return total / len(judgements)


def per_input(outputs: Sequence[Sequence[str]], diversity: Callable[[Sequence[str]], float]) -> tuple[float, float]:
    """Mean and population standard deviation over prompts of the diversity of each prompt's samples.

    Args:
        outputs (`Sequence[Sequence[str]]`): samples of each prompt.
        diversity (`Callable`): of a set of texts.

    Raises:
        ValueError: If there is no prompt, or one with fewer than two samples.
    """
    few = [place for place, texts in enumerate(outputs) if len(texts) < 2]
    if not outputs or few:
        raise ValueError(f"`outputs` needs two samples or more of each prompt; prompts {few[:8]} have fewer.")
    values = torch.tensor([diversity(texts) for texts in outputs], dtype=torch.float64)
    return values.mean().item(), values.var(unbiased=False).sqrt().item()


def across_inputs(outputs: Sequence[Sequence[str]], diversity: Callable[[Sequence[str]], float]) -> float:
    """Diversity of the set of first samples of all prompts.

    Raises:
        ValueError: If there are fewer than two prompts, or one without a sample.
    """
    if len(outputs) < 2 or not all(outputs):
        raise ValueError(f"`outputs` has {len(outputs)} prompts; give two or more, each with a sample.")
    return diversity([texts[0] for texts in outputs])


def best_of_n_kl(n: int) -> float:
    """KL of the best of `n` samples from the policy they come from, in nats: ln n - (n - 1) / n.

    An upper bound, exact without ties (Beirami et al. 2024).

    Raises:
        ValueError: If `n` is below 1.
    """
    checks.check_scalar("n", n, minimum=1)
    return math.log(n) - (n - 1) / n


def reward_kl_frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points of (KL, score) no other beats: none has as high a score at as low a KL, and one of them better.

    Args:
        points (`Sequence[tuple[float, float]]`): KL to the reference in nats, and mean score.

    Returns:
        `list[int]`: places in `points`, by rising KL. Of equal points all stay.

    Raises:
        ValueError: If a number is not finite.
    """
    for place, point in enumerate(points):
        if not all(math.isfinite(value) for value in point):
            raise ValueError(f"`points` {place} is {point}: give finite numbers.")
    kept = []
    for place, (kl, score) in enumerate(points):
        if not any(k <= kl and s >= score and (k, s) != (kl, score) for k, s in points):
            kept.append(place)
    return sorted(kept, key=lambda place: points[place])


def _ngrams(texts: Sequence[str], n: int) -> list[tuple[str, ...]]:
    checks.check_scalar("n", n, minimum=1)
    found: list[tuple[str, ...]] = []
    for text in texts:
        words = words_of(text)
        found += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return found
