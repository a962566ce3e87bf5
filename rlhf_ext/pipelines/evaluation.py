"""A reward model, or an ensemble, on preference rows: accuracy beside always taking the longer answer, calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data.candidates import tokenize_candidates
from ..data.evaluation_rows import H_NAMES, Pair, evaluation_rows, h_of, pairs_of_row, sources_of
from ..data.loading import prompt_key
from ..data.preferences import PreferenceReport
from ..data.prompts import check_tokenizer
from ..functional.clusters import grouped_interval
from ..functional.doubt import ensemble_preference, pair_doubt
from ..functional.pairs import calibration, length_statistics, pair_credits
from ..functional.scores import ensemble_mean
from ..models.build import shortest_context
from ..models.ensembles import RewardEnsemble, is_reward_ensemble, load_reward_ensemble
from ..models.hub import is_inside_repo, local_folder
from ..models.scoring import ModelReward, load_reward_model


# Rows between two updates of the progress bar, each a call of the reward model.
CHUNK = 8


def evaluate_reward_model(
    reward: ModelReward | RewardEnsemble,
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
        reward ([`ModelReward`] or [`~rlhf_ext.models.ensembles.RewardEnsemble`]):
            The model with its own tokenizer. Of an ensemble the mean of its members is the score, each member in the
            unit that was saved with it; calibration is that of the mean of the preferences they predict.
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
        sources that are in no column of the 3H table. Of an ensemble also `ensemble`: `members`, a line and `ece` of
        each, `normalized_over`, and what [`~rlhf_ext.functional.doubt.pair_doubt`] gives.

    Raises:
        ValueError: for a wrong row, a source column that is missing, or if no row is left.
    """
    members = reward.members if isinstance(reward, RewardEnsemble) else [reward]
    prepared = prepare_rows(
        dataset,
        members[0].processing_class,
        shortest_context(*(member.model for member in members)),
        source_column=source_column,
        as_messages=as_messages,
        max_length=max_length,
    )
    rows, report, sources = prepared.rows, prepared.report, prepared.sources
    names = [progress and f"{progress}: {member.__name__}" for member in members] if len(members) > 1 else [progress]
    each = [score_rows(member, rows, name) for member, name in zip(members, names, strict=True)]
    scores = [ensemble_mean(torch.tensor(row, dtype=torch.float64).T).tolist() for row in zip(*each, strict=True)]
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

    def measured(wanted: Sequence[Pair], scores: Sequence[Sequence[float]] = scores) -> dict[str, Any]:
        return measure_pairs(wanted, scores, lengths, prompts)

    result: dict[str, Any] = {
        "model": reward.__name__,
        "rows": {
            "given": report.num_rows,
            "incomparable": report.num_incomparable,
            "overlong": prepared.num_overlong,
            "judged": len(rows),
            "prompt_mismatches": sum(rows["prompt_mismatch"]),
        },
        "overall": measured(pairs),
        "sources": {},
        "three_h": {},
        "unmapped": [],
    }
    targets = torch.tensor([p.target for p in pairs], dtype=torch.float64)
    first, second = (
        torch.tensor([[one[p.row][getattr(p, side)] for one in each] for p in pairs], dtype=torch.float64)
        for side in ("first", "second")
    )
    # In the unit of training, where a difference of scores is a log-odds; a gain saved afterwards is another one.
    factors, noises = zip(*(member.log_odds for member in members), strict=True)

    def calibrated(which: slice) -> dict[str, Any]:
        gaps = (first - second)[:, which]
        chances = ensemble_preference(gaps, factors=factors[which], noises=noises[which])
        return calibration(chances, targets, num_bins=num_bins)

    result["calibration"] = calibrated(slice(None))
    if isinstance(reward, RewardEnsemble):
        lines = {
            member.__name__: measured(pairs, each[k]) | {"ece": calibrated(slice(k, k + 1))["ece"]}
            for k, member in enumerate(members)
        }
        doubt = pair_doubt(first, second, targets)
        result["ensemble"] = {"members": lines, "normalized_over": reward.normalized_over, **doubt}
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


@dataclass
class PreparedRows:
    """Rows that a model can read, tokenised, with their sources, and what was left out."""

    rows: Dataset
    report: PreferenceReport
    sources: list[str] | None
    num_overlong: int


def prepare_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    *,
    source_column: str | None = None,
    as_messages: bool = False,
    max_length: int | None = None,
) -> PreparedRows:
    """
    Everything that can go wrong with the rows, before anything is scored.

    Args:
        context (`int`, *optional*): tokens that the model reads.
        dataset, source_column, as_messages, max_length: as for [`evaluate_reward_model`].

    Raises:
        ValueError: as [`evaluate_reward_model`].
    """
    check_tokenizer(tokenizer)
    rows, report = evaluation_rows(dataset, as_messages=as_messages)
    sources = sources_of(rows, source_column)
    rows = rows.map(tokenize_candidates, fn_kwargs={"processing_class": tokenizer}, desc="Tokens")
    limit = min(limit for limit in (max_length, context, 10**9) if limit is not None)
    kept = [place for place, longest in enumerate(rows["longest"]) if longest <= limit]
    if not kept:
        raise ValueError(f"All {len(rows)} rows are longer than {limit} tokens. Raise `max_length`, or shorten them.")
    sources = None if sources is None else [sources[place] for place in kept]
    return PreparedRows(rows.select(kept), report, sources, len(rows) - len(kept))


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
            f"{path!r} is an ensemble, where a single reward model is read. Name one of its members, such as "
            f"{path}/member_0."
        )
    folder = local_folder(path) if is_inside_repo(path) else path
    model = load_reward_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path, trust_remote_code=trust_remote_code)
    return model.requires_grad_(False).eval(), tokenizer


def load_reward_or_ensemble(
    path: str,
    name: str,
    *,
    batch_size: int,
    device: str | torch.device,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> ModelReward | RewardEnsemble:
    """A reward model, or the folder of an ensemble, under a name of the reports. Reads its own tokenizer's ids."""
    options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if is_reward_ensemble(path):
        ensemble = load_reward_ensemble(path, batch_size=batch_size, **options)
        ensemble.__name__ = name
        return ensemble
    model, tokenizer = load_reward(path, **options)
    return ModelReward(model, tokenizer, tokenizer, name=name, batch_size=batch_size)
