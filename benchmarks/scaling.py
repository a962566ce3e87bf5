"""
Memory and step time of PPO on paper: `python benchmarks/scaling.py --result benchmarks/results/scaling.json`.

Memory is the planner's. Time is arithmetic, with every assumption in `Card` and `HOST_SECONDS`; nothing here was
measured on a GPU. N = parameters of the decoder's layers and the head, T = tokens of a rank's rollout.

    generation   prefill 2 N (prompt tokens) / F, then per sampled token the largest of
                 (bytes of the weights + bytes of the cache so far) / W, 2 N rows / F, layers x host
    scoring      4 forwards (old log-probabilities, reference, values, reward): 4 x 2 N T / F
    update       epochs x 2 roles (policy, critic) x (2 forward + 2 backward + 2 recomputed) N T / F
    gathering    FSDP2 and ZeRO-3 move the weights over the network once per forward, recomputation and backward, and
                 once per sampled token: bytes x (ranks - 1) / ranks / L each

F = sustained FLOP/s, W = sustained memory bandwidth, L = sustained bandwidth of the network into one GPU. Frozen
weights need no gradient of their own, so a LoRA backward costs 2 N a token, not 4 N.
"""

import argparse
import json
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlhf_ext.models.memory_plan import MemoryPlan, plan_memory, trace_run
from rlhf_ext.models.memory_shape import RunShape
from rlhf_ext.models.memory_trace import Activations
from rlhf_ext.pipelines.environment import read_arguments, run_shape


ROOT = Path(__file__).resolve().parents[1]
# Launching the kernels of one decoder layer from Python, LoRA and bitsandbytes included, per token of `generate`.
HOST_SECONDS = 1e-3


@dataclass(frozen=True)
class Card:
    """Makers' figures, and the share of them that is assumed to be sustained."""

    name: str
    gib: int
    flops: float  # dense bf16
    bandwidth: float  # bytes per second
    network: float = 0.0  # bytes per second into one GPU, between nodes
    compute_share: float = 0.4
    bandwidth_share: float = 0.6
    network_share: float = 0.7


CONSUMER = Card("24 GB (RTX 4090: 165 TFLOP/s, 1.01 TB/s)", 24, 165e12, 1.01e12)
NODE = Card("80 GB (H100 SXM: 989 TFLOP/s, 3.35 TB/s, 450 GB/s NVLink)", 80, 989e12, 3.35e12, 450e9)
CLUSTER = replace(NODE, name="80 GB (H100 SXM, 50 GB/s InfiniBand per GPU)", network=50e9)


def step_seconds(shape: RunShape, plan: MemoryPlan, card: Card, epochs: int) -> dict[str, float]:
    """Seconds of one rollout and its updates on every rank, by the formulas above."""
    config = shape.config
    layer = 2 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    layer += 2 * config.hidden_size * config.hidden_size * config.num_key_value_heads // config.num_attention_heads
    parameters = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    # Weights in fp32 are multiplied as TF32, at half the rate of bf16.
    flops = card.flops * card.compute_share / (2 if shape.dtype == torch.float32 else 1)
    bandwidth = card.bandwidth * card.bandwidth_share
    sharded = shape.sharding in ("zero3", "fsdp2")
    weights = plan.parts["base"] * (shape.ranks if sharded else 1)
    gather = weights * (shape.ranks - 1) / shape.ranks / (card.network * card.network_share) if sharded else 0.0
    tokens = shape.rollout * (shape.prompt_length + shape.completion_length)
    per_token = max(
        (weights + plan.parts["cache"] * (1 - shape.completion_length / 2 / (tokens / shape.rollout))) / bandwidth,
        2 * parameters * shape.rollout / flops,
        config.num_hidden_layers * HOST_SECONDS,
        gather,
    )
    micro_batches = shape.rollout // shape.rows
    seconds = {
        "generation": max(2 * parameters * shape.rollout * shape.prompt_length / flops, gather)
        + shape.completion_length * per_token,
        "scoring": 4 * max(2 * parameters * tokens / flops, micro_batches * gather),
        # Forward, recomputation and backward each gather once.
        "update": epochs * 2 * max(6 * parameters * tokens / flops, 3 * micro_batches * gather),
    }
    return seconds | {"step": sum(seconds.values())}


def cases() -> list[tuple[str, RunShape, Card, int]]:
    """8B on one card from its recipe; 70B with the same lengths on 8 and 64 GPUs."""
    arguments = read_arguments(str(ROOT / "recipes" / "ppo_8b_24gb.yaml"))
    eight = run_shape(*arguments, model_config=str(ROOT / "docs" / "llama3_8b.json"))
    seventy = run_shape(*arguments, model_config=str(ROOT / "docs" / "llama3_70b.json"))
    epochs = arguments[1].num_iterations
    whole = replace(seventy, quantization=None)
    zero3 = {"gathers_for_generation": False}
    found = [("8B, NF4", eight, CONSUMER, epochs)]
    for ranks, card in ((8, NODE), (64, CLUSTER)):
        found += [
            (f"70B, NF4, DDP x {ranks}", replace(seventy, ranks=ranks, sharding="ddp"), card, epochs),
            (f"70B, bf16, FSDP2 x {ranks}", replace(whole, ranks=ranks, sharding="fsdp2"), card, epochs),
            (f"70B, fp32, ZeRO-3 x {ranks}", replace(whole, ranks=ranks, sharding="zero3", **zero3), card, epochs),
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, required=True, help="JSON for benchmarks/results.py")
    arguments = parser.parse_args()
    rows: list[list[Any]] = []
    traced: dict[tuple, Activations] = {}
    for name, shape, card, epochs in cases():
        key = (shape.config.num_hidden_layers, shape.quantization is None, shape.dtype)
        if key not in traced:
            traced[key] = trace_run(shape)
        plan = plan_memory(shape, traced[key])
        seconds = step_seconds(shape, plan, card, epochs)
        gib = {part: size / 2**30 for part, size in plan.parts.items()}
        rows.append(
            [
                name,
                f"{card.gib} GB",
                *(round(gib[part], 2) for part in ("base", "adapters, heads", "optimizer", "cache", "activations")),
                round(plan.peak / 2**30, 1),
                plan.peak_phase,
                "yes" if plan.peak <= card.gib * 2**30 else "no",
                shape.rollout * shape.ranks,
                *(round(seconds[part]) for part in ("generation", "scoring", "update", "step")),
            ]
        )
        print(rows[-1], flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "title": "On paper: GiB per GPU and seconds per rollout with its updates",
        "command": f"python benchmarks/scaling.py --result {arguments.result}",
        "commit": commit.strip(),
        "seed": None,
        "columns": ["model", "card", "base", "adapters", "optimizer", "cache", "activations", "peak", "in phase"]
        + ["fits", "rows per rollout", "generation, s", "scoring, s", "update, s", "all, s"],
        "rows": rows,
        "notes": [f"Cards: {'; '.join(card.name for card in (CONSUMER, NODE, CLUSTER))}."],
    }
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
