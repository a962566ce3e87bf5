"""Matrix products of Gemma 3 270M's shapes in float32 and bfloat16 on this CPU, one thread: which one can train here?

python benchmarks/cpu_dtype.py --result benchmarks/results/cpu_dtype.json
"""

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch


def rate(dtype: torch.dtype, width: int, repeats: int = 5) -> float:
    """Median GFLOP/s of `(1600, 640) x (640, width)`."""
    x, w = torch.randn(1600, 640).to(dtype), torch.randn(width, 640).to(dtype)
    torch.nn.functional.linear(x, w)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        seconds.append(time.perf_counter() - start)
    return 2 * 1600 * 640 * width / statistics.median(seconds) / 1e9


def bfloat16_instructions() -> str:
    """Those that Linux lists for this CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return ", ".join(sorted(words & {"avx512_bf16", "amx_bf16", "avx_ne_convert"})) or "none found"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows = []
    for width in (640, 2048):
        wide, narrow = rate(torch.float32, width), rate(torch.bfloat16, width)
        rows.append([f"(1600, 640) x (640, {width})", round(wide, 1), round(narrow, 1), round(narrow / wide, 2)])
    result = {
        "title": "Arithmetic of the CPU: which dtype a run on it should take",
        "command": "python benchmarks/cpu_dtype.py --result benchmarks/results/cpu_dtype.json",
        "commit": commit,
        "seed": 0,
        "columns": ["product", "float32, GFLOP/s", "bfloat16, GFLOP/s", "bfloat16 / float32"],
        "rows": rows,
        "notes": [f"One thread, torch {torch.__version__}, bfloat16 instructions: {bfloat16_instructions()}."],
    }
    args.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
