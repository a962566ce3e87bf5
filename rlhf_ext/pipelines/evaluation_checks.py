"""What an evaluation needs, checked before its first long step: files, columns, and room for the longest text."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..data.evaluation_arguments import EvaluationArguments
from ..data.evaluation_rows import parse_source_map
from ..data.texts import text_of
from ..feedback.judge import AIJudge
from ..models.build import shortest_context
from ..models.ensembles import ENSEMBLE_FILE, is_reward_ensemble
from ..models.hub import check_model_name, check_safetensors, find_file, is_inside_repo, local_folder
from .evaluation import prepare_rows
from .evaluation_policy import PolicyEvaluation, Reference, check_reference, check_sampling
from .evaluation_scorers import Scorer


def check_output(folder: str) -> None:
    """Make the folder of the results, and raise `ValueError` where nothing can be written to it."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"`output_dir` is {folder!r}, where nothing can be written ({error}). Name another folder, or change its "
            "permissions."
        ) from error


def check_preferences(paths: Mapping[str, str], dataset: Dataset, args: EvaluationArguments) -> None:
    """
    Refuse reward models without files, and rows that none of them, or one of them, could judge.

    Args:
        paths (`Mapping[str, str]`): reward models and ensembles by name.

    Raises:
        ValueError: naming the field.
    """
    done: list[tuple] = []
    for path in paths.values():
        folder, context = check_reward_files(path, args.trust_remote_code)
        tokenizer = reward_tokenizer(folder, args.trust_remote_code)
        kind = (tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.eos_token, context)
        if kind in done:  # checkpoints of one run
            continue
        done.append(kind)
        prepared = prepare_rows(
            dataset,
            tokenizer,
            context,
            source_column=args.source_column,
            as_messages=args.as_messages,
            max_length=args.max_length,
        )
        if parse_source_map(args.source_map) and prepared.sources is None:
            raise ValueError(
                f"`source_map` is {args.source_map}, but no column says where a row comes from; there are "
                f"{dataset.column_names}. Name one by `source_column`, or leave `source_map` out."
            )


def check_policy_files(
    path: str, field: str, trust_remote_code: bool = False, revision: str | None = None
) -> int | None:
    """
    The context in tokens of a full model or an adapter, from its files alone; `None` without a limit.

    Args:
        path (`str`): folder, or id on the Hub, at `revision` there.
        field (`str`): the argument that gave it, for the message.

    Raises:
        ValueError: files are missing, of the base of an adapter too, or its weights are in no safetensors file.
    """
    check_model_name(path, field, revision)
    check_safetensors(path, field, revision)
    adapter = find_file(path, "adapter_config.json", revision)
    if adapter is None:
        return _context(AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code))
    config = json.loads(Path(adapter).read_text(encoding="utf-8"))
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    base_field = f"{field}={path!r}, whose adapter_config.json has base_model_name_or_path"
    check_model_name(base, base_field, revision)
    check_safetensors(base, base_field, revision)
    return _context(AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code))


def check_reward_files(path: str, trust_remote_code: bool = False) -> tuple[str, int | None]:
    """
    The folder (or id) whose tokenizer reads the rows, and the context, of a reward model or of an ensemble.

    Raises:
        ValueError: as [`check_policy_files`]; also for an ensemble of which a member is missing.
    """
    field = "reward_model_path"
    if is_reward_ensemble(path):
        saved = json.loads((Path(path) / ENSEMBLE_FILE).read_text(encoding="utf-8"))["members"]
        folders = [str(Path(path) / member["folder"]) for member in saved]
        contexts = [check_policy_files(folder, field, trust_remote_code) for folder in folders]
        return folders[0], min((limit for limit in contexts if limit is not None), default=None)
    folder = local_folder(path) if is_inside_repo(path) else path
    return folder, check_policy_files(folder, field, trust_remote_code)


def reward_tokenizer(folder: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a reward model, or else that of an adapter's base."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        adapter = find_file(folder, "adapter_config.json")
        if adapter is None:
            raise
        base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
        return AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)


def check_policies(
    paths: Mapping[str, str],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    dataset: Dataset,
    max_completion_length: int,
    trust_remote_code: bool = False,
    revisions: Mapping[str, str | None] | None = None,
) -> None:
    """Refuse policies, the baseline too, without files, or that cannot read every prompt and an answer to it."""
    for name, path in paths.items():
        context = check_policy_files(path, "model path", trust_remote_code, (revisions or {}).get(name))
        check_sampling(tokenizers[name], dataset, max_completion_length, context, name)


def check_readers(
    scorers: Sequence[Scorer],
    reference: Reference | None,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    prompts: Sequence[Any],
    max_completion_length: int,
    taken: Sequence[str] = (),
) -> None:
    """
    Refuse what cannot read prompts with an answer of full length: reward models, and the reference.

    With the policy's own vocabulary the longest row is known. With another one the prompts alone are, and one token.

    Args:
        taken (`Sequence[str]`): names that the reports give to something else.

    Raises:
        ValueError: a context is too short, two scorers have one name, or the reference has another vocabulary.
    """
    names = [*taken, *(scorer.name for scorer in scorers)]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{doubles} would name two columns of the report each. Rename a folder of `reward_model_path` or a "
            "function of `reward_funcs`."
        )
    for policy, tokenizer in tokenizers.items():
        own = _lengths(tokenizer, prompts, f"{policy!r}")
        if reference is not None:
            check_reference(policy, tokenizer, reference)
            what = "The reference (`reference_model_path`)"
            _check_room(what, shortest_context(reference.model), own, max_completion_length)
        for scorer in scorers:
            what = f"The reward model {scorer.name!r} (`reward_model_path`)"
            for reward in {id(reward.model): reward for reward in scorer.model_rewards(tokenizer)}.values():
                lengths, room = own, max_completion_length
                if not reward.shares_tokenizer:
                    lengths, room = _lengths(reward.processing_class, prompts, what), 1
                _check_room(what, shortest_context(reward.model), lengths, room)


def check_judge(
    judge: AIJudge,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    prompts: Sequence[Any],
    max_completion_length: int,
) -> bool:
    """
    Refuse prompts whose question leaves no room for two answers of full length in the judge's context.

    With the policies' vocabulary an answer has at most `max_completion_length` tokens. With another one only the
    questions with empty answers are checked; [`check_judge_answers`] does the rest on real ones.

    Returns:
        `bool`: whether that was all there is to check.

    Raises:
        ValueError: naming the longest question.
    """
    if judge.context is None:
        return True
    vocabulary = judge.tokenizer.get_vocab()
    shared = all(tokenizer.get_vocab() == vocabulary for tokenizer in tokenizers.values())
    empty = [""] * len(prompts)
    lengths = judge.question_lengths([text_of(prompt) for prompt in prompts], empty, empty)
    longest = max(lengths)
    room = 2 * max_completion_length if shared else 2
    if longest + room > judge.context:
        answers = f"two answers of `max_completion_length` {max_completion_length}" if shared else "two answers"
        raise ValueError(
            f"The question to the judge (`judge_model_path`) about prompt {lengths.index(longest)} has {longest} "
            f"tokens without answers, and {answers} are to fit beside it into a context of {judge.context}. Drop long "
            "prompts, lower `max_completion_length`, shorten `judge_template`, or take a judge that reads more."
        )
    return shared


def check_judge_answers(judge: AIJudge, found: PolicyEvaluation) -> None:
    """
    Refuse what a judge of another vocabulary could not read, once one policy has answered: the other answer to each
    prompt is taken to be as long as this one.

    Raises:
        ValueError: naming the longest question.
    """
    firsts = range(0, len(found.samples.texts), found.num_samples)
    answers = [found.samples.texts[place] for place in firsts]
    lengths = judge.question_lengths([text_of(found.samples.prompts[place]) for place in firsts], answers, answers)
    longest = max(lengths)
    if judge.context is not None and longest > judge.context:
        raise ValueError(
            f"With the answer of {found.name!r} and another as long, the question to the judge (`judge_model_path`) "
            f"about prompt {lengths.index(longest)} has {longest} tokens, more than its context of {judge.context}. "
            "Lower `max_completion_length`, drop long prompts, or take a judge that reads more."
        )


def _context(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _lengths(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], what: str) -> list[int]:
    if isinstance(prompts[0], str):
        return [len(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    if tokenizer.chat_template is None:
        raise ValueError(f"The prompts are messages, but the tokenizer of {what} has no chat template. Set one.")
    template: Callable[..., Any] = tokenizer.apply_chat_template
    return [
        len(ids)
        for ids in template(list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    ]


def _check_room(what: str, context: int | None, lengths: Sequence[int], room: int) -> None:
    longest = max(lengths)
    if context is not None and longest + room > context:
        raise ValueError(
            f"{what} reads {context} tokens, but prompt {list(lengths).index(longest)} has {longest}, and an answer "
            f"may have {room} or more. Drop long prompts, lower `max_completion_length`, or take a model that reads "
            "more."
        )
