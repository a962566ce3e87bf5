"""Log-probabilities and entropies of given tokens from hidden states and an output head, in tiles of logits.

Shapes: N tokens, H hidden size, V vocabulary.
"""

from typing import Any, cast

import torch

from . import _checks as checks


TILE = 2**21
"""Logits that live at a time: 8 MiB in fp32, so that they are worked on inside a CPU's cache."""

COLUMNS = 2**13
"""Entries of the vocabulary of a tile at most. Sums over the vocabulary go from tile to tile, so that large ones leave
rows enough for the products."""


def token_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    log p(target | hidden) and the entropy of p(. | hidden), with logits z = cap(scale (W h + b)) / temperature.

    Where only `hidden` needs a gradient, as under adapters, its direction d log p / d h = W^T (onehot - p) is found
    along with the log-probability, and the backward pass makes no logits again: 2 products with the head instead of 3.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states one position before each token. Gradient.
        weight (`torch.Tensor` of shape `(V, H)`):
            Output embeddings. Gradient.
        targets (`torch.Tensor` of shape `(N,)`, int64):
            The tokens.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Gradient.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        logit_scale (`float`, *optional*, defaults to `1.0`), softcap (`float`, *optional*):
            What a family does to its logits: multiplied, then c tanh(. / c).
        entropy_gradient (`bool`, *optional*, defaults to `False`):
            Whether the entropy hangs on the graph.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: both `(N,)`, fp32 (float64 for float64), in nats.

    Raises:
        ValueError: shapes or dtypes do not fit, a target is no row of `weight`, or the temperature is not positive.
    """
    checks.check_tensor("hidden", hidden)
    checks.check_tensor("weight", weight)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"`hidden` is {tuple(hidden.shape)} and `weight` {tuple(weight.shape)}; expected (N, H) and (V, H)."
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"`targets` has shape {tuple(targets.shape)}, expected {tuple(hidden.shape[:1])}.")
    if targets.dtype != torch.int64:
        raise ValueError(f"`targets` has dtype {targets.dtype}, not torch.int64: convert it with `.long()`.")
    try:
        weight.detach()[:, 0].gather(0, targets)  # no comparison: the memory plan runs this on tensors without values
    except RuntimeError as error:
        raise ValueError(
            f"`targets` has an id that is none of the {len(weight)} rows of `weight` ({error}): leave out what is "
            "masked, and pass the head that belongs to the tokenizer."
        ) from error
    if not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}; it must be positive.")
    transform = (1.0 / temperature, logit_scale, softcap)
    return cast(
        tuple[torch.Tensor, torch.Tensor],
        _TokenLogps.apply(hidden, weight, bias, targets, transform, entropy_gradient),
    )


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: tuple[float, float, float | None],
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        ahead = for_hidden and not (for_weight or for_bias or entropy_gradient)
        of_each = (torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(5))
        tops, sums, rests, logps, entropies = of_each
        direction = torch.empty(hidden.shape, dtype=wide, device=hidden.device) if ahead else None
        for rows, tiles in _tiles(hidden, weight):
            inputs, target = hidden[rows].to(dtype), targets[rows, None]
            top = torch.full(target.shape, torch.finfo(wide).min, dtype=wide, device=hidden.device)
            # Over the tiles so far, in units of exp(top): the target's term, the sum of the others, sum of p z, and
            # what the others pull the hidden states to. Without the target 1 - p keeps its digits where p is near 1.
            of_target, own, others, moment, slope_own = (torch.zeros_like(top) for _ in range(5))
            pull = torch.zeros(inputs.shape, dtype=wide, device=hidden.device) if ahead else None
            for columns in tiles:
                head = weight[columns].to(dtype)
                z, slope = _logits(inputs, head, None if bias is None else bias[columns], transform)
                place, inside = _inside(target, columns)
                before, top = top, torch.maximum(top, z.amax(-1, keepdim=True))
                down = before - top
                shrink = down.exp()
                z -= top
                of_target = torch.where(inside, z.gather(-1, place), of_target + down)
                p = z.exp()
                with torch.autocast(kind, enabled=False):  # it would cut this product to bf16
                    here = torch.bmm(p[:, None], z[:, :, None]).view(-1, 1)
                moment = (moment + down * (own + others)) * shrink + here
                mine = p.gather(-1, place)
                own = torch.where(inside, mine, own * shrink)
                p.scatter_(-1, place, mine.masked_fill(inside, 0.0))
                others = others * shrink + p.sum(-1, keepdim=True)
                if pull is not None:
                    if isinstance(slope, torch.Tensor):
                        slope_own = torch.where(inside, slope.gather(-1, place), slope_own)
                    pull = pull.mul_(shrink).add_(_times(p, slope).to(dtype) @ head)
            total = own + others
            tops[rows], sums[rows], rests[rows] = (x.squeeze(-1) for x in (top, total.log(), others / total))
            logps[rows] = of_target.squeeze(-1) - sums[rows]
            entropies[rows] = sums[rows] - (moment / total).squeeze(-1)
            if direction is not None and pull is not None:
                away = others * (slope_own if isinstance(slope, torch.Tensor) else slope)
                direction[rows] = (weight[targets[rows]].to(dtype) * away - pull) / total
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.transform = dtype, transform
        ctx.save_for_backward(direction if ahead else hidden, weight, bias, targets, tops, sums, rests, entropies)
        ctx.ahead, ctx.hidden_dtype = ahead, hidden.dtype
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        kept, weight, bias, targets, tops, sums, rests, entropies = ctx.saved_tensors
        for_logps, for_entropies = grads
        if for_logps is None and for_entropies is None:
            return None, None, None, None, None, None
        if ctx.ahead:
            grad = None if for_logps is None else (kept * for_logps[:, None]).to(ctx.hidden_dtype)
            return grad, None, None, None, None, None
        hidden, dtype, wide = kept, ctx.dtype, sums.dtype
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if for_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if for_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if for_bias else None
        for rows, tiles in _tiles(hidden, weight):
            inputs, target = hidden[rows].to(dtype), targets[rows, None]
            for columns in tiles:
                head = weight[columns].to(dtype)
                z, slope = _logits(inputs, head, None if bias is None else bias[columns], ctx.transform)
                z = z.sub_(tops[rows, None]).sub_(sums[rows, None])  # log p
                p = z.exp()
                grad = z
                if for_entropies is not None:  # dH / dz = -p (log p + H)
                    grad.add_(entropies[rows, None]).mul_(p).mul_(-for_entropies[rows, None])
                if for_logps is not None:  # d log p / dz = onehot - p
                    place, inside = _inside(target, columns)
                    p *= -for_logps[rows, None]
                    mine = torch.where(inside, (rests * for_logps)[rows, None], p.gather(-1, place))
                    p.scatter_(-1, place, mine)
                    grad = p if for_entropies is None else grad.add_(p)
                grad = _times(grad, slope)
                if grad_bias is not None:
                    grad_bias[columns] += grad.sum(0)
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] += grad @ head
                if grad_weight is not None:
                    if dtype == wide:
                        grad_weight[columns].addmm_(grad.t(), inputs)
                    else:  # each tile's product in the compute dtype, their sum in fp32
                        grad_weight[columns] += grad.t() @ inputs
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _tiles(hidden: torch.Tensor, weight: torch.Tensor) -> list[tuple[slice, list[slice]]]:
    """Rows of `hidden`, and with each the rows of `weight` that go with them one after the other."""
    vocabulary = weight.shape[0]
    width = min(vocabulary, COLUMNS)
    columns = [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]
    step = max(TILE // width, 1)
    return [(slice(start, start + step), columns) for start in range(0, len(hidden), step)]


def _inside(target: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in a tile each target stands, and whether it does."""
    place = target - columns.start
    width = columns.stop - columns.start
    return place.clamp(0, width - 1), (place >= 0) & (place < width)


def _logits(
    inputs: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    transform: tuple[float, float, float | None],
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """z `(n, V)` in fp32 or wider, and dz / d(W h + b)."""
    per_temperature, scale, softcap = transform
    z = torch.nn.functional.linear(inputs, head, None if bias is None else bias.to(head.dtype))
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if softcap is None:
        factor = scale * per_temperature
        return (z if factor == 1.0 else z.mul_(factor)), factor
    z = z.mul_(scale / softcap).tanh_()
    slope = (1.0 - z * z).mul_(scale * per_temperature)
    return z.mul_(softcap * per_temperature), slope


def _times(grad: torch.Tensor, slope: torch.Tensor | float) -> torch.Tensor:
    return grad if isinstance(slope, float) and slope == 1.0 else grad * slope
