"""What a rollout earns: scores of completions, rewards of single tokens, and probes that are only looked at."""

from typing import Any

import torch

from ..functional.rewards import combine_scores
from ..functional.scores import as_scores, score_moments
from ..models.token_rewards import add_rows


class RewardsMixin:
    """The part of [`PPOTrainer`] that asks the reward functions."""

    token_rewards: list = []
    probes: list = []
    _token_rewards: list[list[float]] | None = None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        prompt_ids = self._tokenize_prompts(prompts)[0]
        rows = [{**row, "prompt_ids": ids} for row, ids in zip(inputs, prompt_ids, strict=True)]
        rewards_per_func = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)
        self._scores = combine_scores(rewards_per_func, self.reward_weights)
        if self.token_rewards or self.probes:
            given = {key: [row[key] for row in rows] for key in rows[0] if key not in _NAMED}
            given |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids_list}
            given |= {"trainer_state": self.state, "log_metric": self._log_metric}
            given |= {"log_extra": self._log_completion_extra}
            self._pay_tokens(given)
            self._look(given)
        return rewards_per_func

    def _pay_tokens(self, given: dict[str, Any]) -> None:
        """Keep, per row of this process, the sum over the token rewards: one number per token."""
        self._token_rewards = [[0.0] * len(ids) for ids in given["completion_ids"]]
        for function in self.token_rewards:
            rows = function(**given)
            self._token_rewards = add_rows(self._token_rewards, rows)
            self._log_over_rows(f"token_rewards/{function.__name__}", as_scores([sum(row) for row in rows]))

    def _look(self, given: dict[str, Any]) -> None:
        for probe in self.probes:
            self._log_over_rows(f"probe/{probe.__name__}", as_scores(probe(**given)))

    def _log_over_rows(self, name: str, rows: torch.Tensor) -> None:
        """Mean and population standard deviation over the rows of all processes; NaN rows have no number."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        mean, std = score_moments(self.accelerator.gather(rows.float().to(self.accelerator.device)))
        metrics[f"{name}/mean"].append(mean.item())
        metrics[f"{name}/std"].append(std.item())


# Columns that reach a reward function under another name.
_NAMED = ("prompt", "completion", "completion_ids")
