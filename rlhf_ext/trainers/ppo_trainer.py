"""PPO with a per-token KL reward and a critic, as three wraps around `GRPOTrainer`.

Rooms below do the work: formulas in `functional/`, roles in `models/`; `ppo_rollout.py` completes the rollout. Here
are only the seams.
"""

import copy
import textwrap
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head

from ..data.prompts import check_prompts, check_tokenizer
from ..functional import (
    AdaptiveKLController,
    AdaptivePenaltyController,
    compute_gae,
    discounted_returns,
    leave_one_out_advantages,
    masked_mean,
    policy_gradient_loss,
    value_loss,
)
from ..functional.advantages import baseline_advantages
from ..functional.statistics import ratio_statistics
from ..models.build import build_roles, choose_critic, load_policy, shortest_context, without_dropout
from ..models.dense_rows import compute_dense_rows
from ..models.fused_head import tile_fused_head
from ..models.generation import without_generation_defaults
from ..models.hub import known_commit, local_folder, with_base_revision
from ..models.positions import count_positions_from_mask
from ..models.rewards import AdapterReward, adapter_of, resolve_reward, resolve_rewards, resolve_token_rewards
from ..models.roles import CRITIC, checkpoint_context
from ..models.score_wrappers import CutAt, ScoreWrapper, parts_of, unit_of
from ..models.scoring import ModelReward, saved_normalization
from .launch import check_launch, prepare_frozen, reset_reentrant
from .ppo_batches import BatchesMixin
from .ppo_card import PPOCardMixin
from .ppo_checkpoint import CheckpointMixin, is_critic
from .ppo_config import PPOConfig
from .ppo_rewards import RewardsMixin
from .ppo_rollout import RolloutMixin, before_each_token, token_mask, whole_rows
from .ppo_throughput import StepClock, ThroughputMixin
from .ppo_trunk import TrunkMixin
from .ppo_update import StepGuard, UpdateMixin


class PPOTrainer(
    RewardsMixin,
    RolloutMixin,
    ThroughputMixin,
    BatchesMixin,
    TrunkMixin,
    UpdateMixin,
    CheckpointMixin,
    PPOCardMixin,
    GRPOTrainer,
):
    """
    Trainer for RLHF by proximal policy optimisation (Schulman et al. 2017, Ziegler et al. 2019, Stiennon et al. 2020).

    Each rollout samples one completion per prompt, pays the reward's score on the last real token and minus
    `kl_coef` x KL to the reference on every token, and trains policy and critic on it for `num_iterations` epochs.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            Policy. A `PeftModel` goes on training its adapter; the reference is that adapter as it is now.
        reward_funcs (`str`, `nn.Module`, `Callable`, or a list of these, *optional*):
            Rewards: folders or ids of reward models, sequence classifiers with one label, Python functions with TRL's
            signature. Summed with `args.reward_weights`.
        args ([`PPOConfig`], *optional*):
            Configuration.
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`):
            Rows with a column `prompt`, text or messages. Further columns reach the reward functions.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The policy's tokenizer; loaded from the model's folder if not given.
        reward_processing_classes (tokenizer or list of tokenizers, *optional*):
            One per reward in `reward_funcs`. A reward model with the policy's vocabulary is fed the rollout's own ids.
        callbacks, optimizers, quantization_config:
            As for [`~trl.GRPOTrainer`].
        peft_config (`PeftConfig`, *optional*):
            Puts a fresh adapter on the policy. The reference is then the bare base.
        critic_model (`str`, `PreTrainedModel` or `PeftModel`, *optional*):
            Critic of its own for `critic="model"`, a sequence classifier with one label and the policy's tokenizer.
            If not given it starts as a copy of the reward model.
        reward_adapter (`str`, *optional*):
            Folder of a reward adapter that was trained on the same base. It is the first reward (so the first of
            `args.reward_weights`), is added to the policy's base, and the
            critic starts as a copy of it (`critic="adapter"`), or as a second head on it (`critic="shared"`).
            Wrappers of [`~rlhf_ext.models.score_wrappers`] may stand around it, as around any reward.
        token_reward_funcs (`str`, `nn.Module`, `Callable`, or a list of these, *optional*):
            Rewards of single tokens, added to the score and the KL: functions with TRL's signature that return one
            list per completion, or reward models trained with `reward_aggregation="sum"` on the policy's tokens.
        probe_funcs (as `reward_funcs`, *optional*):
            Never paid, only logged for every rollout as `probe/NAME/mean` and `/std`: a gold reward, a second reward
            model, an [`~rlhf_ext.models.score_wrappers.EnsembleSpread`]. A score that rises while they turn is
            over-optimised (Stiennon et al. 2020, Sec. 4.3).

    Raises:
        ValueError: data, tokenizer, critic or rewards do not fit; before any training.
    """

    _tag_names = ["rlhf_ext", "ppo"]
    _name = "PPO"
    _paper = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": textwrap.dedent("""\
            @article{schulman2017proximal,
                title        = {{Proximal Policy Optimization Algorithms}},
                author       = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
                year         = 2017,
                eprint       = {arXiv:1707.06347},
            }"""),
    }

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: PPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        critic_model=None,
        reward_adapter: str | ScoreWrapper | None = None,
        token_reward_funcs=None,
        probe_funcs=None,
    ):
        args = PPOConfig("ppo") if args is None else copy.copy(args)  # the caller may use it for another trainer
        check_launch(args, model)
        set_seed(args.seed)  # adapters start at random
        if isinstance(model, str):
            kwargs = {**(args.model_init_kwargs or {})}
            if quantization_config is not None:
                kwargs["quantization_config"] = quantization_config
            kwargs.setdefault("trust_remote_code", args.trust_remote_code)
            source, model = model, load_policy(model, in_pieces=peft_config is not None, **kwargs)
            self.policy_source, revision = source, kwargs.get("revision")
            if not isinstance(model, PeftModel):
                self.base_revision = known_commit(source, revision)
                peft_config = with_base_revision(peft_config, source, revision)
            args.model_init_kwargs = None
            if processing_class is None:
                processing_class = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
        elif quantization_config is not None:
            raise ValueError("quantization_config has no effect on a model that is loaded already. Load it with it.")
        tokenizer = processing_class or AutoTokenizer.from_pretrained(model.config._name_or_path)
        check_tokenizer(tokenizer)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        batch_size = args.per_device_train_batch_size
        rewards = resolve_rewards(
            reward_funcs, reward_processing_classes, tokenizer, batch_size, trust_remote_code=args.trust_remote_code
        )
        options = {"batch_size": batch_size, "trust_remote_code": args.trust_remote_code}
        self.token_rewards = resolve_token_rewards(token_reward_funcs, tokenizer, **options)
        self.probes = resolve_rewards(probe_funcs, None, tokenizer, **options)
        if not rewards and reward_adapter is None:
            if not self.token_rewards:
                raise ValueError(
                    "reward_funcs is empty, and neither a reward_adapter nor token_reward_funcs was given: nothing "
                    "would be rewarded."
                )
            rewards = resolve_rewards(no_score, None, tokenizer, batch_size)
        treated_adapter, reward_adapter = reward_adapter, adapter_of(reward_adapter)
        self.critic, critic_model = choose_critic(
            args.critic,
            base=model,
            critic_model=critic_model,
            reward_adapter=reward_adapter,
            rewards=rewards,
            reward_weights=args.reward_weights,
            reads_values=args.advantage_estimator != "leave_one_out",
            policy_processing_class=tokenizer,
            trust_remote_code=args.trust_remote_code,
        )
        for name, dataset in [("train_dataset", train_dataset), *_named(eval_dataset)]:
            check_prompts(
                dataset,
                name,
                tokenizer,
                max_completion_length=args.max_completion_length,
                max_positions=shortest_context(model, critic_model),
                chat_template_kwargs=args.chat_template_kwargs,
            )

        self.roles = build_roles(
            model,
            critic=self.critic,
            critic_model=critic_model,
            reward_adapter=reward_adapter,
            value_unit=unit_of(treated_adapter, (args.reward_weights or [1.0])[0]),
            peft_config=peft_config,
            keep_reference=args.kl_coef > 0,
            keep_target=getattr(args, "mask_top_p", 1.0) < 1.0,
        )
        if reward_adapter is not None:
            # The first reward, so the first of `reward_weights`.
            self.adapter_reward = AdapterReward(
                self.roles.model,
                tokenizer.pad_token_id,
                batch_size,
                is_normalized=saved_normalization(local_folder(reward_adapter)) is not None,
                with_values=self.critic == "shared",
            )
            rewards = [resolve_reward(treated_adapter, lambda _: self.adapter_reward, tokenizer), *rewards]
            if self.critic == "shared" and any(isinstance(part, CutAt) for part in parts_of(rewards[0])):
                raise ValueError("critic='shared' reads values where the scores are read, and CutAt cuts that text.")
        if args.gradient_checkpointing and reward_adapter is not None:
            given = args.gradient_checkpointing_kwargs or {}
            given = {**given, "use_reentrant": False, "context_fn": checkpoint_context}
            # `Trainer` reads the new name when training starts, TRL the old one after each rollout.
            args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs = given

        without_dropout(self.roles.model, self.roles.reference, self.roles.target)
        self.roles.freeze()
        super().__init__(
            model=self.roles.model,
            reward_funcs=rewards,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.roles.unfreeze()
        trains_entropy = args.entropy_bonus_coef > 0
        tile_fused_head(self.roles.base, self.temperature, entropy_gradient=trains_entropy)
        self._save_passes()
        reset_reentrant(args)
        if optimizers[0] is not None:
            self._check_optimizer(optimizers[0])

        self.reference = self.roles.reference
        if self.reference is not None:
            add_fused_lm_head(self.reference, temperature=self.temperature)
            tile_fused_head(self.reference, self.temperature)
            if args.skip_padding:
                compute_dense_rows(self.reference.base_model)
            count_positions_from_mask(self.reference.base_model)
            self.reference = prepare_frozen(self.reference, self.accelerator)
        for part in [part for func in (*rewards, *self.probes, *self.token_rewards) for part in parts_of(func)]:
            if hasattr(part, "eos_token_ids"):
                part.eos_token_ids = set(self.eos_token_ids)
            if isinstance(part, ModelReward):
                part.model.to(self.accelerator.device)
        self.kl_controller = None
        if args.adaptive_kl_target is not None:
            self.kl_controller = AdaptiveKLController(
                args.kl_coef, target=args.adaptive_kl_target, horizon=args.kl_horizon
            )
        self.penalty_controller = None
        if args.penalty_kl_target is not None:
            self.penalty_controller = AdaptivePenaltyController(args.penalty_coef, target=args.penalty_kl_target)
        if args.policy_objective == "penalty":
            # A ratio is positive: with these bounds the parent's clip never binds.
            self.epsilon_low, self.epsilon_high = 1.0, float("inf")
        self._check_update()
        self._step_kl = torch.zeros(2, device=self.accelerator.device)
        if args.target_kl is not None or args.critic_warmup_rollouts:
            self.add_callback(StepGuard(self))
        self.add_callback(StepClock(self))
        # The parent's loss keeps its log-probabilities to itself; its forward's output does not.
        self._outputs = None
        self.model.register_forward_hook(self._keep_outputs)

    def _keep_outputs(self, module: nn.Module, args: Any, output: Any) -> None:
        if getattr(output, "log_probs", None) is not None:
            self._outputs = output

    @property
    def kl_coef(self) -> float:
        """Weight of the KL in the reward of the next rollout."""
        return self.args.kl_coef if self.kl_controller is None else self.kl_controller.kl_coef

    # First wrap, of `_calculate_rewards`: in ppo_rewards.py. Second wrap: values, reference, rewards, advantages

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._move_penalty()
            self._stopped = False
        with without_generation_defaults(self.roles.model), self._sampling():
            batch = super()._generate_and_score_completions(inputs)
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            rollout = self._complete_rollout(batch, mode)
        for name in ("old_per_token_logps", "old_hidden", "advantages", "values", "returns"):
            if name in rollout:
                batch[name] = rollout[name]
        if self.args.policy_objective == "pg":
            batch.pop("old_per_token_logps", None)
        self._log_rollout(rollout, mode)
        self._log_completions(batch, mode)
        return batch

    def compute_advantages(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages and returns of a rollout, before whitening. Override to try another estimator.

        Args:
            batch (`dict[str, torch.Tensor]`):
                `rewards`, `mask` and, with a critic, `values` of shape `(B, C)` (the value before token t), and
                `bootstrap_values` of shape `(B,)` with `bootstrap_truncated`.

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
            mean = masked_mean(self._gather(returns), self._gather(mask.long()).bool())
            values = mean.expand(mask.shape)
        return baseline_advantages(returns, values, mask), returns

    # Third wrap: the value loss over the parent's own divisor

    def _compute_loss(self, model, inputs):
        if self._stopped and self.model.training:
            # The rest of the rollout is not trained on; its steps pass without a forward.
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        loss = self.compute_policy_loss(inputs, model)
        if self.model.training and self._is_warm_up(self._step):
            loss = loss * 0.0  # not left out: DDP waits for every gradient
        if self.critic == "none":
            return loss
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
        self._log_means(
            # One micro-batch's share of the step, times their number: the mean that is logged is the step's loss.
            {
                "value_loss": critic_loss.detach() / divisor * parts,
                "value/clip_fraction": metrics["value_clip_fraction"],
            }
        )
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
        outputs, self._outputs, length = self._outputs, None, batch["completion_ids"].size(1)
        logps = outputs.log_probs.detach()[:, -length:]
        if self.args.policy_objective == "pg":
            # With a ratio of 1 the parent's gradient is that of REINFORCE; its value is not, so it is put right.
            shown, _ = policy_gradient_loss(logps, batch["advantages"], token_mask(batch), reduction="sum")
            loss = loss + (shown / self._loss_divisor(batch) - loss.detach())
        else:
            self._log_means(ratio_statistics(logps, batch["old_per_token_logps"], token_mask(batch)))
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


def no_score(prompts: list, **kwargs: Any) -> list[float]:
    """The score of a run whose tokens alone are rewarded."""
    return [0.0] * len(prompts)


def _named(eval_dataset) -> list[tuple[str, Any]]:
    if isinstance(eval_dataset, dict):
        return [(f"eval_dataset[{name!r}]", dataset) for name, dataset in eval_dataset.items()]
    return [("eval_dataset", eval_dataset)]
