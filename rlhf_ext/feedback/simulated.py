"""A labeller made of a known score, with the faults of real ones: noise, ties, errors, "cannot compare".

A label depends on the seed, the prompt, the completions and `vote` only, never on what was asked before, so that a
resumed or reordered run gives the same labels. Ask again with another `vote` for a second opinion.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from typing import Any


GoldFunction = Callable[..., list[float]]


class SimulatedLabeller:
    """Labels completions by `gold_fn`, which no reward model ever sees.

    One label is made in this order: with `incomparable_rate` no answer; with `error_rate` an answer drawn uniformly
    (Christiano et al. 2017, 2.2.3: so `prediction_noise=error_rate` is the matching model, and a pair is flipped with
    half that probability); if the best scores lie within `tie_band`, a tie; else the choice by score.

    Args:
        gold_fn: `gold_fn(prompts, completions) -> list[float]`, TRL's signature of reward functions.
        temperature (`float`, *optional*): Boltzmann-rational choice, P(k) = softmax(score_k / temperature), in units
            of the score (for a pair: Bradley-Terry); `None` takes the highest score, equal ones at random.
        tie_band (`float`, *optional*, defaults to `0.0`): scores at most this far from the best count as equal to it;
            `None` knows no ties.
        error_rate, incomparable_rate (`float`, *optional*, defaults to `0.0`): probabilities in [0, 1].
        seed (`int`, *optional*, defaults to `0`): seed of every label.
    """

    def __init__(
        self,
        gold_fn: GoldFunction,
        *,
        temperature: float | None = None,
        tie_band: float | None = 0.0,
        error_rate: float = 0.0,
        incomparable_rate: float = 0.0,
        seed: int = 0,
    ):
        for name, rate in (("error_rate", error_rate), ("incomparable_rate", incomparable_rate)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} is {rate}; give a probability in [0, 1].")
        if temperature is not None and temperature <= 0:
            raise ValueError(f"temperature is {temperature}; give a positive number, or None for the highest score.")
        if tie_band is not None and tie_band < 0:
            raise ValueError(f"tie_band is {tie_band}; give a number >= 0, or None to label no ties.")
        self.gold_fn = gold_fn
        self.temperature = temperature
        self.tie_band = tie_band
        self.error_rate = error_rate
        self.incomparable_rate = incomparable_rate
        self.seed = seed

    def best_of(
        self, prompt: str, completions: Sequence[str], vote: int = 0, skip_ties: bool = False
    ) -> dict[str, Any]:
        """Row `{"prompt", "completions", "best", "incomparable"}`; `best` is an index, None if `incomparable`.

        A K-way question has no "equal": among completions tied with the best one is drawn at random, which teaches
        nothing and adds noise. With `skip_ties` the labeller says "cannot compare" instead.
        """
        scores, rng = self._look(prompt, completions, vote, "best")
        row: dict[str, Any] = {"prompt": prompt, "completions": list(completions), "best": None, "incomparable": True}
        if rng.random() < self.incomparable_rate:
            return row
        if rng.random() < self.error_rate:
            return {**row, "incomparable": False, "best": rng.randrange(len(scores))}
        scores = self._flatten_ties(scores)
        if skip_ties and scores.count(max(scores)) > 1:
            return row
        return {**row, "incomparable": False, "best": self._order(scores, rng)[0]}

    def pair(self, prompt: str, completions: Sequence[str], vote: int = 0) -> dict[str, Any]:
        """Row `{"prompt", "completions", "target", "incomparable"}` of two completions.

        `target` is `[1.0, 0.0]`, `[0.0, 1.0]`, `[0.5, 0.5]` for a tie, or None if `incomparable`.
        """
        if len(completions) != 2:
            raise ValueError(f"completions has {len(completions)} items; a pair needs two, use `best_of` for more.")
        scores, rng = self._look(prompt, completions, vote, "pair")
        row: dict[str, Any] = {
            "prompt": prompt,
            "completions": list(completions),
            "target": None,
            "incomparable": True,
        }
        if rng.random() < self.incomparable_rate:
            return row
        if rng.random() < self.error_rate:
            winner = rng.randrange(2)
        elif self.tie_band is not None and abs(scores[0] - scores[1]) <= self.tie_band:
            return {**row, "incomparable": False, "target": [0.5, 0.5]}
        else:
            winner = self._order(scores, rng)[0]
        return {**row, "incomparable": False, "target": [float(winner == 0), float(winner == 1)]}

    def rank(self, prompt: str, completions: Sequence[str], vote: int = 0) -> dict[str, Any]:
        """Row `{"prompt", "completions", "ranking", "incomparable"}`; `ranking` is None if `incomparable`.

        Indices, best first (Plackett-Luce if `temperature` is set); an error is a uniformly random order.
        """
        scores, rng = self._look(prompt, completions, vote, "rank")
        row: dict[str, Any] = {
            "prompt": prompt,
            "completions": list(completions),
            "ranking": None,
            "incomparable": True,
        }
        if rng.random() < self.incomparable_rate:
            return row
        if rng.random() < self.error_rate:
            return {**row, "incomparable": False, "ranking": rng.sample(range(len(scores)), len(scores))}
        return {**row, "incomparable": False, "ranking": self._order(scores, rng)}

    def _look(
        self, prompt: str, completions: Sequence[str], vote: int, kind: str
    ) -> tuple[list[float], random.Random]:
        if len(completions) < 2:
            raise ValueError(f"completions has {len(completions)} items; give at least two to compare.")
        scores = self.gold_fn([prompt] * len(completions), list(completions))
        key = repr((self.seed, kind, vote, prompt, list(completions)))
        return scores, random.Random(hashlib.sha256(key.encode()).digest())

    def _flatten_ties(self, scores: Sequence[float]) -> list[float]:
        top = max(scores)
        return [top if self.tie_band is not None and top - score <= self.tie_band else score for score in scores]

    def _order(self, scores: Sequence[float], rng: random.Random) -> list[int]:
        # Gumbel noise on score / temperature makes the argmax a softmax sample; without a temperature a random key
        # breaks exact ties.
        noise = [-math.log(-math.log(max(rng.random(), 1e-300))) for _ in scores]
        if self.temperature is None:
            keys = list(zip(scores, noise, strict=True))
        else:
            keys = [(score / self.temperature + g, 0.0) for score, g in zip(scores, noise, strict=True)]
        return sorted(range(len(scores)), key=keys.__getitem__, reverse=True)
