"""The flags by which every recipe names its data, and the splits they stand for."""

from dataclasses import dataclass, field

from datasets import Dataset

from .loading import holdout_by_prompt, load_rows, require_columns


@dataclass
class DataArguments:
    """
    Which rows a recipe trains and evaluates on.

    Parameters:
        dataset_name (`str`):
            Local `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, folder of such files or of `save_to_disk`, or a
            Hub id (`owner/name` or `owner/name:config`).
        dataset_config (`str`, *optional*):
            Configuration of a Hub data set.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on, read if `eval_strategy` is not `"no"` and `eval_fraction` is 0.
        eval_fraction (`float`, *optional*, defaults to `0.0`):
            Share of the train split's prompts that is held out for evaluation, by a hash of the prompt.
        dataset_source (`list[str]`, *optional*):
            Keep only rows whose column `source` is one of these.
        max_rows (`int`, *optional*):
            Keep only the first rows of each split.
    """

    dataset_name: str = field(
        default="",
        metadata={
            "help": "Local `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, folder of such files or of "
            "`save_to_disk`, or a Hub id (`owner/name` or `owner/name:config`)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split to evaluate on, read if `eval_strategy` is not `'no'` and `eval_fraction` is 0."},
    )
    eval_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Share of the train split's prompts that is held out for evaluation, by a hash of the prompt."
        },
    )
    dataset_source: list[str] | None = field(
        default=None, metadata={"help": "Keep only rows whose column `source` is one of these."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Keep only the first rows of each split."})

    def __post_init__(self):
        if isinstance(self.dataset_source, str):  # a single name in a YAML
            self.dataset_source = [self.dataset_source]
        if not 0.0 <= self.eval_fraction < 1.0:
            raise ValueError(f"`eval_fraction` is {self.eval_fraction}; it is a share in [0, 1).")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"`max_rows` is {self.max_rows}; it is at least 1, or unset for all rows.")


@dataclass
class PromptArguments(DataArguments):
    """
    Which prompts the PPO recipe trains on, and where the rewards come from. `rlhf-ext env` reads the same flags.

    Parameters:
        reward_model_path (`str`, *optional*):
            Folder or Hub id of a reward model that stands alone; it may have a tokenizer of its own.
        reward_funcs (`list[str]`, *optional*):
            Python rewards as `module:function`; the working directory is on the path.
        reward_adapter_path (`str`, *optional*):
            Folder of a reward adapter trained on the policy's base.
        critic_model_path (`str`, *optional*):
            Folder or Hub id of what the critic starts from: a model with the policy's tokenizer, or, beside a reward
            adapter, a critic adapter.
        token_reward_funcs, probe_funcs (`list[str]`, *optional*):
            Rewards of single tokens, and rewards that are logged and never paid: `module:function`, or a folder or Hub
            id of a reward model.
        normalize_scores (`bool`, *optional*, defaults to `False`):
            Refuse a reward model (or adapter) without gain and bias of its own; where there are some, they are applied
            either way.
        cut_at (`str`, *optional*), cut_min_index (`int`, defaults to 0), cut_missing_score (`float`, defaults to -1):
            The reward model reads a completion up to this token, at that index or later; one without it gets the
            fixed score.
        clip_scores (`list[float]`, *optional*):
            Smallest and largest score of the reward model.
        missing_eos_penalty (`float`, *optional*):
            Taken off the reward model's score where a completion was cut by length.
        max_prompt_length (`int`, *optional*):
            Drop prompts of more tokens than this. Unset, a prompt that leaves no room for a completion is an error.
    """

    reward_model_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a reward model that stands alone; it may have a tokenizer of its own."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Python rewards as `module:function`; the working directory is on the path."},
    )
    reward_adapter_path: str | None = field(
        default=None, metadata={"help": "Folder of a reward adapter trained on the policy's base."}
    )
    critic_model_path: str | None = field(
        default=None,
        metadata={"help": "What the critic starts from: a model, or beside a reward adapter a critic adapter."},
    )
    token_reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Rewards of single tokens: `module:function`, or a reward model that sums over tokens."},
    )
    probe_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Logged and never paid: `module:function`, or a folder or Hub id of a reward model."},
    )
    normalize_scores: bool = field(
        default=False, metadata={"help": "Refuse a reward model without gain and bias of its own."}
    )
    cut_at: str | None = field(
        default=None, metadata={"help": "Token up to which the reward model reads a completion."}
    )
    cut_min_index: int = field(default=0, metadata={"help": "First index, from 0, at which `cut_at` counts."})
    cut_missing_score: float = field(default=-1.0, metadata={"help": "Score of a completion without `cut_at`."})
    clip_scores: list[float] | None = field(
        default=None, metadata={"help": "Smallest and largest score of the reward model."}
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Taken off the reward model's score where a completion was cut by length."},
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Drop prompts of more tokens than this. Unset, a prompt that leaves no room for a completion is "
            "an error."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("reward_funcs", "token_reward_funcs", "probe_funcs"):
            if isinstance(getattr(self, name), str):  # a single name in a YAML
                setattr(self, name, [getattr(self, name)])
        if not (self.reward_model_path or self.reward_funcs or self.reward_adapter_path or self.token_reward_funcs):
            raise ValueError(
                "No reward: `reward_model_path`, `reward_funcs`, `reward_adapter_path` and `token_reward_funcs` are "
                "all empty; give one."
            )
        if self.clip_scores is not None and len(self.clip_scores) != 2:
            raise ValueError(f"`clip_scores` is {self.clip_scores}; give two numbers, the smallest and the largest.")
        treatments = ("normalize_scores", "cut_at", "clip_scores", "missing_eos_penalty")
        used = {name: getattr(self, name) for name in treatments if getattr(self, name)}
        if used and bool(self.reward_model_path) == bool(self.reward_adapter_path):
            raise ValueError(
                f"{used} treat the score of the reward model, but there is none, or there are two. Give one of "
                "`reward_model_path` and `reward_adapter_path`, or wrap the rewards in a script of your own."
            )


def load_splits(
    arguments: DataArguments, *, wants_eval: bool, seed: int, text_field: str = "text"
) -> tuple[Dataset, Dataset | None]:
    """
    Load what `arguments` name.

    Args:
        arguments ([`DataArguments`]):
            Flags of a recipe.
        wants_eval (`bool`):
            Whether the run evaluates (`eval_strategy` is not `"no"`); a held-out share is given either way.
        seed (`int`):
            Salt of the hash that holds prompts out: runs that shall share their held-out prompts share it.
        text_field (`str`, *optional*, defaults to `"text"`):
            A column that becomes `text`, where there is one.

    Returns:
        `tuple[Dataset, Dataset | None]`: train rows, and evaluation rows if there are any.
    """
    train = _with_text(_select(arguments, arguments.dataset_train_split), text_field)
    if arguments.eval_fraction:
        return holdout_by_prompt(train, arguments.eval_fraction, seed)
    return train, _with_text(_select(arguments, arguments.dataset_test_split), text_field) if wants_eval else None


def _with_text(rows: Dataset, field: str) -> Dataset:
    columns = set(rows.column_names)
    if field == "text" or field not in columns and ("messages" in columns or {"prompt", "completion"} <= columns):
        return rows
    require_columns(rows, [field], what="the rows, of which `dataset_text_field` names it")
    return rows.remove_columns([name for name in rows.column_names if name == "text"]).rename_column(field, "text")


def _select(arguments: DataArguments, split: str) -> Dataset:
    """The rows of one split that the flags ask for.

    Raises:
        ValueError: there is no such data set or split, or `dataset_source` names a source that it does not have.
    """
    rows = load_rows(arguments.dataset_name, split=split, config=arguments.dataset_config)
    if arguments.dataset_source:
        require_columns(rows, ["source"], what=f"the split {split!r}, which `dataset_source` filters")
        found = sorted(set(rows["source"]))
        wanted = set(arguments.dataset_source)
        if unknown := sorted(wanted - set(found)):
            raise ValueError(f"`dataset_source` names {unknown}, but the split {split!r} has {found}.")
        rows = rows.select([index for index, source in enumerate(rows["source"]) if source in wanted])
    return rows if arguments.max_rows is None else rows.select(range(min(arguments.max_rows, len(rows))))
