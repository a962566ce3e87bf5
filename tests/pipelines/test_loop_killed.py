"""`rlhf-ext iterate` as users start it, killed by SIGKILL in the middle of two steps, and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlhf_ext.data.jsonl import read_jsonl
from rlhf_ext.feedback.exchange import export_rows
from rlhf_ext.feedback.store import LabelStore
from rlhf_ext.pipelines.finished_runs import read_run
from rlhf_ext.pipelines.loop_record import STEPS
from rlhf_ext.pipelines.loop_run import LoopRun
from tests.pipelines.test_loop import PPO, REWARD, prompts, sft  # noqa: F401 (fixtures)


ROOT = Path(__file__).resolve().parents[2]
REWARD_STEPS, PPO_STEPS = 24, 12
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}


def start(folder, sft, prompts):  # noqa: F811
    """The command in a session of its own, as a shell would leave it to the kernel."""
    flags = {
        "output_dir": str(folder / "run"),
        "model_name_or_path": sft,
        "dtype": "float32",
        "dataset_name": prompts,
        "eval_fraction": 0.2,
        "num_rounds": 1,
        "labels_per_round": 12,
        "labels": "simulated",
        "gold_func": "tests.pipelines.test_loop:goodness",
        "reward": {**REWARD, **CHECKPOINTS, "max_steps": REWARD_STEPS, "logging_steps": 1},
        "ppo": {**PPO, **CHECKPOINTS, "max_steps": PPO_STEPS},
    }
    (folder / "loop.yaml").write_text(yaml.safe_dump(flags))
    command = [sys.executable, "-m", "rlhf_ext.cli", "iterate", "--config", str(folder / "loop.yaml")]
    output = open(folder / "output.txt", "a")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def kill_when(process, aside):
    """SIGKILL as soon as a step has a whole checkpoint behind it and is still at work; that checkpoint's number."""
    deadline = time.time() + 180
    while time.time() < deadline and process.poll() is None:
        if any(aside.glob("checkpoint-*")):
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL, f"it ended by itself, with code {process.returncode}"
    return max(int(path.name.removeprefix("checkpoint-")) for path in aside.glob("checkpoint-*"))


def finished(run):
    """Every file of the finished steps with the time it was written, and what the manifest says of them."""
    manifest = json.loads((run / "manifest.json").read_text())["steps"]
    paths = [path for step in manifest for path in (run / step["folder"]).rglob("*") if path.is_file()]
    return manifest, {str(path): path.stat().st_mtime_ns for path in paths}


def labels_of(run):
    """What the store holds: every label there ever was, and the comparisons as they are exported."""
    with LabelStore(run / "labels.db", create=False) as store:
        labels = [(label.id, label.comparison_id, label.annotator, label.value) for label in store.labels_since(0)]
        return labels, list(export_rows(store, pool=LoopRun.load(run).pool(1)))


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs POSIX signals")
def test_killed_by_a_signal_it_repeats_nothing_and_loses_no_label(tmp_path, sft, prompts):  # noqa: F811
    run = tmp_path / "run"
    seen, kept = [], []
    for step in ("reward", "policy"):
        kept.append(kill_when(start(tmp_path, sft, prompts), run / "round_1" / f"_unfinished_{step}"))
        assert not (run / "round_1" / step).exists()
        seen.append((finished(run), labels_of(run)))
    assert start(tmp_path, sft, prompts).wait(timeout=180) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    seen.append((finished(run), labels_of(run)))

    names = [[step["step"] for step in manifest] for (manifest, _), _ in seen]
    order = ["evaluation", *STEPS]
    assert names == [order[:4], order[:5], order]
    for (before, after), number in zip(zip(seen, seen[1:], strict=False), (1, 2), strict=True):
        (manifest, times), labels = before
        assert after[0][0][: len(manifest)] == manifest
        changed = {path for path, at in times.items() if after[0][1].get(path) != at}
        assert not changed, f"start {number + 1} wrote finished steps again: {changed}"
        assert labels == after[1]
    history, rows = seen[-1][1]
    selected = read_jsonl(run / "round_1" / "selection" / "rows.jsonl")
    assert len(history) == len(rows) == len(selected) > 0
    assert len({comparison for _, comparison, *_ in history}) == len(selected), "a comparison was labelled twice"
    assert all(row["num_labels"] == 1 for row in rows)
    said = (tmp_path / "output.txt").read_text()
    assert [said.count(f"round 1, {step}\n") for step in STEPS] == [1, 1, 1, 2, 2, 1]
    # Inside the step it went on from the checkpoint: only what came after it was trained again.
    again = [
        said.split(f"round 1, {step}\n")[2].split("\nround ")[0].count("{'loss'") for step in ("reward", "policy")
    ]
    assert again == [REWARD_STEPS - kept[0], PPO_STEPS - kept[1]]
    history = read_run(run / "round_1" / "policy")["result"]["history"]
    assert [entry["step"] for entry in history] == list(range(1, PPO_STEPS + 1))
    assert not list(run.rglob("_unfinished_*"))
