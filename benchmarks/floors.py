"""
How fast W1 to W3 of `speed.py` could be at all: their matrix products at this machine's rate, beside measured seconds.

    python benchmarks/floors.py --speed benchmarks/results/speed.json --result benchmarks/results/floors.json

Products are counted as in `roofline.py`, each shape at its own measured rate, on as many threads as ours had. With
adapters: frozen layers below once per rollout, the head in the forward pass and for the gradient of its inputs, of a
frozen layer no gradient of its weight. "At most" is the peer's time over our floor: how much faster than the peer our
passes could be in fp32. A few of them could still be saved (docs/performance.md), so it is no bound of the algorithm.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare import commit_of_head
from matmul_work import UPDATE, Product, Rates, Work, flops, linears, phases, times, trunk, vocabulary
from ppo_shape import W1, Shape, offline


RANK = 16
ADAPTED = {"W1": None, "W2": 8, "W3": 2}
PHASES = ("rollout", "scoring", "update")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", type=Path, required=True, help="what `speed.py --result` wrote")
    parser.add_argument("--result", type=Path, help="JSON for benchmarks/results.py")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    speed = json.loads(arguments.speed.read_text())
    settings = {name: speed["settings"][name]["ours"] for name in ADAPTED if name in speed["settings"]}
    threads = {setting["threads"] for setting in settings.values()}
    if len(threads) != 1:
        parser.error(f"{arguments.speed} has runs on {sorted(threads)} threads; one number is needed")
    if not arguments.child:  # the number of threads is read when torch is imported
        os.execve(sys.executable, [sys.executable, __file__, *sys.argv[1:], "--child"], offline(threads.pop()))
    rates, rows = Rates(), []
    for name, setting in settings.items():
        work = three_phases(replace(W1, micro_batch=setting["micro_batch"]), ADAPTED[name])
        for part in work.values():
            rates.measure(part)
        rows += rows_of(
            name, {phase: rates.floor(part) for phase, part in work.items()}, work, speed["measured"][name]
        )
    found = {
        "title": "The floor of matrix products and what was measured, seconds of an iteration",
        "command": f"python benchmarks/floors.py --speed {arguments.speed}",
        "commit": commit_of_head(),
        "seed": 0,
        "columns": ["", "phase", "GFLOP", "floor", "ours", "over the floor", "TRL 1.12", "at most"],
        "rows": rows,
        "notes": [
            f"{setting['threads']} threads, fp32, products at {min(rates.measured.values()) / 1e9:.0f} to "
            f"{rates.best / 1e9:.0f} GFLOP/s by shape. Seconds of both programs from {arguments.speed.name}."
        ],
    }
    print(json.dumps(rows, indent=1))
    if arguments.result:
        arguments.result.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def rows_of(name: str, floor: dict[str, float], work: dict[str, Work], measured: dict[str, Any]) -> list[list[Any]]:
    """A row per phase, and one of their sums."""
    seconds = {side: dict(measured["phases"][side]) for side in ("ours", "trl112")}
    parts = {phase: (flops(work[phase]), floor[phase], *(seconds[s][phase] for s in seconds)) for phase in PHASES}
    parts["iteration"] = tuple(sum(column) for column in zip(*parts.values(), strict=True))
    return [
        [name, phase, round(work / 1e9), round(least, 2), round(ours, 2), round(ours / least, 2), round(peer, 2)]
        + [f"{peer / least:.2f}x"]
        for phase, (work, least, ours, peer) in parts.items()
    ]


def three_phases(shape: Shape, adapted: int | None) -> dict[str, Work]:
    """Rollout, scoring and update; LoRA on the upper `adapted` layers of policy, critic and reward, or none at all."""
    if adapted is not None:
        return adapted_phases(shape, adapted)
    found = phases(shape)
    update = sum((found[name] for name in UPDATE), Work())
    scoring = sum((found[name] for name in found if name not in (*UPDATE, "rollout")), Work())
    return {"rollout": found["rollout"], "scoring": scoring, "update": update}


def adapted_phases(shape: Shape, adapted: int) -> dict[str, Work]:
    below, above = replace(shape, layers=shape.layers - adapted), replace(shape, layers=adapted)
    parts, rows = shape.episodes // shape.micro_batch, shape.micro_batch

    def upper(rows: int, length: int, cached: int = 0) -> Work:
        return trunk(above, rows, length, cached) + updates(above, rows * length)

    rollout = trunk(below, shape.episodes, shape.prompt) + upper(shape.episodes, shape.prompt)
    rollout += times(vocabulary(shape, shape.episodes), shape.completion)
    for step in range(1, shape.completion):
        cached = shape.prompt + step - 1
        rollout += trunk(below, shape.episodes, 1, cached) + upper(shape.episodes, 1, cached)
    head, role = vocabulary(shape, rows * shape.completion), upper(rows, shape.length)
    reference = trunk(above, rows, shape.length)
    scoring = trunk(below, rows, shape.length) + times(role, 3) + reference + times(head, 2)  # policy, critic, reward
    epoch = times(role + adapted_backward(above, rows), 2) + head + input_gradients(head)
    return {"rollout": rollout, "scoring": times(scoring, parts), "update": times(epoch, parts * shape.epochs)}


def updates(shape: Shape, tokens: int) -> Work:
    """Forward products of the adapters: x A^T, then (x A^T) B^T."""
    found = Work()
    for k, n, count in linears(shape):
        found[Product("forward", tokens, k, RANK)] += count
        found[Product("forward", tokens, RANK, n)] += count
    return found


def adapted_backward(shape: Shape, rows: int) -> Work:
    """Of the base the gradients of inputs alone, of the adapters both; the lowest layer's inputs need none."""
    tokens, wide = rows * shape.length, shape.hidden
    base = trunk(shape, rows, shape.length)
    found = input_gradients(base)
    found += Work({product: 2 * count for product, count in base.items() if product.kind == "attention"})
    for product, count in updates(shape, tokens).items():
        found[Product("input_grad", product.m, product.n, product.k)] += count
        found[Product("weight_grad", product.n, product.m, product.k)] += count
    for lowest in (Product("input_grad", tokens, wide, wide), Product("input_grad", tokens, RANK, wide)):
        found[lowest] -= 3  # query, key and value
    return found


def input_gradients(work: Work) -> Work:
    linear = {product: count for product, count in work.items() if product.kind == "forward"}
    return Work({Product("input_grad", p.m, p.n, p.k): count for p, count in linear.items()})


if __name__ == "__main__":
    sys.exit(main())
