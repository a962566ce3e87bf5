"""One run of the loop on disk: its arguments, prompts and folders. Every step reads what it needs from here."""

import json
import os
import random
import uuid
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig

from ..data.arguments import load_splits
from ..data.jsonl import read_jsonl
from ..data.loading import load_rows, require_columns, without_prompts
from ..data.loop_arguments import LoopArguments
from ..data.prompts import check_tokenizer
from ..feedback.store import LabelStore
from ..trainers.ppo_config import PPOConfig
from .finished_runs import digest_of, run_once


SETTINGS_FILE, MANIFEST_FILE, ROWS_FILE = "settings.json", "manifest.json", "rows.jsonl"
SFT = "sft"

# What may differ when a run is called again: no step that is finished depends on it.
_MAY_CHANGE = ("output_dir", "num_rounds", "wait_for_labels", "launch_config", "store", "label_share")


class LoopRun:
    """
    The folder of a run, and what was asked for.

    Args:
        args ([`LoopArguments`]), model_args ([`~trl.ModelConfig`]): the flags; `model_name_or_path` is the SFT policy.
    """

    def __init__(self, args: LoopArguments, model_args: ModelConfig):
        self.args, self.model_args = args, model_args
        self.folder = Path(args.output_dir)

    @classmethod
    def load(cls, folder: str | Path) -> "LoopRun":
        """The run that stands in `folder`, for a step in a process of its own.

        Raises:
            ValueError: there is none.
        """
        path = Path(folder) / SETTINGS_FILE
        if not path.exists():
            raise ValueError(f"{str(folder)!r} has no {SETTINGS_FILE}: it is no run of the loop.")
        saved = json.loads(path.read_text(encoding="utf-8"))
        return cls(LoopArguments(**{**saved["loop"], "output_dir": str(folder)}), ModelConfig(**saved["model"]))

    def save_settings(self) -> None:
        """Write what was asked for.

        Raises:
            ValueError: the folder holds a run with other settings.
        """
        asked = json.loads(json.dumps({"loop": asdict(self.args), "model": asdict(self.model_args)}, default=str))
        path = self.folder / SETTINGS_FILE
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            odd = {
                name: f"{before[part].get(name)} before, {value} now"
                for part, values in asked.items()
                for name, value in values.items()
                if name not in _MAY_CHANGE and before[part].get(name) != value
            }
            if odd:
                raise ValueError(
                    f"{str(self.folder)!r} holds a run with other settings: {odd}. Choose another `output_dir`, or "
                    "give the settings it was started with."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        # The report, which loads no torch, tells by the defaults what was asked for.
        defaults = {"loop": _defaults(LoopArguments), "model": _defaults(ModelConfig)}
        found = {**asked, "name": self.name, "defaults": defaults}
        write_whole(path, json.dumps(found, indent=1, default=str))

    @cached_property
    def name(self) -> str:
        """Of the run in the label store, which others share: the folder's name, and an id of its own for a folder of
        the same name elsewhere, or one that was removed and begun again."""
        path = self.folder / SETTINGS_FILE
        if path.exists():  # a run begun before there were ids has pools without
            return json.loads(path.read_text(encoding="utf-8")).get("name", self.folder.resolve().name)
        return f"{self.folder.resolve().name}-{uuid.uuid4().hex[:8]}"

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what a finished step holds."""
        loop = {name: value for name, value in asdict(self.args).items() if name not in _MAY_CHANGE}
        return {"loop": loop, "model": asdict(self.model_args), "prompts": self.digest}

    def step(self, round_: int, name: str) -> Path:
        """Folder of a step."""
        return self.folder / f"round_{round_}" / name

    def rows_of(self, round_: int, name: str) -> list[dict[str, Any]]:
        """What a finished step wrote."""
        return read_jsonl(self.step(round_, name) / ROWS_FILE)

    def once(self, round_: int, name: str, work: Any) -> dict[str, Any]:
        """The record of a step, which is done unless it is finished."""
        return run_once(
            self.step(round_, name), {**self.settings, "round": round_, "step": name}, lambda aside: work(aside)
        )

    def seed(self, round_: int, name: str) -> int:
        """Seed of a step: another one for every round and step."""
        return random.Random(f"{self.args.seed} {round_} {name}").randrange(2**31)

    # Prompts

    @cached_property
    def _prompts(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        named = self.args.eval_dataset_name
        flags = self.args if named is None else replace(self.args, eval_fraction=0.0)
        rows, held = load_splits(flags, wants_eval=named is None, seed=self.args.seed)
        held = held if named is None else load_rows(named)
        require_columns(rows, ["prompt"], what="the prompts")
        require_columns(held, ["prompt"], what="the held-out prompts")
        chosen = list(held)[: self.args.max_eval_prompts]
        kept = without_prompts(list(rows), chosen)
        if not kept:
            raise ValueError(
                f"`dataset_name` {self.args.dataset_name!r} has no prompt that is not held out too: all {len(rows)} "
                "stand among the held-out ones. Name other prompts, or hold a share out by `eval_fraction`."
            )
        if len(kept) < len(rows):
            print(f"{len(rows) - len(kept)} train prompts are held out too, and are left out.", flush=True)
        return kept, chosen

    @property
    def train_prompts(self) -> list[dict[str, Any]]:
        """Rows of prompts to label and to train on."""
        return self._prompts[0]

    @property
    def eval_prompts(self) -> list[dict[str, Any]]:
        """Rows of held-out prompts, the same in every round."""
        return self._prompts[1]

    @cached_property
    def digest(self) -> list[str | None]:
        """Of both lists of prompts: other prompts make another run."""
        return [digest_of(self.train_prompts), digest_of(self.eval_prompts)]

    def prompts_of(self, round_: int, count: int) -> list[dict[str, Any]]:
        """`count` prompts for a round: in a fixed random order, round after round, from the start again at the end."""
        order = list(range(len(self.train_prompts)))
        random.Random(f"{self.args.seed} prompts").shuffle(order)
        start = (round_ - 1) * count
        return [self.train_prompts[order[place % len(order)]] for place in range(start, start + count)]

    # Parts that several steps share

    @property
    def labels_before_training(self) -> int:
        """Comparisons that a round asks before its policy trains."""
        share = self.args.initial_label_share if self.args.asynchronous else 1.0
        return max(round(share * self.args.labels_per_round), 1)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the SFT policy."""
        tokenizer = AutoTokenizer.from_pretrained(
            self.model_args.model_name_or_path,
            revision=self.model_args.model_revision,
            trust_remote_code=self.args.trust_remote_code,
        )
        check_tokenizer(tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        return tokenizer

    @cached_property
    def ppo(self) -> PPOConfig:
        """PPO's arguments with their defaults, to be read; a step's own come from `loop_training.ppo_config`."""
        return PPOConfig(**{"output_dir": str(self.folder), "report_to": "none", **self.args.ppo})

    @property
    def temperature(self) -> float:
        """Of all sampling: the policy is labelled and measured as it is trained."""
        return self.ppo.temperature

    @property
    def max_completion_length(self) -> int:
        """Of all sampling, in tokens."""
        return self.ppo.max_completion_length

    @property
    def store_location(self) -> str | Path:
        return self.args.store or self.folder / "labels.db"

    def open_store(self) -> LabelStore:
        """The label store of the run."""
        return LabelStore(self.store_location)

    def pool(self, round_: int) -> str:
        """Name of a round in the store, which other runs may share."""
        return f"{self.name}/round-{round_}"

    def prompt_dataset(self) -> Dataset:
        """The prompts that PPO trains on; other columns reach the reward functions, reference answers do not."""
        rows = Dataset.from_list(self.train_prompts)
        return rows.remove_columns([name for name in ("completion",) if name in rows.column_names])


def _defaults(kind: Any) -> dict[str, Any]:
    """What each flag of a dataclass is when it is not given."""
    found = {}
    for flag in fields(kind):
        factory = flag.default_factory
        found[flag.name] = flag.default if factory is MISSING else factory()
    return {name: None if value is MISSING else value for name, value in found.items()}


def as_completion(prompt: Any, text: str) -> Any:
    """A completion in the form of its prompt: text, or a turn of the assistant."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text.strip()}]


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows, one a line, whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
