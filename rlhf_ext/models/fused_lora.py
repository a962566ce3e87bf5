"""LoRA layers that add their update inside one matrix product, forward and backward.

PEFT computes y = W x, then B A x, scales it and adds it: two more passes over each output forward, and two over each
gradient backward. Here the product with B accumulates into W x, and the gradient's product with A into its product
with W; what is kept for the backward pass is the same. Over a quantised W, of which only its own layer knows, the
update is added to what that returns.

Shapes: N tokens, I inputs, O outputs, r rank.
"""

import functools
from typing import Any

import torch
from peft.tuners.lora import bnb
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.autograd.function import once_differentiable


QUANTIZED = ("Linear4bit", "Linear8bitLt")
"""PEFT's layers over quantised ones, where bitsandbytes is there."""


def fuse_lora_updates(model: nn.Module) -> int:
    """
    Give the LoRA layers of a model the fused forward, on the instance, and return how many got it.

    Same output and gradients up to rounding. Where the base layer is a frozen `nn.Linear` of the adapter's dtype, or
    under autocast, the update is added inside of its product. Where it is anything else (quantised, of another dtype,
    training, hooked) it runs as it is, and the update is added to what it returns: there inputs of less bytes than the
    adapter's weights are kept as they came, and not once a layer in the adapter's dtype.

    Left to PEFT, call by call: no or several active adapters, merged ones, DoRA and other variants, dropout, biases of
    B, and hooks on the adapter's modules. Left alone are layers whose `forward` somebody has set on the instance.
    Gradients of gradients raise. Not for weights that live in pieces (ZeRO-3, FSDP), which only their own module
    gathers.
    """
    kinds = (Linear, *(getattr(bnb, name) for name in QUANTIZED if hasattr(bnb, name)))
    layers = [layer for layer in model.modules() if type(layer) in kinds and isinstance(layer.base_layer, nn.Linear)]
    layers = [layer for layer in layers if "forward" not in vars(layer)]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer, layer.forward)
    return len(layers)


def _forward(layer: Linear, stock: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    adapter = None if args or kwargs else _only_adapter(layer)
    if adapter is None:
        return stock(x, *args, **kwargs)
    base, down, up = layer.base_layer, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64  # autocast leaves it
    dtype = torch.get_autocast_dtype(kind) if autocast else down.dtype
    inside = _is_plain(base) and (autocast or {x.dtype, base.weight.dtype, up.dtype} == {dtype})
    y = None if inside else base(x)
    # Cast outside of the functions, so that gradients are cast back by their own nodes; no -1 in the shape, which no
    # tokens would leave open.
    rows, down, up = x.reshape(x.shape[:-1].numel(), x.shape[-1]), down.to(dtype), up.to(dtype)
    if dtype.itemsize < rows.dtype.itemsize:  # the smaller of the two is kept
        rows = rows.to(dtype)
    if y is None:
        bias = None if base.bias is None else base.bias.to(dtype)
        out = _Update.apply(rows.to(dtype), base.weight.to(dtype), bias, down, up, layer.scaling[adapter])
    else:
        out = _Beside.apply(y.reshape(len(rows), y.shape[-1]), rows, down, up, layer.scaling[adapter])
    # Here and not in the functions, whose outputs must not be views: some families change them in place.
    return out.view(*x.shape[:-1], out.shape[-1])  # type: ignore[no-any-return]


def _only_adapter(layer: Linear) -> str | None:
    """The adapter to run under, if the fused form covers it."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    dropout, down, up = (part[active[0]] for part in (layer.lora_dropout, layer.lora_A, layer.lora_B))
    drops = not isinstance(dropout, nn.Identity) and not (type(dropout) is nn.Dropout and dropout.p == 0)
    hooked = any(_is_hooked(module) for module in (down, up, dropout))
    return None if drops or hooked or up.bias is not None else active[0]


def _is_plain(base: nn.Module) -> bool:
    frozen = not any(p.requires_grad for p in base.parameters())
    return type(base) is nn.Linear and base.weight.is_floating_point() and frozen and not _is_hooked(base)


def _is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)  # accelerate sets the latter


class _Update(torch.autograd.Function):
    """y = W x + b + s B A x for rows x `(N, I)`, of frozen W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            y = nn.functional.linear(rows, weight, bias)
            low = (rows @ down.t()).mul_(scaling)
            y.addmm_(low, up.t())
        ctx.save_for_backward(rows, weight, down, up, low)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        rows, weight, down, up, low = ctx.saved_tensors
        grad = grads[0]
        for_x, _, _, for_down, for_up, _ = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            grad_low = (grad @ up).mul_(ctx.scaling) if for_x or for_down else None
            grad_x = (grad @ weight).addmm_(grad_low, down) if for_x else None
            grad_down = grad_low.t() @ rows if for_down else None
            grad_up = grad.t() @ low if for_up else None
        return grad_x, None, None, grad_down, grad_up, None


class _Beside(torch.autograd.Function):
    """y + s B A x, where y `(N, O)` is what a base layer made of rows x `(N, I)`; x is kept as it came."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, rows: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            low = (rows.to(down.dtype) @ down.t()).mul_(scaling)
            out = low @ up.t()
            # In place, unless y has more digits: one copy of the outputs less at the peak.
            wider = torch.promote_types(out.dtype, y.dtype) != out.dtype
            out = (y + out if wider else out.add_(y)).to(y.dtype)
        ctx.save_for_backward(rows, down, up, low)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        rows, down, up, low = ctx.saved_tensors
        for_y, for_x, for_down, for_up, _ = ctx.needs_input_grad
        with torch.autocast(rows.device.type, enabled=False):
            grad = grads[0].to(down.dtype)
            grad_low = (grad @ up).mul_(ctx.scaling) if for_x or for_down else None
            grad_x = (grad_low @ down).to(rows.dtype) if for_x else None
            grad_down = grad_low.t() @ rows.to(down.dtype) if for_down else None
            grad_up = grad.t() @ low if for_up else None
        return grads[0] if for_y else None, grad_x, grad_down, grad_up, None
