"""What PPO writes to disk and reads back: the policy, every other role beside it, and the rollout in use."""

import json
import os
from collections import deque
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from ..models.adapters import check_adapter_weights, load_adapter_weights, save_scalar_adapter
from ..models.checkpoints import CompleteCheckpointMixin, load_state, weights_digest
from ..models.pooling import classifier_of, normalization_of
from ..models.reward_checkpoints import load_weights, plain_dtype, save_reward_config
from ..models.roles import CRITIC, POLICY, REFERENCE, REWARD, base_of
from ..models.score_wrappers import parts_of, unit_of
from ..models.sharding import add_frozen, is_in_pieces


# A checkpoint holds a rollout cut into batches: with another value of one of these it would be cut, repeated or
# reached otherwise, or its log-probabilities would be those of another distribution. Learning rates come back
# with the schedule, and the optimizer's settings with its state, so that others would be passed over in silence.
SAME_ON_RESUME = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
    "max_completion_length",
    "temperature",
    "seed",
    "data_seed",
    "policy_objective",
    "advantage_estimator",
    "reward_weights",
    "learning_rate",
    "critic_learning_rate",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "adaptive_kl_target",
    "penalty_kl_target",
)


class CheckpointMixin(CompleteCheckpointMixin):
    """The part of [`PPOTrainer`] that saves and resumes.

    A resumed run is the uninterrupted one, also from the middle of a rollout's epochs: what `Trainer` keeps is joined
    by the critic, the heads, the rollout with its place in the steps, the KL coefficient, the order of the data, and
    what was not logged yet.
    """

    _resumed_from: str | None = None
    _digests: dict[str, str] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._resumed_from = None  # the mixin below finds and checks the folder, and calls `_on_resume`
        self._step, self._buffered_inputs = 0, None  # a second run must not begin on the rollout of the first
        found = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.state.global_step == 0 and self.state.max_steps > 0 and self._buffered_inputs is None:
            raise ValueError(
                f"train_dataset gave no whole rollout of {self.args.generation_batch_size // self.num_generations} "
                "prompts, so no step was taken. Give more rows, or lower the batch."
            )
        return found

    def _on_resume(self, checkpoint: str) -> None:
        self._resumed_from = checkpoint
        saved, now = load_state(self._state_file(checkpoint)), self._run_shape()
        for name in sorted(now.keys() | saved["run"].keys()):
            value = saved["run"].get(name)
            if now.get(name) != value:
                raise ValueError(
                    f"{name}={now.get(name)!r}, but {checkpoint!r} was written with {value!r}, and the run in it does "
                    "not fit another value. Resume with the same one, or start a new run from the saved models."
                )
        if "len(train_dataset)" not in now and _epochs(checkpoint) > 0:
            raise ValueError(
                f"{checkpoint!r} was written in a later pass over streamed rows, whose place in the stream `Trainer` "
                "cannot find again. Load train_dataset into memory, or stream enough rows for one pass."
            )

    def _run_shape(self) -> dict[str, Any]:
        shape = {name: getattr(self.args, name) for name in SAME_ON_RESUME}
        shape["optim"] = str(getattr(self.args.optim, "value", self.args.optim))
        shape |= {"world_size": self.args.world_size, "critic": self.critic}
        if hasattr(self.train_dataset, "__len__"):
            shape["len(train_dataset)"] = len(self.train_dataset)
        return shape | self._frozen_digests()

    def _frozen_digests(self) -> dict[str, str]:
        """What says whether reference and reward models are those of the run; adapters are compared one by one."""
        if self._digests is None:
            models = {"reference": self.reference} if self.reference is not None else {}
            for name in ("reward_funcs", "token_rewards"):
                for index, function in enumerate(getattr(self, name)):
                    found = [getattr(part, "model", None) for part in parts_of(function)]
                    own = [m for m in found if isinstance(m, nn.Module) and m is not self.roles.model]
                    models |= {f"{name}[{index}]" + "'" * count: model for count, model in enumerate(own)}
            whole = {name: model for name, model in models.items() if not is_in_pieces(model)}
            self._digests = {f"weights of {name}": weights_digest(model) for name, model in whole.items()}
            units = {name: normalization_of(model) for name, model in models.items() if name != "reference"}
            units |= {"reward_adapter": unit_of(self.reward_funcs[0])}
            for name in (REWARD, CRITIC):
                if getattr(self.roles.base, f"{name}_head", None) is not None:
                    units[f"the {name} head"] = getattr(self.roles.base, f"{name}_head").score_normalization
            own = getattr(self.roles.base, CRITIC, None)
            if own is not None:
                units["the critic"] = normalization_of(own)
            self._digests |= {f"gain and bias of {name}": str(unit) for name, unit in units.items()}
        return self._digests

    def _state_file(self, folder: str) -> str:
        return os.path.join(folder, f"ppo_state_{self.args.process_index}.pt")

    # Data: `RepeatSampler` is seeded anew in every process, so that a later epoch would begin in the first one's order

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if self._resumed_from is not None and getattr(sampler, "generator", None) is not None:
            for _ in range(_epochs(self._resumed_from)):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    # Per process: the rollout in use, its place in the steps, the controller, and what waits to be logged

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        os.makedirs(output_dir, exist_ok=True)
        state = {
            "run": self._run_shape(),
            "step": self._step,
            "buffered_inputs": self._buffered_inputs,
            "stopped": self._stopped,
            "old_head": self._old_heads["train"],
            "penalty_coef": None if self.penalty_controller is None else self.penalty_controller.penalty_coef,
            "kl_coef": None if self.kl_controller is None else self.kl_controller.kl_coef,
            "logs": {name: _plain(values) for name, values in self._logs.items() if name != "images"},
        }
        torch.save(state, self._state_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        state = load_state(self._state_file(checkpoint), self.args.device)
        self._step, self._buffered_inputs = state["step"], state["buffered_inputs"]
        self._stopped, self._old_heads = state["stopped"], {"train": state["old_head"], "eval": None}
        if self.penalty_controller is not None:
            self.penalty_controller.penalty_coef = state["penalty_coef"]
        if self.kl_controller is not None:
            self.kl_controller.kl_coef = state["kl_coef"]
        for name, values in state["logs"].items():
            _restore(self._logs[name], values)

    # Weights

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # one state dict of all shards holds every role
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        policy, base = self.roles.model, self.roles.base
        critic = base._modules.pop(CRITIC, None)
        try:
            if isinstance(policy, PeftModel):
                # No `super()`: it takes every folder with an adapter for one of the policy's, critic and reward too,
                # and leaves one adapter trainable.
                load_adapter_weights(policy, POLICY, resume_from_checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        finally:
            if critic is not None:
                base._modules[CRITIC] = critic
        for name in (CRITIC, REWARD, REFERENCE):
            folder, head = os.path.join(resume_from_checkpoint, name), getattr(base, f"{name}_head", None)
            if name == CRITIC and critic is not None:
                load_weights(critic, folder)
            elif name == CRITIC and head is not None:
                load_adapter_weights(policy, REWARD if self.critic == "shared" else name, folder, head)
            elif os.path.isdir(folder):
                # Never trained, so it comes from where it came from before; if that has changed, say so.
                check_adapter_weights(policy, name, folder, head)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir if output_dir is not None else self.args.output_dir
        state = self.model.state_dict() if state_dict is None else state_dict
        state = add_frozen(state, self.model, {REFERENCE, REWARD, f"{REWARD}_head"})
        base = base_of(self.accelerator.unwrap_model(self.model))
        # PEFT looks through all modules for weights to save, and a critic may have adapters of its own.
        critic = base._modules.pop(CRITIC, None)
        try:
            super()._save(output_dir, {name: tensor for name, tensor in state.items() if not _is_foreign(name)})
        finally:
            if critic is not None:
                base._modules[CRITIC] = critic
        if not self.args.should_save:
            return
        if self.critic == "model":
            prefix = next(n for n, _ in self.model.named_modules() if n.split(".")[-1] == CRITIC) + "."
            own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            base.critic.save_pretrained(os.path.join(folder, CRITIC), state_dict=own)
            save_reward_config(
                os.path.join(folder, CRITIC),
                "last",
                plain_dtype(classifier_of(base.critic)),
                normalization_of(base.critic),
                is_critic=True,
            )
            self.processing_class.save_pretrained(os.path.join(folder, CRITIC))
        for name in (CRITIC, REWARD):
            if getattr(base, f"{name}_head", None) is not None:
                adapter = REWARD if self.critic == "shared" else name
                head = next(tensor for key, tensor in state.items() if key.endswith(f".{name}_head.weight"))
                unit = getattr(base, f"{name}_head").score_normalization
                place = os.path.join(folder, name)
                save_scalar_adapter(self.roles.model, adapter, head, place, state, unit, is_critic=name == CRITIC)
                self.processing_class.save_pretrained(os.path.join(folder, name))


def _epochs(checkpoint: str) -> int:
    """Finished passes over the data."""
    with open(os.path.join(checkpoint, TRAINER_STATE_NAME), encoding="utf-8") as file:
        return int(json.load(file)["epoch"])


def _plain(values: Any) -> Any:
    """Deques as lists, and what a reward function logged as text: a file read with `weights_only` holds no objects."""
    if isinstance(values, dict):
        return {name: _plain(value) for name, value in values.items()}
    if isinstance(values, (deque, list)):
        return [_plain(value) for value in values]
    return values if values is None or isinstance(values, (str, int, float)) else str(values)


def _restore(target: Any, values: Any) -> None:
    """Fill a deque, or a dictionary of deques, with what `_plain` made of it."""
    if isinstance(target, deque):
        target.clear()
        target.extend(values)
        return
    for name, value in values.items():
        _restore(target[name], value)


def is_critic(name: str) -> bool:
    parts = name.split(".")
    return CRITIC in parts or f"{CRITIC}_head" in parts


def _is_foreign(name: str) -> bool:
    """Whether a parameter belongs to a role with a folder of its own: a policy's file holds no foreign key."""
    parts = name.split(".")
    return is_critic(name) or REWARD in parts or f"{REWARD}_head" in parts
