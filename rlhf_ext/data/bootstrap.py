"""Resampled preference rows for the members of an ensemble."""

import random

from datasets import Dataset

from .loading import prompt_group


def bootstrap_by_prompt(dataset: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """
    Draw as many prompts as there are, with replacement, and hold out the rest (Christiano et al. 2017, Sec. 2.2.3).

    The prompt is resampled and not the row: the rows of one prompt stay together, as often as it was drawn. Otherwise
    a member would be validated on prompts that it was trained on. About 1/e (37%) of the prompts are never drawn.

    Args:
        dataset (`Dataset`):
            Preference rows. A row from which no prompt can be read (`completions` without `prompt`, or token ids) is
            a prompt of its own.
        seed (`int`):
            Decides the draw, together with the number of prompts.

    Returns:
        `tuple[Dataset, Dataset]`: the rows drawn, some of them repeatedly, and the rows held out, in their old order.

    Raises:
        ValueError: if every prompt was drawn, so that nothing is held out; happens with a handful of prompts only.
    """
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(dataset):
        groups.setdefault(prompt_group(row, index), []).append(index)
    rows = list(groups.values())
    chance = random.Random(f"bootstrap {seed}")
    drawn = [chance.randrange(len(rows)) for _ in rows]
    left = sorted(index for place in set(range(len(rows))) - set(drawn) for index in rows[place])
    if not left:
        raise ValueError(
            f"All {len(rows)} different prompts of the preference dataset were drawn for one member (seed {seed}), so "
            "none is held out to validate it. Give more prompts, or another seed."
        )
    return dataset.select([index for place in drawn for index in rows[place]]), dataset.select(left)
