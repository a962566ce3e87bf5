"""A reward that is fitted while the policy trains: every rollout is scored by the newest one that is finished."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .reward_checkpoints import load_reward_model
from .reward_functions import ModelReward


RUN_FILE = "run.json"


class NewestReward:
    """
    A reward function over a folder of numbered reward models, `0001`, `0002`, ...; the highest whole one scores.

    A folder counts when it has its `run.json`, which is written last (`pipelines/finished_runs.py`). Scores of a
    rollout are stale when labels lie in the store that its reward model was not fitted on (Christiano et al. 2017,
    Sec. 2.2: the three processes run asynchronously). Logged per rollout: `reward_version`, `labels_behind` (labels in
    the store less those the model was fitted on) and `stale_rollouts` (rollouts so far that were scored with labels
    behind). A rollout that is repeated after a kill counts once.

    Args:
        folder (`str` or `Path`): where the models appear; one must be there.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the policy and of the reward models.
        count_labels (`Callable[[], int]`): labels in the store now.
        on_rollout (`Callable`, *optional*): called with what TRL hands to reward functions, and `eos_token_ids`,
            before scoring.
        record (`str` or `Path`, *optional*): file that keeps the steps of stale rollouts, for a process that goes on.
        batch_size (`int`, *optional*, defaults to 16): as for [`ModelReward`].
        device (*optional*), trust_remote_code (`bool`, *optional*, defaults to `False`): as for [`load_reward_model`].

    Attributes:
        eos_token_ids (`set[int]`): what finishes a completion; the trainer sets every id of the generation config.

    Raises:
        ValueError: there is no whole model.
    """

    __name__ = "newest_reward"

    def __init__(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        count_labels: Callable[[], int],
        *,
        on_rollout: Callable[..., None] | None = None,
        record: str | Path | None = None,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ):
        self.folder, self.tokenizer, self.count_labels = Path(folder), tokenizer, count_labels
        self.on_rollout, self.batch_size, self.device = on_rollout, batch_size, device
        self.trust_remote_code = trust_remote_code
        self.version, self.labels_read = 0, 0
        self.record = None if record is None else Path(record)
        self.stale_steps: list[int] = []
        if self.record is not None and self.record.exists():
            self.stale_steps = json.loads(self.record.read_text(encoding="utf-8"))
        self.eos_token_ids: set[int] = {tokenizer.eos_token_id}
        self.reward: ModelReward | None = None
        self.update()
        if self.reward is None:
            raise ValueError(f"{str(folder)!r} holds no finished reward model. Fit the first one before the policy.")

    @property
    def stale_rollouts(self) -> int:
        """Rollouts so far that were scored with labels behind."""
        return len(self.stale_steps)

    def update(self) -> bool:
        """Load the newest model if it is newer; whether it was."""
        newest = newest_version(self.folder)
        if newest <= self.version:
            return False
        path = version_folder(self.folder, newest)
        model = load_reward_model(path, device=self.device, trust_remote_code=self.trust_remote_code)
        model.requires_grad_(False)
        self.reward = ModelReward(model, self.tokenizer, self.tokenizer, batch_size=self.batch_size)
        self.version = newest
        self.labels_read = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))["result"]["labels"]
        return True

    def __call__(self, prompts: list, completions: list, **kwargs: Any) -> list[float]:
        """Scores of a rollout; the arguments are those of TRL's reward functions."""
        self.update()
        if self.on_rollout is not None:
            self.on_rollout(prompts=prompts, completions=completions, eos_token_ids=self.eos_token_ids, **kwargs)
        behind = max(self.count_labels() - self.labels_read, 0)
        self._count(behind > 0, kwargs.get("trainer_state"))
        if (log := kwargs.get("log_metric")) is not None:
            log("reward_version", float(self.version))
            log("labels_behind", float(behind))
            log("stale_rollouts", float(self.stale_rollouts))
        assert self.reward is not None
        self.reward.eos_token_ids = set(self.eos_token_ids)
        return self.reward(prompts=prompts, completions=completions, **kwargs)

    def _count(self, stale: bool, trainer_state: Any) -> None:
        if trainer_state is not None:
            # What a killed process did from this step on is being done again.
            self.stale_steps = [step for step in self.stale_steps if step < trainer_state.global_step]
        if stale:
            self.stale_steps.append(len(self.stale_steps) if trainer_state is None else trainer_state.global_step)
        if self.record is not None:
            aside = self.record.with_name(f".{self.record.name}")
            aside.write_text(json.dumps(self.stale_steps), encoding="utf-8")
            aside.replace(self.record)


def version_folder(folder: str | Path, version: int) -> Path:
    """Where a version stands."""
    return Path(folder) / f"{version:04d}"


def newest_version(folder: str | Path) -> int:
    """The highest version that is whole; 0 for none."""
    found = [
        int(path.name)
        for path in Path(folder).glob("[0-9]*")
        if re.fullmatch(r"\d{4,}", path.name) and (path / RUN_FILE).exists()
    ]
    return max(found, default=0)
