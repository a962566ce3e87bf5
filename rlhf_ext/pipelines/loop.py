"""The loop: sample, select, label, fit the reward model, PPO, measure, again (Stiennon et al. 2020, Sec. 3).

Every step is a folder that is whole or absent. A run that was killed anywhere goes on with the step it was at, and
repeats none that is finished. Steps read what they need from disk, so each may run in a process of its own.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from datasets import Dataset
from filelock import FileLock
from transformers import TrainingArguments
from trl import ModelConfig

from ..data.functions import import_function
from ..data.loop_arguments import LoopArguments
from ..data.prompts import check_prompts
from .finished_runs import alone_in, read_run
from .loop_asynchronous import train_asynchronously
from .loop_evaluation import check_scorer_names, evaluate_round
from .loop_labels import check_labeller, check_store, write_labels
from .loop_policies import check_base
from .loop_record import STEPS
from .loop_run import MANIFEST_FILE, LoopRun, write_whole
from .loop_samples import write_samples, write_selection
from .loop_toy import prepare_toy
from .loop_training import free_memory, ppo_config, probe_names, reward_config, train_policy, train_reward
from .policy_checks import check_policy_dtype


WORK: dict[str, Callable[[LoopRun, int, Path], dict[str, Any]]] = {
    "samples": write_samples,
    "selection": write_selection,
    "labels": write_labels,
    "reward": train_reward,
    "policy": train_policy,
    "evaluation": evaluate_round,
}
"""What each step of a round does, in their order."""

LAUNCHED = ("reward", "policy")
"""Steps that run on several processes where `launch_config` asks for it."""

_LOCK_SECONDS = 600


def run_loop(args: LoopArguments, model_args: ModelConfig) -> dict[str, Any]:
    """
    Run the rounds that are not finished yet.

    Args:
        args ([`LoopArguments`]): what is done in each round.
        model_args ([`~trl.ModelConfig`]): `model_name_or_path` is the SFT policy; adapters and quantisation.

    Returns:
        `dict`: what stands in `manifest.json`.

    Raises:
        ValueError: before the first step, for anything that a later one would stumble over.
        LabelsMissing: people have not labelled enough, and `wait_for_labels` is off.
    """
    if PartialState().num_processes > 1:
        raise ValueError(
            "The loop was launched on several processes, but it starts processes itself. Run it on one, and give the "
            "accelerate YAML as `launch_config`."
        )
    with alone_in(args.output_dir):
        return _all_rounds(args, model_args)


def _all_rounds(args: LoopArguments, model_args: ModelConfig) -> dict[str, Any]:
    run = LoopRun(args, model_args)
    steps = ["labels", "reward", "policy"] if args.asynchronous else ["labels", "reward"]
    if any(not run.step(round_, name).exists() for round_ in range(1, args.num_rounds + 1) for name in steps):
        check_store(run)  # before the toy world trains its SFT model
    check_configs(run)  # and a misspelt argument is said before it too
    if args.toy:
        prepare_toy(args, model_args)
    check(run)
    run.save_settings()
    manifest = Manifest(run)
    for round_, name in order_of(args):
        manifest.do(round_, name)
    print(f"finished: `rlhf-ext report {args.output_dir}` writes a page of it", flush=True)
    return manifest.content


def order_of(args: LoopArguments) -> list[tuple[int, str]]:
    """Rounds and steps in the order they are done; round 0 is the SFT policy, measured once."""
    rounds = [(round_, name) for round_ in range(1, args.num_rounds + 1) for name in STEPS]
    return [(0, "evaluation"), *rounds]


def check(run: LoopRun) -> None:
    """Refuse what would fail in the middle of a run.

    Raises:
        ValueError: naming field, value and remedy.
    """
    max_positions = check_base(run)
    args = run.args
    for name in probe_names(run):
        import_function(name)
    check_scorer_names(run)
    configs = check_configs(run)
    check_policy_dtype(run.model_args, args.trust_remote_code)
    rollout = configs["ppo"].generation_batch_size // configs["ppo"].num_generations
    if args.launch_config is not None and "generation_batch_size" not in args.ppo:
        rollout *= _launch_settings(args.launch_config).get("num_processes") or 1
    for what, rows, least in (
        ("train prompts", run.train_prompts, rollout),
        ("held-out prompts", run.eval_prompts, 1),
    ):
        check_prompts(
            Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
            f"`dataset_name` ({what})",
            run.tokenizer,
            max_completion_length=run.max_completion_length,
            max_positions=max_positions,
            rollout_prompts=least,
        )
    check_labeller(run)
    if args.launch_config is not None:
        _check_launch_config(run, configs)
    if "references" in args.sources and not any(row.get("completion") for row in run.train_prompts):
        raise ValueError(
            "`sources` names 'references', but no row of `dataset_name` has a `completion`. Add the column, or leave "
            "references out."
        )


def check_configs(run: LoopRun) -> dict[str, TrainingArguments]:
    """Arguments of both trainers, built once for their own checks; the folder of each step comes later."""
    scratch = run.folder / "_unfinished_check"
    return {"reward": reward_config(run, scratch, 0), "ppo": ppo_config(run, scratch, 0)}


def _check_launch_config(run: LoopRun, configs: Mapping[str, TrainingArguments]) -> None:
    path = str(run.args.launch_config)
    kind = str(_launch_settings(path).get("distributed_type"))
    if kind != "DEEPSPEED":
        return
    if run.args.num_members > 1:
        raise ValueError(
            f"`num_members` is {run.args.num_members}, but `launch_config` {path!r} asks for DeepSpeed, under which a "
            "process builds one trainer. Take multi_gpu.yaml (where memory is short, with adapters or a quantised "
            "base), or a single reward model."
        )
    for name, config in configs.items():
        for mode in ("bf16", "fp16"):
            if getattr(config, mode):
                raise ValueError(
                    f"`{name}` has {mode}=True, but `launch_config` {path!r} asks for DeepSpeed, whose {mode} mode "
                    f"casts adapters and heads too. Set `{mode}: false` in `{name}`, or take multi_gpu.yaml."
                )


def _launch_settings(path: str) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"`launch_config` is {path!r}, which cannot be read: {error}") from error


class Manifest:
    """The list of finished steps, `manifest.json`, and what brings it forward."""

    def __init__(self, run: LoopRun):
        self.run, self.path = run, run.folder / MANIFEST_FILE
        self.content: dict[str, Any] = {"steps": []}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def do(self, round_: int, name: str) -> None:
        """Do a step unless it is finished, and write it down."""
        listed = any((step["round"], step["step"]) == (round_, name) for step in self.content["steps"])
        folder = self.run.step(round_, name)
        if listed and not folder.exists():
            raise ValueError(
                f"{MANIFEST_FILE} says that {name!r} of round {round_} is finished, but {str(folder)!r} is gone. Put "
                "it back, or take another `output_dir`."
            )
        if not listed:
            print(f"round {round_}, {name}", flush=True)
        if name in LAUNCHED and self.run.args.launch_config is not None and not folder.exists():
            launch(self.run, round_, name)
        result = do_step(self.run, round_, name)
        if not listed:
            if name == "evaluation":
                print(f"round {round_}: {in_short(result)}", flush=True)
            self.content["steps"].append(
                {
                    "round": round_,
                    "step": name,
                    "folder": str(folder.relative_to(self.run.folder)),
                    "seconds": read_run(folder).get("seconds"),
                    "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                }
            )
            write_whole(self.path, json.dumps(self.content, indent=1))


def in_short(result: dict[str, Any]) -> str:
    """Scores, win rates over SFT and KL of an evaluation, in a line."""
    parts = [f"{name} {result[name]:.3f}" for name in result if name.startswith("score/") and not name.endswith("_se")]
    parts += [f"win rate by {name} {wins['win_rate']:.3f}" for name, wins in result.get("win_rate", {}).items()]
    return ", ".join([*parts, f"KL {result['kl']:.2f}"] if "kl" in result else parts)


def do_step(run: LoopRun, round_: int, name: str) -> dict[str, Any]:
    """Do a step in this process, unless it is finished."""
    work = train_asynchronously if name == "policy" and run.args.asynchronous else WORK[name]
    result = run.once(round_, name, lambda aside: work(run, round_, aside))
    free_memory()
    return result


def launch(run: LoopRun, round_: int, name: str) -> None:
    """Do a step under `accelerate launch`."""
    # The launcher of this very environment, whatever `accelerate` is found on the path.
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(run.args.launch_config)]
    subprocess.run([*accelerate, "-m", __name__, str(run.folder), str(round_), name], check=True)


def _launched(folder: str, round_: int, name: str) -> None:
    run = LoopRun.load(folder)
    # As the trainer of the step will: without a word accelerate sees no processes on a CPU.
    given = run.args.reward if name == "reward" else run.args.ppo
    state = PartialState(cpu=bool(given.get("use_cpu")))
    # Of a loop that was killed, the launched step may live on; the next one waits for it and finds it finished.
    lock = FileLock(run.step(round_, name).with_name(f".{name}.lock"), timeout=_LOCK_SECONDS)
    if state.is_main_process:
        lock.acquire()
    state.wait_for_everyone()
    do_step(run, round_, name)


if __name__ == "__main__":
    _launched(sys.argv[1], int(sys.argv[2]), sys.argv[3])
