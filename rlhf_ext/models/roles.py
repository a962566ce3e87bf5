"""Which adapter a forward runs under, and the one entry through which every role is reached.

Policy, reference, critic and reward model can share one frozen base: they are named PEFT adapters (or none, for the
reference of a fresh adapter), and two scalar heads. A role is chosen by writing the active adapter on a *cached* list
of tuner layers. PEFT's own `set_adapter`, `use_adapter` and `disable_adapter` are never used around a training
forward: they clear the critic's `requires_grad`, and its gradients then vanish without an error.
"""

import functools
import types
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .positions import count_positions_from_mask
from .scoring import token_scores


POLICY, REFERENCE, CRITIC, REWARD, TARGET = "default", "ref", "critic", "reward", "target"
SCORE_AND_VALUE = "reward+critic"
"""Role of a forward that gives both, where critic and reward share their trunk."""

# Every live switch of the process. Gradient checkpointing needs a module-level function (see `checkpoint_context`),
# and two trainers may live side by side, so it has to take a snapshot of all of them.
_SWITCHES: "weakref.WeakSet[RoleSwitch]" = weakref.WeakSet()


class RoleSwitch:
    """Sets the active adapter of a [`~peft.PeftModel`] for the duration of a `with` block.

    Build it after all adapters exist and before anything with adapters of its own is attached to the base. For a model
    without adapters every role is the model itself and `use` does nothing.
    """

    def __init__(self, model: nn.Module):
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        # Cached: walking `modules()` takes about a millisecond per switch on a 28-layer model.
        self._layers = [module for module in model.modules() if isinstance(module, kinds)]
        _SWITCHES.add(self)

    @property
    def state(self) -> list[tuple[Any, bool]]:
        return [(layer._active_adapter, layer._disable_adapters) for layer in self._layers]

    @state.setter
    def state(self, state: list[tuple[Any, bool]]) -> None:
        for layer, (active, disabled) in zip(self._layers, state, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled

    @contextmanager
    def use(self, adapter: str | None) -> Iterator[None]:
        """Run under `adapter`, or under the bare base with `None`. No `requires_grad` is touched."""
        before = self.state
        self.state = [([adapter] if adapter else active, adapter is None) for active, _ in before]
        try:
            yield
        finally:
            self.state = before


@contextmanager
def _restored(snapshots: list[tuple[RoleSwitch, list[tuple[Any, bool]]]]) -> Iterator[None]:
    now = [(switch, switch.state) for switch, _ in snapshots]
    for switch, state in snapshots:
        switch.state = state
    try:
        yield
    finally:
        for switch, state in now:
            switch.state = state


def checkpoint_context() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of `torch.utils.checkpoint`: recompute in backward under the roles of the forward.

    Without it the recomputation runs under whatever adapter is active then, and the gradients are wrong without an
    error (peft#2832). A module-level function, because `gradient_checkpointing_kwargs` is pickled into
    `training_args.bin`: a bound method would drag the weights of the base along.
    """
    return nullcontext(), _restored([(switch, switch.state) for switch in _SWITCHES])


def base_of(model: nn.Module) -> PreTrainedModel:
    """The causal language model itself, below a possible PEFT wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def bind_roles(model: nn.Module, switch: RoleSwitch, *, shared_trunk: bool = False) -> None:
    """Give the causal language model a keyword `role`, and positions that follow the attention mask.

    `model(input_ids=..., attention_mask=..., role="critic" | "reward")` returns one number per position, `(B, T)` in
    float32; `role="default"` gives the policy's last hidden states, `(B, T, H)`; without `role` the forward is the
    original one. The critic is thereby reached through the same wrapped
    forward as the policy (PEFT, DDP, DeepSpeed and FSDP hand keywords on), so that no second path is needed for
    preparing, clipping or synchronising gradients.

    A critic of its own is the submodule `critic` of the base, a sequence classifier; one that is an adapter has its
    head in the submodule `critic_head`, the frozen reward adapter in `reward_head`. With `shared_trunk` the critic is
    a second head on the reward adapter, whose hidden states get no gradient, and `role="reward+critic"` gives scores
    and values of one forward, `(B, T, 2)`.
    """
    base = base_of(model)
    stock_forward = base.forward

    # The stock signature stays visible: `generate` validates its keyword arguments against it.
    @functools.wraps(type(base).forward)
    def forward(self: PreTrainedModel, *args: Any, role: str | None = None, **kwargs: Any) -> Any:
        if role is None:
            return stock_forward(*args, **kwargs)
        if role == POLICY:
            return self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        if role == CRITIC and getattr(self, "critic", None) is not None:
            return token_scores(self.critic, kwargs["input_ids"], kwargs["attention_mask"])
        names = role.split("+")
        heads = [getattr(self, f"{name}_head", None) for name in names]
        if None in heads or (len(names) > 1 and not shared_trunk):
            raise ValueError(f"role={role!r} has no head on this model. Build it with a {role} adapter or model.")
        with switch.use(REWARD if shared_trunk else role), _grad(not shared_trunk):
            hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        # Under autocast the product would come out in bf16, with 8 bits of a score.
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            outputs = [head(hidden.to(head.weight.dtype)) for head in heads]
        return outputs[0].squeeze(-1) if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    base.forward = types.MethodType(forward, base)
    count_positions_from_mask(base.base_model)
    head = base.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_contiguous)


def _contiguous(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # At the end of the prompts the head reads one position of each row, a strided slice. On a CPU torch 2.13 makes a
    # batch of products of it in bf16 and copies the head once per row: 1.25 GiB for 4 rows of Gemma 3 270M.
    return args[0].contiguous(), *args[1:]


def _grad(wanted: bool) -> AbstractContextManager[None]:
    return nullcontext() if wanted else torch.no_grad()


class ScalarHead(nn.Linear):
    """A `(1, H)` head in float32 that starts as a copy of `weight`: gain * (w h) + bias, both constants."""

    def __init__(self, weight: torch.Tensor, gain: float = 1.0, bias: float = 0.0, *, trainable: bool):
        super().__init__(weight.shape[-1], 1, bias=False, dtype=torch.float32, device=weight.device)
        self.weight.data.copy_(weight)
        self.requires_grad_(trainable)
        self.score_normalization = (gain, bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gain, bias = self.score_normalization
        return super().forward(hidden) * gain + bias
