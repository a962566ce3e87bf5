"""A reward model on labelled answers: accuracy by source and by H, length, calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.candidates import tokenize_candidates
from ..data.preferences import normalize_preferences
from ..functional.pairs import calibration, length_statistics, preference_accuracy
from ..models.reward_functions import ModelReward


THREE_H: dict[str, tuple[str, ...]] = {
    "helpful": ("helpful", "pandalm", "oasst", "open-assistant", "alpacaeval", "mt-bench"),
    "honest": ("honest", "qa_feedback", "truthful"),
    "harmless": ("harmless", "red-team", "refusals", "xstest", "donotanswer"),
    "traps": ("llmbar",),
}
"""Parts of a source's name, in lower case, that say what it measures; `traps` fool length and style."""

SOURCE_COLUMNS = ("source", "subset", "category")


def three_h_of(source: str, mapping: Mapping[str, Sequence[str]] = THREE_H) -> str | None:
    """Which of helpful, honest, harmless or traps a source counts for; the first that fits, `None` for no other."""
    # Traps first: llmbar has parts that are called after what they are built from.
    order = sorted(mapping, key=lambda name: name != "traps")
    return next((name for name in order if any(part in source.lower() for part in mapping[name])), None)


def with_own_parts(three_h: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """[`THREE_H`] with `name=part` entries of a user in front.

    Raises:
        ValueError: an entry has another form or names something else.
    """
    mapping = dict(THREE_H)
    for entry in three_h or []:
        name, _, part = entry.partition("=")
        if name not in mapping or not part:
            raise ValueError(f"`three_h` has {entry!r}; write `name=part` with a name of {list(mapping)}.")
        for other in mapping:
            mapping[other] = tuple(known for known in mapping[other] if known != part.lower())
        mapping[name] = (part.lower(), *mapping[name])
    return mapping


def labelled_pairs(row: dict[str, Any]) -> list[tuple[int, int, float]]:
    """The pairs that a row's label speaks of: places of both candidates, and P(the first is better).

    Two candidates are one pair. Of more, a marked best is paired with each other, a ranking gives all its pairs, and
    a target with several positive entries gives all pairs it says something about, p_i / (p_i + p_j).
    """
    ranking, target = row["ranking"], row["target"]
    if ranking is not None:
        return [(a, b, 1.0) for place, a in enumerate(ranking) for b in ranking[place + 1 :]]
    places = range(len(target))
    return [
        (i, j, target[i] / (target[i] + target[j])) for i in places for j in places if i < j and target[i] + target[j]
    ]


def evaluate_reward_model(
    reward: ModelReward,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    source_column: str | None = None,
    three_h: Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Score labelled rows and say how far the scores agree with the labels.

    Args:
        reward (`Callable`):
            [`ModelReward`], or the mean of an ensemble: called with ids of prompts and completions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The reward model's, which makes the rows' ids as training does.
        dataset (`Dataset`):
            Pairs, or rows with `completions` and a label; RewardBench's columns are pairs with a `subset`.
        source_column (`str`, *optional*):
            Column of the source.
        three_h (`Sequence[str]`, *optional*):
            Entries `name=part`, see [`with_own_parts`].

    Returns:
        `dict`: `all`, `sources`, `three_h` (each accuracy with interval, and `longer`, that of the longer answer),
        `length`, `calibration`, `rows` (what became of them), `pairs`.

    Raises:
        ValueError: the column is not there, or rows are faulty, by their place.
    """
    mapping = with_own_parts(three_h)
    column = source_column or next((name for name in SOURCE_COLUMNS if name in dataset.column_names), None)
    if column is not None and column not in dataset.column_names:
        raise ValueError(f"`source_column` is {column!r}, but the rows have {sorted(dataset.column_names)}.")
    names = dataset[column] if column is not None else ["all rows"] * len(dataset)
    rows, report = normalize_preferences(dataset)
    rows = rows.map(tokenize_candidates, fn_kwargs={"processing_class": tokenizer})
    scores, lengths, targets, sources = [], [], [], []
    for row in tqdm(rows, desc="scoring", disable=not progress):
        ids, starts = row["candidate_ids"], row["completion_starts"]
        prompts, answers = zip(*((i[:s], i[s:]) for i, s in zip(ids, starts, strict=True)), strict=True)
        empty = [""] * len(ids)
        found = reward(prompts=empty, completions=empty, completion_ids=list(answers), prompt_ids=list(prompts))
        for i, j, target in labelled_pairs(row):
            scores.append([found[i], found[j]])
            lengths.append([len(answers[i]), len(answers[j])])
            targets.append(target)
            sources.append(names[row["row"]])
    score, length = (torch.tensor(values, dtype=torch.float64).view(-1, 2) for values in (scores, lengths))
    target = torch.tensor(targets, dtype=torch.float64)

    def measured(keep: torch.Tensor) -> dict[str, Any]:
        return {
            **preference_accuracy(score[keep], target[keep]),
            "longer": preference_accuracy(length[keep], target[keep])["accuracy"],
        }

    by_source = {name: measured(torch.tensor([source == name for source in sources])) for name in sorted(set(sources))}
    which = [three_h_of(source, mapping) for source in sources]
    by_h = {name: measured(torch.tensor([found == name for found in which])) for name in mapping if name in set(which)}
    return {
        "all": measured(torch.ones(len(target), dtype=torch.bool)),
        "sources": by_source,
        "three_h": by_h,
        "length": length_statistics(score, length, target),
        "calibration": calibration(torch.sigmoid(score[:, 0] - score[:, 1]), target),
        "rows": str(report),
        "pairs": len(target),
    }
