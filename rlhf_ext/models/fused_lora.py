"""LoRA layers that add their update inside one matrix product, forward and backward.

PEFT computes y = W x, then B A x, scales it and adds it: two more passes over each output forward, and two over each
gradient backward. Here the product with B accumulates into W x, and the gradient's product with A into its product
with W; what is kept for the backward pass is the same.

Shapes: N tokens, I inputs, O outputs, r rank.
"""

import functools
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.autograd.function import once_differentiable


def fuse_lora_updates(model: nn.Module) -> int:
    """
    Give the LoRA layers of a model the fused forward, on the instance, and return how many got it.

    Same output and gradients up to rounding. What the fused form does not cover goes through PEFT's own, call by call:
    no or several active adapters, merged ones, DoRA and other variants, dropout, biases of B, bases that train or are
    quantised, hooks on the base layer or the adapter's, and mixed dtypes without autocast. Left alone are layers whose
    `forward` somebody has set on the instance. Gradients of gradients raise. Not for weights that live in pieces
    (ZeRO-3, FSDP), which only their own module gathers.
    """
    layers = [module for module in model.modules() if type(module) is Linear and _is_plain(module.base_layer)]
    layers = [layer for layer in layers if "forward" not in vars(layer)]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer, layer.forward)
    return len(layers)


def _is_plain(base: nn.Module) -> bool:
    return type(base) is nn.Linear and base.weight.is_floating_point()


def _forward(layer: Linear, stock: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    adapter = None if args or kwargs else _only_adapter(layer)
    if adapter is None:
        return stock(x, *args, **kwargs)
    base = layer.base_layer
    tensors = (x, base.weight, base.bias, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and len({t.dtype for t in tensors if t is not None}) > 1:
        return stock(x)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if x.dtype == torch.float64:  # autocast leaves it
        dtype = x.dtype
    # Cast outside of the function, so that gradients are cast back by their own nodes.
    cast = [None if t is None else t.to(dtype) for t in tensors]
    rows = cast[0].reshape(x.shape[:-1].numel(), x.shape[-1])  # no -1, which no tokens would leave open
    y = _Update.apply(rows, *cast[1:], layer.scaling[adapter])
    # Here and not in the function, whose outputs must not be views: some families change them in place.
    return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


def _only_adapter(layer: Linear) -> str | None:
    """The adapter to run under, if the fused form covers it."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    base = layer.base_layer
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    dropout, down, up = (part[active[0]] for part in (layer.lora_dropout, layer.lora_A, layer.lora_B))
    drops = not isinstance(dropout, nn.Identity) and not (type(dropout) is nn.Dropout and dropout.p == 0)
    trains = any(p.requires_grad for p in base.parameters())
    hooked = any(_is_hooked(module) for module in (base, down, up, dropout))
    return None if trains or drops or hooked or up.bias is not None or not _is_plain(base) else active[0]


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
