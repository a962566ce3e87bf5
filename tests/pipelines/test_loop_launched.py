"""The loop whose training steps run on two real processes: reward model and policy are those of one process."""

from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from rlhf_ext.data.jsonl import read_jsonl
from rlhf_ext.pipelines import loop
from tests.distributed.launcher import difference
from tests.pipelines.test_loop import PPO, REWARD, arguments, prompts, sft  # noqa: F401 (fixtures)


ROOT = Path(__file__).resolve().parents[2]
GOLD, RANKS = "tests.pipelines.greedy_gold:goodness", "RLHF_EXT_TEST_RANKS"
# Processes sample differently by design, so PPO is greedy here; SGD, because AdamW's first steps are signs.
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_steps": 3}
KINDS = {"multi_gpu": "multi_cpu", "zero2": "zero2", "zero3": "zero3"}
"""Shipped files, and what a process says that it runs under."""


def launched(folder, sft, prompts, kind, processes, peft):  # noqa: F811
    """A round whose training steps are launched by a copy of a shipped file, which names the CPU and the processes."""
    shipped = yaml.safe_load((ROOT / "accelerate_configs" / f"{kind}.yaml").read_text())
    config = {**shipped, "use_cpu": True, "num_processes": processes, "mixed_precision": "no", "main_process_port": 0}
    (folder / "ranks").mkdir(parents=True)
    (folder / "launch.yaml").write_text(yaml.safe_dump(config))
    size = {"per_device_train_batch_size": 8 // processes}
    args = arguments(
        folder / "run",
        sft,
        prompts,
        peft=peft,
        num_rounds=1,
        labels_per_round=24,
        reward_eval_fraction=0.0,  # batches of one size: a last one that is smaller is filled up on two processes
        gold_func=GOLD,
        launch_config=str(folder / "launch.yaml"),
        reward={**REWARD, **SGD, **size},
        ppo={**PPO, **SGD, **size},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv(RANKS, str(folder / "ranks"))
        loop.run_loop(*args)
    return folder / "run" / "round_1"


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
def one(request, tmp_path_factory, sft, prompts):  # noqa: F811
    folder = tmp_path_factory.mktemp("one") / "one"
    return launched(folder, sft, prompts, "cpu", 1, request.param), request.param


@pytest.mark.parametrize(
    "kind", [kind if kind == "multi_gpu" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_two_processes_train_what_one_does(tmp_path, one, sft, prompts, kind):  # noqa: F811
    alone, peft = one
    together = launched(tmp_path / "two", sft, prompts, kind, 2, peft)
    assert {path.name for path in (tmp_path / "two" / "ranks").iterdir()} == {
        f"{KINDS[kind]}-{rank}-of-2" for rank in (0, 1)
    }
    rows = [read_jsonl(round_ / "labels" / "rows.jsonl") for round_ in (alone, together)]
    # A pool has the id of its run.
    assert len({row.pop("pool") for both in rows for row in both}) == 2 and rows[0] == rows[1]
    name = "adapter_model.safetensors" if peft else "model.safetensors"
    start = load_file(Path(sft) / "model.safetensors")
    for step in ("reward", "policy"):
        ours, theirs = load_file(together / step / name), load_file(alone / step / name)
        apart = difference(ours, theirs)
        print(f"\n{kind} {'lora' if peft else 'full'} {step}: {apart:.3g}")
        assert apart < 1e-5
        if peft:
            assert any(ours[key].abs().max() > 1e-4 for key in ours if "lora_B" in key), "adapters that stand still"
        else:
            moved = max((ours[key] - start[key]).abs().max().item() for key in ours if key in start)
            print(f"{kind} {step} moved {moved:.3g}")
            assert moved > 1e-3, "weights that stand still prove nothing"
