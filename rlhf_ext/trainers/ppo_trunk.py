"""What PPO's roles share is computed once: the frozen lower layers of the base, per rollout; and no padding."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from transformers.utils import logging

from ..models.dense_rows import compute_dense_rows
from ..models.roles import CRITIC
from ..models.trunk_cache import DEFAULT_GIB, TrunkCache, num_frozen_layers


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
        """Set up both; the roles are complete, and train what they will train."""
        base = self.roles.base
        if self.args.skip_padding:
            for model in (base, getattr(base, CRITIC, None)):
                if model is not None:
                    compute_dense_rows(model.base_model)
        asked = self.args.trunk_cache_gib
        if asked == 0:
            return
        layers, reason = num_frozen_layers(base), None
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            reason = "weights may be in pieces"
        elif layers == 0:
            reason = "the lowest layer trains or carries an adapter; `layers_to_transform` puts them higher"
        else:
            try:
                gib = DEFAULT_GIB if asked is None else asked
                self.trunk = TrunkCache(base, layers, max_bytes=int(gib * GIB))
            except ValueError as error:
                reason = str(error)
        if reason is not None and asked is not None:
            logger.warning(f"trunk_cache_gib={asked} has no effect: {reason}.")

    def _texts(self, mode: str) -> object:
        """A context for a rollout: its texts, not those of the one before; an evaluation's are forgotten after it."""
        if self.trunk is None:
            return nullcontext()
        return _fresh(self.trunk) if mode == "train" else self.trunk.apart()


@contextmanager
def _fresh(trunk: TrunkCache) -> Iterator[None]:
    trunk.texts.clear()
    yield
