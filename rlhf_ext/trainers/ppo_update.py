"""What PPO adds to an update: penalty on the KL to the old policy, entropy bonus, and steps that are not taken.

Shapes: B rows of this process, C completion tokens, H hidden size.
"""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from ..functional import entropy_loss, exact_kl, masked_mean
from ..functional.statistics import ratio_statistics
from .launch import may_cut_weights
from .ppo_checkpoint import is_critic
from .ppo_rollout import before_each_token, token_mask


CHUNK_TOKENS = 64
"""Tokens whose full distributions live at a time in the exact KL."""

# What a model may do to its logits after the head, which an exact KL from hidden states and head would miss.
_LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class StepGuard(TrainerCallback):
    """Asks the trainer, once the gradients of a step are there, which of them are applied."""

    def __init__(self, trainer: "UpdateMixin"):
        super().__init__()
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._drop_gradients()


class UpdateMixin:
    """The part of [`PPOTrainer`] that decides what an optimizer step is made of, and whether it is taken.

    A step that is not taken has no gradients: torch's optimizers then touch neither a weight nor their own state. The
    step still counts, for the data and for the schedule, since resuming finds its place by the number of steps.
    """

    _stopped = False
    _hidden: torch.Tensor | None = None
    _old_heads: dict[str, tuple[torch.Tensor, torch.Tensor | None] | None] = {"train": None, "eval": None}

    def _check_update(self) -> None:
        """Refuse what this launch cannot do; called once the accelerator is there."""
        args = self.args
        if args.target_kl is not None and (self.is_deepspeed_enabled or args.fp16):
            what = "DeepSpeed" if self.is_deepspeed_enabled else "fp16"
            raise ValueError(
                f"target_kl={args.target_kl} leaves steps out, which {what} cannot: it steps its own copies or scales "
                "by gradients that are not there. Set it to None, or launch without it."
            )
        if args.critic_warmup_rollouts and self.is_deepspeed_enabled and args.weight_decay > 0:
            raise ValueError(
                f"critic_warmup_rollouts={args.critic_warmup_rollouts} with weight_decay={args.weight_decay} would "
                "decay the policy under DeepSpeed. Set weight_decay to 0, or launch without DeepSpeed."
            )
        plugin = args.deepspeed_plugin
        optimizer = {} if plugin is None else plugin.deepspeed_config.get("optimizer") or {}
        if optimizer and args.critic_learning_rate is not None and self.critic != "none":
            raise ValueError(
                f"critic_learning_rate={args.critic_learning_rate} has no effect on the optimizer of the DeepSpeed "
                "configuration, which has one rate. Remove its block `optimizer`, or set critic_learning_rate to None."
            )
        decay = optimizer.get("params", {}).get("weight_decay", 0.0)
        if args.critic_warmup_rollouts and decay != "auto" and decay > 0:
            raise ValueError(
                f"critic_warmup_rollouts={args.critic_warmup_rollouts} with weight_decay={decay} in the DeepSpeed "
                "configuration's `optimizer` would decay the policy. Set it to 0, or launch without DeepSpeed."
            )
        if self._some_epochs_rest and may_cut_weights(self):
            what = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP"
            raise ValueError(
                f"critic_epochs={args.critic_epochs} with num_iterations={args.num_iterations} leaves the critic out "
                f"of steps, which {what} cannot: it steps its own copies. Set it to None, or launch with DDP."
            )
        if args.policy_objective == "penalty":
            self._check_head("policy_objective", "penalty")

    def _check_head(self, field: str, value: Any) -> None:
        """Refuse a model whose distributions cannot be read off hidden states and a linear head."""
        config = self.roles.base.config.get_text_config()
        changed = [name for name in _LOGIT_FIELDS if getattr(config, name, None) not in (None, 1.0)]
        head = self.roles.base.get_output_embeddings()
        if changed or not isinstance(head, nn.Linear):
            raise ValueError(
                f"{field}={value!r} reads distributions off hidden states and a linear head, but this model has "
                f"{changed or type(head).__name__} behind them. Use PPO with policy_objective='clip'."
            )
        if self.is_fsdp_enabled or (self.is_deepspeed_enabled and is_deepspeed_zero3_enabled()):
            raise ValueError(
                f"{field}={value!r} reads the whole head outside of a forward, which FSDP and ZeRO-3 keep in pieces. "
                "Launch with DDP or ZeRO-2."
            )

    @property
    def penalty_coef(self) -> float:
        """Weight of KL(old || new) in the loss of this rollout."""
        return self.args.penalty_coef if self.penalty_controller is None else self.penalty_controller.penalty_coef

    # Hidden states, of which the exact KL is made: kept from the forward that gives the log-probabilities

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.args.policy_objective != "penalty":
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        kept: list[torch.Tensor] = []
        backbone = self.roles.base.base_model
        hook = backbone.register_forward_hook(lambda module, inputs, output: kept.append(output.last_hidden_state))
        try:
            result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        finally:
            hook.remove()
        if kept:  # a reference of its own has another backbone
            self._hidden = torch.cat(kept)
        return result

    def _take_hidden(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """`(B, C, H)` hidden states that predict each token, of the policy's last forward on `batch`."""
        hidden, self._hidden = before_each_token(self._hidden, batch), None
        return hidden

    def _head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        head = self.roles.base.get_output_embeddings()
        return head.weight, head.bias

    def _remember_head(self, mode: str) -> None:
        """Keep the old policy's head where training moves it; else the live one is the old one."""
        head = self._head()
        trains = any(part is not None and part.requires_grad for part in head)
        old = tuple(None if part is None else part.detach().clone() for part in head) if trains else None
        # An evaluation in the middle of a rollout's epochs must not replace the head of that rollout.
        self._old_heads = {**self._old_heads, mode: old}

    def _kl_to_old(self, batch: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """`(B, C)` exact KL(old || new) at the sampling temperature."""
        new = self._head()
        old = self._old_heads["train" if self.model.training else "eval"] or new
        scale = 1.0 / self.temperature
        heads = [w if b is None else (w * scale, b * scale) for w, b in (old, new)]
        rows = [h * scale if new[1] is None else h for h in (batch["old_hidden"], hidden)]
        return exact_kl(rows[0], heads[0], rows[1], heads[1], token_mask(batch), chunk_size=CHUNK_TOKENS)

    # Terms of the loss

    def _penalty_term(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        kl, mask = self._kl_to_old(batch, self._take_hidden(batch)), token_mask(batch)
        self._note({"policy/penalty_kl": masked_mean(kl.detach(), mask)}, mask.sum())
        return self.penalty_coef * kl.sum() / self._loss_divisor(batch)

    def _entropy_term(self, batch: dict[str, torch.Tensor], entropy: torch.Tensor) -> torch.Tensor:
        bonus, _ = entropy_loss(entropy, token_mask(batch), reduction="sum")
        return self.args.entropy_bonus_coef * bonus / self._loss_divisor(batch)

    @torch.no_grad()
    def _move_penalty(self) -> None:
        """After a rollout's last step: its KL, measured on all of its tokens, moves the coefficient of the next."""
        if self.penalty_controller is None or self._buffered_inputs is None or self._is_warm_up(self._step - 1):
            return  # of a policy that stood still the KL is 0, and says nothing
        total = torch.zeros(2, device=self.accelerator.device)
        for batch in self._buffered_inputs:
            self._logps(self.model, batch, "train")
            kl = self._kl_to_old(batch, self._take_hidden(batch))
            total += torch.stack([kl.sum(), token_mask(batch).sum().to(kl.dtype)])
        total = self.accelerator.reduce(total, reduction="sum")
        self.penalty_controller.update((total[0] / total[1].clamp(min=1)).item())
        self._metrics["train"]["policy/kl_after_update"].append((total[0] / total[1].clamp(min=1)).item())

    # Steps that are not taken

    def _is_warm_up(self, micro_batch: int) -> bool:
        """Whether this micro-batch, counted from the start of the run, belongs to a rollout for the critic alone."""
        rollout = micro_batch // (self.args.steps_per_generation * self.num_iterations)
        return rollout < self.args.critic_warmup_rollouts

    @property
    def _some_epochs_rest(self) -> bool:
        return self.critic != "none" and self.args.critic_epochs not in (None, self.num_iterations)

    def _critic_rests(self, micro_batch: int) -> bool:
        """Whether this micro-batch, counted from the start of the run, is of an epoch after the critic's last one."""
        epoch = micro_batch // self.args.steps_per_generation % self.num_iterations
        return self._some_epochs_rest and epoch >= self.args.critic_epochs and not self._is_warm_up(micro_batch)

    def _watch_kl(self, logps: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
        """Add a micro-batch to the KL of the step that is being gathered."""
        mask = token_mask(batch)
        kl = ratio_statistics(logps, batch["old_per_token_logps"], mask)["policy/approx_kl"]
        self._step_kl = self._step_kl + torch.stack([kl * mask.sum(), mask.sum().to(kl.dtype)])

    def _drop_gradients(self) -> None:
        if self.args.target_kl is not None:
            if not self._stopped:
                # Summed over all processes, so that all stop together.
                total = self.accelerator.reduce(self._step_kl, reduction="sum")
                self._stopped = bool(total[0] / total[1].clamp(min=1) > self.args.target_kl)
            self._step_kl = torch.zeros(2, device=self.accelerator.device)
            self._metrics["train"]["policy/skipped"].append(float(self._stopped))
        micro_batch = self._step - 1  # the step's micro-batches are counted by now
        warm_up, rests = self._is_warm_up(micro_batch), self._critic_rests(micro_batch)
        for name, parameter in self.model.named_parameters():
            if self._stopped or (rests if is_critic(name) else warm_up):
                parameter.grad = None

    # Optimizer

    def create_optimizer(self, *args, **kwargs):
        created = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.critic_learning_rate
        if created and rate is not None and self.critic != "none":
            critic = {id(p) for n, p in self.model.named_parameters() if is_critic(n)}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in critic]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in critic]
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """A caller's optimizer was made before the critic and the adapters were: what it lacks would never train."""
        if self.args.critic_learning_rate is not None:
            raise ValueError(
                f"critic_learning_rate={self.args.critic_learning_rate} has no effect on an optimizer of your own. "
                "Remove it, or pass no optimizer."
            )
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        lost = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in known]
        if lost:
            raise ValueError(
                f"optimizers[0] lacks {len(lost)} trained parameters, {lost[0]!r} first: the critic and new adapters "
                "are made by the trainer. Pass no optimizer, and set `optim`, `learning_rate`, `critic_learning_rate`."
            )
