"""Preference rows as pairs to be judged: where each comes from, and which of helpful, honest, harmless it measures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from .loading import require_columns
from .preferences import PreferenceReport, normalize_preferences


logger = logging.get_logger(__name__)

SOURCE_COLUMNS = ("source", "subset", "category")
"""Columns that say where a row comes from, the first that is there; `subset` is RewardBench's."""

# Part of a source's name, in any case, and what it measures; the first that fits counts.
THREE_H = (
    ("llmbar", "trap"),
    ("helpful", "helpful"),
    ("honest", "honest"),
    ("harmless", "harmless"),
    ("qa_feedback", "honest"),
    ("finegrainedrlhf", "honest"),
    ("pandalm", "helpful"),
    ("oasst", "helpful"),
    ("open-assistant", "helpful"),
)
H_NAMES = ("helpful", "honest", "harmless", "trap")


@dataclass
class Pair:
    """
    Two completions of a row.

    Attributes:
        row (`int`): place of the row among the rows that were kept.
        first, second (`int`): which of its completions.
        target (`float`): P(first is better): 1, 0, 0.5 for a tie, or a vote.
    """

    row: int
    first: int
    second: int
    target: float


def evaluation_rows(dataset: Dataset, *, as_messages: bool = False) -> tuple[Dataset, PreferenceReport]:
    """
    Check preference rows and bring them into the general form.

    Args:
        dataset (`Dataset`):
            Rows of ours (pairs, or `completions` with a label), or RewardBench's `prompt`, `chosen`, `rejected`.
        as_messages (`bool`, *optional*, defaults to `False`):
            Make a user's turn of a text prompt and an assistant's turn of each completion, as chat models read them.

    Returns:
        `tuple[Dataset, PreferenceReport]`: as [`~rlhf_ext.data.preferences.normalize_preferences`].

    Raises:
        ValueError: for a wrong row, or `as_messages` with rows that have no text prompt.
    """
    rows, report = normalize_preferences(dataset)
    if not as_messages:
        return rows, report
    require_columns(rows, ["prompt"], what="the preference rows, which `as_messages` makes into turns")
    if not isinstance(rows[0]["prompt"], str):
        raise ValueError("`as_messages` is set, but the prompts are messages already. Leave it out.")
    return rows.map(_turns, desc="Turns"), report


def _turns(row: dict[str, Any]) -> dict[str, Any]:
    completions = [[{"role": "assistant", "content": text}] for text in row["completions"]]
    return {"prompt": [{"role": "user", "content": row["prompt"]}], "completions": completions}


def pairs_of_row(place: int, size: int, target: Sequence[float] | None, ranking: Sequence[int] | None) -> list[Pair]:
    """
    The pairs that a label decides, or calls a tie.

    A ranking gives all pairs. A target over K > 2 gives those of which one has a share, P(first) being its part of
    both shares: best of K is the best against each other one.
    """
    order = None if ranking is None else {candidate: rank for rank, candidate in enumerate(ranking)}
    pairs = []
    for i in range(size):
        for j in range(i + 1, size):
            if order is not None:
                pairs.append(Pair(place, i, j, float(order[i] < order[j])))
            elif target[i] + target[j] > 0:
                pairs.append(Pair(place, i, j, target[i] / (target[i] + target[j])))
    return pairs


def sources_of(dataset: Dataset, column: str | None = None) -> list[str] | None:
    """
    Where each row comes from; `None` if no column says.

    Args:
        column (`str`, *optional*):
            Its name; by default the first of [`SOURCE_COLUMNS`] that is there.

    Raises:
        ValueError: the named column is missing or has empty entries.
    """
    if column is not None:
        require_columns(dataset, [column], what="the preference rows, of which `source_column` names it")
    name = column or next((name for name in SOURCE_COLUMNS if name in dataset.column_names), None)
    return None if name is None else ["unnamed" if value is None else str(value) for value in dataset[name]]


def unique_prompts(dataset: Dataset) -> Dataset:
    """
    Each prompt once: the same prompt again is no other one, and an interval over prompts must not count it as such.

    Raises:
        ValueError: there is no column `prompt`.
    """
    require_columns(dataset, ["prompt"], what="the prompts of the evaluation")
    first: dict[str, int] = {}
    for place, prompt in enumerate(dataset["prompt"]):
        first.setdefault(json.dumps(prompt, sort_keys=True), place)
    if len(first) < len(dataset):
        logger.warning(f"{len(dataset) - len(first)} of {len(dataset)} prompts stand there again and are left out.")
    return dataset.select(sorted(first.values()))


def parse_source_map(entries: Sequence[str] | None) -> dict[str, str]:
    """
    `["my_source=honest", ...]` as a dictionary.

    Raises:
        ValueError: an entry is not `part_of_a_name=H` with H one of [`H_NAMES`].
    """
    found = {}
    for entry in entries or []:
        name, separator, value = entry.rpartition("=")
        if not separator or not name or value not in H_NAMES:
            raise ValueError(f"`source_map` has {entry!r}; write part of a source's name, =, and one of {H_NAMES}.")
        found[name] = value
    return found


def h_of(source: str, source_map: Mapping[str, str] | None = None) -> str | None:
    """Which of [`H_NAMES`] a source measures, by a part of its name; `source_map` goes first. `None` if none fits."""
    known = [*(source_map or {}).items(), *THREE_H]
    return next((h for part, h in known if part.lower() in source.lower()), None)
