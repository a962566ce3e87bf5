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
)
from ..models.build import build_roles, load_policy, shortest_context, without_dropout
from ..models.critics import choose_critic
from ..models.dense_rows import compute_dense_rows
from ..models.fused_head import tile_fused_head
from ..models.generation import without_generation_defaults
from ..models.hub import known_commit, local_folder, with_base_revision
from ..models.positions import count_positions_from_mask
from ..models.rewards import (
    AdapterReward,
    adapter_of,
    resolve_probes,
    resolve_reward,
    resolve_rewards,
    resolve_token_rewards,
)
from ..models.roles import checkpoint_context
from ..models.score_wrappers import CutAt, ScoreWrapper, parts_of, unit_of
from ..models.scoring import ModelReward, saved_normalization
from .evaluation import EvaluationMixin
from .launch import check_launch, prepare_frozen, reset_reentrant
from .ppo_batches import BatchesMixin
from .ppo_card import PPOCardMixin
from .ppo_checkpoint import CheckpointMixin
from .ppo_config import PPOConfig
from .ppo_loss import LossMixin
from .ppo_rewards import RewardsMixin
from .ppo_rollout import RolloutMixin
from .ppo_step_metrics import StepMetricsMixin
from .ppo_throughput import StepClock, ThroughputMixin
from .ppo_trunk import TrunkMixin
from .ppo_update import StepGuard, UpdateMixin


class PPOTrainer(
    RewardsMixin,
    RolloutMixin,
    LossMixin,
    EvaluationMixin,
    StepMetricsMixin,
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
            With `critic="adapter"` the folder of a critic adapter, such as the `critic/` of an earlier run. If not
            given it starts as a copy of the reward model.
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
        self.probes = resolve_probes(probe_funcs, tokenizer, **options)
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
                max_positions=shortest_context(model, None if isinstance(critic_model, str) else critic_model),
                chat_template_kwargs=args.chat_template_kwargs,
                rollout_prompts=args.generation_batch_size // args.num_generations if name == "train_dataset" else 1,
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
            if isinstance(part, ModelReward):
                part.set_policy(tokenizer)  # one that the caller built may know another policy, or none
            if hasattr(part, "eos_token_ids"):
                part.eos_token_ids = set(self.eos_token_ids)
            if hasattr(part, "chat_template_kwargs"):
                part.chat_template_kwargs = dict(args.chat_template_kwargs or {})
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
        if args.target_kl is not None or args.critic_warmup_rollouts or self._some_epochs_rest:
            self.add_callback(StepGuard(self))
        self.add_callback(StepClock(self))
        self._begin_notes()
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

    # Third wrap, of `_compute_loss`: in ppo_loss.py


def no_score(prompts: list, **kwargs: Any) -> list[float]:
    """The score of a run whose tokens alone are rewarded."""
    return [0.0] * len(prompts)


def _named(eval_dataset) -> list[tuple[str, Any]]:
    if isinstance(eval_dataset, dict):
        return [(f"eval_dataset[{name!r}]", dataset) for name, dataset in eval_dataset.items()]
    return [("eval_dataset", eval_dataset)]
