"""Tokenised candidates: the ids that TRL's reward trainer would read, for any number of completions."""

import json
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .loading import common_prefix_length, implicit_prompt
from .preferences import IMPLICIT, TARGET_TOLERANCE, PreferenceReport, is_truncated


CANDIDATE_COLUMNS = ("candidate_ids", "completion_starts", "target", "ranking", "row", "margin")


def tokenize_candidates(row: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> dict[str, Any]:
    """
    Tokenise the completions of a general row, each after its prompt, as [`~trl.RewardTrainer`] does with a pair.

    Text: the end-of-sequence token is appended where it does not stand, and prompt + completion are tokenised as one.
    Messages: the chat template of prompt + completion, up to the token that ends the turn. `tools` and
    `chat_template_kwargs` are passed on. A completion that is `truncated` stays open in either form, as a rollout that
    was cut by length is scored.

    Returns:
        `dict[str, Any]`: `candidate_ids`, and what [`locate_completions`] adds.
    """
    candidate_ids = []
    for position, completion in enumerate(row["completions"]):
        cut = is_truncated(row, position)
        if isinstance(completion, str):
            eos = processing_class.eos_token
            text = row.get("prompt", "") + (completion if cut or completion.endswith(eos) else completion + eos)
            ids = processing_class(text=text)["input_ids"]
            candidate_ids.append(without_added_eos(ids, text, processing_class) if cut else ids)
        else:
            messages = [*row.get("prompt", []), *completion]
            # The keyword is given where it is needed: not every template can leave a turn open.
            options = {"continue_final_message": True} if cut else {}
            candidate_ids.append(_template_ids(processing_class, messages, row, **options))
    return locate_completions({**row, "candidate_ids": candidate_ids}, processing_class)


def check_candidate_ids(row: dict[str, Any], index: int) -> dict[str, Any]:
    """
    Check a row that holds token ids already; gives it `longest`, and `row` and `ranking` where they are missing.

    Raises:
        ValueError: no two candidates, a start outside its ids, or a label that does not fit, naming the row.
    """
    ids, starts = row["candidate_ids"], row.get("completion_starts")
    if len(ids) < 2 or starts is None or len(starts) != len(ids):
        raise ValueError(
            f"Row {index} has {len(ids)} `candidate_ids` and `completion_starts` {starts}. Give two candidates or "
            "more, and for each the place where its completion begins."
        )
    wrong = [place for place, start in enumerate(starts) if not 0 <= start < len(ids[place])]
    if wrong:
        raise ValueError(
            f"Row {index}: `completion_starts` {starts} leave no token of candidates {wrong}, whose lengths are "
            f"{[len(ids[place]) for place in wrong]}. A start is a place from 0 to below the length."
        )
    target, ranking = row.get("target"), row.get("ranking")
    fits = (
        len(target) == len(ids) and abs(sum(target) - 1.0) <= TARGET_TOLERANCE
        if ranking is None and target is not None
        else ranking is not None and sorted(ranking) == list(range(len(ids)))
    )
    if not fits:
        raise ValueError(
            f"Row {index} has `target` {target} and `ranking` {ranking} for {len(ids)} candidates. Give one of them: "
            "numbers that sum to 1, or all places, best first."
        )
    return {"longest": max(map(len, ids)), "row": row.get("row", index), "target": target, "ranking": ranking}


def end_at_closer(ids: list[int], start: int, processing_class: PreTrainedTokenizerBase) -> list[int]:
    """
    Cut blank text that a chat template writes behind the token that ends a turn (ChatML ends it with a line break).

    A rollout stops at that token, so a reward model that learnt to score one later would be read at a position it was
    never trained on.

    Args:
        ids (`list[int]`):
            Prompt and completion, as the template wrote them.
        start (`int`):
            Where the completion begins; a closer in the prompt does not count.
    """
    closers = set(processing_class.all_special_ids)
    last = max((place for place in range(start, len(ids)) if ids[place] in closers), default=None)
    if last is None or processing_class.decode(ids[last + 1 :]).strip():
        return ids
    return ids[: last + 1]


def locate_completions(row: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> dict[str, Any]:
    """
    Find where the completions of tokenised candidates begin.

    A pair without a `prompt` begins with it ([`~rlhf_ext.data.loading.implicit_prompt`]). Of completions alone every
    token counts.

    Returns:
        `dict[str, Any]`: `candidate_ids`; `completion_starts`, how many tokens each candidate shares with its prompt
        alone; `prompt_mismatch`, whether that is fewer than the prompt has; `longest`, the most tokens of a candidate.
    """
    candidate_ids, prompt = row["candidate_ids"], row.get("prompt")
    is_implicit = prompt is None
    if is_implicit and row.get("chosen") is not None and row.get("rejected") is not None:
        prompt = implicit_prompt(row["chosen"], row["rejected"])
    elif is_implicit:
        prompt = row.get(IMPLICIT)
    if prompt is None:
        prompt_ids = []
    elif isinstance(prompt, str):
        prompt_ids = processing_class(text=prompt)["input_ids"]
        # A tokenizer that closes every text by EOS closes the prompt too, where no completion begins with it.
        prompt_ids = without_added_eos(prompt_ids, prompt, processing_class)
    else:
        prompt_ids = _template_ids(processing_class, prompt, row, add_generation_prompt=True)
    starts = [common_prefix_length(prompt_ids, ids) for ids in candidate_ids]
    if _has_messages(row):
        candidate_ids = [
            ids if is_truncated(row, position) else end_at_closer(ids, start, processing_class)
            for position, (ids, start) in enumerate(zip(candidate_ids, starts, strict=True))
        ]
    return {
        "candidate_ids": candidate_ids,
        "completion_starts": starts,
        # Nothing continues the tokens of a prompt that was never apart.
        "prompt_mismatch": not is_implicit and min(starts) < len(prompt_ids),
        "longest": max(len(ids) for ids in candidate_ids),
    }


def pair_to_candidates(
    row: dict[str, Any], index: int, processing_class: PreTrainedTokenizerBase, rows: list[int] | None
) -> dict[str, Any]:
    """A pair that TRL tokenised (`chosen_ids`, `rejected_ids`) as a row of candidates; `rows` maps to given rows."""
    place = index if rows is None else rows[index]
    for name in ("chosen_ids", "rejected_ids"):
        if not row[name]:
            raise ValueError(
                f"Row {place} of the preference dataset: `{name}` is {row[name]}, expected token ids. Drop the row."
            )
    located = locate_completions({**row, "candidate_ids": [row["chosen_ids"], row["rejected_ids"]]}, processing_class)
    return {**located, "target": [1.0, 0.0], "ranking": None, "row": place}


def drop_overlong(
    dataset: Dataset | IterableDataset,
    report: PreferenceReport,
    *,
    max_length: int | None,
    context_length: int | None,
    overlong: str,
    max_share: float = 0.01,
) -> Dataset | IterableDataset:
    """
    Drop rows with a candidate longer than `max_length`, count them, and refuse what the model cannot read.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `longest` and `row`.
        report ([`PreferenceReport`]):
            Gets `num_overlong`.
        max_length (`int` or `None`):
            Most tokens of prompt and completion; `None` for no limit of ours.
        context_length (`int` or `None`):
            Most tokens that the model has positions for.
        overlong (`str`):
            `"raise"` refuses a dataset with more than `max_share` overlong rows, a streamed one at its first;
            `"drop"` never does.
        max_share (`float`, *optional*, defaults to `0.01`):
            Share of rows that may be dropped without asking.

    Raises:
        ValueError: naming rows, lengths and the remedy.
    """
    if isinstance(dataset, IterableDataset):
        limits = {"max_length": max_length, "context_length": context_length, "overlong": overlong}
        return dataset.filter(_fits, fn_kwargs=limits)
    lengths, rows = list(dataset["longest"]), list(dataset["row"])
    if max_length is not None:
        kept = [position for position, length in enumerate(lengths) if length <= max_length]
        report.num_overlong = len(lengths) - len(kept)
        if not kept:
            raise ValueError(f"All rows are longer than `max_length={max_length}`. Raise `max_length`.")
        if overlong == "raise" and report.num_overlong > max_share * len(lengths):
            long = [rows[position] for position, length in enumerate(lengths) if length > max_length]
            raise ValueError(
                f"{len(long)} of {len(lengths)} rows ({len(long) / len(lengths):.1%}) are longer than `max_length="
                f"{max_length}` tokens, among them rows {long[:8]}. Raise `max_length`, or set `overlong='drop'` to "
                "train without them."
            )
        if report.num_overlong:
            dataset = dataset.select(kept)
            lengths, rows = [lengths[position] for position in kept], [rows[position] for position in kept]
    beyond = {row: length for row, length in zip(rows, lengths, strict=True) if length > (context_length or length)}
    if beyond:
        raise _beyond_context(beyond, context_length)
    return dataset


def _fits(row: dict[str, Any], max_length: int | None, context_length: int | None, overlong: str) -> bool:
    length = row["longest"]
    if max_length is not None and length > max_length:
        if overlong == "raise":
            raise ValueError(
                f"Row {row['row']} has {length} tokens, more than `max_length={max_length}`, and the share of such "
                "rows is not known for a streamed dataset. Raise `max_length`, or set `overlong='drop'`."
            )
        return False
    if context_length is not None and length > context_length:
        raise _beyond_context({row["row"]: length}, context_length)
    return True


def _beyond_context(lengths: dict[int, int], context_length: int | None) -> ValueError:
    shown = dict(list(lengths.items())[:8])
    return ValueError(
        f"{len(lengths)} rows are longer than the model's context of {context_length} tokens "
        f"(`max_position_embeddings`): tokens by row {shown}. Shorten prompt or completion, or set `max_length` to "
        f"{context_length} or less and `overlong='drop'`."
    )


def without_added_eos(ids: list[int], text: str, processing_class: PreTrainedTokenizerBase) -> list[int]:
    """`ids` without an end of sequence that the tokenizer adds to every text."""
    eos = processing_class.eos_token
    added = eos is not None and ids[-1:] == [processing_class.eos_token_id] and not text.endswith(eos)
    return ids[:-1] if added else ids


def _template_ids(processing_class: PreTrainedTokenizerBase, messages: list, row: dict, **kwargs: Any) -> list[int]:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    options = {"tools": tools, **(row.get("chat_template_kwargs") or {}), **kwargs}
    return processing_class.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def _has_messages(row: dict[str, Any]) -> bool:
    texts = (row.get("prompt"), row.get("chosen"), *(row.get("completions") or []))
    return any(isinstance(text, list) for text in texts)
