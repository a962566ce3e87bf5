"""
An ensemble of reward adapters in the processes that a launcher started.

    torchrun --nproc_per_node 2 tests/distributed/ensemble_worker.py --world WORLD --output OUT --cases ensemble
"""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import load_from_disk
from transformers import AutoTokenizer

from rlhf_ext import PreferenceRewardConfig
from rlhf_ext.pipelines.reward_ensemble import train_reward_ensemble
from rlhf_ext.pipelines.reward_normalization import reference_samples
from tests.distributed.worker import lora, options


def run(case: str, world: Path, output: Path) -> None:
    args = PreferenceRewardConfig(**options(case, output), learning_rate=0.05)
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    rows, samples = load_from_disk(str(world / "preferences")), None
    if "samples" in case.split("-"):
        samples = reference_samples(str(world / "base"), tokenizer, list(rows["prompt"]), max_new_tokens=6)
    train_reward_ensemble(
        str(world / "base"),
        args,
        rows,
        tokenizer,
        num_members=2,
        peft_config=lora(task_type="SEQ_CLS"),
        samples=samples,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", required=True)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    for case in parsed.cases:
        run(case, parsed.world, parsed.output)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
