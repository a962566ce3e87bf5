"""Environments and processes of `speed.py`: one process per measurement, and a check that two did the same work."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from invariants_trl112 import environment
from memory import ALLOCATOR


ROOT = Path(__file__).resolve().parents[1]
PEER_PACKAGES = (["torch==2.13.0"], ["trl==1.12.0", "rich", "peft==0.21.2"])
OUR_PACKAGES = (["torch==2.13.0"], ["-e", str(ROOT)])
PROGRAMS = {"trl112": "speed_trl112.py"}
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
# Left to the library's defaults, whatever the shell says: seconds depend on how threads wait.
THREAD_POLICY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Quiet below; the machine's own services make about a tenth.
QUIET_LOAD = 0.5


def pythons(folder: Path, ours: Path | None, peer: Path | None) -> dict[str, Path]:
    """The interpreter of each side; environments that were not given are built in `folder`, unless they are there."""
    peer = peer or environment(folder / "trl112", PEER_PACKAGES)
    ours = ours or environment(folder / "ours", OUR_PACKAGES)
    return {"ours": ours, "padded": ours, "generation": ours, "trl112": peer}


def measure(run: dict[str, Any], python: Path, *, returning: bool) -> dict[str, Any]:
    """One process; `returning`: freed blocks go back to the system at once.

    The allocator's own settings keep freed blocks, so peaks would be those of its habits; without it each large tensor
    costs page faults, so seconds would be those. Time and memory are therefore taken in processes of their own.

    Raises:
        SystemExit: the process failed; its last lines are shown.
    """
    program = ROOT / "benchmarks" / PROGRAMS.get(run["side"], "speed_ours.py")
    variables = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    variables |= {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"OMP_NUM_THREADS": str(run["threads"]), **(ALLOCATOR if returning else {})}
    given = {name: value for name, value in os.environ.items() if name not in THREAD_POLICY}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        settings, output = Path(name) / "run.json", Path(name) / "output.json"
        settings.write_text(json.dumps(run))
        process = subprocess.run(
            [python, program, settings, output], env={**given, **variables}, capture_output=True, text=True
        )
        if process.returncode:
            raise SystemExit(
                f"{run['workload']} {run['side']} ended with {process.returncode}:\n"
                f"{process.stdout[-2000:]}{process.stderr[-6000:]}"
            )
        return {**json.loads(output.read_text()), "load_before": load, "commit": commit_of_head()}


def check_same_work(run: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any], peer: str) -> None:
    """
    Raises:
        ValueError: another model, another number of tokens or of optimizer steps.
    """
    names = ["checksum", "tokens"] + ([] if peer == "generation" else ["optimizer_steps"])
    for name in names:
        if ours[name] != theirs[name]:
            raise ValueError(f"{run['workload']}: {name} is {ours[name]} for ours and {theirs[name]} for the peer.")
    steps = run.get("epochs", 4) * (run["iterations"] + 1)
    if ours["optimizer_steps"] != steps:
        raise ValueError(f"{run['workload']}: ours took {ours['optimizer_steps']} optimizer steps, not {steps}.")
    if "completion" not in run:
        tokens = 32 * 64 * (run["iterations"] + 1)
        if ours["tokens"] != tokens:
            raise ValueError(f"{run['workload']}: {ours['tokens']} tokens were sampled, not {tokens}.")


def versions(python: Path) -> dict[str, str]:
    code = (
        "import json, sys\nfrom importlib.metadata import PackageNotFoundError, version\nfound = {}\n"
        f"for name in {LIBRARIES}:\n    try:\n        found[name] = version(name)\n"
        "    except PackageNotFoundError:\n        pass\n"
        "print(json.dumps({**found, 'python': sys.version.split()[0]}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def commit_of_head() -> str:
    line = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    return {"cpu": model, "cores": os.cpu_count()}


def warn_unless_quiet() -> None:
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        print(f"The machine is not quiet: load {load:.2f}. Ratios may hold, seconds do not.", file=sys.stderr)
