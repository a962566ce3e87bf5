"""Prompt rows for PPO, checked before any training."""

from pathlib import Path

from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import is_conversational

from .loading import is_empty


# Columns that the trainer itself hands to reward functions.
RESERVED_COLUMNS = {"prompt_ids", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ValueError` for a tokenizer without an end-of-sequence token: no completion could ever end."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"processing_class {type(tokenizer).__name__} has eos_token=None, so no completion could end. Set "
            "`tokenizer.eos_token` to a token of its vocabulary."
        )


def set_up_tokenizer(
    tokenizer: PreTrainedTokenizerBase, eos_token: str | None = None, chat_template_path: str | None = None
) -> None:
    """
    Give a recipe's tokenizer what TRL's trainers give theirs, before rows are counted by it.

    Args:
        eos_token (`str`, *optional*), chat_template_path (`str`, *optional*):
            As in TRL's configurations; the path of a `.jinja` or `.j2` file, or the name of a tokenizer, whose own
            tokens the trainer adds.

    Raises:
        ValueError: there is no end-of-sequence token.
    """
    if eos_token is not None:
        tokenizer.eos_token = eos_token
    if chat_template_path is not None and chat_template_path.endswith((".jinja", ".j2")):
        tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
    elif chat_template_path is not None:
        tokenizer.chat_template = AutoTokenizer.from_pretrained(chat_template_path).chat_template
    check_tokenizer(tokenizer)


def check_prompts(
    dataset: Dataset | IterableDataset | None,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_completion_length: int,
    max_positions: int | None,
    chat_template_kwargs: dict | None = None,
    rollout_prompts: int = 1,
) -> None:
    """Check the rows of a prompt data set.

    Args:
        dataset (`Dataset` or `IterableDataset`, *optional*):
            Rows with a column `prompt`, text or messages. Rows of a stream are seen only when they come, so only the
            first is checked.
        name (`str`):
            How messages call the data set.
        tokenizer (`PreTrainedTokenizerBase`):
            The policy's.
        max_completion_length (`int`):
            Tokens that may be sampled.
        max_positions (`int`, *optional*):
            The model's context in tokens.
        rollout_prompts (`int`, *optional*, defaults to 1):
            Prompts of a rollout: with fewer none is ever whole, and nothing would be trained on.

    Raises:
        ValueError: no row, fewer than a rollout takes, no column `prompt`, a reserved column, an empty prompt, one
            that is neither text nor messages, or one that leaves no room for a completion; the message names the rows.
    """
    if dataset is None:
        return
    rows = dataset if isinstance(dataset, Dataset) else dataset.take(1)
    columns = dataset.column_names or []
    if columns and "prompt" not in columns:
        raise ValueError(f"{name} has no column 'prompt' (found {columns}). Rename the column that holds the prompts.")
    taken = sorted(RESERVED_COLUMNS & set(columns))
    if taken:
        raise ValueError(f"{name} has a column {taken[0]!r}, a name the trainer itself hands to rewards. Rename it.")
    empty, long, count = [], [], 0
    for index, row in enumerate(rows):
        count += 1
        prompt = row.get("prompt")
        if is_empty(prompt):
            empty.append(index)
            continue
        if not isinstance(prompt, str) and not is_conversational({"prompt": prompt}):
            raise ValueError(
                f"{name} has a prompt of type {type(prompt).__name__} at row {index} that is neither text nor "
                "messages. Give a string, or a list of {'role': ..., 'content': ...}."
            )
        if is_conversational({"prompt": prompt}):
            ids = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
            )["input_ids"]
        else:
            ids = tokenizer(prompt)["input_ids"]
        if max_positions is not None and len(ids) + max_completion_length > max_positions:
            long.append((index, len(ids)))
    if not count:
        raise ValueError(f"{name} has no rows. Check the path and the split.")
    if empty:
        raise ValueError(f"{name} has {len(empty)} empty prompts, first at row {empty[0]}. Remove these rows.")
    if long:
        index, length = long[0]
        raise ValueError(
            f"{name} has {len(long)} rows whose prompt and completion exceed the model's context of {max_positions} "
            f"tokens; row {index} has {length} prompt tokens and max_completion_length={max_completion_length}. Drop "
            "or shorten these prompts, or lower max_completion_length."
        )
    if isinstance(dataset, Dataset) and count < rollout_prompts:
        raise ValueError(
            f"{name} has {count} prompts, a rollout takes {rollout_prompts}, and prompts that fill none are left out: "
            "nothing would be trained on. Give more prompts, or lower per_device_train_batch_size, "
            "gradient_accumulation_steps or steps_per_generation."
        )
