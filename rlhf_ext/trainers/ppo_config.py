"""Arguments of [`PPOTrainer`]."""

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from .ppo_config_checks import ConfigChecks


class _One(int):
    """The number 1 that passes the parent's `num_generations < 2`: its code runs with one completion per prompt."""

    def __lt__(self, other: object) -> bool:
        return False


@dataclass
class PPOConfig(ConfigChecks, GRPOConfig):
    r"""
    Configuration of [`PPOTrainer`]: TRL's [`~trl.GRPOConfig`] with the fields of classic RLHF.

    TRL's own fields keep their meaning. `generation_batch_size` (or `steps_per_generation`) is the rollout,
    `num_iterations` the PPO epochs, and a rollout gives `num_iterations * steps_per_generation /
    gradient_accumulation_steps` optimizer steps. Only the fields below are new or have another default; a parent's
    field that does not compose raises.

    Parameters that control the objective:
        policy_objective (`str`, *optional*, defaults to `"clip"`):
            `"clip"`: PPO-Clip (Schulman et al. 2017, eq. 7). `"penalty"`: PPO-Penalty (eq. 8), with the exact KL over
            the vocabulary. `"pg"`: REINFORCE or actor-critic, without a ratio.
        penalty_coef (`float`, *optional*, defaults to `1.0`):
            Weight of KL(old || new) in the loss of `"penalty"`.
        penalty_kl_target (`float`, *optional*):
            KL(old || new) that an update should reach, nats per token: after each rollout `penalty_coef` is halved
            below target / 1.5 and doubled above 1.5 target. `None` keeps it fixed.
        target_kl (`float`, *optional*):
            Early stop: an optimizer step whose mean approximate KL to the old policy (nats per token) is above it,
            and the rollout's steps after it, are not taken. They count for `max_steps` and the schedule. Needs more
            than one optimizer step per rollout: the first one starts from the old policy.
        entropy_bonus_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the mean entropy per token, with the divisor of the policy loss.
        epsilon_value (`float`, *optional*, defaults to `0.2`):
            Clip range of the value loss; `None` switches it off.
        vf_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the value loss.
        num_iterations (`int`, *optional*, defaults to `4`):
            PPO epochs per rollout.

    Parameters that control rewards and advantages:
        kl_coef (`float`, *optional*, defaults to `0.05`):
            Weight of the KL to the reference inside the per-token reward (Ziegler et al. 2019, eq. 2). With 0 no
            reference is kept.
        adaptive_kl_target (`float`, *optional*):
            Target of the KL controller in nats summed per sequence. `None` keeps `kl_coef` fixed.
        kl_estimator (`str`, *optional*, defaults to `"k1"`):
            Estimator of the KL inside the reward. Only `"k1"` has an unbiased gradient there; `"k2"` and `"k3"` warn.
            What is logged as `kl`, and moves `kl_coef`, is k1 always.
        kl_horizon (`int`, *optional*, defaults to `10000`):
            Horizon of the KL controller in sequences.
        advantage_estimator (`str`, *optional*, defaults to `"gae"`):
            `"gae"`, `"returns"` (reward-to-go, minus the value where there is a critic), `"leave_one_out"` (the bandit
            view, needs `num_generations >= 2`).
        baseline (`str`, *optional*, defaults to `"none"`):
            For `advantage_estimator="returns"` without a critic: `"batch_mean"` subtracts the mean return of all
            tokens of the rollout. Needs `whiten_advantages=False`, since whitening subtracts any constant again.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount per token.
        gae_lambda (`float`, *optional*, defaults to `0.95`):
            Lambda of GAE.
        bootstrap_truncated (`bool`, *optional*, defaults to `False`):
            Whether the critic's value follows the last token of a completion that was cut by length.
        whiten_rewards (`bool`, *optional*, defaults to `False`):
            Whether per-token rewards are scaled to variance 1, their mean kept.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Whether advantages are whitened over all real tokens of the rollout, on all processes together.
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt.

    Parameters that control speed and memory:
        skip_padding (`bool`, *optional*, defaults to `True`):
            Whether padding is left out of what is computed: models read rows without it, rows of like length go
            through them together, an optimizer step's rows are split into its micro-batches by length, such that the
            largest has as few tokens as possible, several samples of a prompt read it once, and rows that have ended
            leave the batch that is sampled. A step's gradient is the same, and so is the distribution that is sampled
            from.
        trunk_cache_gib (`float`, *optional*):
            Where adapters stand on the upper layers only, the layers below give the same hidden states to every role
            and epoch: they are computed once per rollout and kept in the CPU's memory, at most this many GiB of them;
            what lies beyond is computed each time. `0` switches it off; unset takes 1 GiB wherever it is exact.

    Parameters that control the critic:
        critic (`str`, *optional*):
            `"adapter"`: an adapter on the policy's base, started from `reward_adapter`. `"shared"`: a second head on
            the frozen `reward_adapter`; only that head trains. `"model"`: a model of its own.
            `"none"`: no critic. Unset: `"none"` where no value is used (`leave_one_out`), else `"adapter"` if a
            `reward_adapter` is given, else `"model"`.
        critic_learning_rate (`float`, *optional*):
            Learning rate of the critic, on the policy's schedule. `None` takes `learning_rate`.
        critic_epochs (`int`, *optional*):
            The critic trains in the first so many of a rollout's `num_iterations` epochs; in the rest neither its
            forward nor its backward is computed. `None` trains it in all. One process or DDP.
        critic_warmup_rollouts (`int`, *optional*, defaults to `0`):
            Rollouts at the start that train the critic, in every epoch, and leave the policy as it is.

    Raises:
        ValueError: a value is out of range, or a field of the parent does not compose; the message names the field,
            the value and the remedy.
    """

    # Parameters with another default than the parent's
    learning_rate: float = field(default=3e-6, metadata={"help": "Learning rate of the policy."})
    num_generations: int | None = field(default=1, metadata={"help": "Completions per prompt."})
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs per rollout."})
    disable_dropout: bool = field(default=True, metadata={"help": "Has to stay True: no dropout in any role."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter takes part; True fails with roles on one base."}
    )

    # Parameters that control the objective
    policy_objective: str = field(default="clip", metadata={"help": "'clip', 'penalty' or 'pg'."})
    penalty_coef: float = field(default=1.0, metadata={"help": "Weight of KL(old || new) under 'penalty'."})
    penalty_kl_target: float | None = field(
        default=None, metadata={"help": "KL(old || new) of an update, nats per token; None keeps penalty_coef fixed."}
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "Approximate KL at which the rest of a rollout's steps is left out."}
    )
    entropy_bonus_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    epsilon_value: float | None = field(
        default=0.2, metadata={"help": "Clip range of the value loss; None switches it off."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})

    # Parameters that control rewards and advantages
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL to the reference inside the reward."})
    adaptive_kl_target: float | None = field(
        default=None, metadata={"help": "Target of the KL controller, nats per sequence; None keeps kl_coef fixed."}
    )
    kl_estimator: str = field(default="k1", metadata={"help": "'k1', 'k2' or 'k3': the KL inside the reward."})
    kl_horizon: int = field(default=10_000, metadata={"help": "Horizon of the KL controller in sequences."})
    advantage_estimator: str = field(default="gae", metadata={"help": "'gae', 'returns' or 'leave_one_out'."})
    baseline: str = field(
        default="none", metadata={"help": "'none' or 'batch_mean': subtracted from unwhitened 'returns'."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    bootstrap_truncated: bool = field(
        default=False, metadata={"help": "Whether the critic's value follows a completion cut by length."}
    )
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Whether rewards are scaled to variance 1, their mean kept."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Whether advantages are whitened over the whole rollout."}
    )

    # Parameters that control speed and memory
    skip_padding: bool = field(
        default=True, metadata={"help": "Whether no padding is computed; gradients and distributions are the same."}
    )
    trunk_cache_gib: float | None = field(
        default=None,
        metadata={
            "help": "Memory of the CPU for outputs of frozen lower layers; 0 is off, None takes 1 if it is exact."
        },
    )

    # Parameters that control the critic
    critic: str | None = field(
        default=None, metadata={"help": "'adapter', 'shared', 'model' or 'none'; unset chooses."}
    )
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic; None takes learning_rate."}
    )
    critic_epochs: int | None = field(
        default=None, metadata={"help": "Epochs of a rollout that train the critic; None is num_iterations."}
    )
    critic_warmup_rollouts: int = field(
        default=0, metadata={"help": "Rollouts that train the critic alone before the policy moves."}
    )

    def __post_init__(self) -> None:
        if self.num_generations_eval not in (None, self.num_generations):
            raise ValueError(
                f"num_generations_eval={self.num_generations_eval} is not num_generations={self.num_generations}: "
                "evaluation samples as training does. Remove it."
            )
        if self.num_generations is None or self.num_generations < 1:
            raise ValueError(f"num_generations={self.num_generations} must be at least 1, completions per prompt.")
        if self.num_generations == 1:
            self.num_generations = _One(1)
        self.num_generations_eval = self.num_generations
        if self.ddp_find_unused_parameters is None:  # `Trainer` would read it as True for a model with adapters
            self.ddp_find_unused_parameters = False
        super().__post_init__()
        self.num_generations = self.num_generations_eval = int(self.num_generations)
        self._check_parent_fields()
        self._check_own_fields()

    @property
    def optimizer_steps_per_rollout(self) -> int:
        return self.num_iterations * self.steps_per_generation // self.gradient_accumulation_steps

    def to_dict(self) -> dict[str, Any]:
        config = super().to_dict()
        for name, kwargs in config.items():
            # Under its old and its new name. Loggers write this dictionary as JSON, which knows no functions.
            if isinstance(kwargs, dict) and callable(kwargs.get("context_fn")):
                config[name] = {**kwargs, "context_fn": kwargs["context_fn"].__name__}
        return config
