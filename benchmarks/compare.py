"""Compare policy-gradient trainers on the toy world: arms as a file, JSONL per run, paired intervals, plots.

    python benchmarks/compare.py --arms benchmarks/arms.yaml --tune      # learning rates, on seeds of their own
    python benchmarks/compare.py --arms benchmarks/arms.yaml --seeds 5   # the test; a second call runs what is missing

A run is written aside and renamed when it is whole, so that an interrupted one counts as missing. Its first line holds
the arm as it was run: if the file of arms has changed since, the run is refused by name, or done again with `--rerun`.
Arms with `trainer: ppo_trl112` run in an environment of their own (`--peer_environment`), which is built if need be.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from compare_report import report
from compare_statistics import area
from invariants_trl112 import environment


ROOT = Path(__file__).resolve().parents[1]
TRAINERS = ("ppo", "nlpo", "rloo", "grpo", "ppo_trl112")
PEER = "ppo_trl112"
ARM_FIELDS = {"name", "trainer", "rollout_size", "minibatches", "epochs", "args", "tune"}


def read_arms(path: Path) -> dict[str, Any]:
    """The file of arms, checked.

    Raises:
        ValueError: a field is missing or unknown, a name comes twice, or arms differ in the size of their grids.
    """
    spec = yaml.safe_load(path.read_text())
    missing = {"world", "tuning_seeds", "protocol", "arms"} - set(spec)
    if missing:
        raise ValueError(f"{path.name} has no {', '.join(sorted(missing))}. See benchmarks/arms.yaml.")
    names = [arm.get("name") for arm in spec["arms"]]
    if len(set(names)) != len(names):
        raise ValueError(f"{path.name}: arms share a name in {names}. Give each its own: it is its folder.")
    for arm in spec["arms"]:
        if set(arm) != ARM_FIELDS:
            raise ValueError(f"{path.name}: arm {arm.get('name')!r} has {sorted(arm)}, not {sorted(ARM_FIELDS)}.")
        if arm["trainer"] not in TRAINERS:
            raise ValueError(f"{path.name}: trainer {arm['trainer']!r} is unknown. Choose one of {TRAINERS}.")
        if spec["world"]["episodes"] % arm["rollout_size"]:
            raise ValueError(
                f"{path.name}: {arm['name']} has rollout_size={arm['rollout_size']}, which does not divide "
                f"episodes={spec['world']['episodes']}: arms would differ in their budget."
            )
    if len({len(arm["tune"]["learning_rate"]) for arm in spec["arms"]}) != 1:
        raise ValueError(f"{path.name}: arms try different numbers of learning rates. Give each the same.")
    return spec


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in name.lower()).split())


def job_of(spec: dict[str, Any], arm: dict[str, Any], rate: float, seed: int, path: Path) -> dict[str, Any]:
    """One run: the arm with its learning rate, the world, the seed, the file it goes to, and a hash of the former."""
    run = {**{k: v for k, v in arm.items() if k != "tune"}, "learning_rate": rate}
    text = json.dumps([run, spec["world"], seed], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"arm": run, "world": spec["world"], "seed": seed, "path": path, "hash": key}


def read_run(path: Path) -> dict[str, Any]:
    """`header`, `updates` and `final` of a run's file."""
    first, *rows, last = [json.loads(line) for line in path.read_text().splitlines()]
    return {"header": first, "updates": rows, "final": last["final"]}


def missing_jobs(jobs: list[dict[str, Any]], rerun: bool = False) -> list[dict[str, Any]]:
    """The jobs whose file is not there.

    Raises:
        ValueError: a file was made by another arm or world than the job's, and `rerun` is not set.
    """
    todo = []
    for job in jobs:
        if job["path"].exists():
            if read_run(job["path"])["header"]["hash"] == job["hash"]:
                continue
            if not rerun:
                raise ValueError(
                    f"{job['path']} was run with other settings than {job['arm']['name']} has now. Pass --rerun to "
                    "replace it, or another --output_dir to keep it."
                )
        todo.append(job)
    return todo


def write_run(job: dict[str, Any], updates: list[dict[str, Any]], final: dict[str, float], commit: str) -> None:
    header = {"arm": job["arm"], "world": job["world"], "seed": job["seed"], "hash": job["hash"], "commit": commit}
    aside = job["path"].with_suffix(".part")
    aside.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text("".join(json.dumps(row) + "\n" for row in (header, *updates, {"final": final})))
    aside.rename(job["path"])


def run_jobs(jobs: list[dict[str, Any]], output_dir: Path, peer_environment: Path) -> None:
    """Run jobs one after the other: those of this environment, then those of the peer in one process of its own."""
    if not jobs:
        return
    import compare_arms  # TRL takes ten seconds: not for a call that has nothing to run

    commit = commit_of_head()
    sft = {s: compare_arms.sft_model(str(output_dir / "sft"), jobs[0]["world"], s) for s in {j["seed"] for j in jobs}}
    scratch = output_dir / "scratch"
    own = [job for job in jobs if job["arm"]["trainer"] != PEER]
    for number, job in enumerate(own):
        start = time.perf_counter()
        updates, final = compare_arms.run_arm(job["arm"], job["world"], job["seed"], sft[job["seed"]], str(scratch))
        write_run(job, updates, final, commit)
        print(
            f"[{number + 1}/{len(own)}] {job['arm']['name']}, learning rate {job['arm']['learning_rate']:g}, seed "
            f"{job['seed']}: area {area(updates):.3f}, held-out gold {final['gold_reward']:.3f}, "
            f"KL {final['kl']:.2f}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        shutil.rmtree(scratch, ignore_errors=True)
    peers = [job for job in jobs if job["arm"]["trainer"] == PEER]
    if not peers:
        return
    # A folder per job, named by its hash: what a process that was interrupted had finished is not trained again.
    folders = [output_dir / "peer" / job["hash"] for job in peers]
    listed = [
        {**{name: job[name] for name in ("arm", "world", "seed")}, "sft": sft[job["seed"]], "folder": str(folder)}
        for job, folder in zip(peers, folders, strict=True)
    ]
    file = output_dir / "peer" / "jobs.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(listed))
    command = [str(environment(peer_environment)), "benchmarks/compare_trl112.py", str(file)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    for job, folder in zip(peers, folders, strict=True):
        policy = compare_arms.AutoModelForCausalLM.from_pretrained(folder / "policy")
        final = compare_arms.held_out(policy, sft[job["seed"]], job["world"], job["seed"])
        write_run(job, json.loads((folder / "updates.json").read_text()), final, commit)
        shutil.rmtree(folder)


def commit_of_head() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def tune(spec: dict[str, Any], args: argparse.Namespace) -> None:
    """Run every arm's learning rates on the tuning seeds; the one with the largest area goes to `tuned.json`."""
    folder, jobs = args.output_dir / "tuning", []
    for arm in spec["arms"]:
        for rate in arm["tune"]["learning_rate"]:
            for seed in spec["tuning_seeds"]:
                path = folder / slug(arm["name"]) / f"lr{rate:g}-seed{seed}.jsonl"
                jobs.append(job_of(spec, arm, rate, seed, path))
    run_jobs(missing_jobs(jobs, args.rerun), args.output_dir, args.peer_environment)
    tuned: dict[str, Any] = {}
    for job in jobs:
        areas = tuned.setdefault(job["arm"]["name"], {"areas": {}})["areas"]
        areas.setdefault(job["arm"]["learning_rate"], []).append(area(read_run(job["path"])["updates"]))
    for found in tuned.values():
        found["areas"] = {rate: sum(values) / len(values) for rate, values in found["areas"].items()}
        found["learning_rate"] = max(found["areas"], key=found["areas"].get)
    path = args.output_dir / "tuned.json"
    before = json.loads(path.read_text()) if path.exists() else {}  # of another file of arms in the same folder
    path.write_text(json.dumps(before | tuned, indent=2) + "\n")


def test(spec: dict[str, Any], args: argparse.Namespace) -> None:
    """Run every arm at its tuned rate on the seeds of the test, as far as they are missing; tables and plot follow."""
    file = args.output_dir / "tuned.json"
    tuned = json.loads(file.read_text()) if file.exists() else {}
    lost = [arm["name"] for arm in spec["arms"] if arm["name"] not in tuned]
    if lost:
        raise ValueError(f"{file} has no learning rate for {', '.join(lost)}. Run with --tune first.")
    clash = set(range(args.seeds)) & set(spec["tuning_seeds"])
    if clash:
        raise ValueError(f"tuning_seeds {sorted(clash)} are among the {args.seeds} seeds of the test. Choose others.")
    rates = {arm["name"]: tuned[arm["name"]]["learning_rate"] for arm in spec["arms"]}
    jobs = []
    for seed in range(args.seeds):  # seed by seed, so that an interrupted comparison is a paired one
        for arm in spec["arms"]:
            path = args.output_dir / "runs" / slug(arm["name"]) / f"seed{seed}.jsonl"
            jobs.append(job_of(spec, arm, rates[arm["name"]], seed, path))
    todo = missing_jobs(jobs, args.rerun)
    print(f"{len(jobs) - len(todo)} runs are there, {len(todo)} are missing", flush=True)
    run_jobs(todo, args.output_dir, args.peer_environment)
    runs: dict[str, dict[int, Any]] = {}
    for job in jobs:
        runs.setdefault(job["arm"]["name"], {})[job["seed"]] = read_run(job["path"])
    commits = {run["header"]["commit"] for of_seed in runs.values() for run in of_seed.values()}
    command = f"python benchmarks/compare.py --arms {os.path.relpath(args.arms.resolve(), ROOT)} --seeds {args.seeds}"
    report(
        spec,
        tuned,
        runs,
        command=command,
        commit=", ".join(sorted(commits)),
        result=args.result,
        plot_path=args.plot,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, default=ROOT / "benchmarks" / "arms.yaml", help="file of arms")
    parser.add_argument("--seeds", type=int, default=5, help="test on seeds 0 to this, less one")
    parser.add_argument("--tune", action="store_true", help="choose the learning rates instead of testing")
    parser.add_argument("--rerun", action="store_true", help="replace runs whose arm or world has changed since")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"))
    parser.add_argument("--peer_environment", type=Path, default=Path("runs/trl112"), help="where TRL 1.12 lives")
    parser.add_argument(
        "--result", type=Path, help="JSON for docs/; the verdicts go to a second one, NAME_claims.json"
    )
    parser.add_argument("--plot", type=Path, help="PNG: gold against episodes and against KL")
    args = parser.parse_args()
    args.output_dir, args.peer_environment = args.output_dir.resolve(), args.peer_environment.resolve()
    spec = read_arms(args.arms)
    tune(spec, args) if args.tune else test(spec, args)


if __name__ == "__main__":
    sys.exit(main())
