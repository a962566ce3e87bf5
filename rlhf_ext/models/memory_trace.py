"""Activations of a step without a step: the real architecture runs on tensors that have shapes and no data.

The model stands on torch's `meta` device and is turned into fake tensors, so forward, recomputation and backward run
as written (autocast, checkpointing, attention, adapters), and every storage is counted from its birth to its death.
What fake tensors cannot show is put in by size: the tile of TRL's kernel for log-probabilities, and the weight that
bitsandbytes restores for the length of one product.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from ..functional.token_logps import token_logps
from .fused_blocks import fuse_blocks
from .fused_lora import fuse_lora_updates
from .roles import CRITIC, REWARD, RoleSwitch, base_of, checkpoint_context


# TRL's chunked head works on tiles of this many tokens and entries of the vocabulary (pinned in tests/test_seams.py).
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages born while it is on, now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.gradients = self.gradients_at_peak = 0
        self._alive: set[int] = set()

    def ignore(self, tensors: Iterator[torch.Tensor]) -> None:
        """Leave storages that were there before out of the count: their views look like new tensors."""
        self._alive |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(
        self, function: Callable[..., Any], kinds: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
                    if self.now > self.peak:
                        self.peak, self.gradients_at_peak = self.now, self.gradients
        return out

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class _Restored(torch.autograd.Function):
    """Product with a frozen quantised weight: it is restored to `dtype` for the product, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, width: int, dtype: torch.dtype, copies: int) -> torch.Tensor:
        ctx.size, ctx.dtype, ctx.copies = (width, x.shape[-1]), dtype, copies
        weight = torch.empty(ctx.size, dtype=dtype)
        out = torch.empty(*x.shape[:-1], width, dtype=x.dtype)
        del weight
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        weights = [torch.empty(ctx.size, dtype=ctx.dtype) for _ in range(ctx.copies)]
        out = torch.empty(*grad.shape[:-1], ctx.size[1], dtype=grad.dtype)
        del weights
        return out, None, None, None


class _ChunkedHead(torch.autograd.Function):
    """TRL's chunked log-probabilities on a GPU: what is kept, and the tile that lives for a moment."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, tile: int) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.tile = tile
        ctx.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        workspace = torch.empty(tile, dtype=ctx.dtype)
        out = torch.empty(hidden.shape[0], dtype=torch.float32)
        del workspace
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight = ctx.saved_tensors
        grad_hidden = torch.empty(hidden.shape, dtype=torch.float32)
        grad_weight = torch.empty(weight.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        workspace = torch.empty(ctx.tile, dtype=ctx.dtype)
        del workspace
        return grad_hidden.to(hidden.dtype), None if grad_weight is None else grad_weight.to(weight.dtype), None


@dataclass
class Activations:
    """Bytes above what a model holds anyway, at the highest moment of each phase.

    Attributes:
        prefill: Reading the prompts of a rollout, their keys and values in it.
        scoring: One micro-batch without gradients: log-probabilities, values.
        update: Forward and backward of one micro-batch, without the gradients of parameters.
        gradients: Gradients of parameters that are there at that moment.
    """

    prefill: int
    scoring: int
    update: int
    gradients: int


def trace_activations(
    model: nn.Module,
    *,
    quantized: set[str],
    compute_dtype: torch.dtype,
    rollout: int,
    rows: int,
    prompt_length: int,
    completion_length: int,
    gradient_checkpointing: bool,
    autocast: bool,
    accumulates: bool,
    device: str,
    fused: bool,
) -> Activations:
    """Run a rollout's prompts, one scoring pass and one update of `model` on fake tensors.

    Args:
        model (`nn.Module`):
            Causal language model on the `meta` device, with adapters, heads and a possible submodule `critic`, as
            [`~rlhf_ext.models.build.build_roles`] puts them together. It is turned into fake tensors and is of no
            further use.
        quantized (`set[str]`):
            Names of the quantised linear layers of the base.
        compute_dtype (`torch.dtype`):
            What a quantised weight is restored to.
        rollout, rows (`int`):
            Prompts read at once, and rows of a micro-batch.
        accumulates (`bool`):
            Whether the gradients of an earlier micro-batch are there already.
        device (`str`):
            `"cuda"` or `"cpu"`, for the workspace of the head.
        fused (`bool`):
            Whether LoRA layers, norms and feed-forward layers run as `fuse_lora_updates` and `fuse_blocks` make them.
    """
    base, switch = base_of(model), RoleSwitch(model)
    length = prompt_length + completion_length
    if fused:
        fuse_blocks(model)  # before: it compares numbers
    with FakeTensorMode():
        _to_fake(model)
        _restore_weights(base, quantized, compute_dtype)
        if fused:
            fuse_lora_updates(model)
        model.train()
        if gradient_checkpointing:
            base.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": checkpoint_context, "preserve_rng_state": False}
            )

        def policy() -> torch.Tensor:
            head = base.get_output_embeddings()
            hidden = base.base_model(**_inputs(rows, length), use_cache=False).last_hidden_state
            if device == "cpu":  # ours, of the completion's tokens
                hidden = hidden[:, prompt_length - 1 : -1].flatten(0, 1)
                return token_logps(hidden, head.weight, torch.zeros(len(hidden), dtype=torch.long))[0].sum()
            hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1])
            tile = min(rows * completion_length, TILE_TOKENS) * TILE_VOCABULARY
            return _ChunkedHead.apply(hidden, head.weight, tile).sum()

        def critic() -> torch.Tensor:
            own = getattr(base, CRITIC, None)
            if own is not None:
                hidden = own.base_model(**_inputs(rows, length), use_cache=False).last_hidden_state
                return own.score(hidden).float().sum()
            if getattr(base, f"{CRITIC}_head", None) is None:
                return torch.zeros(())
            # A shared critic is a second head on the frozen reward adapter.
            own_adapter = CRITIC in model.peft_config
            with switch.use(CRITIC if own_adapter else REWARD), nullcontext() if own_adapter else torch.no_grad():
                hidden = base.base_model(**_inputs(rows, length), use_cache=False).last_hidden_state
            return base.critic_head(hidden.to(base.critic_head.weight.dtype)).sum()

        def casts() -> torch.autocast:
            return torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)

        with torch.no_grad(), _counted(model) as scoring:
            for role in (policy, critic):
                with casts():
                    role()
        # `generate` of a PEFT model calls the base directly, past the autocast that accelerate wraps around the whole.
        with torch.no_grad(), _counted(model) as prefill:
            base.gradient_checkpointing_disable()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and model is base):
                out = base(**_inputs(rollout, prompt_length), use_cache=True, logits_to_keep=1)
            del out
        if gradient_checkpointing:
            base.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": checkpoint_context, "preserve_rng_state": False}
            )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if accumulates:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        with _counted(model) as update:
            for parameter in trained if not accumulates else []:
                parameter.register_post_accumulate_grad_hook(lambda p: _arrived(update, p))
            with casts():
                loss = policy() + critic()
            loss.backward()
        return Activations(
            prefill.peak, scoring.peak, update.peak - update.gradients_at_peak, update.gradients_at_peak
        )


def _arrived(live: LiveBytes, parameter: torch.Tensor) -> None:
    live.gradients += parameter.numel() * parameter.element_size()


def _inputs(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def _counted(model: nn.Module) -> Iterator[LiveBytes]:
    live = LiveBytes()
    live.ignore(iter([*model.parameters(), *model.buffers()]))
    live.ignore(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    with live:
        yield live


def _to_fake(model: nn.Module) -> None:
    """Replace parameters and buffers on the meta device by fake ones on the CPU; what is tied stays tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = new
                tensors[name] = made[id(tensor)]


def _restore_weights(base: nn.Module, quantized: set[str], dtype: torch.dtype) -> None:
    for name, module in base.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and name.replace(".base_layer", "") in quantized:
            width = module.weight.shape[0 if isinstance(module, nn.Linear) else 1]
            copies = 1 if module.weight.dtype == dtype else 2  # restored to the loaded dtype, then converted

            def forward(x: torch.Tensor, width: int = width, copies: int = copies) -> torch.Tensor:
                return _Restored.apply(x, width, dtype, copies)

            module.forward = forward
