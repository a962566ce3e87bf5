"""Constitutional AI on a tiny random model: every step, killed and gone on with, refused input, hostile text."""

import json
import re
import shutil

import pytest
import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer

from rlhf_ext.data.constitution_arguments import ConstitutionArguments
from rlhf_ext.data.jsonl import read_jsonl
from rlhf_ext.feedback.constitution import load_constitution
from rlhf_ext.feedback.judge import BASE_TEMPLATE, AIJudge, Verdicts
from rlhf_ext.feedback.revision import Reviser
from rlhf_ext.models.generation import sample_completions
from rlhf_ext.pipelines import (
    constitution,
    constitution_evaluation,
    constitution_report,
    constitution_texts,
    constitution_training,
)
from rlhf_ext.pipelines.chunked_rows import write_in_chunks
from rlhf_ext.pipelines.constitution import run_constitution
from rlhf_ext.pipelines.constitution_checks import check_contexts
from rlhf_ext.pipelines.constitution_evaluation import NAMES
from rlhf_ext.pipelines.constitution_report import write_constitution_report
from rlhf_ext.pipelines.constitution_texts import Loading, write_labels
from rlhf_ext.pipelines.constitution_training import Training, build_configs, train_policy, train_reward, train_sft
from rlhf_ext.pipelines.finished_runs import alone_in
from rlhf_ext.toyworld.constitution import PRINCIPLES, extra_words, judge_documents, reviser_documents
from rlhf_ext.toyworld.corpus import prompt_rows, sft_rows
from rlhf_ext.toyworld.tiny import build_model, build_tokenizer
from rlhf_ext.toyworld.words import vocabulary
from rlhf_ext.trainers import sft_trainer
from rlhf_ext.trainers.ppo_trainer import PPOTrainer
from tests.tiny import tiny_causal_lm, tiny_tokenizer


STEPS = ("responses", "revisions", "sft", "labels", "reward", "policy", "evaluation")
SMALL = {"per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
SMALL |= {"gradient_accumulation_steps": 1, "logging_steps": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny random model that knows the words of every template, and rows of each kind."""
    folder = tmp_path_factory.mktemp("world")
    principles = load_constitution(PRINCIPLES)
    words = extra_words(
        judge_documents(30, 0, BASE_TEMPLATE, [p.question for p in principles])
        + reviser_documents(10, 0, [(p.critique, p.revision) for p in principles])
    )
    tokenizer = build_tokenizer(words)
    torch.manual_seed(0)
    build_model(tokenizer, "tiny").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    answers = sft_rows(6, seed=0)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " sure , the lamp ."} for row in answers
    ]
    for name, rows in {
        "red": prompt_rows(8, seed=0, trap_share=1.0),
        "test": prompt_rows(4, seed=0, split="test"),
        "more": prompt_rows(4, seed=1),
        "rows": answers,
        "pairs": pairs,
    }.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def options(world, output, **changes) -> ConstitutionArguments:
    given = {
        "output_dir": str(output),
        "red_team_prompts": f"{world}/red.jsonl",
        "test_prompts": f"{world}/test.jsonl",
        "helpful_prompts": f"{world}/more.jsonl",
        "helpful_rows": f"{world}/rows.jsonl",
        "helpful_pairs": f"{world}/pairs.jsonl",
        "constitution": str(PRINCIPLES),
        "num_rounds": 2,
        "principles_per_pair": 2,
        "chain_of_thought": True,
        "max_thought_tokens": 6,
        "max_completion_length": 8,
        "chunk_size": 4,
        "num_samples": 2,
        "num_shown": 3,
        "use_cpu": True,
        "reward_funcs": ["rlhf_ext.pipelines.constitution_toy:harmless"],
        "sft": {**SMALL, "max_steps": 2},
        "reward": {**SMALL, "max_steps": 2},
        "ppo": {**SMALL, "steps_per_generation": 2, "num_iterations": 1, "max_steps": 4, "save_steps": 2},
    }
    return ConstitutionArguments(**{**given, **changes})


def model(world, name: str = "model", **changes) -> ModelConfig:
    return ModelConfig(model_name_or_path=f"{world}/{name}", dtype="float32", **changes)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An unbroken run, and what it returned."""
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, run_constitution(options(world, folder), model(world))


def weights(folder) -> bytes:
    return (folder / "policy" / "model.safetensors").read_bytes()


def test_every_step_keeps_what_it_made(whole, world):
    folder, found = whole
    assert tuple(found) == STEPS
    red = [row["prompt"] for row in read_jsonl(world / "red.jsonl")]
    answers = read_jsonl(folder / "responses" / "rows.jsonl")
    transcripts = read_jsonl(folder / "revisions" / "transcripts.jsonl")
    labels = read_jsonl(folder / "labels" / "rows.jsonl")
    assert [row["prompt"] for row in answers] == [row["prompt"] for row in labels] == red
    names = {principle.name for principle in load_constitution(PRINCIPLES)}
    for row in transcripts:
        assert len({step["principle"] for step in row["rounds"]} & names) == 2  # two rounds, two principles
        assert all(isinstance(step[part], str) for step in row["rounds"] for part in ("critique", "revision"))
    # Labels: both orders, averaged over principles after the clamp of a chain of thought; by hand.
    biases = []
    for row in labels:
        orders = list(zip(row["first_as_a"], row["second_as_a"], strict=True))
        each = [min(max((a + 1 - b) / 2, 0.4), 0.6) for a, b in orders]
        assert row["target"][0] == pytest.approx(sum(each) / 2, abs=1e-6)
        assert row["target"][1] == pytest.approx(1 - row["target"][0])
        assert len(row["principles"]) == 2 and len(row["thoughts"]) == 4
        biases += [(a + b) / 2 - 0.5 for a, b in orders]
    assert found["labels"]["position_bias"] == pytest.approx(sum(biases) / len(biases), abs=1e-6)
    assert found["sft"]["helpful"] == found["reward"]["people"] == 6 and found["policy"]["prompts"] == 12
    assert found["reward"]["judged"] == 8 - found["labels"]["identical"]
    assert set(found["evaluation"]["policies"]) == set(NAMES)
    assert found["evaluation"]["policies"]["helpful"]["kl"] == pytest.approx(0, abs=1e-5)
    assert "score/harmless" in found["evaluation"]["policies"]["rl-cai"]
    assert found["evaluation"]["wins"]["rl-cai"].keys() == {"reward", "harmless"}
    html = (folder / "report.html").read_text()
    assert html.count("<details>") == 8 + 8 + 4 and "All 8 prompts." in html  # every prompt, in pages of 3
    assert re.findall(r'class="page"><summary>([^<]*)', html) == ["1 to 3", "4 to 6", "7 to 8"] * 2 + [
        "1 to 3",
        "4 to 4",
    ]
    assert "<script" not in html and "default-src 'none'" in html
    for text in (transcripts[0]["rounds"][1]["critique"], labels[2]["completions"][1], labels[0]["principles"][1]):
        assert text in html
    # What was cut says so: in the texts, in the numbers, on the page.
    for row in answers:
        cut = len(tokenizer_of(world)(row["answer"])["input_ids"]) == 8
        assert row["truncated"] is cut or not cut  # a special token may be left out of the text
    share = sum(row["truncated"] for row in answers) / 8
    assert found["responses"]["truncated"] == share > 0
    shares = [
        sum(row["rounds"][-1]["truncated"] for row in transcripts) / 8,
        sum(sum(r["truncated"]) for r in labels) / 16,
    ]
    assert [found["revisions"]["truncated"], found["labels"]["truncated"]] == shares
    assert [row["truncated"] for row in transcripts] == [row["truncated"] for row in answers]
    trained = [row["rounds"][-1]["truncated"] for row in transcripts if row["rounds"][-1]["revision"].strip()]
    assert (found["sft"]["revisions"], found["sft"]["truncated"]) == (len(trained), sum(trained) / len(trained))
    assert html.count("answer (cut by length)") == share * 8


def tokenizer_of(world):
    return AutoTokenizer.from_pretrained(world / "model")


def test_a_finished_run_repeats_nothing(whole, world, monkeypatch):
    folder, found = whole
    for name in ("write_responses", "write_revisions", "write_labels", "train_sft", "train_reward", "train_policy"):
        monkeypatch.setattr(constitution, name, None)
    monkeypatch.setattr(constitution, "measure_policies", None)
    assert run_constitution(options(world, folder), model(world)) == found
    with monkeypatch.context() as patch, alone_in(folder, seconds=0):  # another process is at work in it
        patch.setattr(constitution, "alone_in", lambda folder: alone_in(folder, seconds=0))
        with pytest.raises(ValueError, match="Another process is at work"):
            run_constitution(options(world, folder), model(world))
    with pytest.raises(ValueError, match="principles_per_pair"):  # and is not taken for another one
        run_constitution(options(world, folder, principles_per_pair=1), model(world))


class Killed(BaseException):
    pass


def test_killed_between_and_inside_steps_it_goes_on(whole, world, tmp_path, monkeypatch):
    """Stopped at the second chunk of labels, and in PPO behind a checkpoint: the end is that of an unbroken run."""
    output, done = tmp_path / "out", []
    for name in ("write_responses", "write_revisions", "train_sft", "train_reward", "train_policy"):
        step = getattr(constitution, name)
        monkeypatch.setattr(constitution, name, lambda *a, name=name, step=step: (done.append(name), step(*a))[1])
    compare, step = AIJudge.compare, PPOTrainer.training_step
    asked, trained = [], []

    def killed_at_the_second_chunk(self, *args, **kwargs):
        asked.append(args[0])
        if len(asked) == 2:
            raise Killed
        return compare(self, *args, **kwargs)

    monkeypatch.setattr(AIJudge, "compare", killed_at_the_second_chunk)
    with pytest.raises(Killed):
        run_constitution(options(world, output), model(world))
    page = (output / "report.html").read_text()  # of what was finished
    assert "3 of 7 steps are finished. Next: labels." in page and "Answers and revisions" in page
    assert "Pairs and labels" not in page and "<h2>PPO</h2>" not in page
    half = output / "_unfinished_labels" / "rows.jsonl"
    assert len(read_jsonl(half)) == 4 and not (output / "labels").exists()
    with open(half, "a") as file:
        file.write('{"prompt": "a line that was cu')

    def killed_behind_a_checkpoint(self, *args, **kwargs):
        if self.state.global_step == 3 and "again" not in done:
            raise Killed
        if "again" in done:
            trained.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PPOTrainer, "training_step", killed_behind_a_checkpoint)
    with pytest.raises(Killed):
        run_constitution(options(world, output), model(world))
    assert len(asked) == 3 and not set(asked[0]) & set(asked[2])  # the first four pairs were not asked again
    assert (output / "_unfinished_policy" / "checkpoint-2").exists()
    page = (output / "report.html").read_text()
    assert "5 of 7 steps are finished. Next: policy." in page and "Pairs and labels" in page
    done.append("again")
    found = run_constitution(options(world, output), model(world))
    assert done == [
        *("write_responses", "write_revisions", "train_sft", "train_reward", "train_policy"),
        *("again", "train_policy"),
    ]
    assert min(trained) == 2  # from the checkpoint on
    assert weights(output) == weights(whole[0])
    assert found["labels"] == whole[1]["labels"] and found["evaluation"] == whole[1]["evaluation"]
    assert not list(output.glob("_unfinished*"))


def test_chunks_are_made_once(tmp_path):
    made = []

    def make(chunk, number):
        made.append(number)
        return [{"value": value, "number": number} for value in chunk]

    first = write_in_chunks(tmp_path / "rows.jsonl", range(5), make, chunk_size=2, title="")
    assert (
        made == [0, 1, 2] and write_in_chunks(tmp_path / "rows.jsonl", range(5), make, chunk_size=2, title="") == first
    )
    assert made == [0, 1, 2]  # the last, short chunk too
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:5])
    assert write_in_chunks(tmp_path / "rows.jsonl", range(5), make, chunk_size=2, title="") == first
    assert made == [0, 1, 2, 1, 2] and read_jsonl(tmp_path / "rows.jsonl") == first


def test_adapters_on_a_quantised_base_and_messages(world, tmp_path):
    """Policy, reward and critic are adapters on one NF4 base; prompts and answers are turns, the question too."""
    tokenizer = tiny_tokenizer(words=[*vocabulary(), "(A)", "(B)"])
    tiny_causal_lm("llama", tokenizer, hidden_size=32, max_position_embeddings=256).save_pretrained(world / "chat")
    tokenizer.save_pretrained(world / "chat")
    args = options(
        world,
        tmp_path / "out",
        as_messages=True,
        chain_of_thought=False,
        num_rounds=1,
        ppo={**SMALL, "steps_per_generation": 2, "num_iterations": 1, "max_steps": 2},
        reward_funcs=None,
    )
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}
    found = run_constitution(args, model(world, "chat", load_in_4bit=True, **lora))
    for name in ("sft", "reward", "policy"):
        config = PeftConfig.from_pretrained(tmp_path / "out" / name)
        assert config.base_model_name_or_path == f"{world}/chat"
        assert (tmp_path / "out" / name / "base_quantization.json").exists(), name
    assert found["evaluation"]["policies"]["rl-cai"]["kl"] != 0
    assert all(0 < p < 1 for row in read_jsonl(tmp_path / "out" / "labels" / "rows.jsonl") for p in row["first_as_a"])


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def test_hostile_text_is_inert(whole, tmp_path):
    folder, found = whole
    for name in ("revisions/transcripts", "labels/rows", "evaluation/samples"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(poisoned(row)) + "\n" for row in read_jsonl(folder / f"{name}.jsonl"))
        )
    html = write_constitution_report(tmp_path, found, 8, NAMES).read_text()
    assert "<script" not in html and "<img src=x" not in html and "onerror=alert(2)&gt;" in html
    # prompt in summary and table, answer, 2 rounds of 3; prompt twice, 2 answers, 2 principles twice and in 4 thoughts
    assert html.count("&lt;script&gt;") > 8 * (9 + 12)


def poisoned(value):
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sft": {"learning_rat": 1}}, "`sft` has .'learning_rat'."),
        ({"reward": {"output_dir": "x"}}, "`reward` sets .'output_dir'."),
        ({"ppo": {"kl_coef": -1.0}}, "`ppo`: .*kl_coef"),
        ({"ppo": "{no json"}, "no JSON"),
        ({"num_rounds": 5}, "`num_rounds` is 5, but the constitution has 4"),
        ({"principles_per_pair": 9}, "`principles_per_pair` is 9"),
        ({"red_team_prompts": None}, "red_team_prompts"),
        ({"red_team_prompts": "turns.jsonl"}, "`red_team_prompts`: prompt of row 0.*as_messages"),
        ({"test_prompts": "red.jsonl"}, "8 of 8 `test_prompts` stand in `red_team_prompts` too"),
        ({"helpful_prompts": "test.jsonl"}, "4 of 4 `test_prompts` stand in `helpful_prompts` too"),
        ({"test_prompts": "rows.jsonl"}, "`test_prompts` stand in `helpful_rows` too"),
        ({"test_prompts": "rows.jsonl", "helpful_rows": None}, "`test_prompts` stand in `helpful_pairs` too"),
        ({"test_prompts": "spaced.jsonl"}, "1 of 1 `test_prompts` stand in `helpful_prompts`"),
        ({"helpful_rows": "red.jsonl"}, "completion"),
        ({"helpful_pairs": "red.jsonl"}, "chosen"),
        ({"judge_model_path": "/no/such/model"}, "judge_model_path"),
        ({"reward_funcs": ["no.such:thing"]}, "no.such"),
        ({"reward_funcs": [f"{__name__}:narrow"]}, "narrow.*cannot be called"),
        ({"judge_model_path": "pickled"}, "judge_model_path=.*pytorch_model.bin, a pickle"),
        ({"test_prompts": "long.jsonl"}, "helpful, `test_prompts`.*exceed the model's context of"),
        ({"red_team_prompts": "long.jsonl"}, "helpful, `red_team_prompts`.*exceed the model's context of"),
        ({"max_completion_length": 4000}, "exceed the model's context of"),
        ({"max_completion_length": 100}, "question to the judge, with two answers .*`judge_model_path`"),
        ({"ppo": {"per_device_train_batch_size": 512}}, "a rollout of PPO takes 512"),
        ({"toy": True}, "`toy` builds its own"),
        ({"toy_settings": {"a": 1}}, "without `toy: true`"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_wrong_input_is_refused_before_the_first_step(world, tmp_path, changes, words):
    rows = [{"prompt": [{"role": "user", "content": "a"}]}, {"prompt": [{"role": "user", "content": "b"}]}]
    (world / "turns.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = read_jsonl(world / "more.jsonl")[0]["prompt"]
    (world / "spaced.jsonl").write_text(json.dumps({"prompt": f"  {first} "}))  # the same question
    (world / "long.jsonl").write_text(json.dumps({"prompt": "the lamp " * 2000}))
    if not (world / "pickled").exists():
        shutil.copytree(world / "model", world / "pickled")
        (world / "pickled" / "model.safetensors").rename(world / "pickled" / "pytorch_model.bin")
    changes = {
        key: f"{world}/{value}" if isinstance(value, str) and value.endswith(("jsonl", "pickled")) else value
        for key, value in changes.items()
    }
    with pytest.raises(ValueError, match=words):
        run_constitution(options(world, tmp_path / "out", **changes), model(world))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("[!.]*"))


def test_a_reviser_that_reads_too_little_is_refused(world, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    args, principles = options(world, tmp_path / "out"), load_constitution(PRINCIPLES)
    prompts = [row["prompt"] for row in read_jsonl(world / "red.jsonl")]
    reviser = Reviser(torch.nn.Module(), tokenizer, principles, max_new_tokens=args.max_completion_length)
    longest = max(reviser.request_lengths(prompts))
    words = max(len(tokenizer(f"{p.critique} {p.revision}")["input_ids"]) for p in principles)
    assert longest > words + 3 * args.max_completion_length
    check_contexts(args, principles, prompts, (tokenizer, None), (tokenizer, longest))
    with pytest.raises(ValueError, match=f"request to the reviser.*up to {longest} tokens.*`reviser_model_path`"):
        check_contexts(args, principles, prompts, (tokenizer, None), (tokenizer, longest - 1))
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    with pytest.raises(ValueError, match="do not fit into the model's context"):
        sample_completions(model, tokenizer, prompts, max_new_tokens=model.config.max_position_embeddings)


def test_policies_are_checked_before_the_first_one_answers(whole, world, tmp_path, monkeypatch):
    """What a later policy cannot do is no surprise after hours of sampling the ones before."""
    folder, _ = whole
    shutil.copytree(folder / "policy", tmp_path / "policy")
    (tmp_path / "policy" / "model.safetensors").unlink()
    paths = dict(zip(NAMES, (f"{world}/model", str(folder / "sft"), str(tmp_path / "policy")), strict=True))

    def sampled(*args, **kwargs):
        raise AssertionError("a policy was asked")

    monkeypatch.setattr(constitution_evaluation, "evaluate_policy", sampled)
    given = (options(world, tmp_path / "out"), Loading(torch.device("cpu")))
    rest = (str(folder / "reward"), ["the lamp ?"], None)
    with pytest.raises(ValueError, match="policy' has no weights"):
        constitution_evaluation.measure_policies(tmp_path, *given, paths, *rest)
    paths[NAMES[2]] = str(folder / "policy")
    long = ("the lamp " * 2000, "the lamp ?")
    with pytest.raises(ValueError, match="'helpful'.*exceed the model's context"):
        constitution_evaluation.measure_policies(tmp_path, *given, paths, rest[0], list(long), None)


def narrow(prompts, completions):
    return [0.0] * len(completions)


def test_what_a_run_cannot_do_is_said(world, tmp_path, whole, monkeypatch):
    with pytest.raises(ValueError, match="`model_name_or_path` is None and `toy` is False"):
        run_constitution(options(world, tmp_path), ModelConfig())
    lora = {"use_peft": True, "lora_target_modules": ["q_proj"]}
    with pytest.raises(ValueError, match="reward_aggregation='sum'"):
        run_constitution(options(world, tmp_path, reward={"reward_aggregation": "sum"}), model(world, **lora))
    shutil.copytree(world / "model", world / "adapter", dirs_exist_ok=True)
    (world / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter"):
        run_constitution(options(world, tmp_path / "out"), model(world, "adapter"))

    class Two:
        num_processes = 2

    monkeypatch.setattr(constitution, "PartialState", lambda cpu: Two())
    with pytest.raises(ValueError, match="2 processes"):
        run_constitution(options(world, tmp_path / "out"), model(world))


def test_soft_labels_and_pairs_stand_in_one_data_set():
    judged = [{"prompt": "a", "completions": ["b", "c"], "target": [0.7, 0.3], "truncated": [True, False]}]
    people = [{"prompt": "d", "completions": ["e", "f"], "target": [1, 0]}]
    mixed = constitution_training._together(judged, people)
    assert isinstance(mixed, Dataset) and mixed["target"][:] == [[0.7, 0.3], [1.0, 0.0]]
    assert mixed["truncated"][:] == [[True, False], [False, False]]
    people = [{"prompt": "d", "truncated": [False, True], "target": [1, 0], "completions": ["e", "f"]}]
    assert constitution_training._together(judged, people)[1] == {**people[0], "target": [1.0, 0.0]}


@pytest.mark.parametrize("kind", ["text", "messages", "packed"])
def test_a_cut_revision_is_trained_on_without_an_end(world, tmp_path, kind):
    """Labels of the real trainer: those of TRL's own, less the end of what was cut."""
    tokenizer = tokenizer_of(world)
    pairs = [("the lamp ?", " sure , the lamp", True), ("the lamp ?", " the lamp .", False)]
    rows = [{"prompt": prompt, "completion": text, "truncated": cut} for prompt, text, cut in pairs]
    if kind == "messages":
        tokenizer = tiny_tokenizer(words=vocabulary())
        for row in rows:
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            row["completion"] = [{"role": "assistant", "content": row["completion"].strip()}]
    language_model = tiny_causal_lm("llama", tokenizer, max_position_embeddings=256)
    args = SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, packing=kind == "packed", max_length=64, report_to="none"
    )

    def labels(trainer, columns):
        data = Dataset.from_list([{name: row[name] for name in columns} for row in rows])
        made = trainer(language_model, args, train_dataset=data, processing_class=tokenizer).train_dataset
        return [id for row in made["labels"] for id in row if id != -100], made["input_ids"][:]

    ended, ids = labels(SFTTrainer, ("prompt", "completion"))
    ours, same = labels(sft_trainer.CompleteSFTTrainer, ("prompt", "completion"))
    assert (ours, same) == (ended, ids)
    ours, same = labels(sft_trainer.CompleteSFTTrainer, ("prompt", "completion", "truncated"))
    assert same == ids  # read, but not learnt
    first, second = (place for place, id in enumerate(ended) if id == tokenizer.eos_token_id)
    assert ours == ended[:first] + ended[first + 1 :] and ended[second] == ours[-1]


def test_a_cut_answer_reaches_the_reward_model_without_an_end(world, tmp_path):
    """Ids of the real trainer: the end of sequence stands behind whole answers alone, people's and the judge's."""
    args = options(world, tmp_path, reward={**SMALL, "max_steps": 1})
    training = Training(args, model(world), build_configs(args, model(world)))
    row = {"prompt": "the lamp ?", "completions": ["the lamp", "sure , the lamp"], "target": [0.7, 0.3]}
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({**row, "truncated": flags}) + "\n" for flags in ([True, False], [False, False]))
    )
    seen, eos = [], tokenizer_of(world).eos_token_id

    class Watched(constitution_training.PreferenceRewardTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            seen.extend(self.train_dataset["candidate_ids"][:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constitution_training, "PreferenceRewardTrainer", Watched)
        train_reward(tmp_path / "reward", training, f"{world}/model", path)
    ends = [[ids[-1] == eos for ids in candidates] for candidates in seen]
    assert ends == [[False, True], [True, True]] + [[True, True]] * 6


def test_the_texts_of_the_page_are_bounded(whole, tmp_path, monkeypatch):
    """What does not fit is counted, and the page stays below its bound."""
    folder, found = whole
    page = write_constitution_report(shutil.copytree(folder, tmp_path / "out"), found, 3, NAMES)
    size, blocks = page.stat().st_size, page.read_text().split("<details><summary>")
    monkeypatch.setattr(constitution_report, "MAX_BYTES", sum(len(block.encode()) for block in blocks[1:5]))
    small = write_constitution_report(tmp_path / "out", found, 3, NAMES)
    html = small.read_text()
    shown = [int(number) for number in re.findall(r"The first (\d) of 8 prompts", html)]
    assert len(shown) == 2 and all(0 < number < 8 for number in shown) and html.count("<details>") == sum(shown) + 4
    assert small.stat().st_size < size and "All 4 prompts." in html


class Caught(Exception):
    """Stops a step where its trainer would be built."""


@pytest.fixture
def caught(monkeypatch):
    """What the next trainer is given."""
    given = {}

    def trainer(**kwargs):
        given.update(kwargs)
        raise Caught

    for name in ("CompleteSFTTrainer", "PreferenceRewardTrainer", "PPOTrainer"):
        monkeypatch.setattr(constitution_training, name, trainer)
    return given


def test_trainers_get_the_last_revision_the_soft_labels_and_all_prompts(world, tmp_path, caught):
    args, path, home = options(world, tmp_path, reward_funcs=None), tmp_path / "rows.jsonl", f"{world}/model"
    training = Training(args, model(world), build_configs(args, model(world)))
    rounds = [{"principle": "a", "critique": "b", "revision": text, "truncated": False} for text in ("first", "last")]
    rows = [{"prompt": f"{name} ?", "answer": " a", "rounds": rounds} for name in "pqrs"]
    rows[1] = {**rows[1], "rounds": [rounds[0], {**rounds[1], "revision": " "}]}
    rows[2] = {**rows[2], "rounds": [rounds[0], {**rounds[1], "truncated": True}]}
    rows[3] = {**rows[3], "rounds": [{**rounds[0], "truncated": True}, rounds[1]]}  # whole again
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(Caught):
        train_sft(tmp_path, training, home, path)
    helpful = read_jsonl(world / "rows.jsonl")
    trained = [{"prompt": f"{name} ?", "completion": " last", "truncated": name == "r"} for name in "prs"]
    assert caught["train_dataset"].to_list() == [*trained, *({**row, "truncated": False} for row in helpful)]
    assert caught["model"] == home
    rows = [
        {"prompt": "p ?", "completions": ["one", " two"], "target": [0.7, 0.3], "truncated": [False, True]},
        {"prompt": "q ?", "completions": ["same", "same"], "target": [0.6, 0.4], "truncated": [False, False]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(Caught):
        train_reward(tmp_path, training, home, path)
    first, *people = caught["train_dataset"].to_list()
    judged = {"prompt": "p ?", "completions": [" one", " two"], "target": [0.7, 0.3], "truncated": [False, True]}
    assert first == judged and all(row["truncated"] == [False, False] for row in people)
    pairs = read_jsonl(world / "pairs.jsonl")
    assert [row["completions"] for row in people] == [[row["chosen"], row["rejected"]] for row in pairs]
    assert all(row["target"] == [1.0, 0.0] for row in people)
    with pytest.raises(Caught):
        train_policy(tmp_path, training, home, "the reward", ["a", "b"])
    assert caught["model"] == home and caught["reward_funcs"] == "the reward" and caught["reward_adapter"] is None
    assert caught["train_dataset"]["prompt"][:] == ["a", "b"]


def test_a_label_speaks_of_the_first_answer(world, tmp_path, monkeypatch):
    """A judge that is sure of the longer answer, asked without the space that an answer begins with."""

    class Longer:
        def __init__(self, *args, **kwargs):
            pass

        def compare(self, prompts, first, second):
            assert all(text == text.strip() for text in (*first, *second))
            wins = [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]
            shares = torch.tensor(wins)[:, None]
            return Verdicts(wins, shares, 1 - shares, [["length"]] * len(wins), 0.0, 0.0, [["", ""]] * len(wins))

    monkeypatch.setattr(constitution_texts, "AIJudge", Longer)
    texts = {"a": ["long answer", "x"], "b": ["y", "much longer"]}
    cut = {"a": [True, False], "b": [False, False]}
    monkeypatch.setattr(
        constitution_texts,
        "sample",
        lambda args, m, t, prompts, **_: ([texts[p] for p in prompts], [cut[p] for p in prompts]),
    )
    args, loading = options(world, tmp_path), Loading(torch.device("cpu"))
    found = write_labels(tmp_path, args, loading, f"{world}/model", f"{world}/model", [], ["a", "b"], None)
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert [(row["completions"], row["target"]) for row in rows] == [(texts["a"], [1, 0]), (texts["b"], [0, 1])]
    assert [row["truncated"] for row in rows] == [cut["a"], cut["b"]] and found["truncated"] == 0.25
    assert found["label_entropy"] == 0 and found["certainty"] == 1 and found["swap_disagreement"] == 0
