"""Starts the worker as users start a recipe, and compares what two processes left with what one did."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from rlhf_ext.models.build import load_policy
from rlhf_ext.models.scoring import load_reward_model, token_scores
from tests.distributed.worker import IDS


ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "distributed" / "worker.py"
CONFIGS = ROOT / "accelerate_configs"


def command(kind: str, output: Path) -> list[str]:
    """The launch line of `one`, `ddp`, `zero2` or `zero3`, up to the script."""
    if kind == "one":
        return [sys.executable]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    if kind == "ddp":
        return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    # The shipped files name eight GPUs. `--cpu` on the line would leave DeepSpeed out, so a copy says it.
    config = {**yaml.safe_load((CONFIGS / f"{kind}.yaml").read_text()), "use_cpu": True, "num_processes": 2}
    (output / f"{kind}.yaml").write_text(yaml.safe_dump(config))
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(output / f"{kind}.yaml")]
    return [*line, "--main_process_port", port]


def launch(kind: str, world: Path, output: Path, cases: list[str], script: Path = WORKER) -> str:
    """Run the worker and return what it printed; raises with its last words if it fails."""
    output.mkdir(parents=True, exist_ok=True)
    line = [*command(kind, output), str(script), "--world", str(world), "--output", str(output), "--cases", *cases]
    # An inherited thread count or a GPU would make another run of it.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=900)
    if process.returncode:
        raise AssertionError(f"{kind}: {process.stdout[-500:]}{process.stderr[-4000:]}")
    return process.stdout + process.stderr


def read(output: Path, case: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(output / f"{case}.rank{rank}.pt", weights_only=False)


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of two sets of tensors of the same names and shapes."""
    assert one.keys() == other.keys() and one, sorted(one.keys() ^ other.keys())[:4]
    return max((tensor - other[name]).abs().max().item() for name, tensor in one.items())


def compare(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How far two runs are apart, and how far the first moved: `gradients` relative to the largest entry."""
    largest = max(tensor.abs().max().item() for tensor in one["gradients"].values())
    return {
        "gradients": difference(one["gradients"], other["gradients"]) / largest,
        "weights": difference(one["weights"], other["weights"]),
        "moved": difference(one["start"], one["weights"]),
    }


def reload(folder: Path) -> dict[str, torch.Tensor]:
    """What the roles of a folder say after loading, as `worker.spoken` asks them."""
    said = {}
    with torch.no_grad():
        if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
            said["policy"] = load_policy(str(folder)).eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        for role in ("critic", "reward"):
            if (folder / role).exists():
                said[role] = token_scores(load_reward_model(folder / role), IDS, torch.ones_like(IDS))
    return said


def agree(first: dict[str, list], second: dict[str, list]) -> None:
    """Two processes of a sampled run saw the same moments, counts and coefficient, and other completions."""
    for name in ("moments", "tokens", "kl_coef"):
        assert first[name] and first[name] == second[name], name
    assert len(set(first["kl_coef"])) > 1, "a controller that stands still proves nothing"
    assert all(count == tokens for (count, *_), tokens in zip(first["moments"][::2], first["tokens"], strict=True))
    for one, other in zip(first["completions"], second["completions"], strict=True):
        assert one != other and len(one) == len(other)
