"""What PPO's roles share is computed once: the frozen layers of the base, per rollout; no padding; fused adapters."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from transformers.utils import logging

from ..models.dense_rows import compute_dense_rows
from ..models.fused_blocks import fuse_blocks
from ..models.fused_lora import fuse_lora_updates
from ..models.roles import CRITIC, base_of
from ..models.trunk_cache import DEFAULT_GIB, TrunkCache, num_frozen_layers
from .launch import may_cut_weights


logger = logging.get_logger(__name__)

GIB = 2**30


class TrunkMixin:
    """The part of [`PPOTrainer`] that lets the lower layers run once per rollout.

    Where policy, reference, critic and reward are adapters on the upper layers of one base, the layers below give
    each of them the same hidden states, in every epoch. Replaying them is exact: bit for bit in a batch of the shape
    in which they were computed, up to the rounding of matrix products in another.
    """

    trunk: TrunkCache | None = None

    def _save_passes(self) -> None:
        """Set up all of it; the roles are complete, and train what they will train."""
        base = self.roles.base
        if self.args.skip_padding:
            critic = getattr(base, CRITIC, None)
            for model in [base] if critic is None else [base, base_of(critic)]:
                compute_dense_rows(model.base_model)
        in_pieces = may_cut_weights(self)
        if not in_pieces:
            fuse_lora_updates(self.roles.model)
            fuse_blocks(self.roles.model)
        asked = self.args.trunk_cache_gib
        if asked == 0:
            return
        layers, reason = num_frozen_layers(base), None
        if in_pieces:
            reason = "weights may be in pieces"
        elif layers == 0:
            reason = "the lowest layer trains or carries an adapter (`layers_to_transform`), or is not found"
        else:
            try:
                gib = DEFAULT_GIB if asked is None else asked
                trunk = TrunkCache(base, layers, max_bytes=int(gib * GIB))
                trunk.prove()
                trunk.enabled, self.trunk = False, trunk
            except ValueError as error:
                reason = str(error)
        if reason is not None and asked is not None:
            logger.warning(f"trunk_cache_gib={asked} has no effect: {reason}.")

    # On inside the steps of this trainer alone: elsewhere the model may be changed, or asked for other outputs

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._trunk_on():
            return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._trunk_on(), nullcontext() if self.trunk is None else self.trunk.apart():
            return super().prediction_step(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if self.trunk is not None and self.model.training:
            self.trunk.texts.clear()
        return super()._generate_and_score_completions(inputs)

    @contextmanager
    def _trunk_on(self) -> Iterator[None]:
        if self.trunk is not None:
            self.trunk.enabled = True
        try:
            yield
        finally:
            if self.trunk is not None:
                self.trunk.enabled = False

    # A rollout in use keeps its texts: computed again in other batches they would differ in the last bits

    def _texts_file(self, folder: str) -> str:
        return os.path.join(folder, f"ppo_texts_{self.args.process_index}.safetensors")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        in_use = self._step % (self.args.steps_per_generation * self.num_iterations) or self.penalty_controller
        if self.trunk is not None and self.trunk.texts and in_use:
            self.trunk.save(self._texts_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self.trunk is not None and os.path.isfile(self._texts_file(checkpoint)):
            try:
                self.trunk.load(self._texts_file(checkpoint))
            except ValueError as error:
                raise ValueError(
                    f"{checkpoint!r} was written on another base, or in another dtype or quantisation: {error} "
                    "Resume with the same model."
                ) from error
