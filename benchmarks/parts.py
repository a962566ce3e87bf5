"""
Parts against what they replace: LoRA layers against PEFT's, norms, feed-forward layers, the cache of sampling and
several samples of a prompt against transformers'.

    python benchmarks/parts.py --result benchmarks/results/parts.json

The sizes of W2 of docs/performance.md, one thread, CPU seconds. Both programs run in one process in alternation, each
first in every other round; a row gives medians and the ratio by round with its interval.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare import commit_of_head
from peft import LoraConfig, get_peft_model
from ppo_shape import W1, make_policy
from speed_statistics import median_interval
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from rlhf_ext.models.fused_blocks import fuse_blocks
from rlhf_ext.models.fused_lora import fuse_lora_updates
from rlhf_ext.models.growing_cache import grow_ahead
from rlhf_ext.models.live_sampling import only_live_rows


RANK, MICRO_BATCH, SAMPLES = 16, 8, 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--result", type=Path, help="JSON for benchmarks/results.py")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pairs = {
        **adapters(),
        **blocks(),
        f"steps of {W1.completion} tokens for {W1.episodes} rows": steps(),
        f"{SAMPLES} samples of {W1.episodes // SAMPLES} prompts": samples(),
    }
    rows = []
    for name, (theirs, ours) in pairs.items():
        seconds = alternate(theirs, ours, arguments.rounds)
        ratios = [their / our for their, our in zip(*seconds, strict=True)]
        middle, low, high, covered = median_interval(ratios)
        medians = [f"{statistics.median(side) * 1e3:.4g}" for side in seconds]
        rows.append([name, *medians, f"{middle:.3f}x [{low:.3f}, {high:.3f}]"])
        print(*rows[-1], sep="   ", flush=True)
    found = {
        "title": "Parts against what they replace, CPU milliseconds",
        "command": "python benchmarks/parts.py",
        "commit": commit_of_head(),
        "seed": 0,
        "columns": ["part", "before", "now", "before / now"],
        "rows": rows,
        "notes": [f"{arguments.rounds} rounds, one thread, fp32; intervals cover the median with {covered:.1%}."],
    }
    if arguments.result:
        arguments.result.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def alternate(theirs: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(-1, rounds):  # the first warms up
        for side in (0, 1) if number % 2 else (1, 0):
            start = time.process_time()
            (theirs, ours)[side]()
            if number >= 0:
                seconds[side].append(time.process_time() - start)
    return seconds


def adapters() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """The seven linear layers of a block, with adapters, on the tokens of a micro-batch."""
    wide, inner = W1.hidden, W1.intermediate
    block = nn.ModuleDict({f"{name}_proj": nn.Linear(wide, wide, bias=False) for name in "qkvo"})
    block.update({f"{name}_proj": nn.Linear(wide, inner, bias=False) for name in ("gate", "up")})
    block["down_proj"] = nn.Linear(inner, wide, bias=False)
    stock = get_peft_model(nn.ModuleDict({"block": block}), LoraConfig(r=RANK, target_modules=list(block)))
    fused = copy.deepcopy(stock)
    fuse_lora_updates(fused)
    tokens = torch.randn(MICRO_BATCH, W1.length, inner)

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            for layer in model.base_model.model["block"].values():
                layer(tokens[..., : layer.in_features])

    def both(model: nn.Module) -> None:
        for layer in model.base_model.model["block"].values():
            layer(tokens[..., : layer.in_features].clone().requires_grad_()).sum().backward()

    return {
        "LoRA layers, forward": (lambda: forward(stock), lambda: forward(fused)),
        "LoRA layers, forward and backward": (lambda: both(stock), lambda: both(fused)),
    }


def blocks() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Norm and feed-forward layer of a block that trains, on the tokens of a micro-batch."""
    layer = make_policy(W1).model.layers[0]
    tokens = torch.randn(MICRO_BATCH, W1.length, W1.hidden)

    def both(module: nn.Module) -> Callable[[], Any]:
        return lambda: module(tokens.clone().requires_grad_()).sum().backward()

    found = {}
    for name, module in (("norm", layer.input_layernorm), ("feed-forward layer", layer.mlp)):
        fused = copy.deepcopy(module)
        fuse_blocks(fused)
        found[f"{name}, forward and backward"] = (both(module), both(fused))
    return found


def steps() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Greedy steps of the whole model behind prompts, without the drawing of tokens."""
    model = make_policy(W1).eval()
    prompts = torch.randint(3, W1.vocabulary, (W1.episodes, W1.prompt))

    @torch.no_grad()
    def sample(ahead: bool) -> None:
        cache, new = DynamicCache(config=model.config), prompts
        if ahead:
            grow_ahead(cache)
        for _ in range(W1.completion):
            new = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    return lambda: sample(False), lambda: sample(True)


def samples() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """`generate` with several samples of each prompt, none of which ends: what ended rows save comes on top."""
    model = make_policy(W1).eval()
    prompts = torch.randint(3, W1.vocabulary, (W1.episodes // SAMPLES, W1.prompt)).repeat_interleave(SAMPLES, dim=0)
    length = {"max_new_tokens": W1.completion, "min_new_tokens": W1.completion}
    config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, **length)
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "generation_config": config}

    def ours() -> None:
        with only_live_rows(model):
            model.generate(**inputs)

    return lambda: model.generate(**inputs), ours


if __name__ == "__main__":
    sys.exit(main())
