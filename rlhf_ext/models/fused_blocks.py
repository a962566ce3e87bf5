"""RMS norms and gated feed-forward layers that keep less for the backward pass.

Autograd keeps an RMS norm's input and what it scales with its weight, and of act(g) * u all of g, u and act(g). Here
the norm keeps its input and one number per token, in fewer passes over its tensors; the layer keeps g and u, and
computes act(g) twice. Forward the operations are those of the model, so that outputs have its bits.

Shapes: `(..., D)`; D is a model's width or that of its feed-forward layers.
"""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .fused_lora import _is_hooked


# Families differ in whether 1 is added to the weight, and in whether the product with it is in float32.
NORMS = ((0.0, True), (0.0, False), (1.0, False))
ACTIVATIONS = (("silu", {}), ("gelu", {"approximate": "none"}), ("gelu", {"approximate": "tanh"}))


def fuse_blocks(model: nn.Module) -> int:
    """
    Give norms and gated feed-forward layers the fused forward, on the instance, and return how many got it.

    Same output bit for bit, same gradients up to rounding. A module gets it if a copy of it, with weights of a few
    entries, says what one of the forms here says, in several dtypes and for small and large inputs; its class does not
    matter. Others are left alone, as are those whose `forward` somebody has set on the instance, and feed-forward
    layers with hooks on their activation. Hooks on the module itself, and those of its projections, go on being
    called; an activation or epsilon that is exchanged later is not heard. Gradients of gradients raise, and so do the
    transforms of `torch.func`. Not for weights that live in pieces (ZeRO-3, FSDP).
    """
    found = 0
    for module in model.modules():
        form = None if "forward" in vars(module) else _norm_form(module) or _gate_form(module)
        if form is not None:
            module.forward = functools.partial(_forward, module, form)  # type: ignore[assignment]
            found += 1
    return found


def _forward(module: nn.Module, form: Any, *args: Any, **kwargs: Any) -> Any:
    """More inputs than one, as gated norms may have, are for the class."""
    return type(module).forward(module, *args, **kwargs) if kwargs or len(args) != 1 else form(module, *args)


def _norm_form(module: nn.Module) -> Any:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    owns = [name for name, parameter in module._parameters.items() if parameter is not None]
    if not isinstance(eps, float) or owns != ["weight"] or module._modules or module.weight.dim() != 1:
        return None
    for offset, casts_first in NORMS:
        form = functools.partial(_run_norm, eps=eps, offset=offset, casts_first=casts_first)
        if all(_says_the_same(module, form, x, {"weight": w}, {}) for x in _inputs() for w in _weights(x)):
            return form
    return None


def _gate_form(module: nn.Module) -> Any:
    if set(module._modules) != {"gate_proj", "up_proj", "down_proj", "act_fn"} or module._parameters:
        return None
    if _is_hooked(module.act_fn):  # type: ignore[arg-type]
        return None
    # Three different factors, so that no layer passes for another.
    parts = {"gate_proj": _Times(0.7), "up_proj": _Times(1.7), "down_proj": _Times(-0.3), "act_fn": module.act_fn}
    for name, options in ACTIVATIONS:
        form = functools.partial(_run_gate, name=name, options=options)
        if all(_says_the_same(module, form, x, {}, parts) for x in _inputs()):
            return form
    return None


def _inputs() -> Iterator[torch.Tensor]:
    """Rows between 1e-5 and 1e3, where epsilons and limits of a formula show."""
    sizes = torch.tensor([1e-5, 1e-2, 1, 30, 1e3], device="cpu")[:, None]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for width in (6, 10):
            x = torch.linspace(-3, 4, 5 * width, dtype=torch.float32, device="cpu").sin().view(5, width)
            yield (x * sizes)[None].to(dtype)


def _weights(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Weights of the dtype of x, and of others, as models keep theirs in float32 under inputs of 16 bits."""
    for dtype in {x.dtype, torch.float32, torch.bfloat16}:
        yield torch.linspace(-0.7, 1.3, x.shape[-1], dtype=torch.float32, device="cpu").to(dtype)


class _Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def _says_the_same(
    module: nn.Module, form: Any, x: torch.Tensor, parameters: dict[str, Any], modules: dict[str, Any]
) -> bool:
    """Whether a copy of `module` with small parts gives the bits of `form`, in training too, where dropout shows."""
    for training in (False, True):
        twin = copy.copy(module)
        vars(twin).update(training=training, _parameters=parameters, _modules=modules)
        with torch.no_grad():
            try:
                said = twin.forward(x.clone())  # not called: hooks are for real inputs
                expected = form(twin, x)
                same = said.dtype == expected.dtype and torch.equal(said, expected)
            except Exception:  # a module of another kind may raise anything
                return False
        if not same:
            return False
    return True


def _run_norm(module: nn.Module, x: torch.Tensor, *, eps: float, offset: float, casts_first: bool) -> Any:
    if torch.is_grad_enabled():
        return _Norm.apply(x, module.weight, eps, offset, casts_first)
    return _norm(x, module.weight, eps, offset, casts_first)[0]  # type: ignore[arg-type]


def _run_gate(module: nn.Module, x: torch.Tensor, *, name: str, options: dict[str, str]) -> Any:
    # In one expression: without gradients nobody holds gate and up while `down_proj` runs.
    return module.down_proj(_activated(module.gate_proj(x), module.up_proj(x), name, options))  # type: ignore[operator]


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, casts_first: bool) -> Any:
    """x / rms(x) times the weight, and 1 / rms(x) `(..., 1)` in float32."""
    x32 = x.to(torch.float32)
    scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    h = x32 * scale
    del x32
    if casts_first:
        h = h.to(x.dtype)
    factor = weight if offset == 0 else offset + weight.float()
    # In place where it gives the same number: a tensor of this size less.
    y = h.mul_(factor) if torch.promote_types(h.dtype, factor.dtype) == h.dtype else h * factor
    return (y if casts_first else y.to(x.dtype)), scale


class _Norm(torch.autograd.Function):
    """y = w h with h = x / rms(x); keeps x and 1 / rms(x)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, casts_first: bool
    ) -> torch.Tensor:
        y, scale = _norm(x, weight, eps, offset, casts_first)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        grad_x = grad_weight = None
        with torch.autocast(x.device.type, enabled=False):
            grad, factor = grads[0].to(wide), ctx.offset + weight.to(wide)
            h = (x.to(torch.float32) * scale).to(wide)
            by_entry = grad * h
            if for_weight:
                grad_weight = by_entry.reshape(x.shape[:-1].numel(), x.shape[-1]).sum(0).to(weight.dtype)
            if for_x:  # dL/dx = (g w - h mean(g w h)) / rms
                inner = by_entry.mul_(factor).mean(-1, keepdim=True)
                del by_entry
                grad_x = (grad * factor).addcmul_(h, inner, value=-1).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None, None, None


def _activated(gate: torch.Tensor, up: torch.Tensor, name: str, options: dict[str, str]) -> Any:
    if torch.is_grad_enabled() and gate.dtype == up.dtype:
        return _Gate.apply(gate, up, name, options)
    return _gate(gate, up, name, options)


def _gate(gate: torch.Tensor, up: torch.Tensor, name: str, options: dict[str, str]) -> torch.Tensor:
    active = getattr(nn.functional, name)(gate, **options)
    return active.mul_(up) if active.dtype == up.dtype and not active.requires_grad else active * up


class _Gate(torch.autograd.Function):
    """act(g) u; keeps g and u."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, name: str, options: dict[str, str]) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name, ctx.options = name, options
        return _gate(gate, up, name, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (gate, up), grad = ctx.saved_tensors, grads[0]
        for_gate, for_up = ctx.needs_input_grad[:2]
        grad_up = getattr(nn.functional, ctx.name)(gate, **ctx.options).mul_(grad) if for_up else None
        grad_gate = None
        if for_gate:
            derivative = torch.ops.aten.silu_backward if ctx.name == "silu" else torch.ops.aten.gelu_backward
            grad_gate = derivative(grad * up, gate, **ctx.options)
        return grad_gate, grad_up, None, None
