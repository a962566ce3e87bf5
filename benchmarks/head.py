"""Log-probabilities of tokens on a CPU: `functional.token_logps` against the kernel of TRL, forward and backward.

    python benchmarks/head.py --result benchmarks/results/head.json

The two alternate in one process, best of several each; the numbers are compared on the way.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from compare import commit_of_head
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from rlhf_ext.functional.token_logps import token_logps


SHAPES = [(2048, 8192, 384), (256, 262_144, 640)]
VOCABULARY_TILE = 32768  # TRL's


def seconds(name: str, rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    if name == "ours":
        logps, _ = token_logps(rows, weight, targets)
    else:
        outputs = ("log_probs", "entropy")
        logps = ChunkedLogProbFunction.apply(rows, weight, None, targets, 1.0, VOCABULARY_TILE, None, 1.0, outputs)[0]
    logps.sum().backward()
    return time.perf_counter() - start, logps.detach()


def compare(tokens: int, vocabulary: int, hidden: int, trains: bool, repeats: int) -> list[str]:
    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, hidden) * 0.05).requires_grad_(trains)
    targets = torch.randint(vocabulary, (tokens,))
    rows = torch.randn(tokens, hidden, requires_grad=True)
    best: dict[str, float] = {}
    found: dict[str, torch.Tensor] = {}
    for _ in range(repeats):
        for name in ("TRL", "ours"):
            taken, found[name] = seconds(name, rows, weight, targets)
            best[name] = min(best.get(name, taken), taken)
    torch.testing.assert_close(found["ours"], found["TRL"], rtol=0, atol=1e-4)
    head = "trains" if trains else "is frozen"
    ratio = f"{best['TRL'] / best['ours']:.2f}x"
    return [f"{tokens:,} x {vocabulary:,} x {hidden}", head, f"{best['TRL']:.2f}", f"{best['ours']:.2f}", ratio]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [compare(*shape, trains, args.repeats) for shape in SHAPES for trains in (False, True)]
    result = {
        "title": "The output head on a CPU, forward and backward",
        "command": f"python benchmarks/head.py --repeats {args.repeats} --threads {args.threads}",
        "commit": commit_of_head(),
        "seed": 0,
        "columns": ["tokens x vocabulary x hidden", "the head", "TRL, s", "ours, s", "faster"],
        "rows": rows,
        "notes": "Best of the repeats, in turns, in one process. With entropies; float32.",
    }
    print(json.dumps(result, indent=1))
    if args.result is not None:
        args.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
