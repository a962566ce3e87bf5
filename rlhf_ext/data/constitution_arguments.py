"""The flags of `recipes/constitution.py`."""

import json
from dataclasses import dataclass, field
from typing import Any


TRAINERS = ("sft", "reward", "ppo")
DATA = ("red_team_prompts", "helpful_rows", "helpful_pairs", "helpful_prompts", "test_prompts")
SHARED = ("output_dir", "seed", "use_cpu", "trust_remote_code")
"""What the run sets in the arguments of every trainer."""


@dataclass
class ConstitutionArguments:
    """
    Prompts, models and sizes of a run of Constitutional AI (Bai et al. 2022); the helpful policy is
    `model_name_or_path`.

    Parameters:
        output_dir (`str`):
            Folder of the run, with a folder of its own for each finished step.
        red_team_prompts, test_prompts (`str`):
            Data sets with a text column `prompt`: what tempts the policy to do harm, and what it is measured on.
        helpful_rows, helpful_pairs, helpful_prompts (`str`, *optional*):
            People's data on helpfulness: `prompt` and `completion` mixed into SFT, preference rows mixed into the
            reward model's, and prompts mixed into PPO's.
        judge_model_path, reviser_model_path (`str`, *optional*):
            Who compares, and who criticises and revises; by default the helpful policy.
        constitution (`str`, *optional*):
            YAML of principles; by default the one of the package.
        sft, reward, ppo (`dict`, *optional*):
            Arguments of `trl.SFTConfig`, `PreferenceRewardConfig` and `PPOConfig`. An unknown key is refused.
        toy (`bool`, *optional*, defaults to `False`), toy_settings (`dict`, *optional*):
            Build models and data of the toy world, and which sizes to change
            ([`~rlhf_ext.pipelines.constitution_toy.ToySettings`]).
    """

    output_dir: str = field(default="", metadata={"help": "Folder of the run."})
    red_team_prompts: str | None = field(
        default=None, metadata={"help": "Data set of `prompt`, which tempt the policy to do harm."}
    )
    helpful_rows: str | None = field(
        default=None, metadata={"help": "Data set of `prompt` and `completion`, mixed into the fine-tuning."}
    )
    helpful_pairs: str | None = field(
        default=None, metadata={"help": "Preference rows by people, on helpfulness, mixed into the reward model's."}
    )
    helpful_prompts: str | None = field(default=None, metadata={"help": "Data set of `prompt`, mixed into PPO's."})
    test_prompts: str | None = field(
        default=None, metadata={"help": "Data set of held-out `prompt`, on which the policies are measured."}
    )
    judge_model_path: str | None = field(
        default=None, metadata={"help": "Causal language model that compares; by default the helpful policy."}
    )
    reviser_model_path: str | None = field(
        default=None,
        metadata={"help": "Causal language model that criticises and revises; by default the helpful policy."},
    )
    constitution: str | None = field(
        default=None, metadata={"help": "YAML of principles; by default the one of the package."}
    )
    num_rounds: int = field(default=1, metadata={"help": "Rounds of critique and revision; the paper has 4."})
    principles_per_pair: int = field(default=1, metadata={"help": "Principles drawn for each pair, averaged."})
    chain_of_thought: bool = field(
        default=False, metadata={"help": "Let the judge write before it chooses; labels are then kept in [.4, .6]."}
    )
    max_thought_tokens: int = field(default=128, metadata={"help": "Most tokens of a thought."})
    as_messages: bool = field(
        default=False, metadata={"help": "Make turns of text prompts and answers, for policies that read chats."}
    )
    max_completion_length: int = field(default=128, metadata={"help": "Most tokens of an answer or a revision."})
    temperature: float = field(default=1.0, metadata={"help": "Of answers, critiques and revisions."})
    batch_size: int = field(default=16, metadata={"help": "Rows per forward outside the trainers."})
    chunk_size: int = field(
        default=256, metadata={"help": "Prompts between two writes: what a killed run has to sample again."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score in PPO where an answer was cut by length."}
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Python scores for the measurement alone, as `module:function`."}
    )
    num_samples: int = field(default=4, metadata={"help": "Answers to each test prompt."})
    num_shown: int = field(default=50, metadata={"help": "Prompts of one page of the report, which has all of them."})
    seed: int = field(default=42, metadata={"help": "Of everything."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use a GPU."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether a checkpoint may run code of its own."})
    sft: dict | str | None = field(default=None, metadata={"help": "Arguments of `trl.SFTConfig`."})
    reward: dict | str | None = field(default=None, metadata={"help": "Arguments of `PreferenceRewardConfig`."})
    ppo: dict | str | None = field(default=None, metadata={"help": "Arguments of `PPOConfig`."})
    toy: bool = field(default=False, metadata={"help": "Build models and data of the toy world for the run."})
    toy_settings: dict | str | None = field(default=None, metadata={"help": "Sizes of the toy world's."})

    def __post_init__(self):
        for name in (*TRAINERS, "toy_settings"):
            setattr(self, name, _as_dict(name, getattr(self, name)))
        if isinstance(self.reward_funcs, str):  # a single name in a YAML
            self.reward_funcs = [self.reward_funcs]
        if not self.output_dir:
            raise ValueError("`output_dir` is empty; name the folder of the run.")
        for name in TRAINERS:
            if taken := sorted(set(SHARED) & set(getattr(self, name))):
                raise ValueError(f"`{name}` sets {taken}, which the run sets for all its trainers. Leave them out.")
        for name in ("num_rounds", "principles_per_pair", "max_thought_tokens", "max_completion_length", "batch_size"):
            self._check_count(name)
        for name in ("chunk_size", "num_samples", "num_shown"):
            self._check_count(name)
        if self.temperature <= 0:
            raise ValueError(f"`temperature` is {self.temperature}; it is above 0: two greedy answers are one.")
        self._check_data()

    def _check_count(self, name: str) -> None:
        if getattr(self, name) < 1:
            raise ValueError(f"`{name}` is {getattr(self, name)}; it is at least 1.")

    def _check_data(self) -> None:
        built = (*DATA, "judge_model_path", "reviser_model_path", "constitution", "reward_funcs")
        if self.toy:
            if given := [name for name in built if getattr(self, name)]:
                raise ValueError(f"`toy` builds its own data and models, but {given} are given too. Leave one out.")
            return
        if self.toy_settings:
            raise ValueError("`toy_settings` are given without `toy: true`. Leave them out, or set it.")
        if missing := [name for name in ("red_team_prompts", "test_prompts") if not getattr(self, name)]:
            raise ValueError(f"{missing} are empty; name data sets with a column `prompt`.")


def _as_dict(name: str, value: Any) -> dict[str, Any]:
    """A dictionary from a YAML, or JSON from the command line."""
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{name}` is {value!r}, which is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` is {value!r}; give a dictionary.")
    return value
