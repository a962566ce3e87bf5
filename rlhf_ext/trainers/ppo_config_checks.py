"""What of [`PPOConfig`] does not go together, said before anything is loaded."""

from dataclasses import fields
from typing import Any

from transformers.utils import logging
from trl import GRPOConfig

from .hub import refuse_stored_token


logger = logging.get_logger(__name__)


# Fields of the parent that would change the objective, the sampling distribution or the bookkeeping behind our back,
# with the only value that composes and the reason. `tests/trainers/test_ppo_config.py` diffs the parent's fields
# against this table and the inherited ones, so that a new flag upstream cannot slip through.
ONLY_VALUE: dict[str, tuple[Any, str]] = {
    "beta": (0.0, "the KL to the reference goes into the reward; set `kl_coef`"),
    "loss_type": ("dapo", "any other divisor depends on how the batch is split into micro-batches"),
    "entropy_coef": (0.0, "its mean per micro-batch depends on how the batch is split"),
    "use_adaptive_entropy": (False, "it drives `entropy_coef`"),
    "top_entropy_quantile": (1.0, "PPO trains on every token"),
    "importance_sampling_level": ("token", "advantages are per token"),
    "off_policy_mask_threshold": (None, "it drops whole sequences by their group advantage"),
    "use_bias_correction_kl": (True, "it belongs to `beta`, and has no effect without it"),
    "scale_rewards": ("group", "group statistics are not used; see `whiten_rewards` and `whiten_advantages`"),
    "multi_objective_aggregation": ("sum_then_normalize", "scores are summed with `reward_weights`"),
    "mask_truncated_completions": (False, "it empties the mask of a truncated row; its KL and values count here"),
    "sync_ref_model": (False, "the reference of the KL term stays fixed"),
    "top_p": (1.0, "sampling would differ from the distribution that the ratio is taken of"),
    "top_k": (0, "sampling would differ from the distribution that the ratio is taken of"),
    "min_p": (None, "sampling would differ from the distribution that the ratio is taken of"),
    "repetition_penalty": (1.0, "sampling would differ from the distribution that the ratio is taken of"),
    "disable_dropout": (True, "with dropout the ratio differs from 1 before the first update"),
    "router_aux_loss_coef": (None, "mixtures of experts are untested here"),
    "use_vllm": (False, "the parent would push every named parameter to it, adapters and heads of other roles too"),
    "use_transformers_continuous_batching": (False, "it is untested with roles on one base"),
    "transformers_continuous_batching_config": (None, "continuous batching is not used"),
    "use_transformers_paged": (False, "deprecated alias of continuous batching"),
    "use_liger_kernel": (False, "it replaces the forward that carries the roles"),
    "cast_lm_head_to_fp32": (False, "the reference would keep its own precision and the KL would not start at 0"),
    "load_best_model_at_end": (False, "the parent would load the policy and leave the critic behind"),
    "neftune_noise_alpha": (None, "noise in the embeddings moves the ratio off 1 before the first update"),
    "remove_unused_columns": (False, "every column of a row belongs to the reward functions"),
    "label_smoothing_factor": (0.0, "there are no labels"),
    "ignore_data_skip": (False, "a resumed run would begin with the first prompts again"),
    "auto_find_batch_size": (False, "a halved batch breaks the rollout"),
    "max_tool_calling_iterations": (None, "tools are not supported"),
    "bf16_full_eval": (False, "an evaluation would round what trains, for good"),
    "fp16_full_eval": (False, "an evaluation would round what trains, for good"),
    "enable_jit_checkpoint": (False, "it saves in the middle of a step, where a rollout has no place to go on from"),
    "train_sampling_strategy": ("random", "prompts are drawn for rollouts, whatever their length"),
    "ddp_static_graph": (None, "policy and critic are two forwards of one graph"),
}

# Sampling arguments that may pass through `generation_kwargs` without changing the distribution.
_NEUTRAL_GENERATION_KWARGS = {"use_cache", "cache_implementation"}


class ConfigChecks:
    """The part of [`PPOConfig`] that refuses: fields of the parent, values, and fields that nothing would read."""

    def _check_parent_fields(self) -> None:
        defaults = {f.name: f.default for f in fields(GRPOConfig)}
        for name, (value, reason) in ONLY_VALUE.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not compose with PPO: {reason}. Leave it at {value!r}."
                )
        for name, default in defaults.items():
            if (
                name.startswith(("vllm_", "sapo_", "vespo_", "ref_model_", "entropy_coef_"))
                or name == "entropy_target"
            ):
                if getattr(self, name) != default:
                    raise ValueError(f"{name}={getattr(self, name)!r} has no effect on PPO. Remove it.")
        extra = set(self.generation_kwargs or {}) - _NEUTRAL_GENERATION_KWARGS
        if extra:
            raise ValueError(
                f"generation_kwargs has {sorted(extra)}, which may change the distribution that is sampled from. "
                f"Only {sorted(_NEUTRAL_GENERATION_KWARGS)} pass."
            )

    def _check_own_fields(self) -> None:
        refuse_stored_token(self.hub_token)
        choices = {
            "policy_objective": ("clip", "penalty", "pg"),
            "kl_estimator": ("k1", "k2", "k3"),
            "baseline": ("none", "batch_mean"),
            "advantage_estimator": ("gae", "returns", "leave_one_out"),
            "critic": (None, "adapter", "shared", "model", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Choose one of {allowed}.")
        for name in ("gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1.")
        positive = ("temperature", "kl_horizon", "adaptive_kl_target", "epsilon", "epsilon_high", "epsilon_value")
        for name in (*positive, "penalty_coef", "penalty_kl_target", "target_kl"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be positive. Use None where it can be switched off."
                )
        for name in (
            "kl_coef",
            "vf_coef",
            "trunk_cache_gib",
            "critic_learning_rate",
            "entropy_bonus_coef",
            "critic_warmup_rollouts",
        ):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if self.critic_epochs is not None and not 1 <= self.critic_epochs <= self.num_iterations:
            raise ValueError(
                f"critic_epochs={self.critic_epochs} must lie between 1 and num_iterations={self.num_iterations}, the "
                "epochs of a rollout. Use None to train the critic in all of them."
            )
        if self.adaptive_kl_target is not None and self.generation_batch_size >= 5 * self.kl_horizon:
            raise ValueError(
                f"kl_horizon={self.kl_horizon} is too short for rollouts of {self.generation_batch_size} completions: "
                "the coefficient could turn negative. Set it above a fifth of the rollout, better to many rollouts."
            )
        if self.delta is not None and not self.delta > 1:
            raise ValueError(f"delta={self.delta} must be above 1: it caps the ratio. Use None to leave it out.")
        if self.adaptive_kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_coef=0 stays 0 under adaptive_kl_target, whose rule multiplies. Start above 0.")
        if self.advantage_estimator == "leave_one_out" and self.num_generations < 2:
            raise ValueError(
                f"advantage_estimator='leave_one_out' with num_generations={self.num_generations} gives advantages of "
                "0: a completion is compared with the others of its prompt. Set num_generations to 2 or more."
            )
        if self.critic == "none" and self.advantage_estimator == "gae":
            raise ValueError(
                "advantage_estimator='gae' needs values, but critic='none'. Use 'returns' or 'leave_one_out'."
            )
        if self.advantage_estimator == "leave_one_out" and self.critic not in (None, "none"):
            raise ValueError(
                f"critic={self.critic!r} is not read by advantage_estimator='leave_one_out'. Set it to 'none'."
            )
        if self.bootstrap_truncated and self.advantage_estimator != "gae":
            raise ValueError(
                f"bootstrap_truncated=True is read by advantage_estimator='gae' only, not by "
                f"{self.advantage_estimator!r}. Set it to False."
            )
        if self.critic_learning_rate is not None and (
            self.critic == "none" or self.advantage_estimator == "leave_one_out"
        ):
            raise ValueError(
                f"critic_learning_rate={self.critic_learning_rate} has no effect without a critic. Remove it."
            )
        if self.ddp_find_unused_parameters:
            raise ValueError(
                "ddp_find_unused_parameters=True fails: policy and critic share a base, so DDP would mark its "
                "parameters twice. Set it to False; every trained parameter takes part."
            )
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs has use_reentrant=True, which loses the critic's gradients on one base "
                "and fails under DDP and ZeRO-3. Set it to False, or leave it out."
            )
        if self.steps_per_generation % self.gradient_accumulation_steps != 0:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} is no multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: a step would mix rollouts."
            )
        if (
            self.policy_objective == "pg"
            and self.num_iterations * self.steps_per_generation != self.gradient_accumulation_steps
        ):
            raise ValueError(
                "policy_objective='pg' has no ratio to correct for stale samples, so a rollout gives one optimizer "
                f"step. Set num_iterations=1 and steps_per_generation={self.gradient_accumulation_steps} "
                f"(now {self.num_iterations} and {self.steps_per_generation})."
            )

        self._check_without_effect()

    def _check_without_effect(self) -> None:
        """A field that the chosen objective, estimator or critic never reads looks like one that works."""
        default = {f.name: f.default for f in fields(type(self))}
        objective, estimator = self.policy_objective, self.advantage_estimator
        has_critic = self.critic != "none" and estimator != "leave_one_out"
        steps = self.optimizer_steps_per_rollout
        read_by_penalty = (objective == "penalty", f"policy_objective={objective!r} has no penalty")
        read_by_clip = (objective == "clip", f"policy_objective={objective!r} clips no ratio")
        read_by_critic = (has_critic, f"advantage_estimator={estimator!r} with critic={self.critic!r} has no critic")
        read = {
            "penalty_coef": read_by_penalty,
            "penalty_kl_target": read_by_penalty,
            "epsilon": read_by_clip,
            "epsilon_high": read_by_clip,
            "delta": read_by_clip,
            "target_kl": (
                objective != "pg" and steps > 1,
                f"policy_objective={objective!r} with {steps} optimizer step(s) per rollout never measures a policy "
                "that has moved, for it does so before a step",
            ),
            "baseline": (
                estimator == "returns" and self.critic == "none" and not self.whiten_advantages,
                f"advantage_estimator={estimator!r} with critic={self.critic!r} and whiten_advantages="
                f"{self.whiten_advantages} has a baseline already; it is for 'returns', 'none' and False",
            ),
            "gae_lambda": (estimator == "gae", f"advantage_estimator={estimator!r} has no lambda"),
            "gamma": (estimator != "leave_one_out", "advantage_estimator='leave_one_out' adds rewards up"),
            "epsilon_value": read_by_critic,
            "vf_coef": read_by_critic,
            "critic_epochs": read_by_critic,
            "critic_warmup_rollouts": read_by_critic,
            "kl_estimator": (self.kl_coef > 0, "kl_coef=0 charges no KL"),
            "kl_horizon": (self.adaptive_kl_target is not None, "adaptive_kl_target=None keeps kl_coef fixed"),
        }
        for name, (is_read, reason) in read.items():
            if not is_read and getattr(self, name) != default[name]:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect: {reason}. Remove it.")
        if self.kl_estimator != "k1":
            logger.warning(
                f"kl_estimator={self.kl_estimator!r} inside the reward has a biased gradient, 'k1' has not. Use it to "
                "reproduce a paper."
            )
