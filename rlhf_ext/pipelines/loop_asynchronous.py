"""The policy step in the asynchronous form of Christiano et al. 2017 (Sec. 2.2): three processes over the label store.

`policy` trains with PPO, scores each rollout by the newest finished reward model and leaves the rollout in a queue;
`labels` asks about rollouts of the queue, as many as the schedule says, and answers where a program labels; `rewards`
fits the reward model again when enough labels are new. Each goes on where it was if it is killed and started again;
the supervisor does that. A step is whole or absent as any other.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock

from ..feedback.annotators import work_through
from ..feedback.exchange import export_rows
from ..feedback.store import LabelStore
from ..functional.label_schedule import labels_due
from ..models.generation import Samples
from ..models.newest_reward import NewestReward, newest_version, version_folder
from .finished_runs import RUN_FILE, read_run, run_once
from .loop_labels import add_comparisons, agreement_facts, annotators_of, label_facts, labelled_rows
from .loop_run import LoopRun, write_whole
from .loop_training import fit_reward, reference_samples_of, reward_config, run_ppo


REWARDS, QUEUE, ENDED, STALE = "rewards", "queue", "policy_ended", "stale_rollouts.json"
ROUND = 1
_POLL_SECONDS = 0.5
_MAX_RESTARTS = 5


def train_asynchronously(run: LoopRun, round_: int, folder: Path) -> dict[str, Any]:
    """
    Start the three processes, start a killed one again, and end when the policy is trained.

    Raises:
        RuntimeError: a process failed by itself, or was killed too often; its output says why.
    """
    for name in (REWARDS, QUEUE):
        (folder / name).mkdir(exist_ok=True)
    _adopt_first_reward(run, folder)
    processes = {role: _start(run, role) for role in ROLES}
    restarts = dict.fromkeys(ROLES, 0)
    try:
        while processes:
            time.sleep(_POLL_SECONDS)
            for role, process in list(processes.items()):
                code = process.poll()
                if code == 0:
                    del processes[role]
                elif code is not None and (code > 0 or restarts[role] >= _MAX_RESTARTS):
                    raise RuntimeError(
                        f"The process {role!r} of the asynchronous run ended with code {code}, after {restarts[role]} "
                        "restarts. Call again when the cause is gone: it goes on from what is whole."
                    )
                elif code is not None:  # killed by a signal
                    restarts[role] += 1
                    print(f"{role} was killed by signal {-code}; it is started again", flush=True)
                    processes[role] = _start(run, role)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    result = json.loads((folder / ENDED).read_text(encoding="utf-8"))
    with run.open_store() as store:
        rows = labelled_rows(store, pool_of(run))
        facts = label_facts(run, rows) | agreement_facts(store, pool_of(run))
        facts |= {"asked": count_asked(run, store), "due": run.args.labels_per_round}
    if facts["asked"] < facts["due"]:
        print(
            f"{facts['asked']} of {facts['due']} comparisons were asked: the rollouts held no more groups of "
            "completions that differ. Raise the rollout of `ppo`, or lower `labels_per_round`.",
            flush=True,
        )
    versions = newest_version(folder / REWARDS)
    last = read_run(version_folder(folder / REWARDS, versions))["result"]
    measured = {name: last[name] for name in ("accuracy", "interval", "num_rows") if name in last}
    return {
        **result,
        "restarts": restarts,
        "labels": facts,
        "reward_versions": versions,
        "last_reward": measured,
    }


# The three roles; each runs in a process of its own


def train(run: LoopRun, folder: Path) -> None:
    """PPO against the newest reward; every rollout goes into the queue."""
    if (folder / ENDED).exists():
        return  # killed after the policy was saved
    with run.open_store() as store:
        reward = NewestReward(
            folder / REWARDS,
            run.tokenizer,
            lambda: count_labels(run, store),
            on_rollout=_rollout_writer(run, folder / QUEUE),
            record=folder / STALE,
            batch_size=run.args.eval_batch_size,
            device=PartialState().device,
            trust_remote_code=run.args.trust_remote_code,
        )
        first = str(version_folder(folder / REWARDS, 1))
        result = run_ppo(run, ROUND, folder, reward_funcs=reward, critic_model=first)
    result["stale_rollouts"] = reward.stale_rollouts
    write_whole(folder / ENDED, json.dumps(result))


def elicit(run: LoopRun, folder: Path) -> None:
    """Turn rollouts into comparisons by the schedule, and answer them where a program labels."""
    annotators = annotators_of(run)
    with run.open_store() as store:
        while True:
            ended = (folder / ENDED).exists()
            for path in sorted((folder / QUEUE).glob("*.json")):
                _ask(run, store, path)
            for name, annotator in annotators:
                work_through(store, annotator, name, pool=pool_of(run))
            if ended:
                return
            _wait()


def fit(run: LoopRun, folder: Path) -> None:
    """Fit the next version whenever `refit_labels` labels are new."""
    samples = reference_samples_of(run)
    with run.open_store() as store:
        while not (folder / ENDED).exists():
            version = newest_version(folder / REWARDS)
            last = version_folder(folder / REWARDS, version)
            read = json.loads((last / RUN_FILE).read_text(encoding="utf-8"))["result"]["labels"]
            if count_labels(run, store) - read < run.args.refit_labels:
                _wait()
                continue
            _fit_version(run, store, folder, version + 1, samples)


def _fit_version(run: LoopRun, store: LabelStore, folder: Path, version: int, samples: Samples | None) -> None:
    # Of the first pool too: it may be labelled further, and its labels count among the new ones.
    rows = [row for pool in (run.pool(ROUND), pool_of(run)) for row in export_rows(store, pool=pool)]
    labels = sum(row["num_labels"] for row in rows)
    # An adapter starts anew on the base; a full model goes on from the one before.
    last = version_folder(folder / REWARDS, version - 1)
    start = run.model_args.model_name_or_path if run.model_args.use_peft else str(last)
    changes = {} if run.args.refit_steps is None else {"max_steps": run.args.refit_steps}

    def work(aside: Path) -> dict[str, Any]:
        args = reward_config(run, aside, run.seed(version, "reward"), **changes)
        return {**fit_reward(run, start, args, rows, samples), "labels": labels}

    target = version_folder(folder / REWARDS, version)
    run_once(target, {**run.settings, "version": version, "labels": labels}, work)


ROLES: dict[str, Callable[[LoopRun, Path], None]] = {"policy": train, "labels": elicit, "rewards": fit}


def pool_of(run: LoopRun) -> str:
    """Comparisons that were asked while the policy trained."""
    return f"{run.pool(ROUND)}-asynchronous"


def count_labels(run: LoopRun, store: LabelStore) -> int:
    """Labels in the store, those given before the policy started among them."""
    return store.progress(pool=run.pool(ROUND)).labels + store.progress(pool=pool_of(run)).labels


def count_asked(run: LoopRun, store: LabelStore) -> int:
    """Comparisons in the store, those asked before the policy started among them."""
    return store.progress(pool=run.pool(ROUND)).comparisons + store.progress(pool=pool_of(run)).comparisons


def newest_reward_folder(run: LoopRun) -> Path:
    """The reward model that the finished policy was trained by last."""
    rewards = run.step(ROUND, "policy") / REWARDS
    return version_folder(rewards, newest_version(rewards))


def _adopt_first_reward(run: LoopRun, folder: Path) -> None:
    target = version_folder(folder / REWARDS, 1)
    if target.exists():
        return
    aside = target.with_name(f"_unfinished_{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(run.step(ROUND, "reward"), aside)
    aside.rename(target)


def _rollout_writer(run: LoopRun, queue: Path) -> Callable[..., None]:
    """Writes groups of completions of one prompt, with how far training is."""
    size, steps = run.args.num_candidates, run.ppo.optimizer_steps_per_rollout

    def write(
        prompts: list,
        completions: list,
        completion_ids: list,
        trainer_state: Any,
        eos_token_ids: Collection[int],
        **kwargs: Any,
    ) -> None:
        _check_parent()
        step = trainer_state.global_step
        rows = []
        for start in range(0, len(prompts) - size + 1, size):
            group = slice(start, start + size)
            if any(prompt != prompts[start] for prompt in prompts[group]):
                continue  # the rest of a group that another process holds
            ids = [list(row) for row in completion_ids[group]]
            rows.append(
                {
                    "prompt": prompts[start],
                    "completions": [_joined(run, prompts[start], text) for text in completions[group]],
                    "policies": [f"step_{step}"] * size,
                    "truncated": [not row or row[-1] not in eos_token_ids for row in ids],
                    "extra": {"step": step},
                }
            )
        # The last rollout asks for all that is left: none comes after it.
        share = 1.0 if step + steps >= trainer_state.max_steps else step / trainer_state.max_steps
        write_whole(queue / f"{step:08d}.json", json.dumps({"share": share, "rows": rows}))

    return write


def _joined(run: LoopRun, prompt: Any, text: Any) -> Any:
    """As [`~rlhf_ext.models.generation.completion_text`], without the ids of the prompt at hand."""
    if not isinstance(prompt, str) or text.startswith(" "):
        return text
    apart = [*run.tokenizer(prompt)["input_ids"], *run.tokenizer(text, add_special_tokens=False)["input_ids"]]
    return text if run.tokenizer(prompt + text)["input_ids"] == apart else f" {text}"


def _ask(run: LoopRun, store: LabelStore, path: Path) -> None:
    """Add what is due of one rollout to the store, then take it out of the queue."""
    rollout = json.loads(path.read_text(encoding="utf-8"))
    total = run.args.labels_per_round
    # Labels that are due, in comparisons; those asked before the policy started count among them.
    due: float = total  # of the last rollout: the schedule itself stops a hundredth short
    if rollout["share"] < 1.0:
        due = labels_due(rollout["share"], total=total, initial_share=run.args.initial_label_share)
    asked = count_asked(run, store)
    rows = [row for row in rollout["rows"] if any(text != row["completions"][0] for text in row["completions"])]
    count = min(max(round(due) - asked, 0), len(rows))
    chosen = random.Random(f"{run.args.seed} {path.name}").sample(rows, count)
    add_comparisons(run, store, pool_of(run), chosen)
    path.unlink()  # the same rollout again, after a kill in here, is the same comparisons in the store


def _start(run: LoopRun, role: str) -> subprocess.Popen:
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, str(run.folder), role]
    return subprocess.Popen(command, env={**os.environ, "RLHF_EXT_SUPERVISOR": str(os.getpid())})


def _check_parent() -> None:
    """End when the supervisor is gone: what goes on is started by the next one."""
    if str(os.getppid()) != os.environ.get("RLHF_EXT_SUPERVISOR", str(os.getppid())):
        raise SystemExit("The supervisor of this run is gone.")


def _wait() -> None:
    _check_parent()
    time.sleep(_POLL_SECONDS)


def _main(folder: str, role: str) -> None:
    run = LoopRun.load(folder)
    aside = run.step(ROUND, "policy").with_name("_unfinished_policy")
    # Of a supervisor that was killed, the old process may live for a moment.
    with FileLock(aside / f"{role}.lock", timeout=600):
        ROLES[role](run, aside)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])
