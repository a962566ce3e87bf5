"""Load on the labelling page: annotators with logins of their own, all at once over HTTP, on this machine.

    python benchmarks/label_load.py --annotators 200 --labels 10000 --result benchmarks/results/label_load.json

Starts the real command on 127.0.0.1, lets every annotator log in with a password and answer as fast as the page gives
tasks, and checks that each comparison ends with exactly one label. A fifth of the answers are sent twice, as by a
client that lost the reply.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from rlhf_ext.feedback.page.accounts import Accounts
from rlhf_ext.feedback.records import Candidate, NewComparison
from rlhf_ext.feedback.store import LabelStore


ROOT = Path(__file__).resolve().parents[1]
Seconds = dict[str, list[float]]


async def annotate(address: str, name: str, password: str, start: asyncio.Event, seconds: Seconds) -> int:
    """Log in, wait for all others, and label until nothing is left; the number of labels acknowledged."""
    chance, done = random.Random(name), 0
    async with httpx.AsyncClient(base_url=address, timeout=300.0) as client:

        async def call(path: str, body: dict) -> dict:
            began = time.perf_counter()
            answer = await client.post(f"/api/{path}", json=body)
            answer.raise_for_status()
            seconds[path].append(time.perf_counter() - began)
            return answer.json()

        await call("login", {"name": name, "password": password})
        await start.wait()
        while (task := (await call("task", {}))["task"]) is not None:
            label = {"comparison_id": task["comparison_id"], "kind": "best", "value": chance.randrange(2)}
            label |= {"seconds": 1.0, "key": f"{name} {task['comparison_id']}"}
            first = await call("label", label)
            done += 1
            if chance.random() < 0.2:
                assert (await call("label", label))["label_id"] == first["label_id"]
    return done


async def run(address: str, annotators: int, passwords: dict[str, str]) -> tuple[int, float, Seconds]:
    seconds: Seconds = {"login": [], "task": [], "label": []}
    start = asyncio.Event()
    tasks = [asyncio.create_task(annotate(address, n, p, start, seconds)) for n, p in passwords.items()]
    while len(seconds["login"]) < annotators:
        await asyncio.sleep(0.05)
        for task in tasks:
            if task.done():
                task.result()
    began = time.perf_counter()
    start.set()
    done = sum(await asyncio.gather(*tasks))
    return done, time.perf_counter() - began, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotators", type=int, default=200)
    parser.add_argument("--labels", type=int, default=10_000)
    parser.add_argument("--store", help="URL of a PostgreSQL database; a file in a temporary folder by default")
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        location = args.store or str(Path(folder) / "labels.db")
        accounts = Accounts(Path(folder) / "users.json")
        passwords = {f"annotator {i}": f"password {i}" for i in range(args.annotators)}
        for name, password in passwords.items():
            accounts.set_password(name, password)
        with LabelStore(location) as store:
            store.add(
                NewComparison(f"prompt {i}", [Candidate(f"answer {i}"), Candidate(f"other {i}")])
                for i in range(args.labels)
            )
            command = "import sys; from rlhf_ext.cli import main; sys.exit(main())"
            line = [sys.executable, "-c", command, "label", "--store", location, "--port", "0"]
            server = subprocess.Popen(
                [*line, "--users", str(accounts.path)],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            try:
                address = server.stdout.readline().split(" at ")[1].split(" ")[0]
                done, wall, seconds = asyncio.run(run(address, args.annotators, passwords))
            finally:
                server.terminate()
                server.wait(timeout=60)
            labels = store.labels_since()
        lost = args.labels - len({label.comparison_id for label in labels})
        doubled = len(labels) - len({label.comparison_id for label in labels})
        rows = []
        for path in ("login", "task", "label"):
            values = sorted(seconds[path])
            quantiles = [values[min(int(q * len(values)), len(values) - 1)] for q in (0.5, 0.95, 0.99)]
            rows.append([path, len(values), *(round(1000 * value) for value in [*quantiles, values[-1]])])
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
        flags = f"--annotators {args.annotators} --labels {args.labels}" + (" --store URL" if args.store else "")
        result = {
            "title": f"{args.annotators} annotators at once, {args.labels} labels, "
            + ("PostgreSQL" if args.store else "SQLite"),
            "command": f"python benchmarks/label_load.py {flags}",
            "commit": commit.stdout.strip(),
            "seed": 0,
            "columns": ["call", "calls", "median, ms", "95%", "99%", "largest"],
            "rows": rows,
            "notes": [
                f"{done} labels acknowledged, {lost} lost, {doubled} doubled; {done / wall:.0f} labels a second over "
                f"{wall:.0f} s. Annotators answer at once and never pause; server and clients share two cores. A "
                "fifth of the answers are sent twice. A login hashes a password (scrypt, 16 MiB)."
            ],
        }
        print(json.dumps(result, indent=2))
        if args.result is not None:
            args.result.write_text(json.dumps(result, indent=2) + "\n")
        if lost or doubled or done != args.labels:
            raise SystemExit("Labels were lost or doubled.")


if __name__ == "__main__":
    main()
