"""Policy, labels and rewards as three real processes: labels arrive while training runs, and each may be killed."""

import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from rlhf_ext.data.jsonl import read_jsonl
from rlhf_ext.feedback.store import LabelStore
from rlhf_ext.models.newest_reward import NewestReward, newest_version, version_folder
from rlhf_ext.pipelines import loop, loop_asynchronous
from rlhf_ext.pipelines.finished_runs import read_run
from rlhf_ext.pipelines.loop_labels import add_comparisons
from rlhf_ext.pipelines.loop_report import write_loop_report
from rlhf_ext.pipelines.loop_run import LoopRun
from tests.pipelines.test_loop import PPO, arguments, goodness, prompts, sft  # noqa: F401 (fixtures)
from tests.tiny import tiny_reward_model, tiny_tokenizer


GO_ON = "RLHF_EXT_TEST_GO_ON"  # variable: a file without which the policy does not pass its sixteenth step


def slow_gold(prompts, completions, trainer_state=None, **kwargs):  # noqa: F811
    """As gold; the policy takes its time, and does not end before each process was killed and a refit is whole."""
    if trainer_state is not None:
        time.sleep(0.2)
        deadline = time.time() + 300
        while trainer_state.global_step >= 16 and not os.path.exists(os.environ[GO_ON]) and time.time() < deadline:
            time.sleep(0.1)
    return goodness(prompts, completions)


def kill_once(folder, role, when):
    """Kill the process of a role as soon as `when()` is true; the pid that died is the return."""
    deadline = time.time() + 240
    while time.time() < deadline:
        for process in psutil.Process(os.getpid()).children():
            try:
                if process.cmdline()[-2:] == [str(folder), role] and when():
                    process.send_signal(signal.SIGKILL)
                    return process.pid
            except psutil.Error:  # it ended meanwhile
                continue
        time.sleep(0.02)
    return None


def test_each_process_is_killed_and_the_run_ends_whole(tmp_path, sft, prompts, monkeypatch):  # noqa: F811
    monkeypatch.setenv(GO_ON, str(tmp_path / "go_on"))
    folder = tmp_path / "run"
    args = arguments(
        folder,
        sft,
        prompts,
        num_rounds=1,
        labels_per_round=24,
        asynchronous=True,
        gold_func=f"{__name__}:slow_gold",
        refit_labels=4,
        refit_steps=1,
        ppo={**PPO, "max_steps": 24, "num_generations": 2, "save_strategy": "steps", "save_steps": 1},
    )
    aside = folder / "round_1" / "_unfinished_policy"
    killed = {}
    whens = {
        "policy": lambda: list(aside.glob("checkpoint-*")),
        "labels": lambda: list((aside / "queue").glob("*.json")),
        "rewards": lambda: list((aside / "rewards").glob("_unfinished_*")),
    }
    threads = [
        threading.Thread(target=lambda role=role: killed.update({role: kill_once(folder, role, whens[role])}))
        for role in whens
    ]

    def let_go():
        for thread in threads:
            thread.join()
        deadline = time.time() + 240
        while newest_version(aside / "rewards") < 2 and time.time() < deadline:
            time.sleep(0.1)
        (tmp_path / "go_on").touch()

    last = threading.Thread(target=let_go)
    for thread in [*threads, last]:
        thread.start()
    loop.run_loop(*args)
    last.join()
    assert set(killed) == set(whens) and all(killed.values()), killed
    result = read_run(folder / "round_1" / "policy")["result"]
    assert result["restarts"] == {"policy": 1, "labels": 1, "rewards": 1}
    assert result["reward_versions"] > 1
    newest = read_run(version_folder(folder / "round_1" / "policy" / "rewards", result["reward_versions"]))["result"]
    assert result["last_reward"]["accuracy"] == newest["accuracy"]
    with LabelStore(folder / "labels.db") as store:
        pool = LoopRun.load(folder).pool(1)
        initial, later = (store.progress(pool=name) for name in (pool, f"{pool}-asynchronous"))
    assert initial.comparisons == 6 and initial.comparisons + later.comparisons <= 24
    assert result["labels"]["asked"] == initial.comparisons + later.comparisons and result["labels"]["due"] == 24
    assert later.labels == later.comparisons > 0, "every comparison that was asked has its label, once"
    history = result["history"]
    assert [entry["step"] for entry in history] == list(range(1, 25)), "the killed policy went on from its checkpoint"
    assert history[-1]["reward_version"] >= history[0]["reward_version"] >= 1
    assert {"labels_behind", "stale_rollouts"} <= set(history[0])
    write_loop_report(str(folder), str(tmp_path / "page.html"))
    assert "labels given while the policy trained" in (tmp_path / "page.html").read_text(encoding="utf-8")
    # The versions were fitted on ever more labels, and the evaluation reads the last one.
    rewards = folder / "round_1" / "policy" / "rewards"
    counts = [read_run(version_folder(rewards, v))["result"]["labels"] for v in range(1, newest_version(rewards) + 1)]
    assert counts == sorted(set(counts))
    assert read_jsonl(folder / "round_1" / "evaluation" / "answers.jsonl")[0]["scores"]["reward"] is not None


def test_a_rollout_is_scored_by_the_newest_whole_model_and_staleness_is_counted(tmp_path):
    tokenizer, logged = tiny_tokenizer(), {}

    def save(version, labels, seed, whole=True):
        torch.manual_seed(seed)
        path = version_folder(tmp_path, version)
        tiny_reward_model("llama", tokenizer, seed=seed).save_pretrained(path)
        tokenizer.save_pretrained(path)
        if whole:
            (path / "run.json").write_text(json.dumps({"settings": {}, "result": {"labels": labels}}))

    with pytest.raises(ValueError, match="no finished reward model"):
        NewestReward(tmp_path, tokenizer, lambda: 0)
    save(1, 10, seed=0)
    count = {"labels": 10}
    record = tmp_path / "stale.json"
    reward = NewestReward(tmp_path, tokenizer, lambda: count["labels"], record=record)
    asked = {
        "prompts": ["the cat"],
        "completions": [" sat"],
        "completion_ids": [[5, 1]],
        "log_metric": logged.__setitem__,
    }
    first = reward(**asked)
    assert logged == {"reward_version": 1.0, "labels_behind": 0.0, "stale_rollouts": 0.0}
    count["labels"] = 13
    save(2, 13, seed=1, whole=False)
    assert reward(**asked) == first, "a model that is being written was read"
    assert logged == {"reward_version": 1.0, "labels_behind": 3.0, "stale_rollouts": 1.0}
    (version_folder(tmp_path, 2) / "run.json").write_text(json.dumps({"settings": {}, "result": {"labels": 13}}))
    assert reward(**asked) != first
    assert logged == {"reward_version": 2.0, "labels_behind": 0.0, "stale_rollouts": 1.0}
    # Killed and started again, from a checkpoint: what is repeated counts once.
    count["labels"] = 14
    for step in (1, 2, 3):
        reward(**asked, trainer_state=SimpleNamespace(global_step=step))
    again = NewestReward(tmp_path, tokenizer, lambda: count["labels"], record=record)
    assert again.stale_rollouts == reward.stale_rollouts == 4
    again(**asked, trainer_state=SimpleNamespace(global_step=2))
    assert again.stale_rollouts == 3
    # Every id that ends an answer reaches the model that scores, and who writes the rollout down.
    seen = {}
    again.on_rollout = lambda **kwargs: seen.update(kwargs)
    again.eos_token_ids = {1, 7}
    again(**asked)
    assert again.reward.eos_token_ids == {1, 7} == seen["eos_token_ids"]


def asynchronous(folder, sft, prompts, **kwargs):  # noqa: F811
    given = {"asynchronous": True, "num_rounds": 1, "ppo": {**PPO, "num_generations": 2}, **kwargs}
    run = LoopRun(*arguments(folder, sft, prompts, **given))
    (run.step(1, "policy") / loop_asynchronous.REWARDS).mkdir(parents=True)
    return run, run.step(1, "policy")


def test_a_rollout_is_written_with_its_ends_and_the_last_one_asks_for_the_rest(tmp_path, sft, prompts):  # noqa: F811
    run, folder = asynchronous(tmp_path / "run", sft, prompts, labels_per_round=8)
    write = loop_asynchronous._rollout_writer(run, folder)
    for step in (2, 3):
        write(
            prompts=["the cat"] * 4,
            completions=["sat", "ran", "good", ""],
            completion_ids=[[8, 9], [8, 7], [8, 1], []],
            eos_token_ids={1, 7},
            trainer_state=SimpleNamespace(global_step=step, max_steps=4),
        )
    rollouts = [json.loads((folder / f"{step:08d}.json").read_text()) for step in (2, 3)]
    assert [row["truncated"] for row in rollouts[0]["rows"]] == [[True, False], [False, True]]
    assert [rollout["share"] for rollout in rollouts] == [0.5, 1.0], "the last rollout starts before the last step"
    with run.open_store() as store:
        loop_asynchronous._ask(run, store, folder / "00000003.json")
        assert loop_asynchronous.count_asked(run, store) == 2


def test_the_last_rollout_asks_for_every_label(tmp_path, sft, prompts):  # noqa: F811
    run, folder = asynchronous(tmp_path / "run", sft, prompts, labels_per_round=100)
    row = {"completions": ["sat", "ran"], "policies": ["step_1"] * 2, "truncated": [False] * 2}
    rows = [{"prompt": f"w{place}", "extra": {"step": 1}, **row} for place in range(150)]
    (folder / "1.json").write_text(json.dumps({"share": 1.0, "rows": rows}))
    with run.open_store() as store:
        loop_asynchronous._ask(run, store, folder / "1.json")
        assert loop_asynchronous.count_asked(run, store) == 100


def test_labels_that_arrive_late_in_the_first_pool_are_read_once(tmp_path, sft, prompts, monkeypatch):  # noqa: F811
    run, folder = asynchronous(tmp_path / "run", sft, prompts, labels="people", label_share=0.5, refit_labels=2)
    first = version_folder(folder / loop_asynchronous.REWARDS, 1)
    first.mkdir()
    (first / "run.json").write_text(json.dumps({"settings": {}, "result": {"labels": 1}}))
    (run.step(1, "labels")).mkdir(parents=True)
    (run.step(1, "labels") / "rows.jsonl").write_text("")  # as it was when half of it was labelled
    row = {"completions": ["sat", "ran"], "policies": ["sft", "sft"], "truncated": [False, False]}
    with run.open_store() as store:
        add_comparisons(run, store, run.pool(1), [{"prompt": f"w{place}", **row} for place in range(4)])
        while (task := store.claim("ann")) is not None:
            store.submit("ann", task.comparison_id, "best", 0)
    reads = []

    def fitted(run, start, args, rows, samples):
        assert len(reads) < 3, "fitted again and again without a new label"
        return reads.append(len(rows)) or {}

    monkeypatch.setattr(loop_asynchronous, "fit_reward", fitted)
    waited = iter([None, None, (folder / loop_asynchronous.ENDED).touch])
    monkeypatch.setattr(loop_asynchronous, "_wait", lambda: (next(waited) or (lambda: None))())
    loop_asynchronous.fit(run, folder)
    assert reads == [4]


def test_a_policy_that_has_ended_is_not_trained_again_and_restarts_end(tmp_path, sft, prompts, monkeypatch):  # noqa: F811
    run, folder = asynchronous(tmp_path / "run", sft, prompts)
    (folder / loop_asynchronous.ENDED).write_text("{}")
    monkeypatch.setattr(loop_asynchronous, "run_ppo", lambda *args, **kwargs: pytest.fail("PPO trains again"))
    monkeypatch.setattr(loop_asynchronous, "_adopt_first_reward", lambda *args: None)
    monkeypatch.setattr(loop_asynchronous, "_POLL_SECONDS", 0)
    loop_asynchronous.train(run, folder)
    started = []

    def start(run, role):
        started.append(role)
        killed = -9 if role == "policy" and started.count(role) <= 6 else None
        return SimpleNamespace(poll=lambda: killed, kill=lambda: None, wait=lambda: None)

    monkeypatch.setattr(loop_asynchronous, "_start", start)
    with pytest.raises(RuntimeError, match="'policy' .* ended with code -9, after 5 restarts"):
        loop_asynchronous.train_asynchronously(run, 1, folder)
    assert started.count("policy") == 6
    assert (folder / loop_asynchronous.ENDED).exists()


def test_comparisons_need_groups_in_a_rollout(tmp_path, sft, prompts):  # noqa: F811
    with pytest.raises(ValueError, match="num_generations"):
        arguments(tmp_path, sft, prompts, num_rounds=1, asynchronous=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy_start": "last"}, "`policy_start` is 'last'.*Set it to 'sft'"),
        ({"selection": "disagreement", "num_members": 2}, "`selection` is 'disagreement'.*Set it to 'random'"),
        ({"num_members": 2}, "`num_members` is 2.*Set it to 1"),
        ({"num_rounds": 2}, "`num_rounds` is 2.*Set it to 1"),
        ({"launch_config": "cpu.yaml"}, "`launch_config` is 'cpu.yaml'.*Set it to None"),
    ],
)
def test_what_cannot_hold_there_is_refused(tmp_path, sft, prompts, changes, words):  # noqa: F811
    given = {"num_rounds": 1, "asynchronous": True, "ppo": {**PPO, "num_generations": 2}}
    arguments(tmp_path, sft, prompts, **given)
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, sft, prompts, **{**given, **changes})
