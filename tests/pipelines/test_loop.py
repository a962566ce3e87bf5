"""The loop: steps once and in order, killed anywhere, from whoever labels, on adapters; and what it refuses."""

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from rlhf_ext.data.jsonl import read_jsonl
from rlhf_ext.data.loop_arguments import LoopArguments
from rlhf_ext.feedback.exchange import to_dataset
from rlhf_ext.feedback.store import LabelStore
from rlhf_ext.models.ensembles import is_reward_ensemble
from rlhf_ext.pipelines import finished_runs, loop, loop_labels
from rlhf_ext.pipelines.finished_runs import alone_in, read_run
from rlhf_ext.pipelines.loop_labels import LabelsMissing
from rlhf_ext.pipelines.loop_report import write_loop_report
from rlhf_ext.pipelines.loop_run import LoopRun, write_jsonl
from rlhf_ext.pipelines.loop_training import _labels_so_far, _split, reference_samples_of
from rlhf_ext.trainers.ppo_config import PPOConfig
from tests.tiny import WORDS, tiny_causal_lm, tiny_tokenizer


TINY = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "learning_rate": 1e-3,
}
REWARD = {**TINY, "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
PPO = {
    **TINY,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "steps_per_generation": 1,
    "num_iterations": 1,
    "max_completion_length": 6,
    "logging_steps": 1,
}


def goodness(prompts, completions, **kwargs):
    """Gold: how many words are good."""
    return [float(text.split().count("good") - text.split().count("bad")) for text in completions]


def letters(prompts, completions, **kwargs):
    """A gold that hardly ever ties, where a few labels must hold a comparison whatever was sampled."""
    return [float(len(text)) for text in completions]


def of_messages(prompts, completions, **kwargs):
    """A gold that these prompts are no messages for."""
    return [float(len(completion[-1]["content"])) for completion in completions]


def reward(prompts, completions, **kwargs):
    """Named like the round's reward model."""
    return [0.0] * len(prompts)


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tiny_causal_lm("llama", tokenizer, hidden_size=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    Dataset.from_list([{"prompt": f"w{i % 24} the cat w{i // 24}", "completion": " good"} for i in range(48)]).to_json(
        path
    )
    return str(path)


def arguments(folder, sft, prompts, peft=False, **kwargs):
    given = {
        "output_dir": str(folder),
        "dataset_name": prompts,
        "eval_fraction": 0.2,
        "num_rounds": 2,
        "labels_per_round": 8,
        "labels": "simulated",
        "gold_func": f"{__name__}:goodness",
        "reward_eval_fraction": 0.4,
        "reward": REWARD,
        "ppo": PPO,
        **kwargs,
    }
    if given["labels"] != "simulated":
        given.pop("gold_func") if kwargs.get("gold_func") is None else None
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"]} if peft else {}
    return LoopArguments(**given), ModelConfig(model_name_or_path=sft, dtype="float32", **lora)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, sft, prompts):
    folder = tmp_path_factory.mktemp("loop") / "run"
    loop.run_loop(*arguments(folder, sft, prompts))
    return folder


def test_every_step_stands_in_its_folder_and_in_the_manifest(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    done = [(step["round"], step["step"]) for step in manifest["steps"]]
    assert done == [(0, "evaluation")] + [(round_, name) for round_ in (1, 2) for name in loop.STEPS]
    assert all((finished / step["folder"] / "run.json").exists() for step in manifest["steps"])
    assert not list(finished.rglob("_unfinished_*"))
    AutoModelForCausalLM.from_pretrained(finished / "round_2" / "policy")


def test_who_writes_and_what_is_labelled(finished):
    for round_, newest in ((1, "sft"), (2, "round_1")):
        rows = read_jsonl(finished / f"round_{round_}" / "selection" / "rows.jsonl")
        assert 0 < len(rows) <= 8
        assert all(row["policies"][0] == newest for row in rows)
        labels = read_jsonl(finished / f"round_{round_}" / "labels" / "rows.jsonl")
        assert len(labels) == len(rows)
        assert read_run(finished / f"round_{round_}" / "labels")["result"]["gold_agreement"] in (1.0, None)
    second = read_jsonl(finished / "round_2" / "samples" / "rows.jsonl")
    assert {name for row in second for name in row["policies"]} == {"sft", "round_1"}
    held = {row["prompt"] for row in read_jsonl(finished / "round_0" / "evaluation" / "answers.jsonl")}
    assert not held & {row["prompt"] for row in second}, "a held-out prompt was labelled"


def test_the_reward_model_reads_all_rounds_so_far(finished):
    counts = [len(read_jsonl(finished / f"round_{round_}" / "labels" / "rows.jsonl")) for round_ in (1, 2)]
    assert [read_run(finished / f"round_{r}" / "reward")["result"]["rows"] for r in (1, 2)] == [
        counts[0],
        sum(counts),
    ]


def test_rounds_are_measured_on_the_same_prompts(finished):
    answers = [read_jsonl(finished / f"round_{r}" / "evaluation" / "answers.jsonl") for r in range(3)]
    assert [row["prompt"] for row in answers[0]] == [row["prompt"] for row in answers[2]]
    result = read_run(finished / "round_2" / "evaluation")["result"]
    assert set(result["win_rate"]) == {"reward", "goodness"}
    assert set(answers[2][0]["scores"]) == {"reward", "goodness"}
    assert result["kl"] != 0.0


def test_a_finished_run_repeats_nothing_and_grows_by_rounds(finished, sft, prompts, monkeypatch):
    called = []
    for name in loop.WORK:
        monkeypatch.setitem(loop.WORK, name, lambda *args, _name=name: called.append(_name) or {})
    before = (finished / "manifest.json").read_text()
    (finished / "manifest.json").unlink()  # as if killed before it was written
    loop.run_loop(*arguments(finished, sft, prompts))
    assert called == []
    after = (finished / "manifest.json").read_text()
    seconds = [[step["seconds"] for step in json.loads(text)["steps"]] for text in (before, after)]
    assert seconds[0] == seconds[1] and max(seconds[0]) > 0.2
    with pytest.raises(ValueError, match="labels_per_round.*8 before, 9 now"):
        loop.run_loop(*arguments(finished, sft, prompts, labels_per_round=9))


def test_the_report_reads_what_the_loop_wrote(finished, tmp_path):
    write_loop_report(str(finished), str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "goodness" in page
    asked = page.split("What was asked</h2>")[1].split("<details>")[0]
    assert set(re.findall("<td class=text>([a-z_]+)</td><td", asked)) == {
        *("output_dir", "dataset_name", "eval_fraction", "num_rounds", "labels_per_round", "labels", "gold_func"),
        *("reward_eval_fraction", "reward", "ppo", "model_name_or_path"),
    }


def test_prompts_are_chosen_by_the_flags_of_every_recipe(tmp_path, sft, prompts):
    for split, start in (("train", 0), ("test", 12)):
        rows = [{"prompt": f"w{i} the cat", "source": "ab"[i % 2]} for i in range(start, start + 20)]
        Dataset.from_list(rows).to_json(tmp_path / f"{split}.jsonl")
    run = LoopRun(
        *arguments(tmp_path / "run", sft, str(tmp_path), eval_fraction=0.0, dataset_source=["a"], max_rows=7)
    )
    # The seventh is held out too, and not trained on.
    assert [row["prompt"] for row in run.train_prompts] == [f"w{2 * i} the cat" for i in range(6)]
    assert [row["prompt"] for row in run.eval_prompts] == [f"w{2 * i} the cat" for i in range(6, 13)]
    run = LoopRun(*arguments(tmp_path / "run", sft, prompts, eval_dataset_name=str(tmp_path / "test.jsonl")))
    assert len(run.train_prompts) == 48 and len(run.eval_prompts) == 20
    with pytest.raises(ValueError, match="no prompt that is not held out"):
        _ = LoopRun(*arguments(tmp_path / "run", sft, prompts, eval_dataset_name=prompts)).digest


def test_at_the_defaults_the_reward_model_has_held_out_rows_and_sampling_is_as_in_ppo(tmp_path, sft, capsys):
    rows = [{"prompt": f"question number {place}?"} for place in range(400)]
    Dataset.from_list(rows).to_json(tmp_path / "many.jsonl")
    args = LoopArguments(
        output_dir=str(tmp_path / "run"),
        dataset_name=str(tmp_path / "many.jsonl"),
        ppo={"use_cpu": True, "bf16": False},
    )
    run = LoopRun(args, ModelConfig(model_name_or_path=sft))
    kept, held = _split(run, Dataset.from_list(run.train_prompts))
    assert 0 < len(held) < 0.15 * len(kept)
    assert _split(run, kept.select([0]))[1] is None
    assert "no held-out accuracy" in capsys.readouterr().out
    undecided = Dataset.from_list([{**row, "incomparable": True} for row in run.train_prompts])
    everything, nothing = _split(run, undecided)
    assert nothing is None and len(everything) == len(undecided), "no row that was held out is compared"
    assert "is compared" in capsys.readouterr().out
    mixed = [{**row, "incomparable": place % 2 == 0} for place, row in enumerate(run.train_prompts)]
    assert 0 < len(_split(run, Dataset.from_list(mixed))[1]) < len(held)
    assert run.max_completion_length == PPOConfig.max_completion_length
    assert run.temperature == PPOConfig.temperature


def test_who_labels_is_who_was_asked_and_a_misspelt_argument_comes_before_the_toy_world(tmp_path, monkeypatch):
    assert LoopArguments(output_dir="x", toy=True).labels == "simulated"
    assert LoopArguments(output_dir="x", toy=True, labels="people").labels == "people"
    assert LoopArguments(output_dir="x", dataset_name="y").labels == "people"
    monkeypatch.setattr(loop, "prepare_toy", lambda *args: pytest.fail("the toy world was built first"))
    cpu = {"use_cpu": True, "bf16": False}
    args = LoopArguments(output_dir=str(tmp_path / "run"), toy=True, reward=cpu, ppo={**cpu, "kl_coeff": 0.1})
    with pytest.raises(ValueError, match="kl_coeff"):
        loop.run_loop(args, ModelConfig())


def test_an_evaluation_in_a_line():
    result = {"score/gold": 0.5, "score/gold_se": 0.1, "kl": 1.25, "win_rate": {"gold": {"win_rate": 0.625}}}
    assert loop.in_short(result) == "score/gold 0.500, win rate by gold 0.625, KL 1.25"
    assert loop.in_short({"score/gold": 0.5}) == "score/gold 0.500"


def test_runs_of_one_name_share_a_store_and_no_label(tmp_path, sft, prompts):
    runs = [LoopRun(*arguments(tmp_path / place / "run", sft, prompts)) for place in "ab"]
    for run in runs:
        run.save_settings()
    pools = [run.pool(1) for run in runs]
    assert pools[0] != pools[1] and all(pool.startswith("run-") for pool in pools)
    assert LoopRun.load(runs[0].folder).pool(1) == LoopRun(runs[0].args, runs[0].model_args).pool(1) == pools[0]
    (runs[0].folder / "settings.json").unlink()  # removed and begun again
    assert LoopRun(runs[0].args, runs[0].model_args).pool(1) not in pools


def selected(run, round_, names, completions=("good", "bad")):
    """Comparisons of a round in the store, and what was selected on disk."""
    row = {"completions": list(completions), "policies": ["sft"] * len(completions)}
    rows = [{"prompt": name, **row, "truncated": [False] * len(completions)} for name in names]
    run.step(round_, "selection").mkdir(parents=True)
    write_jsonl(run.step(round_, "selection") / "rows.jsonl", rows)
    with run.open_store() as store:
        return loop_labels.add_comparisons(run, store, run.pool(round_), rows)


def test_later_labels_of_a_round_are_read_and_the_newest_round_is_asked_first(tmp_path, sft, prompts):
    run = LoopRun(*arguments(tmp_path / "run", sft, prompts, labels="people", label_share=0.3))
    selected(run, 1, ["p0", "p1", "left"])
    with run.open_store() as store:
        store.submit("ann", store.claim("ann").comparison_id, "best", 0)
        for step in ("labels", "reward"):
            run.step(1, step).mkdir()
        assert loop_labels.write_labels(run, 1, run.step(1, "labels"))["labels"] == 1
        late = store.claim("ann")
        store.submit("ann", late.comparison_id, "best", 0)
        selected(run, 2, ["p2", "p3"])
        assert [task.prompt for task in store.claim_many("bob", 9)] == ["p2", "p3", "left"]
        for _ in range(2):
            rows = _labels_so_far(run, 1, run.step(1, "reward"))
            assert [row["prompt"] for row in rows] == ["p0", "p1"]
            store.undo("ann", store.labels_of("ann")[0].id)  # what a step has read stays as it was
    run.args.store = str(tmp_path / "other.db")  # without the pool: what the step kept is read
    (run.step(1, "reward") / "rows.jsonl").unlink()
    assert to_dataset(_labels_so_far(run, 1, run.step(1, "reward")))["prompt"][:] == ["p0"]


@pytest.mark.parametrize(
    ("share", "of", "wanted"), [(0.9, 10, 9), (0.8, 50, 40), (0.95, 10, 10), (1.0, 7, 7), (0.5, 3, 2)]
)
def test_a_share_of_labels_is_the_least_number_that_has_it(share, of, wanted):
    assert loop_labels.labels_wanted(of, share) == wanted


def test_who_is_left_when_everybody_skipped_and_what_a_split_is(tmp_path, sft, prompts, capsys):
    run = LoopRun(*arguments(tmp_path / "run", sft, prompts, labels="people", wait_for_labels=False, overlap=1))
    first, second = selected(run, 1, ["p0", "p1"])
    with run.open_store() as store:
        store.submit("ann", first, "skip")
        assert loop_labels.left_to_nobody(store, run.pool(1)) == 1
        store.submit("ann", second, "tie")
        with pytest.raises(LabelsMissing, match="1 comparisons .*label_share.*set_overlap"):
            loop_labels.wait_for_people(run, store, run.pool(1))
        run.args.wait_for_labels = True
        thread = threading.Thread(target=loop_labels.wait_for_people, args=(run, store, run.pool(1), 0.02))
        thread.start()
        said, end = "", time.monotonic() + 30
        while "everybody who labels here" not in said and time.monotonic() < end:
            time.sleep(0.02)
            said += capsys.readouterr().out
        assert "everybody who labels here" in said
        store.submit("bob", first, "best", 0)
        thread.join()
        store.set_overlap(2, pool=run.pool(1))
        store.submit("cem", first, "best", 1)
        rows = loop_labels.labelled_rows(store, run.pool(1))
        assert [(row["target"], row["split"]) for row in rows] == [([0.5, 0.5], True), ([0.5, 0.5], False)]
        facts = {**loop_labels.label_facts(run, rows), **loop_labels.agreement_facts(store, run.pool(1))}
        assert (facts["split"], facts["ties"], facts["incomparable"]) == (1, 1, 0)


def test_gold_agreement_reads_rankings_and_the_best_of_many(tmp_path, sft, prompts):
    run = LoopRun(*arguments(tmp_path / "run", sft, prompts))
    ids = selected(run, 1, ["p0", "p1"], ("good", "w1", "bad"))
    with run.open_store() as store:
        store.submit("ann", ids[0], "ranking", [0, 2, 1])  # two pairs of three are as gold has them
        store.submit("ann", ids[1], "best", 2)  # none of two
        facts = loop_labels.label_facts(run, loop_labels.labelled_rows(store, run.pool(1)))
    assert facts["gold_agreement"] == pytest.approx(2 / 5)


def test_a_run_and_a_launched_step_are_alone_in_their_folder(tmp_path, sft, prompts, monkeypatch):
    args = arguments(tmp_path / "run", sft, prompts)

    def second(*given):
        with alone_in(tmp_path / "run", seconds=0):
            pytest.fail("two at work in one folder")

    monkeypatch.setattr(loop, "_all_rounds", second)
    with pytest.raises(ValueError, match="Another process is at work in"):
        loop.run_loop(*args)
    with alone_in(tmp_path / "run", seconds=0):
        pass  # the lock went with the run
    run = LoopRun(*args)
    run.save_settings()
    run.step(1, "policy").parent.mkdir()

    def locked(run, round_, name):
        with pytest.raises(Timeout):
            FileLock(run.step(round_, name).with_name(f".{name}.lock"), timeout=0).acquire()
        return "done"

    monkeypatch.setattr(loop, "do_step", locked)
    loop._launched(str(run.folder), 1, "policy")


def test_what_a_step_was_asked_for_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "step"
    for settings in ({"a": 1}, {"a": 2}):  # killed while it works, and while it writes the settings of the next call

        def killed(*args, **kwargs):
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            if settings["a"] == 2:
                patch.setattr(finished_runs.json, "dump", killed)
            finished_runs.run_once(folder, settings, killed)
    assert finished_runs.run_once(folder, {"a": 2}, lambda aside: {"done": True}) == {"done": True}
    assert read_run(folder)["settings"] == {"a": 2}


def test_what_ppo_would_refuse_comes_before_the_first_step(tmp_path, sft, prompts):
    args, model_args = arguments(tmp_path / "run", sft, prompts)
    model_args.dtype = "bfloat16"
    with pytest.raises(ValueError, match="`dtype` is 'bfloat16'.*`use_peft`"):
        loop.check(LoopRun(args, model_args))
    args, model_args = arguments(tmp_path / "wide", sft, prompts, ppo={**PPO, "per_device_train_batch_size": 512})
    with pytest.raises(ValueError, match="a rollout takes 512.*nothing would be trained on"):
        loop.check(LoopRun(args, model_args))
    (tmp_path / "launch.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 128\n")
    args, model_args = arguments(tmp_path / "many", sft, prompts, launch_config=str(tmp_path / "launch.yaml"))
    with pytest.raises(ValueError, match="a rollout takes 512"):
        loop.check(LoopRun(args, model_args))


def test_a_judge_whose_context_is_too_short_is_refused_first(tmp_path, sft, prompts, monkeypatch):
    run = LoopRun(*arguments(tmp_path / "run", sft, prompts, labels="judge", judge_model_path="judge"))
    judge = SimpleNamespace(context=26, question_lengths=lambda texts, *answers: [14] * len(texts))
    monkeypatch.setattr(loop_labels, "judge_of", lambda run: judge)
    loop_labels.check_labeller(run)
    judge.context = 25
    with pytest.raises(ValueError, match="14 tokens without answers.*`max_completion_length` 6 .*context of 25"):
        loop_labels.check_labeller(run)


def test_the_samples_that_normalise_begin_once(tmp_path, sft, prompts):
    run = LoopRun(*arguments(tmp_path / "run", sft, prompts, normalize_scores="shift"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    begin = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[begin])
    tokenizer.chat_template = "{{ bos_token + ' ' }}" + tokenizer.chat_template
    run.__dict__["tokenizer"] = tokenizer
    asked = [{"role": "user", "content": "the cat"}]
    answer = [{"role": "assistant", "content": "sat"}]
    run.step(1, "samples").mkdir(parents=True)
    row = {"prompt": asked, "completions": [answer] * 2, "completion_ids": [[8, 1]] * 2, "truncated": [False] * 2}
    write_jsonl(run.step(1, "samples") / "rows.jsonl", [row])
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert reference_samples_of(run).prompt_ids == [ids["input_ids"]]


class Killed(BaseException):
    """Not an Exception: nothing in between may catch it."""


def test_killed_in_any_step_it_goes_on_with_that_step(tmp_path, sft, prompts, monkeypatch):
    folder, started = tmp_path / "run", []
    originals = dict(loop.WORK)

    def once_killed(name):
        def work(run, round_, aside):
            started.append((round_, name))
            result = originals[name](run, round_, aside)
            if started.count((round_, name)) == 1:
                raise Killed
            return result

        return work

    for name in originals:
        monkeypatch.setitem(loop.WORK, name, once_killed(name))
    for _ in range(8):  # every step of a round dies once after its work, before it counts as finished
        try:
            loop.run_loop(*arguments(folder, sft, prompts, num_rounds=1))
            break
        except Killed:
            continue
    order = [(0, "evaluation"), *((1, name) for name in loop.STEPS)]
    assert started == [step for step in order for _ in range(2)]
    assert len(read_jsonl(folder / "round_1" / "labels" / "rows.jsonl")) == len(
        read_jsonl(folder / "round_1" / "selection" / "rows.jsonl")
    )


def test_adapters_share_a_base_and_go_on_from_the_last_policy(tmp_path, sft, prompts):
    folder = tmp_path / "run"
    loop.run_loop(
        *arguments(
            folder,
            sft,
            prompts,
            peft=True,
            policy_start="last",
            normalize_scores="scale",
            sources=["policy", "references"],
            missing_eos_penalty=1.0,
        )
    )
    AutoPeftModelForCausalLM.from_pretrained(folder / "round_2" / "policy")
    assert read_run(folder / "round_2" / "policy")["result"]["start"] == str(folder / "round_1" / "policy")
    rows = read_jsonl(folder / "round_2" / "samples" / "rows.jsonl")
    assert {name for row in rows for name in row["policies"]} == {"round_1", "reference"}
    reward = read_run(folder / "round_1" / "reward")["result"]
    assert reward["gain"] > 0


def test_disagreement_selects_where_the_ensemble_is_in_doubt(tmp_path, sft, prompts):
    folder = tmp_path / "run"
    doubt = {"selection": "disagreement", "num_members": 2, "pool_factor": 3, "num_candidates": 3}
    loop.run_loop(*arguments(folder, sft, prompts, gold_func=f"{__name__}:letters", **doubt))
    assert is_reward_ensemble(folder / "round_2" / "reward")
    first, second = (read_run(folder / f"round_{r}" / "selection")["result"] for r in (1, 2))
    assert first["disagreement_mean"] is None
    assert second["disagreement_selected"] > second["disagreement_mean"]


@pytest.mark.slow
def test_an_ensemble_of_adapters_on_a_quantised_base(tmp_path, sft, prompts):
    folder = tmp_path / "run"
    doubt = {"selection": "disagreement", "num_members": 2}
    args, model_args = arguments(folder, sft, prompts, peft=True, gold_func=f"{__name__}:letters", **doubt)
    model_args.load_in_4bit, model_args.bnb_4bit_quant_type = True, "nf4"
    loop.run_loop(args, model_args)
    assert read_run(folder / "round_2" / "selection")["result"]["disagreement_mean"] > 0
    result = read_run(folder / "round_2" / "evaluation")["result"]
    assert set(result["win_rate"]) == {"reward", "letters"} and "score/reward" in result


def test_people_label_while_the_loop_waits(tmp_path, sft, prompts, monkeypatch):
    folder = tmp_path / "run"
    asked = arguments(folder, sft, prompts, labels="people", num_rounds=1, wait_for_labels=False)
    with pytest.raises(LabelsMissing, match="rlhf-ext label --store"):
        loop.run_loop(*asked)
    asked[0].wait_for_labels = True
    waiting = loop_labels.wait_for_people
    monkeypatch.setattr(loop_labels, "wait_for_people", lambda *args: waiting(*args, seconds=0.05))

    def person():
        with LabelStore(folder / "labels.db") as store:
            while (task := store.claim("ann")) is not None:
                store.submit("ann", task.comparison_id, "best", 0)

    thread = threading.Thread(target=person)
    thread.start()
    loop.run_loop(*asked)
    thread.join()
    result = read_run(folder / "round_1" / "labels")["result"]
    assert list(result["annotators"]) == ["ann"] and result["labels"] == result["comparisons"]


def test_a_judge_gives_soft_labels(tmp_path, sft, prompts):
    tokenizer = tiny_tokenizer(words=(*WORDS, "(A)", "(B)", "Choice:"))
    tokenizer.chat_template = None
    judge = tiny_causal_lm("llama", tokenizer, max_position_embeddings=512)
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    folder = tmp_path / "run"
    asked = {"labels": "judge", "judge_model_path": str(tmp_path / "judge"), "num_rounds": 1}
    loop.run_loop(*arguments(folder, sft, prompts, **asked))
    targets = [row["target"] for row in read_jsonl(folder / "round_1" / "labels" / "rows.jsonl")]
    assert all(sum(target) == pytest.approx(1.0) and 0.0 < min(target) for target in targets)
    assert len({target[0] for target in targets}) > 1
    assert list(read_run(folder / "round_1" / "labels")["result"]["annotators"]) == ["judge"]


def test_training_is_launched_by_accelerate_with_the_same_result(tmp_path, finished, sft, prompts, monkeypatch):
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root))
    folder = tmp_path / "run"
    config = str(root / "accelerate_configs" / "cpu.yaml")
    loop.run_loop(*arguments(folder, sft, prompts, num_rounds=1, launch_config=config))
    for name in ("reward", "policy"):
        ours = load_file(folder / "round_1" / name / "model.safetensors")
        theirs = load_file(finished / "round_1" / name / "model.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": {"max_stepz": 3}}, "`reward` names .*max_stepz"),
        ({"ppo": {"loops": 3}}, "`ppo` names .*loops"),
        ({"selection": "disagreement"}, "one model cannot disagree"),
        ({"labels": "judge"}, "`judge_model_path` is empty"),
        ({"sources": ["everybody"]}, "`sources` names"),
        ({"gold_func": "nowhere:nothing"}, "nowhere:nothing"),
        ({"gold_func": f"{__name__}:of_messages"}, "cannot score the first prompt .* TypeError"),
        ({"score_funcs": [f"{__name__}:reward"]}, "name .'reward'. more than once"),
        ({"ppo": {**PPO, "output_dir": "x"}}, "which the loop sets itself"),
        ({"ppo": {**PPO, "max_completion_length": 500}}, "exceed the model's context"),
        ({"refit_labels": 3}, "nothing reads it"),
        ({"launch_config": "accelerate_configs/zero3.yaml", "num_members": 2}, "`num_members` is 2.*DeepSpeed"),
        (
            {"launch_config": "accelerate_configs/zero2.yaml", "ppo": {**PPO, "bf16": True}},
            "`ppo` has bf16.*DeepSpeed",
        ),
        ({"launch_config": "nowhere.yaml"}, "cannot be read"),
        ({"toy": True, "labels": "judge", "judge_model_path": "x"}, "labels by gold"),
        (
            {"store": "mysql://ann:secret@host/labels"},
            r"`store` is 'mysql://ann:\*\*\*@host/labels'.*postgresql://user",
        ),
        ({"store": "nowhere/labels.db"}, "`store` is 'nowhere/labels.db'.*no folder.*a folder that exists"),
        (
            {"store": "postgresql://ann:secret@127.0.0.1:1/labels"},
            r"`store` is 'postgresql://ann:\*\*\*@.*(refused|psycopg)",
        ),
        ({"store": "postgresql://host:port/labels"}, "`store` is 'postgresql://host:port/labels'.*user@host"),
        ({"store": "."}, "`store` is '.'.*not an SQLite file"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(tmp_path, sft, prompts, changes, words):
    with pytest.raises(ValueError, match=words):
        loop.run_loop(*arguments(tmp_path / "run", sft, prompts, **changes))
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_password_of_the_store_is_not_printed(tmp_path, sft, prompts):
    with pytest.raises(ValueError) as refused:
        loop.run_loop(*arguments(tmp_path / "run", sft, prompts, store="postgresql://ann:secret@127.0.0.1:1/labels"))
    assert "secret" not in str(refused.value)


def test_a_finished_run_needs_no_store(finished, sft, prompts):
    loop.run_loop(*arguments(finished, sft, prompts, store="nowhere/labels.db"))


def test_a_pickled_sft_model_is_refused(tmp_path, sft, prompts):
    shutil.copytree(sft, tmp_path / "sft")
    os.rename(tmp_path / "sft" / "model.safetensors", tmp_path / "sft" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model_name_or_path=.*pytorch_model.bin, a pickle.*convert it"):
        loop.run_loop(*arguments(tmp_path / "run", str(tmp_path / "sft"), prompts))


def test_an_adapter_as_sft_is_refused(tmp_path, sft, prompts):
    folder = tmp_path / "adapter"
    os.makedirs(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="rlhf-ext merge"):
        loop.run_loop(*arguments(tmp_path / "run", str(folder), prompts))
