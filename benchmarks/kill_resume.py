"""Kill PPO runs at random times, resume them, and compare with the run that nobody killed.

    python benchmarks/kill_resume.py --kills 20 --result benchmarks/results/kill_resume.json

Tiny models on one base (policy, reference, reward and critic adapters), adaptive KL, checkpoints within the epochs
of a rollout. Each of the runs is ended by SIGKILL to all of its processes at a time drawn uniformly over the length of
the whole run, resumed from its newest checkpoint, and has to end with the same bits: weights of all roles and every
logged number but times. Exits with 1 if one does not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def launch(folder: Path, output_dir: Path, processes: int) -> subprocess.Popen:
    """Start a run in a process group of its own."""
    output_dir.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = [*launcher, "-m", "tests.trainers.resume_run", str(folder), str(output_dir)]
    log = open(output_dir / "log.txt", "a")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CI": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for_start(run: subprocess.Popen, output_dir: Path, processes: int) -> None:
    marks = [output_dir / f"started_{rank}" for rank in range(processes)]
    while not all(mark.exists() for mark in marks):
        if run.poll() is not None:
            raise RuntimeError(f"a run ended before it began, see {output_dir / 'log.txt'}")
        time.sleep(0.02)


def finish(run: subprocess.Popen, output_dir: Path) -> None:
    if run.wait() != 0:
        raise RuntimeError(f"a run failed, see {output_dir / 'log.txt'}")


def same_end(one: Path, other: Path, processes: int) -> bool:
    for rank in range(processes):
        (weights, logs), (again, logs_again) = (
            torch.load(folder / f"end_{rank}.pt", weights_only=True) for folder in (one, other)
        )
        if weights.keys() != again.keys() or not all(torch.equal(w, again[name]) for name, w in weights.items()):
            return False
        if [e for e in logs if "loss" in e] != [e for e in logs_again if "loss" in e]:
            return False
    return True


def matrix(processes: int, kills: int, seed: int, work: Path) -> dict:
    rng, whole = random.Random(f"{seed} {processes}"), work / f"whole_{processes}"
    run = launch(work, whole, processes)
    wait_for_start(run, whole, processes)
    started = time.monotonic()
    finish(run, whole)
    length = time.monotonic() - started
    same, resumed_at = 0, []
    for number in range(kills):
        folder = work / f"killed_{processes}_{number}"
        run = launch(work, folder, processes)
        wait_for_start(run, folder, processes)
        time.sleep(rng.uniform(0, length))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        # The workers of torchrun lead groups of their own.
        subprocess.run(["pkill", "-KILL", "-f", f"{folder}$"], check=False)
        steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
        resumed_at.append(steps[-1] if steps else 0)
        finish(launch(work, folder, processes), folder)
        equal = same_end(whole, folder, processes)
        same += equal
        print(f"{processes} process(es), kill {number + 1}: from step {resumed_at[-1]}, equal: {equal}", flush=True)
        if equal:
            shutil.rmtree(folder)
    return {"processes": processes, "kills": kills, "same": same, "resumed_at": sorted(resumed_at)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    from tests.trainers.resume_run import SAVE_STEPS, STEPS, prepare

    work = Path(tempfile.mkdtemp(prefix="kill_resume_"))
    prepare(work)
    rows = []
    for processes in args.processes:
        rows.append(matrix(processes, args.kills, args.seed, work))
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        result = {
            "title": "PPO runs killed at random times and resumed",
            "command": f"python benchmarks/kill_resume.py --kills {args.kills}",
            "commit": commit,
            "seed": args.seed,
            "columns": ["processes", "kills", "ended bit-equal to the run that was not killed", "resumed at steps"],
            "rows": [[r["processes"], r["kills"], r["same"], ", ".join(map(str, r["resumed_at"]))] for r in rows],
            "notes": [
                f"SIGKILL at a uniform time of a run of {STEPS} steps, a checkpoint every {SAVE_STEPS}, a rollout "
                "every 4; 0: before the first checkpoint. Equal: weights of all roles and every logged number but "
                "times."
            ],
        }
        print(json.dumps(result, indent=2))
        if args.result is not None:
            args.result.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(row["same"] != row["kills"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
