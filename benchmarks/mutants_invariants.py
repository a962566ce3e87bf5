"""
Bring each pitfall back by one line and see whether its test notices: `make mutants`.

The table is `invariants.yaml`: a place in our code, what stands there, what stands there then, and the test of
tests/invariants/ that has to turn red. Each patch is applied to a copy of the sources, where only that test runs. A
test that stays green checks nothing.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml


ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("invariants.yaml")
PATCH_FIELDS = {"number", "wrong", "patch", "test", "file", "old", "new"}
NOTICED, SURVIVED, BROKEN = "red", "still green", "did not run"


def read_table(path: Path = TABLE) -> list[dict[str, Any]]:
    """The entries, checked: whole, and each patch applies to exactly one place.

    Raises:
        ValueError: an entry lacks a field, or what it replaces stands in its file never or more than once.
    """
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    for entry in entries:
        fields = {"number", "wrong", "reason"} if "reason" in entry else PATCH_FIELDS
        if set(entry) != fields:
            raise ValueError(f"{entry['number']} has the fields {sorted(entry)}, expected {sorted(fields)}.")
        if "reason" not in entry:
            patched(entry)
    return entries


def patched(entry: dict[str, Any]) -> str:
    """The file of an entry after its patch."""
    source = (ROOT / entry["file"]).read_text(encoding="utf-8")
    count = source.count(entry["old"])
    if count != 1:
        raise ValueError(f"{entry['number']}: {entry['old']!r} stands {count} times in {entry['file']}, not once.")
    return source.replace(entry["old"], entry["new"])


def numbers_of(entry: dict[str, Any]) -> list[str]:
    """`["S7", "R13"]` of an entry `S7, R13`; what is no number only tells two entries apart."""
    return re.findall(r"\b[SR]\d+\b", entry["number"])


def try_out(entry: dict[str, Any]) -> tuple[str, str]:
    """What became of the test of a patch, and the first line of its complaint."""
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder)
        for name in ("rlhf_ext", "tests"):
            shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copied)
        (copied / entry["file"]).write_text(patched(entry), encoding="utf-8")
        test = f"tests/invariants/{entry['test']}"
        line = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=short", test]
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            return BROKEN, "longer than 600 s"
    complaints = [text[1:].strip() for text in done.stdout.splitlines() if text.startswith("E  ")]
    # 1: a test failed. Anything else but 0: nothing ran, so nothing is known.
    kind = {0: SURVIVED, 1: NOTICED}.get(done.returncode, BROKEN)
    return kind, complaints[0] if complaints else done.stdout[-500:] + done.stderr[-500:] if kind == BROKEN else ""


def summary(entries: list[dict[str, Any]], outcomes: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """The result file of a whole run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    rows = []
    for entry in entries:
        if "reason" in entry:
            rows.append([entry["number"], entry["wrong"], "-", entry["reason"], "-"])
            continue
        test = f"`{entry['test'].split('::')[-1]}`"
        what = f"`{Path(entry['file']).name}`: {entry['patch']}"
        rows.append([entry["number"], entry["wrong"], test, what, outcomes[entry["number"]][0]])
    tried = [row for row in rows if row[-1] != "-"]
    red = sum(row[-1] == NOTICED for row in tried)
    return {
        "title": "One patch per pitfall, and what TRL 1.12's PPO gives on the same check",
        "command": "make mutants",
        "commit": commit.stdout.strip(),
        "seed": 0,
        "beside": "invariants_trl112",
        "columns": ["", "what goes wrong", "our test", "our line that brings it back", "the test then"],
        "rows": rows,
        "notes": [f"{red} of {len(tried)} patches turn their test red."],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="numbers such as s07 or R13")
    parser.add_argument("--jobs", type=int, default=2, help="patches tried at once")
    parser.add_argument("--result", type=Path, help="write the summary of a whole run here")
    arguments = parser.parse_args()
    table = read_table()
    entries = [entry for entry in table if "reason" not in entry]
    if arguments.only:
        asked = {re.sub(r"^([SR])0*", r"\1", number.upper()) for number in arguments.only}
        entries = [entry for entry in entries if asked & set(numbers_of(entry))]
        if not entries:
            parser.error(f"--only {' '.join(arguments.only)}: no patch has such a number")
        if arguments.result is not None:
            parser.error("--result is the summary of all patches; leave --only out")
    outcomes: dict[str, tuple[str, str]] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for entry, outcome in zip(entries, pool.map(try_out, entries), strict=True):
            outcomes[entry["number"]] = outcome
            print(f"{entry['number']:<20} {outcome[0]:<12} {outcome[1]}", flush=True)
    if arguments.result is not None:
        result = summary(table, outcomes)
        arguments.result.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    failed = [number for number, (kind, _) in outcomes.items() if kind != NOTICED]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} patches were noticed.", *failed)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
