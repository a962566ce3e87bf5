"""What PPO adds to a rollout: log-probabilities, reference, values, rewards, advantages, and what is logged of them.

Shapes: B rows of this process, P prompt tokens (left-padded), C completion tokens (right-padded).
"""

import torch
from transformers.utils import logging

from ..functional import (
    compute_gae,
    discounted_returns,
    estimate_kl,
    leave_one_out_advantages,
    masked_mean,
    masked_whiten,
    shape_rewards,
)
from ..functional.advantages import baseline_advantages
from ..functional.statistics import completion_statistics, is_below_zero, rollout_statistics, row_means
from ..models.roles import CRITIC
from ..models.scoring import last_token_scores
from ..models.token_rewards import pad_rows
from .ppo_batches import by_length


logger = logging.get_logger(__name__)


def token_mask(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(B, C)` bool, True = a real token of the completion."""
    return batch["completion_mask"].bool()


def whole_rows(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of prompt and completion, both `(B, P + C)`."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


def before_each_token(outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """From `(B, P + C)` outputs the `(B, C)` ones one position before each token: V(s_t), a_t not yet seen."""
    first = batch["prompt_ids"].size(1)
    return outputs[:, first - 1 : -1]


class RolloutMixin:
    """The part of [`PPOTrainer`] that completes what the parent generated, on all processes alike."""

    _told_of_negative_kl = False

    def _complete_rollout(self, batch: dict[str, torch.Tensor], mode: str) -> dict[str, torch.Tensor]:
        mask = token_mask(batch)
        scores = self._scores
        if self.args.advantage_estimator == "leave_one_out":
            # A missing score would be a 0 in the others' baseline, so its whole group teaches nothing.
            missing = scores.isnan().view(-1, self.num_generations).any(dim=1)
            scores = scores.masked_fill(missing.repeat_interleave(self.num_generations), torch.nan)
        rollout = {"mask": mask, "scores": self._own_rows(scores, len(mask))}
        logps = batch.get("old_per_token_logps")
        logps = self._logps(self.model, batch, mode) if logps is None else logps
        rollout["old_per_token_logps"] = torch.where(mask, self._old_logps(batch, logps, mode), 0.0)
        if self.args.policy_objective == "penalty":
            rollout["old_hidden"] = self._take_hidden(batch)
            self._remember_head(mode)
        charged = rollout["kl"] = torch.zeros(mask.shape, dtype=logps.dtype, device=logps.device)
        if self.args.kl_coef > 0:
            reference = self._reference_logps(batch, mode)
            # What is logged, and moves the controller, is k1 whatever the reward is charged with.
            rollout["kl"] = torch.where(mask, estimate_kl(logps, reference, estimator="k1"), 0.0)
            charged = torch.where(mask, estimate_kl(logps, reference, estimator=self.args.kl_estimator), 0.0)
        scored = ~rollout["scores"].isnan()
        # A row without a score teaches nothing, not even through the moments.
        scored_mask = rollout["scored_mask"] = mask & scored[:, None]
        rollout["rewards"] = shape_rewards(
            torch.where(scored, rollout["scores"], 0.0),
            charged,
            mask,
            kl_coef=self.kl_coef,
            token_rewards=pad_rows(self._token_rewards, like=logps) if self.token_rewards else None,
        )
        rollout["raw_rewards"] = rollout["rewards"]
        if self.args.whiten_rewards:
            rollout["rewards"] = self._whiten(rollout["rewards"], scored_mask, shift_mean=False)
        if self.critic != "none":
            rollout |= self._values(batch, mode)
        advantages, returns = self.compute_advantages(rollout)
        rollout["raw_advantages"] = advantages
        if self.args.whiten_advantages:
            advantages = self._whiten(advantages, scored_mask, shift_mean=True)
        # The parent multiplies by the mask, so padding has to be finite.
        rollout["advantages"] = torch.where(scored_mask, advantages, 0.0)
        rollout["returns"] = returns
        if "values" in rollout:
            rollout["returns"] = torch.where(scored[:, None], returns, rollout["values"])
        return rollout

    def compute_advantages(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages and returns of a rollout, before whitening. Override to try another estimator.

        Args:
            batch (`dict[str, torch.Tensor]`):
                `rewards`, `mask`, `scored_mask` (without rows that no reward scored) and, with a critic, `values` of
                shape `(B, C)` (the value before token t), and `bootstrap_values` of shape `(B,)` with
                `bootstrap_truncated`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: both `(B, C)`, 0 where the mask is False.
        """
        rewards, mask, values = batch["rewards"], batch["mask"], batch.get("values")
        if self.args.advantage_estimator == "leave_one_out":
            per_row = self.accelerator.gather(rewards.sum(-1))
            advantages = leave_one_out_advantages(per_row, group_size=self.num_generations)
            advantages = torch.where(mask, self._own_rows(advantages, len(mask))[:, None], 0.0)
            return advantages, torch.where(mask, rewards.sum(-1, keepdim=True), 0.0)
        if self.args.advantage_estimator == "gae":
            return compute_gae(
                rewards,
                values,
                mask,
                gamma=self.args.gamma,
                gae_lambda=self.args.gae_lambda,
                bootstrap_values=batch.get("bootstrap_values"),
            )
        returns = discounted_returns(rewards, mask, gamma=self.args.gamma)
        if self.args.baseline == "batch_mean":
            mean = masked_mean(self._gather(returns), self._gather(batch["scored_mask"].long()).bool())
            values = mean.expand(mask.shape)
        return baseline_advantages(returns, values, mask), returns

    def _old_logps(self, batch: dict[str, torch.Tensor], raw: torch.Tensor, mode: str) -> torch.Tensor:
        """`(B, C)` log-probabilities that the ratio is taken of: the raw ones of the policy, unless it is masked."""
        return raw

    def _logps(self, model, batch, mode):
        ids, mask = whole_rows(batch)
        size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        return self._get_per_token_logps_and_entropies(
            model, input_ids=ids, attention_mask=mask, logits_to_keep=batch["completion_ids"].size(1), batch_size=size
        )[0]

    def _reference_logps(self, batch, mode):
        if self.reference is not None:
            return self._logps(self.reference, batch, mode)
        with self.roles.switch.use(self.roles.reference_adapter):
            return self._logps(self.model, batch, mode)

    def _values(self, batch, mode):
        ids, mask = whole_rows(batch)
        size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        if self.critic == "shared":  # the forward that scored the rows gave them
            values = torch.cat(self.adapter_reward.values)
            outputs = values.new_zeros(mask.shape).masked_scatter(mask.bool(), values)
        else:
            order, back = by_length(mask)
            outputs = torch.cat(
                [self.model(input_ids=ids[rows], attention_mask=mask[rows], role=CRITIC) for rows in order.split(size)]
            )[back]
        values = {"values": torch.where(token_mask(batch), before_each_token(outputs, batch), 0.0)}
        if self.args.bootstrap_truncated:
            ended = torch.isin(batch["completion_ids"], torch.tensor(self.eos_token_ids, device=ids.device))
            cut = ~(ended & token_mask(batch)).any(dim=1)
            values["bootstrap_values"] = torch.where(cut, last_token_scores(outputs, mask), 0.0)
        return values

    # Rows of all processes

    def _own_rows(self, gathered: torch.Tensor, rows: int) -> torch.Tensor:
        start = self.accelerator.process_index * rows
        return gathered[start : start + rows]

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.dim() > 1:
            rows = self.accelerator.pad_across_processes(rows, dim=1)
        return self.accelerator.gather(rows)

    def _whiten(self, rows: torch.Tensor, mask: torch.Tensor, shift_mean: bool) -> torch.Tensor:
        whitened = masked_whiten(self._gather(rows), self._gather(mask.long()).bool(), shift_mean=shift_mean)
        return self._own_rows(whitened, len(rows))[:, : rows.size(1)]

    # What is logged

    def _log_rollout(self, rollout: dict[str, torch.Tensor], mode: str) -> None:
        everywhere = {
            name: self._gather(rollout[key].long()).bool() if key == "mask" else self._gather(rollout[key])
            for name, key in {
                "scores": "scores",
                "kl": "kl",
                "rewards": "raw_rewards",
                "advantages": "raw_advantages",
                "mask": "mask",
                "values": "values",
                "returns": "returns",
            }.items()
            if key in rollout
        }
        statistics = rollout_statistics(**everywhere)
        metrics = self._metrics[mode]
        for name, value in statistics.items():
            if self.args.kl_coef > 0 or name not in ("kl", "kl_per_token"):  # without a reference there is no KL
                metrics[name].append(value.item())
        if is_below_zero(everywhere["kl"], everywhere["mask"]) and not self._told_of_negative_kl:
            self._told_of_negative_kl = True
            logger.warning(
                "`kl` is below 0 by more than sampling explains: the completions do not come from the policy whose "
                "log-probabilities are taken. Look for what changes sampling, such as a `generate` that was replaced."
            )
        metrics["kl_coef"].append(self.kl_coef)
        if self.args.policy_objective == "penalty":
            metrics["policy/penalty_coef"].append(self.penalty_coef)
        # With one completion per prompt the parent's group statistics say nothing, and its column is all zeros.
        metrics.pop("frac_reward_zero_std", None)
        per_row = row_means(everywhere["advantages"], everywhere["mask"])
        for _ in range(min(len(per_row), len(self._logs["advantages"]))):
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(per_row.tolist())
        # While the critic warms up the KL is that of a policy that stands still.
        if mode == "train" and self.kl_controller is not None and not self._is_warm_up(self._step):
            self.kl_controller.update(statistics["kl"].item(), len(everywhere["scores"]))

    def _log_completions(self, batch: dict[str, torch.Tensor], mode: str) -> None:
        ids, mask = self._gather(batch["completion_ids"]), self._gather(batch["completion_mask"]).bool()
        statistics = completion_statistics(ids, mask, eos_token_ids=list(self.eos_token_ids))
        for name, value in statistics.items():
            self._metrics[mode][name].append(value.item())
        if mode == "eval":
            scored, ended = (~self._scores.isnan()).sum().item(), len(ids) * statistics["completions/eos_rate"].item()
            self._count_eval_rows(len(ids), scored, ended)
