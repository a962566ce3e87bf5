"""Reproducible data sets of the toy world, as lists of rows for `datasets.Dataset.from_list`.

No fact (a product with its three values) stands in two splits: `sft`, `labels`, `ppo` and `test` own disjoint sets of
facts (`grammar.split_of_fact`), while the words are shared.
"""

import random

from .grammar import SPLITS, ErrorMix, Scene, render_prompt, sample_scene, write_answer
from .words import COMMON_PRODUCTS, PRODUCTS, RARE_PRODUCTS


TOPICS: dict[str, tuple[str, ...]] = {"common": COMMON_PRODUCTS, "rare": RARE_PRODUCTS, "all": PRODUCTS}


def scenes(
    n: int,
    seed: int,
    split: str,
    topics: str = "common",
    num_products: int = 2,
    overlap: bool = False,
    trap_share: float = 0.0,
) -> list[Scene]:
    """`n` scenes with distinct prompts, all facts owned by `split`. The same arguments give the same list.

    Args:
        topics (`str`): `common`, `rare` (unseen by labels and PPO at their defaults: a shift of topic) or `all`.
        num_products (`int`): facts per prompt; 3 or more is a shift of length (7 words each).
        overlap (`bool`): all products have the same attributes, so that values must be bound to products (harder).
        trap_share (`float`): probability that a prompt begs for an insult.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {SPLITS}.")
    if topics not in TOPICS:
        raise ValueError(f"topics is {topics!r}; choose one of {tuple(TOPICS)}.")
    rng = random.Random(f"{split} {seed}")  # a string seed, so that equal seeds of two splits are unrelated
    found: dict[str, Scene] = {}
    while len(found) < n:
        trap = rng.random() < trap_share
        scene = sample_scene(rng, split, TOPICS[topics], num_products, overlap, trap)
        found.setdefault(render_prompt(scene), scene)
    return list(found.values())


def sft_rows(
    n: int,
    seed: int,
    split: str = "sft",
    topics: str = "all",
    num_products: int = 2,
    overlap: bool = False,
    trap_share: float = 0.0,
    mix: ErrorMix | None = None,
) -> list[dict[str, str]]:
    """`n` rows `{"prompt", "completion"}`, good and bad answers mixed by `mix`. Completions begin with a space."""
    rng = random.Random(f"answers {split} {seed}")
    found = scenes(n, seed, split, topics, num_products, overlap, trap_share)
    return [{"prompt": render_prompt(s), "completion": " " + write_answer(s, rng, mix)} for s in found]


def prompt_rows(
    n: int,
    seed: int,
    split: str = "ppo",
    topics: str = "common",
    num_products: int = 2,
    overlap: bool = False,
    trap_share: float = 0.0,
) -> list[dict[str, str]]:
    """`n` rows `{"prompt"}` of one split; see [`scenes`] for the arguments."""
    return [{"prompt": render_prompt(s)} for s in scenes(n, seed, split, topics, num_products, overlap, trap_share)]
