"""The matrix products of one PPO iteration, counted from its shape, and the rate at which this machine multiplies.

What is counted is what the computation needs: keys and values from a cache in the rollout, the vocabulary for
completion positions alone, of causal attention the lower triangle, each log-probability once. What a program does on
top (a second projection in the backward, prompt positions) is its own.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ppo_shape import Shape


@dataclass(frozen=True)
class Product:
    """(m x k) by (k x n). `kind` is its layout: `forward` x w^T, `input_grad` g w, `weight_grad` g^T x, `attention`.

    What stands transposed in memory decides which kernel the library takes.
    """

    kind: str
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n


Work = Counter[Product]
"""Products and how often each of them occurs."""


def linears(shape: Shape) -> list[tuple[int, int, int]]:
    """Inputs, outputs and number of the linear layers of the trunk."""
    wide, inner = shape.hidden, shape.intermediate
    return [(wide, wide, 4 * shape.layers), (wide, inner, 2 * shape.layers), (inner, wide, shape.layers)]


def trunk(shape: Shape, rows: int, length: int, cached: int = 0) -> Work:
    """A forward of `rows` rows of `length` tokens, behind `cached` ones whose keys and values are there."""
    work = Work({Product("forward", rows * length, k, n): count for k, n, count in linears(shape)})
    pairs = length * cached + length * (length + 1) // 2  # of a query with a key that it sees
    work[Product("attention", rows * pairs, shape.hidden, 1)] += 2 * shape.layers  # scores, then values
    return work


def vocabulary(shape: Shape, positions: int) -> Work:
    return Work({Product("forward", positions, shape.hidden, shape.vocabulary): 1})


def backward(work: Work) -> Work:
    """Gradients of inputs and weights: twice the forward. The embeddings train, so the lowest inputs have one too."""
    found = Work()
    for product, count in work.items():
        if product.kind == "attention":
            found[product] += 2 * count
        else:
            found[Product("input_grad", product.m, product.n, product.k)] += count
            found[Product("weight_grad", product.n, product.m, product.k)] += count
    return found


def times(work: Work, count: int) -> Work:
    return Work({product: number * count for product, number in work.items()})


def phases(shape: Shape) -> dict[str, Work]:
    """Work of one iteration, phase by phase; phases of roles that are not there are left out."""
    parts = shape.episodes // shape.micro_batch
    rollout = trunk(shape, shape.episodes, shape.prompt) + times(vocabulary(shape, shape.episodes), shape.completion)
    for step in range(1, shape.completion):
        rollout += trunk(shape, shape.episodes, 1, cached=shape.prompt + step - 1)
    forward = times(trunk(shape, shape.micro_batch, shape.length), parts)
    logps = forward + times(vocabulary(shape, shape.micro_batch * shape.completion), parts)
    found = {"rollout": rollout, "old log-probabilities": logps}
    if shape.roles > 1:
        found["reference"] = logps
    if shape.roles > 3:
        found["reward"] = forward
    if shape.roles > 2:
        found["values"] = forward
    found["policy forward"] = times(logps, shape.epochs)
    found["backward"] = times(backward(logps), shape.epochs)
    if shape.roles > 2:
        found["critic forward"] = times(forward, shape.epochs)
        found["backward"] += times(backward(forward), shape.epochs)
    return found


UPDATE = ("policy forward", "critic forward", "backward")


def flops(work: Work) -> int:
    return sum(product.flops * count for product, count in work.items())


class Rates:
    """Measured FLOP/s of products, each the best of several; attention counts at the best rate of all.

    Args:
        seconds (`float`): how long each shape is tried, at least five times.
        clock: the time.
    """

    def __init__(self, seconds: float = 0.3, clock: Callable[[], float] = time.perf_counter):
        self.seconds, self.clock = seconds, clock
        self.measured: dict[Product, float] = {}

    @property
    def best(self) -> float:
        return max(self.measured.values())

    def measure(self, work: Work) -> None:
        for product in work:
            if product.kind != "attention" and product not in self.measured:
                self.measured[product] = product.flops / min(self._tries(product))

    def _tries(self, product: Product) -> Iterator[float]:
        import torch

        m, k, n = product.m, product.k, product.n
        left = torch.randn(k, m).t() if product.kind == "weight_grad" else torch.randn(m, k)
        right = torch.randn(n, k).t() if product.kind == "forward" else torch.randn(k, n)
        out = torch.empty(m, n)  # a new one each time would be a test of the allocator
        until, count = self.clock() + self.seconds, 0
        while count < 5 or self.clock() < until:
            start = self.clock()
            torch.mm(left, right, out=out)
            yield self.clock() - start
            count += 1

    def floor(self, work: Work) -> float:
        """Seconds that the products take at the rate of their own shapes."""
        return sum(product.flops * count / self.measured.get(product, self.best) for product, count in work.items())
