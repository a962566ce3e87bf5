"""
The whole table of two processes against one: `make slow-distributed`, about five minutes on two cores.

With `RESULTS=FOLDER` in the environment the tables that docs/scaling.md shows are written there.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.distributed import worker
from tests.distributed.launcher import ROOT, agree, compare, launch, read, reload


pytestmark = pytest.mark.slow
KINDS = {"ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
CASES = {
    "ppo-lora": "PPO, LoRA, four roles on one base",
    "ppo-lora-ckpt": "the same, checkpointing",
    "ppo-lora-accumulate": "the same, two micro-batches per step",
    "ppo-lora-adamw": "the same, AdamW, clipped at 1.0",
    "ppo-lora-shared": "the same, the critic a head on the reward adapter",
    "ppo-nf4": "PPO, LoRA on an NF4 base",
    "ppo-nf4-ckpt": "the same, checkpointing",
    "ppo-full": "PPO, full fine-tuning, critic and reward of their own",
    "ppo-full-ckpt": "the same, checkpointing",
    "reward-full": "reward model, full fine-tuning",
    "reward-full-ckpt": "the same, checkpointing",
    "reward-full-sum": "reward model, scores summed over tokens",
    "reward-full-stream": "reward model, rows as a stream",
    "reward-full-lm": "reward model with the language-modelling term",
    "reward-lora": "reward model, LoRA",
    "reward-lora-ckpt": "the same, checkpointing",
    "reward-lora-lm": "reward model, LoRA, with the language-modelling term",
    "reward-nf4": "reward model, LoRA on an NF4 base",
}
SAMPLED = ["ppo-lora-sampled", "ppo-full-sampled"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    world = worker.build_world(folder / "world")
    launch("one", world, folder / "one", list(CASES))
    for kind in KINDS:
        launch(kind, world, folder / kind, [*CASES, *SAMPLED])
    return folder


@pytest.fixture(scope="module")
def apart(runs):
    """Differences by case and kind; written for the documentation where it is asked for."""
    found = {c: {k: compare(read(runs / "one", c), read(runs / k, c)) for k in KINDS} for c in CASES}
    rows = []
    for case, title in CASES.items():
        row = [title, round(found[case]["ddp"]["moved"], 4)]
        for kind in KINDS:
            # Clipped before one process shows its gradients, and after DeepSpeed does.
            row += [None if "adamw" in case else found[case][kind]["gradients"], found[case][kind]["weights"]]
        rows.append(row)
    columns = ["case", "weights moved"]
    columns += [f"{title}: {what}" for title in KINDS.values() for what in ("gradients", "weights")]
    notes = [
        "Gradients of step 1: largest difference over the largest entry. Weights after 3 steps: largest difference. "
        f"{worker.ROWS} rows a step, ragged prompts, completions and numbers of candidates; greedy rollouts for PPO, "
        "two epochs each. ZeRO-3 with `stage3_param_persistence_threshold` 0, so that no tensor stays whole.",
        f"CPU, gloo, float32, torch {torch.__version__}.",
    ]
    write("two_processes", "Two processes against one on the same batch, SGD unless said", columns, rows, notes)
    return found


def write(name, title, columns, rows, notes):
    if "RESULTS" not in os.environ:
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    result = {"title": title, "command": "make slow-distributed", "commit": commit.stdout.strip(), "seed": 3}
    result |= {"columns": columns, "rows": rows, "notes": notes}
    (ROOT / os.environ["RESULTS"] / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_and_weights_are_those_of_one_process(apart, kind, case):
    found = apart[case][kind]
    assert found["moved"] > 1e-3
    assert found["weights"] < 1e-5
    if "adamw" not in case:
        assert found["gradients"] < 1e-6


@pytest.mark.parametrize("kind", ["one", *KINDS])
@pytest.mark.parametrize("case", ["ppo-lora", "ppo-full"])
def test_saved_roles_say_what_they_said(runs, kind, case):
    result, saved = read(runs / kind, case), reload(runs / kind / case / "saved")
    assert {"policy", "critic"} <= saved.keys() and ("reward" in saved) is ("lora" in case)
    for role, numbers in saved.items():
        torch.testing.assert_close(numbers, result[role], atol=1e-5, rtol=0, msg=role)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SAMPLED)
def test_sampled_rollouts_share_their_numbers_and_not_their_samples(runs, kind, case):
    agree(*(read(runs / kind, case, rank)["seen"] for rank in (0, 1)))


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_resumed_runs_end_with_the_same_bits(tmp_path, kind):
    """Sampled rollouts and AdamW; DeepSpeed loads its own part of a checkpoint. DDP: `make slow-kill`."""
    cases = ["ppo-lora-sampled-adamw-resume", "ppo-full-sampled-adamw-resume", "reward-lora-adamw-resume"]
    launch(kind, worker.build_world(tmp_path / "world"), tmp_path, cases)
    for case in cases:
        whole, resumed = torch.load(tmp_path / f"{case}.rank0.pt")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), case


def test_roles_under_fsdp2(runs):
    cases = {"plain": False, "ckpt": True}
    launch("ddp", runs / "world", runs / "fsdp2", list(cases), script=Path(__file__).with_name("fsdp2_worker.py"))
    rows = []
    for case, checkpointing in cases.items():
        both = [torch.load(runs / "fsdp2" / f"{case}.rank{rank}.pt") for rank in (0, 1)]
        worst = {name: max(found[name] for found in both) for name in both[0]}
        assert worst.pop("generate") == 0
        assert max(worst.values()) < 1e-5
        rows.append([checkpointing, *worst.values(), 0])
    columns = ["checkpointing", *worst, "tokens generated otherwise"]
    notes = "Forwards: largest difference of log-probabilities, values, scores; gradients: over the largest entry."
    title = "Roles under torch's `fully_shard`, two processes on gloo against the plain model"
    write("fsdp2", title, columns, rows, notes)


def test_bf16_mode_of_deepspeed_is_refused_before_training(runs):
    with pytest.raises(AssertionError, match="ValueError: bf16=True switches on DeepSpeed's bf16 mode"):
        launch("zero2", runs / "world", runs / "refused", ["ppo-lora-bf16"])
