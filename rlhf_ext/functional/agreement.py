"""How far several people's labels of the same things agree.

Shapes: U units (what was labelled), V values (what may be said of it). All read `counts (U, V)`: how many people gave
unit u the value v. Units with fewer than two labels say nothing about agreement and are left out.
"""

import math
from typing import Literal

import torch


Metric = Literal["nominal", "ordinal"]


def percent_agreement(counts: torch.Tensor) -> torch.Tensor:
    r"""Share of pairs of people who said the same, mean over units (Fleiss 1971, the mean of his P_i).

    \(P = \frac{1}{U} \sum_u \sum_v n_{uv} (n_{uv} - 1) / (n_u (n_u - 1))\)

    Args:
        counts (`torch.Tensor` of shape `(U, V)`, integer): people per unit and value.

    Returns:
        `torch.Tensor`: 0-d float64 from 0 to 1; NaN without a unit that two people labelled.

    Raises:
        ValueError: If `counts` is not a 2-d tensor of whole numbers >= 0.
    """
    n = _pairable(counts)
    total = n.sum(dim=1)
    return (n * (n - 1)).sum(dim=1).div(total * (total - 1)).mean()


def krippendorff_alpha(counts: torch.Tensor, *, metric: Metric) -> torch.Tensor:
    r"""Krippendorff's alpha: 1 is perfect agreement, 0 what chance gives, below 0 is disagreement beyond chance.

    \(\alpha = 1 - D_o / D_e = 1 - (n - 1) \sum_{cv} o_{cv} \delta^2_{cv} / \sum_{cv} n_c n_v \delta^2_{cv}\) with
    coincidences \(o_{cv} = \sum_u n_{uc} (n_{uv} - [c = v]) / (n_u - 1)\), \(n_c = \sum_v o_{cv}\), n their sum.
    Nominal: \(\delta^2 = [c \ne v]\). Ordinal: \(\delta^2_{cv} = (\sum_{g=c}^{v} n_g - (n_c + n_v) / 2)^2\), values in
    the order of the columns (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    Args:
        counts (`torch.Tensor` of shape `(U, V)`, integer): people per unit and value.
        metric (`str`): `"nominal"` or `"ordinal"`.

    Returns:
        `torch.Tensor`: 0-d float64; NaN if all labels are one value, where chance leaves nothing to compare with.

    Raises:
        ValueError: If `counts` is not a 2-d tensor of whole numbers >= 0, or `metric` is unknown.
    """
    if metric not in ("nominal", "ordinal"):
        raise ValueError(f"`metric` is {metric!r}: use 'nominal' or 'ordinal'.")
    n = _pairable(counts)
    weighted = n / (n.sum(dim=1, keepdim=True) - 1)
    coincidences = weighted.T @ n - torch.diag(weighted.sum(dim=0))
    marginals = coincidences.sum(dim=1)
    if metric == "nominal":
        distance = 1.0 - torch.eye(n.shape[1], dtype=n.dtype, device=n.device)
    else:
        # Up to the middle of each value; the distance between two middles is what the sum above counts.
        middle = marginals.cumsum(0) - marginals / 2
        distance = (middle[:, None] - middle[None, :]) ** 2
    expected = (marginals[:, None] * marginals[None, :] * distance).sum()
    observed = (coincidences * distance).sum()
    if expected == 0:
        return torch.full_like(expected, math.nan)
    return 1 - (marginals.sum() - 1) * observed / expected


def _pairable(counts: torch.Tensor) -> torch.Tensor:
    if not isinstance(counts, torch.Tensor) or counts.dim() != 2:
        shape = tuple(counts.shape) if isinstance(counts, torch.Tensor) else type(counts).__name__
        raise ValueError(f"`counts` is {shape}, expected a tensor of shape (U, V): one row per unit.")
    n = counts.double()
    if not bool(((n >= 0) & (n == n.round())).all()):
        raise ValueError("`counts` holds numbers that are not counts: pass how many people gave each value.")
    return n[n.sum(dim=1) >= 2]
