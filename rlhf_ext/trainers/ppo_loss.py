"""The loss of a micro-batch: the parent's policy loss, what is added to it, and the value loss over one divisor."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..functional import policy_gradient_loss, value_loss
from ..functional.statistics import ratio_statistics
from ..models.roles import CRITIC
from .ppo_checkpoint import is_critic
from .ppo_rollout import before_each_token, token_mask, whole_rows


class LossMixin:
    """The part of [`PPOTrainer`] that wraps `_compute_loss`."""

    def _compute_loss(self, model, inputs):
        if self._stopped and self.model.training:
            # The rest of the rollout is not trained on; its steps pass without a forward.
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        if self.model.training:
            return self._loss_of_both(model, inputs)
        loss = self._loss_of_both(model, inputs)
        self._log_step("eval")
        return loss

    def _loss_of_both(self, model, inputs):
        loss = self.compute_policy_loss(inputs, model)
        if self.model.training and self._is_warm_up(self._step):
            loss = loss * 0.0  # not left out: DDP waits for every gradient
        if self.critic == "none":
            return loss
        if self.model.training and self._critic_rests(self._step):
            if not isinstance(model, DistributedDataParallel):
                return loss
            # DDP waits for every gradient; these are dropped before the step.
            critic = [p for name, p in self.model.named_parameters() if is_critic(name) and p.requires_grad]
            return loss + 0.0 * sum(p.sum() for p in critic)
        ids, attention_mask = whole_rows(inputs)
        values = before_each_token(model(input_ids=ids, attention_mask=attention_mask, role=CRITIC), inputs)
        critic_loss, metrics = value_loss(
            values,
            inputs["values"],
            inputs["returns"],
            token_mask(inputs),
            epsilon_value=self.args.epsilon_value,
            reduction="sum",
        )
        divisor = self._loss_divisor(inputs)
        parts = self.current_gradient_accumulation_steps if self.model.training else 1
        # One micro-batch's share of the step, times their number: the mean that is logged is the step's loss.
        self._note({"value_loss": critic_loss.detach() / divisor * parts})
        self._note({"value/clip_fraction": metrics["value_clip_fraction"]}, token_mask(inputs).sum())
        return loss + self.args.vf_coef * critic_loss / divisor

    def compute_policy_loss(self, batch: dict[str, torch.Tensor], model: nn.Module | None = None) -> torch.Tensor:
        """Policy loss of one micro-batch, over the parent's divisor. Override to add a term.

        Args:
            batch (`dict[str, torch.Tensor]`):
                What `_generate_and_score_completions` returned, one slice of it.
            model (`nn.Module`, *optional*):
                The prepared model; the trainer's own if not given.
        """
        loss = super()._compute_loss(self.model if model is None else model, batch)
        tokens = token_mask(batch).sum()
        self._note_what_the_parent_logged(tokens)
        outputs, self._outputs, length = self._outputs, None, batch["completion_ids"].size(1)
        logps = outputs.log_probs.detach()[:, -length:]
        if self.args.policy_objective == "pg":
            # With a ratio of 1 the parent's gradient is that of REINFORCE; its value is not, so it is put right.
            shown, _ = policy_gradient_loss(logps, batch["advantages"], token_mask(batch), reduction="sum")
            loss = loss + (shown / self._loss_divisor(batch) - loss.detach())
        else:
            self._note(ratio_statistics(logps, batch["old_per_token_logps"], token_mask(batch)), tokens)
            if self.model.training and self.args.target_kl is not None:
                self._watch_kl(logps, batch)
        if self.args.policy_objective == "penalty":
            loss = loss + self._penalty_term(batch)
        if self.args.entropy_bonus_coef > 0:
            loss = loss + self._entropy_term(batch, outputs.entropy[:, -length:])
        return loss

    def _loss_divisor(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        # Mean number of tokens per optimizer step of the rollout and process: the parent's for `dapo`, pinned in
        # tests/test_seams.py.
        divisor = batch["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            divisor = divisor * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return divisor
