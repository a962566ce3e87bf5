"""What every formula of this folder does first: check its inputs, raise the precision, clear masked positions.

Shapes: B batch, T completion tokens. Mask: True = a real completion token.
"""

import math
from typing import Literal

import torch


Reduction = Literal["mean", "sum"]
Metrics = dict[str, torch.Tensor]


def check_tensor(name: str, value: object, shape: tuple[int, ...] | torch.Size | None = None) -> None:
    """Refuse what is not a floating tensor of exactly this shape: broadcasting would give a wrong number, silently."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` is a {type(value).__name__}, not a tensor: pass a floating `torch.Tensor`.")
    if not value.dtype.is_floating_point:
        raise ValueError(f"`{name}` has dtype {value.dtype}, not a floating one: convert it with `.float()`.")
    if shape is not None and value.shape != torch.Size(shape):
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)}, expected {tuple(shape)}: nothing is broadcast here, "
            "so slice or expand it to that shape before the call."
        )


def check_masked(mask: object, *, ndim: int | None = 2, **tensors: object) -> None:
    """Check a bool mask (of `ndim` dimensions, if not None) and that every tensor has exactly its shape."""
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"`mask` is a {type(mask).__name__}, not a tensor: pass a bool `torch.Tensor`.")
    if mask.dtype != torch.bool:
        raise ValueError(
            f"`mask` has dtype {mask.dtype}, not torch.bool: convert it with `.bool()` (True = a real token)."
        )
    if ndim is not None and mask.dim() != ndim:
        raise ValueError(f"`mask` has shape {tuple(mask.shape)}, expected {ndim} dimensions: reshape it.")
    for name, value in tensors.items():
        check_tensor(name, value, mask.shape)


def check_scalar(
    name: str,
    value: float,
    *,
    above: float = -math.inf,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    below: float = math.inf,
) -> None:
    """Refuse a number that is not finite or lies outside its range (`above` and `below` are exclusive)."""
    if not (math.isfinite(value) and above < value < below and minimum <= value <= maximum):
        bounds = [
            f"{sign} {bound:g}"
            for sign, bound in ((">", above), (">=", minimum), ("<=", maximum), ("<", below))
            if math.isfinite(bound)
        ]
        raise ValueError(f"`{name}` is {value!r}: set it to a finite number {' and '.join(bounds)}".rstrip() + ".")


def check_reduction(reduction: str) -> None:
    """Refuse any reduction but the two we define."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"`reduction` is {reduction!r}: use 'mean' (over real tokens or rows) or 'sum'.")


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Half precisions become float32; float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def clear(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Upcast, and put 0 at masked positions.

    By `where`, never by `x * mask`: NaN * 0 is NaN, in the value and in the gradient.
    """
    return torch.where(mask, upcast(x), 0.0)


def count(mask: torch.Tensor) -> torch.Tensor:
    """Number of real tokens, at least 1, so that an empty mask gives 0 instead of 0/0."""
    return mask.sum().clamp(min=1)


def mean(cleared: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over real tokens of a tensor that is already 0 at masked positions."""
    return cleared.sum() / count(mask)


def reduce(cleared: torch.Tensor, mask: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """Sum over all tokens, divided by the number of real tokens for "mean"."""
    return cleared.sum() if reduction == "sum" else mean(cleared, mask)


def share(condition: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Share of the real tokens where `condition` holds."""
    return (condition & mask).sum().to(dtype) / count(mask)
