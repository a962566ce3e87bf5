"""
Seconds to a fixed gold reward on the toy world: ours, TRL 1.12's PPO, TRL 1.16's RLOO and GRPO.

    python benchmarks/learning.py --output_dir runs/learning --tune      # six settings each, on seeds of its own
    python benchmarks/learning.py --output_dir runs/learning --seeds 5 --result benchmarks/results/learning.json

Programs, grids and world stand in `learning.yaml`. Each run is a process of one thread that starts from the same SFT
model and trains on gold itself. Its policy is written every few updates while the clock stands still; afterwards gold
is measured on held-out prompts, and the seconds are those at which it crosses the target, straight between snapshots.
A second call runs what is missing. Two calls may share the work: `--first_seed 0 --seeds 3` and `--first_seed 3
--seeds 5`, then one more for the table.
"""

import argparse
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from compare import commit_of_head, slug
from compare_statistics import interval
from invariants_trl112 import environment
from ppo_shape import ROOT, offline


GOAL = 3.0
PEER = "ppo_trl112"
OURS = ("ppo", "nlpo")
EVALUATION_SEED = 7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--programs", type=Path, default=ROOT / "benchmarks" / "learning.yaml")
    parser.add_argument("--tune", action="store_true", help="choose each program's setting instead of testing")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5, help="test on seeds up to this, less one")
    parser.add_argument("--only", nargs="+", help="names of programs to run now, without a table")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a busy machine")
    parser.add_argument("--peer_environment", type=Path, default=Path("runs/trl112"), help="where TRL 1.12 lives")
    parser.add_argument("--result", type=Path, help="JSON for benchmarks/results.py")
    arguments = parser.parse_args()
    arguments.output_dir = arguments.output_dir.resolve()
    spec = read_programs(arguments.programs)
    seeds = spec["tuning_seeds"] if arguments.tune else list(range(arguments.first_seed, arguments.seeds))
    if not arguments.tune and set(spec["tuning_seeds"]) & set(seeds):
        raise ValueError(f"tuning_seeds={spec['tuning_seeds']} has seeds of the test in it. Choose others.")
    programs = [p for p in spec["programs"] if arguments.only is None or p["name"] in arguments.only]
    tuned_file = arguments.output_dir / "tuned.json"
    runs = {}
    for seed, program in itertools.product(seeds, programs):
        settings = grid(program) if arguments.tune else [read_tuned(tuned_file, program["name"])]
        for setting in settings:
            runs[program["name"], seed, json.dumps(setting)] = run(spec, program, setting, seed, arguments)
    if arguments.only is not None:
        return 0
    if arguments.tune:
        tuned = {program["name"]: fastest(program, runs) for program in programs}
        tuned_file.write_text(json.dumps(tuned, indent=2) + "\n")
        print(json.dumps(tuned, indent=2))
    elif arguments.first_seed == 0:
        found = {key[:2]: value for key, value in runs.items()}
        summary = result(spec, found, json.loads(tuned_file.read_text()), arguments.clock)
        print(json.dumps(summary, indent=1))
        if arguments.result:
            arguments.result.write_text(json.dumps(summary, indent=1) + "\n")
    return 0


def read_tuned(path: Path, name: str) -> dict[str, Any]:
    tuned = json.loads(path.read_text()) if path.exists() else {}
    if name not in tuned:
        raise ValueError(f"{path} has no setting for {name}. Run with --tune first.")
    return tuned[name]["setting"]


def fastest(program: dict[str, Any], runs: dict[tuple[str, int, str], Any]) -> dict[str, Any]:
    """The setting with the least geometric mean of seconds over the tuning seeds, and the seconds of all of them."""
    found: dict[str, list[float]] = {json.dumps(setting): [] for setting in grid(program)}
    for (name, _, key), value in runs.items():
        if name == program["name"]:
            found[key].append(value["seconds"])
    best = min(found, key=lambda key: math.prod(found[key]))
    return {"setting": json.loads(best), "seconds": found}


def read_programs(path: Path) -> dict[str, Any]:
    """The file of programs, checked.

    Raises:
        ValueError: grids of different sizes, or a rollout that is no multiple of its minibatch.
    """
    spec = yaml.safe_load(path.read_text())
    sizes = {program["name"]: len(grid(program)) for program in spec["programs"]}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"{path.name}: grids of {sizes} settings. Give each program as many.")
    for program in spec["programs"]:
        for size in program["grid"]["rollout_size"]:
            if spec["world"]["episodes"] % size or size % min(size, program["minibatch"] or size):
                raise ValueError(f"{path.name}: rollout_size={size} of {program['name']} does not divide evenly.")
    return spec


def grid(program: dict[str, Any]) -> list[dict[str, Any]]:
    names = list(program["grid"])
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*program["grid"].values())]


def run(
    spec: dict[str, Any], program: dict[str, Any], setting: dict[str, Any], seed: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One run: what its file holds, if it was made by the same job; else it is run first. One that the gold of
    training ended before held-out gold had crossed is run again to its limits."""
    job = {**{key: program[key] for key in ("trainer", "args", "minibatch")}, "setting": setting, "seed": seed}
    job["world"] = spec["world"]
    name = "-".join(f"{value:g}" for value in setting.values())
    path = arguments.output_dir / slug(program["name"]) / f"seed{seed}-{name}.json"
    found, margins = None, [spec["world"]["margin"], None]
    if path.exists():
        found = json.loads(path.read_text())
        if found["job"] != job:
            raise ValueError(f"{path} was run with other settings. Move it away, or choose another --output_dir.")
        margins = [None]
    for margin in margins:
        if found is None or ended_early(found["updates"], spec["world"]):
            updates = train(job, margin, path.with_suffix(".part"), arguments)
            found = {"job": job, "commit": commit_of_head(), "updates": updates}
            path.with_suffix(".aside").write_text(json.dumps(found, indent=1) + "\n")
            path.with_suffix(".aside").rename(path)
            reached = crossing(updates, spec["world"], arguments.clock)
            said = "not reached"
            if reached["reached"]:
                said = f"{reached['seconds']:.1f} s, {reached['episodes']} episodes"
            print(f"{program['name']} {setting}, seed {seed}: {said}", flush=True)
    return {**found, **crossing(found["updates"], spec["world"], arguments.clock)}


def ended_early(updates: list[dict[str, Any]], world: dict[str, Any]) -> bool:
    """Whether the gold of training ended a run before held-out gold had crossed: it may not have got there yet."""
    last, crossed = updates[-1], any(row["held_out"] >= world["target"] for row in updates)
    return not crossed and last["cpu_seconds"] <= world["max_seconds"] and last["episodes"] < world["episodes"]


def train(
    job: dict[str, Any], margin: float | None, folder: Path, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Updates of one training, a process of its own, with held-out gold; without a margin it goes to its limits."""
    import compare_arms  # TRL takes ten seconds: not for a call that has nothing to run

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    world, seed = job["world"], job["seed"]
    sft = compare_arms.sft_model(str(arguments.output_dir / "sft"), world, seed)
    details = {**job, "world": {**world, "margin": margin}, "sft": sft, "folder": str(folder)}
    (folder / "job.json").write_text(json.dumps(details))
    is_peer = job["trainer"] == PEER
    python = environment(arguments.peer_environment.resolve()) if is_peer else sys.executable
    script = ROOT / "benchmarks" / ("learning_trl112.py" if is_peer else "learning_run.py")
    with open(folder / "log.txt", "w") as log:
        line = [str(python), str(script), str(folder / "job.json")]
        subprocess.run(line, env=offline(1), stdout=log, stderr=subprocess.STDOUT, check=True)
    updates = held_out(folder, sft, world, seed)
    shutil.rmtree(folder)
    return updates


def held_out(folder: Path, sft: str, world: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """The updates of a run, each with the gold of its snapshot on held-out prompts; the first row is the SFT model."""
    import torch
    from compare_arms import AutoModelForCausalLM, build_tokenizer, evaluate, prompt_rows
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(sft).eval(), build_tokenizer()
    prompts = [row["prompt"] for row in prompt_rows(world["test_prompts"], seed, split="test")]
    own = dict(policy.named_parameters())
    rows = [
        {"update": 0, "episodes": 0, "seconds": 0.0, "cpu_seconds": 0.0},
        *json.loads((folder / "updates.json").read_text()),
    ]
    above = 0
    for row in rows:
        if row["update"]:
            weights = load_file(folder / f"policy-{row['update']}.safetensors")
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(weights[name])
        evaluation = evaluate(policy, None, tokenizer, prompts, world["max_completion_length"], EVALUATION_SEED)
        row["held_out"] = evaluation.metrics["gold_reward"]
        row["grammatical"] = evaluation.metrics["grammatical"]
        above += row["held_out"] >= world["target"]
        if above == 2:  # what follows is not read
            break
    return [row for row in rows if "held_out" in row]


def crossing(updates: list[dict[str, Any]], world: dict[str, Any], clock: str) -> dict[str, Any]:
    """Seconds and episodes at which held-out gold first reaches the target, straight between two snapshots."""
    key = "seconds" if clock == "wall" else "cpu_seconds"
    for before, after in itertools.pairwise(updates):
        if after["held_out"] >= world["target"]:
            share = (world["target"] - before["held_out"]) / (after["held_out"] - before["held_out"])
            seconds, episodes = (before[k] + share * (after[k] - before[k]) for k in (key, "episodes"))
            return {"reached": True, "seconds": seconds, "episodes": round(episodes)}
    return {"reached": False, "seconds": float(world["max_seconds"]), "episodes": updates[-1]["episodes"]}


def geometric(values: list[float]) -> tuple[float, float, float]:
    """Geometric mean of `values` and its 95% t-interval on the logarithms."""
    return tuple(math.exp(x) for x in interval([math.log(value) for value in values]))


def result(
    spec: dict[str, Any], runs: dict[tuple[str, int], Any], tuned: dict[str, Any], clock: str
) -> dict[str, Any]:
    """What `benchmarks/results.py` renders; ratios are paired by seed."""
    seeds = sorted({seed for _, seed in runs})
    seconds = {p["name"]: [runs[p["name"], seed]["seconds"] for seed in seeds] for p in spec["programs"]}
    names = {side: [p["name"] for p in spec["programs"] if (p["trainer"] in OURS) == side] for side in (True, False)}
    # Of ours the one that was fastest on the tuning seeds; of the peers the one that is fastest on those of the test.
    ours = min(names[True], key=lambda name: min(geometric(values)[0] for values in tuned[name]["seconds"].values()))
    best = min(names[False], key=lambda name: geometric(seconds[name])[0])
    rows = []
    for name, values in seconds.items():
        of_program = [runs[name, seed] for seed in seeds]
        ratio = geometric([theirs / own for theirs, own in zip(seconds[best], values, strict=True)])
        episodes = sum(run["episodes"] for run in of_program) / len(seeds)
        rows.append(
            [
                f"{name} (best peer)" if name == best else name,
                ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in tuned[name]["setting"].items()),
                _spread(geometric(values)),
                f"{sum(run['reached'] for run in of_program)} of {len(seeds)}",
                round(episodes),
                None if name == best else _spread(ratio),
            ]
        )
    world, settings = spec["world"], len(grid(spec["programs"][0]))
    ratio = geometric([theirs / own for theirs, own in zip(seconds[best], seconds[ours], strict=True)])
    return {
        "title": f"Seconds to a held-out gold reward of {world['target']} on the toy world",
        "command": f"python benchmarks/learning.py --output_dir runs/learning --seeds {len(seeds)}"
        + (" --clock cpu" if clock == "cpu" else ""),
        "commit": ", ".join(sorted({run["commit"] for run in runs.values()})),
        "seed": seeds,
        "columns": [
            "program",
            "setting",
            "seconds",
            "reached",
            "episodes",
            "seconds of the best peer over its own, paired",
        ],
        "rows": rows,
        "notes": [
            f"Geometric means with 95% t-intervals of the logarithms over seeds; one thread, {clock} seconds of "
            "training alone, without imports and evaluation. A run that does not get there counts as "
            f"{world['max_seconds']} s.",
            f"Settings: {settings} of each program, tuned on seeds {', '.join(map(str, spec['tuning_seeds']))}: "
            f"{settings * len(names[True])} of ours, {settings * len(names[False])} of the peers. Goal: {GOAL:g} "
            f"times faster than the best peer; {ours}, the fastest of ours on the tuning seeds, is {_spread(ratio)} "
            "times.",
        ],
    }


def _spread(values: tuple[float, float, float]) -> str:
    return f"{values[0]:.3g} [{values[1]:.3g}, {values[2]:.3g}]"


if __name__ == "__main__":
    sys.exit(main())
