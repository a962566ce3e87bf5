"""What PPO writes to disk and reads back: the policy, and every other role beside it."""

import os

from ..models.adapters import save_scalar_adapter
from ..models.roles import CRITIC, REWARD, base_of


class CheckpointMixin:
    """The part of [`PPOTrainer`] that saves and resumes."""

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint:
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}: exact resuming is not part of this version, "
                "and resuming it inexactly would go unnoticed. Start a new run from the saved policy and critic."
            )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir if output_dir is not None else self.args.output_dir
        state = self.model.state_dict() if state_dict is None else state_dict
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
            self.processing_class.save_pretrained(os.path.join(folder, CRITIC))
        for name in (CRITIC, REWARD):
            head = getattr(base, f"{name}_head", None)
            if head is not None:
                save_scalar_adapter(self.roles.model, name, head.weight, os.path.join(folder, name))
                self.processing_class.save_pretrained(os.path.join(folder, name))


def is_critic(name: str) -> bool:
    parts = name.split(".")
    return CRITIC in parts or f"{CRITIC}_head" in parts


def _is_foreign(name: str) -> bool:
    """Whether a parameter belongs to a role with a folder of its own: a policy's file holds no foreign key."""
    parts = name.split(".")
    return is_critic(name) or REWARD in parts or f"{REWARD}_head" in parts
