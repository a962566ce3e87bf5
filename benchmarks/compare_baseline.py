"""Which constant baseline has the least variance at the start of a comparison, against the mean reward.

    python benchmarks/compare_baseline.py --runs runs/compare --seeds 5

For samples y of the SFT model with gold R and g = grad log pi(y), the estimator (R - b) g is unbiased for every b, and
its variance, the trace, is least at b* = E[R |g|^2] / E[|g|^2], not at E[R]. Both are measured on `--samples` of the
training prompts of each seed.
"""

import argparse
import json
from pathlib import Path

import torch
from compare import commit_of_head
from transformers import AutoModelForCausalLM

from rlhf_ext.models.generation import sample_completions
from rlhf_ext.toyworld.corpus import prompt_rows
from rlhf_ext.toyworld.gold import gold_reward
from rlhf_ext.toyworld.tiny import build_tokenizer


def gradients(folder: Path, seed: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gold `(N,)` and the gradient of each sample's log-probability `(N, P)`."""
    torch.manual_seed(seed)
    tokenizer, model = build_tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    prompts = [row["prompt"] for row in prompt_rows(samples, seed, split="ppo")]
    found = sample_completions(model, tokenizer, prompts, max_new_tokens=16)
    rows = []
    for prompt, completion in zip(found.prompt_ids, found.completion_ids, strict=True):
        ids = torch.tensor([prompt + completion])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        parts = torch.autograd.grad(logps[len(prompt) - 1 :].sum(), list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.tensor(gold_reward(found.prompts, found.texts)), torch.stack(rows)


def variance(gold: torch.Tensor, rows: torch.Tensor, baseline: float) -> float:
    """Trace of the covariance of (R - b) g."""
    return ((gold - baseline)[:, None] * rows).var(0, unbiased=True).sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="the --output_dir of compare.py")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    table = []
    for seed in range(args.seeds):
        gold, rows = gradients(args.runs / "sft" / f"seed{seed}" / "sft", seed, args.samples)
        weight = rows.pow(2).sum(1)
        best, mean = ((gold * weight).mean() / weight.mean()).item(), gold.mean().item()
        none = variance(gold, rows, 0.0)
        table.append([seed, mean, best, *(variance(gold, rows, b) / none for b in (mean, best))])
    result = {
        "title": "A constant baseline at the SFT model: variance of the policy gradient",
        "command": f"python benchmarks/compare_baseline.py --runs runs/compare --seeds {args.seeds}",
        "commit": commit_of_head(),
        "seed": list(range(args.seeds)),
        "columns": ["seed", "mean gold", "best baseline b*", "variance at the mean / at 0", "variance at b* / at 0"],
        "rows": table,
        "notes": [f"{args.samples} samples of the training prompts, one each; b* = E[R |g|^2] / E[|g|^2]."],
    }
    print(json.dumps(result, indent=2))
    if args.result is not None:
        args.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
