"""A reward model on preference rows: accuracy by source beside always taking the longer answer, calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data.candidates import tokenize_candidates
from ..data.evaluation_rows import H_NAMES, Pair, evaluation_rows, h_of, pairs_of_row, sources_of
from ..data.loading import prompt_key
from ..functional.clusters import grouped_interval
from ..functional.pairs import calibration, length_statistics, pair_credits, predicted_preference
from ..models.build import shortest_context
from ..models.ensembles import is_reward_ensemble
from ..models.hub import is_inside_repo, local_folder
from ..models.pooling import log_odds_of
from ..models.scoring import ModelReward, load_reward_model


# Rows between two updates of the progress bar, each a call of the reward model.
CHUNK = 8


def evaluate_reward_model(
    reward: ModelReward,
    dataset: Dataset,
    *,
    source_column: str | None = None,
    source_map: Mapping[str, str] | None = None,
    as_messages: bool = False,
    max_length: int | None = None,
    num_bins: int = 10,
    progress: str | None = None,
) -> dict[str, Any]:
    """
    Judge every pair of a preference data set by a reward model.

    Candidates are tokenised as in reward training: closed by the end of sequence, prompt and completion as one text.

    Args:
        reward ([`ModelReward`]):
            The model with its own tokenizer.
        dataset (`Dataset`):
            Pairs, general rows, or RewardBench's columns.
        source_column, source_map, as_messages:
            As in [`~rlhf_ext.data.evaluation_arguments.EvaluationArguments`].
        max_length (`int`, *optional*):
            Leaves out rows with a longer candidate; counted. What the model cannot read is left out and counted too.
        num_bins (`int`, *optional*, defaults to 10):
            Bins of the calibration error.
        progress (`str`, *optional*):
            Title of a progress bar.

    Returns:
        `dict`: `rows`, counts; `overall`, `sources`, `three_h`: lines of [`measure_pairs`]; `calibration`; `unmapped`,
        sources that are in no column of the 3H table.

    Raises:
        ValueError: for a wrong row, or if none is left.
    """
    tokenizer = reward.processing_class
    rows, report = evaluation_rows(dataset, as_messages=as_messages)
    rows = rows.map(tokenize_candidates, fn_kwargs={"processing_class": tokenizer}, desc="Tokens")
    limit = min(limit for limit in (max_length, shortest_context(reward.model), 10**9) if limit is not None)
    kept = [place for place, longest in enumerate(rows["longest"]) if longest <= limit]
    if not kept:
        raise ValueError(f"All {len(rows)} rows are longer than {limit} tokens. Raise `max_length`, or shorten them.")
    num_overlong = len(rows) - len(kept)
    rows = rows.select(kept)
    scores = score_rows(reward, rows, progress)
    lengths = [
        [len(ids) - start for ids, start in zip(row, starts, strict=True)]
        for row, starts in zip(rows["candidate_ids"], rows["completion_starts"], strict=True)
    ]
    pairs = [
        pair
        for place, (row, target, ranking) in enumerate(zip(scores, rows["target"], rows["ranking"], strict=True))
        for pair in pairs_of_row(place, len(row), target, ranking)
    ]
    prompts = [prompt_key({"chosen": row["completions"][0], "rejected": row["completions"][1], **row}) for row in rows]
    sources = sources_of(rows, source_column)

    def measured(wanted: Sequence[Pair]) -> dict[str, Any]:
        return measure_pairs(wanted, scores, lengths, prompts)

    result: dict[str, Any] = {
        "model": reward.__name__,
        "rows": {
            "given": report.num_rows,
            "incomparable": report.num_incomparable,
            "overlong": num_overlong,
            "judged": len(rows),
            "prompt_mismatches": sum(rows["prompt_mismatch"]),
        },
        "overall": measured(pairs),
        "sources": {},
        "three_h": {},
        "unmapped": [],
    }
    gaps = torch.tensor([scores[p.row][p.first] - scores[p.row][p.second] for p in pairs], dtype=torch.float64)
    targets = torch.tensor([p.target for p in pairs], dtype=torch.float64)
    # In the unit of training, where a difference of scores is a log-odds; a gain saved afterwards is another one.
    factor, noise = log_odds_of(reward.model)
    chances = predicted_preference(gaps, factor=factor, noise=noise)
    result["calibration"] = calibration(chances, targets, num_bins=num_bins)
    if sources is not None:
        for name in sorted(set(sources)):
            result["sources"][name] = measured([pair for pair in pairs if sources[pair.row] == name])
        meaning = {name: h_of(name, source_map) for name in sorted(set(sources))}
        for h in H_NAMES:
            wanted = [pair for pair in pairs if meaning[sources[pair.row]] == h]
            if wanted:
                result["three_h"][h] = measured(wanted)
        result["unmapped"] = [name for name, h in meaning.items() if h is None]
    return result


def score_rows(reward: ModelReward, rows: Dataset, progress: str | None = None) -> list[list[float]]:
    """Scores of the candidates of tokenised rows, which are read in order of length so that little is padding."""
    order = sorted(range(len(rows)), key=lambda place: rows[place]["longest"], reverse=True)
    scores: list[list[float]] = [[] for _ in order]
    for start in tqdm(range(0, len(order), CHUNK), desc=progress, disable=progress is None):
        places = order[start : start + CHUNK]
        flat = [
            (place, ids[:begin], ids[begin:])
            for place in places
            for ids, begin in zip(rows[place]["candidate_ids"], rows[place]["completion_starts"], strict=True)
        ]
        empty = [""] * len(flat)
        found = reward(empty, empty, [ids for *_, ids in flat], prompt_ids=[ids for _, ids, _ in flat])
        for (place, *_), score in zip(flat, found, strict=True):
            scores[place].append(score)
    return scores


def measure_pairs(
    pairs: Sequence[Pair], scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]], prompts: Sequence[str]
) -> dict[str, Any]:
    """
    One line of a table.

    Args:
        pairs (`Sequence[Pair]`):
            At least one.
        scores, lengths (`Sequence[Sequence]`):
            Per row, of each candidate.
        prompts (`Sequence[str]`):
            Per row; pairs of one prompt are not independent, and the intervals know.

    Returns:
        `dict`: `pairs`, `ties` (of the label), `prompts`; `accuracy`, `low`, `high`, ties one half; the same with
        `decisive_`, without pairs whose label is a tie (`None` without any other), and with `longer_`, of always
        taking the longer answer on those; what [`~rlhf_ext.functional.pairs.length_statistics`] gives.
    """
    chosen = torch.tensor([[scores[p.row][p.first], scores[p.row][p.second]] for p in pairs], dtype=torch.float64)
    sizes = torch.tensor([[lengths[p.row][p.first], lengths[p.row][p.second]] for p in pairs], dtype=torch.float64)
    targets = torch.tensor([p.target for p in pairs], dtype=torch.float64)
    groups = [prompts[p.row] for p in pairs]
    decisive = (targets != 0.5).tolist()
    # Ties of the label are left out, as beside it; without any decisive pair there is nothing else.
    kept = targets != 0.5 if any(decisive) else torch.ones_like(targets, dtype=torch.bool)
    of_length = length_statistics(chosen[kept], sizes[kept], targets[kept])
    line = {"pairs": len(pairs), "ties": decisive.count(False), "prompts": len(set(groups))}
    line |= _share("", pair_credits(chosen, targets).tolist(), groups, [True] * len(pairs))
    line |= _share("decisive_", pair_credits(chosen, targets).tolist(), groups, decisive)
    line |= _share("longer_", pair_credits(sizes, targets).tolist(), groups, decisive)
    line |= {key: of_length[key] for key in ("length_correlation", "length_slope", "accuracy_length_regressed")}
    return line


def _share(name: str, credits: list[float], groups: list[str], kept: list[bool]) -> dict[str, float | None]:
    credits, groups = (
        [c for c, k in zip(credits, kept, strict=True) if k],
        [g for g, k in zip(groups, kept, strict=True) if k],
    )
    if not credits:
        return {f"{name}accuracy": None, f"{name}low": None, f"{name}high": None}
    low, high = grouped_interval(credits, groups)
    return {f"{name}accuracy": sum(credits) / len(credits), f"{name}low": low, f"{name}high": high}


def load_reward(
    path: str, *, device: str | torch.device, dtype: str | torch.dtype, trust_remote_code: bool = False
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A reward model, full or an adapter, and the tokenizer saved with it, or else that of its base."""
    if is_reward_ensemble(path):
        raise ValueError(
            f"{path!r} is an ensemble. Name its members, {path}/member_0 and so on: each is a reward model of its own."
        )
    folder = local_folder(path) if is_inside_repo(path) else path
    model = load_reward_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path, trust_remote_code=trust_remote_code)
    return model.requires_grad_(False).eval(), tokenizer
