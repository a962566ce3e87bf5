"""
Put the checks of tests/invariants/ to TRL 1.12's PPO: `make invariants-trl112`.

Later versions have no PPO trainer, so this builds an environment of its own and runs `trl112_checks.py` in it: tiny
models from configs, on a CPU, offline but for the packages. The result stands beside ours in docs/invariants.md.

    python benchmarks/invariants_trl112.py --environment FOLDER --result benchmarks/results/invariants_trl112.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
CHECKS = Path(__file__).with_name("trl112_checks.py")
# torch by itself first: what follows then keeps the build that is there.
PACKAGES = (["torch==2.13.0"], ["trl==1.12.0", "rich"])
DONE = ".done"


def environment(folder: Path, packages: tuple[list[str], ...] = PACKAGES) -> Path:
    """The Python of an environment with TRL 1.12, or with other `packages`; made unless `folder` holds a whole one.

    Raises:
        TimeoutError: another process began to make it and did not end within half an hour.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        for _ in range(1800):
            if (folder / DONE).exists():
                return folder / "bin" / "python"
            time.sleep(1)
        raise TimeoutError(f"{folder} exists without {DONE}. Remove it to build it again.") from None
    venv.create(folder, with_pip=True)
    for together in packages:
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *together], check=True)
    (folder / DONE).touch()
    return folder / "bin" / "python"


def run_checks(python: Path, only: list[str] | None) -> list[list[str]]:
    """Rows of number, what was measured, and whether the invariant holds."""
    settings = {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "measured.json"
        line = [python, CHECKS, "--output", output, *(["--only", *only] if only else [])]
        # TRL's tables of numbers go nowhere; what was measured comes on the other stream.
        subprocess.run(line, env={**os.environ, **settings}, stdout=subprocess.DEVNULL, check=True)
        return json.loads(output.read_text(encoding="utf-8"))


def versions(python: Path) -> str:
    line = "import torch, transformers, trl; print(trl.__version__, transformers.__version__, torch.__version__)"
    found = subprocess.run([python, "-c", line], capture_output=True, text=True, check=True).stdout.split()
    return f"TRL {found[0]}, transformers {found[1]}, torch {found[2].split('+')[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True, help="folder of the virtual environment")
    parser.add_argument("--result", type=Path, help="write the measurements of all checks here")
    parser.add_argument("--only", nargs="+", help="numbers as they stand in invariants.yaml, such as 'S7, R13'")
    arguments = parser.parse_args()
    if arguments.only and arguments.result:
        parser.error("--result is that of all checks; leave --only out")
    python = environment(arguments.environment)
    rows = run_checks(python, arguments.only)
    if arguments.result is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        result = {
            "title": "TRL 1.12's PPO on the same checks",
            "command": "make invariants-trl112",
            "commit": commit.stdout.strip(),
            "seed": 0,
            "columns": ["", "TRL 1.12 PPO, measured", "verdict"],
            "rows": rows,
            "notes": [f"{versions(python)}; tiny random models from configs, one CPU thread."],
        }
        arguments.result.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
