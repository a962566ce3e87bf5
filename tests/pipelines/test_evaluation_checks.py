"""What an evaluation cannot do is said before anything is sampled or scored, naming the field."""

import json
import runpy
from pathlib import Path

import pytest
from trl import TrlParser

from rlhf_ext.data.evaluation_arguments import EvaluationArguments
from rlhf_ext.feedback.constitution import Principle
from rlhf_ext.feedback.judge import BASE_TEMPLATE, AIJudge
from rlhf_ext.models.generation import Samples
from rlhf_ext.pipelines.evaluation_checks import check_judge, check_judge_answers
from rlhf_ext.pipelines.evaluation_policy import PolicyEvaluation, build_judge
from tests.tiny import WORDS, tiny_causal_lm, tiny_reward_model, tiny_tokenizer


RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "evaluate.py"
LONG = " ".join(["w1"] * 20)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models of a context of 64 and of 24 tokens; `other_` ones have another vocabulary."""
    folder = tmp_path_factory.mktemp("world")
    own, other = tiny_tokenizer(), tiny_tokenizer(words=(*WORDS, "more"))
    no_chat = tiny_tokenizer(words=(*WORDS, "more"))
    no_chat.chat_template = None
    made = {
        "policy": (tiny_causal_lm, own, 64),
        "short_policy": (tiny_causal_lm, own, 24),
        "other_judge": (tiny_causal_lm, other, 24),
        "other_policy": (tiny_causal_lm, other, 64),
        "reward": (tiny_reward_model, own, 64),
        "short_reward": (tiny_reward_model, own, 24),
        "other_reward": (tiny_reward_model, other, 20),
        "no_chat_reward": (tiny_reward_model, no_chat, 64),
    }
    for name, (make, tokenizer, context) in made.items():
        make("llama", tokenizer, max_position_embeddings=context).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "no_weights").mkdir()
    (folder / "no_weights" / "config.json").write_text((folder / "policy" / "config.json").read_text())
    tokenizer.save_pretrained(folder / "no_weights")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "gone")}
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    own.save_pretrained(folder / "adapter")
    (folder / "ensemble").mkdir()
    members = [{"folder": "member_0"}, {"folder": "member_1"}]
    (folder / "ensemble" / "ensemble.json").write_text(json.dumps({"members": members}))
    (folder / "ensemble" / "member_0").symlink_to(folder / "reward")
    rows = {
        "prompts": [{"prompt": "w1 w2"}, {"prompt": LONG}],
        "messages": [{"prompt": [{"role": "user", "content": "w1"}]}],
        "pairs": [{"prompt": "w1 ", "chosen": "good", "rejected": "bad w2"}],
    }
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, values)))
    (folder / "template.txt").write_text("{prompt} {first} {second}")
    (folder / "key.txt").write_text("{prompt} {first} {second} {third}")
    (folder / "one.txt").write_text("{prompt} {first}")
    (folder / "file").write_text("")
    (folder / "own_checked_scores.py").write_text(
        "def topic_score(completions, topic, **kwargs):\n    return [0.0] * len(completions)\n"
        "def narrow(prompts, completions):\n    return [0.0] * len(completions)\n"
        "def reward(completions, **kwargs):\n    return [0.0] * len(completions)\n"
        "def judge(completions, **kwargs):\n    return [0.0] * len(completions)\n"
        "async def slow(completions, **kwargs):\n    return [0.0] * len(completions)\n"
    )
    return folder


POLICY = "--policy_model_path {w}/policy --dataset_name {w}/prompts.jsonl --max_completion_length 8 --output_dir {out}"
BASELINE = POLICY + " --baseline_model_path {w}/policy"
JUDGE = BASELINE + " --judge_labels good bad --judge_template {w}/template.txt"
PAIRS = "--dataset_name {w}/pairs.jsonl --output_dir {out}"
TO_REFUSE = {
    "output": (PAIRS + " --reward_model_path {w}/reward --output_dir {w}/file/out", "output_dir.*file/out"),
    "a policy that reads less": (
        POLICY + " --policy_model_path {w}/policy {w}/short_policy",
        "short_policy.*context of 24.*max_completion_length=8",
    ),
    "a baseline that reads less": (POLICY + " --baseline_model_path {w}/short_policy", "baseline short_policy.*24"),
    "a second policy without weights": (
        POLICY + " --policy_model_path {w}/policy {w}/no_weights",
        "no_weights.*has no weights",
    ),
    "an adapter without its base": (
        POLICY + " --policy_model_path {w}/policy {w}/adapter",
        "adapter.*base_model_name_or_path.*gone",
    ),
    "a reward that reads less": (
        POLICY + " --reward_model_path {w}/short_reward",
        "'short_reward'.*reward_model_path.*24 tokens.*prompt 1 has 20.*8.*max_completion_length",
    ),
    "a reward of another vocabulary that cannot read a prompt": (
        POLICY + " --reward_model_path {w}/other_reward",
        "'other_reward'.*20 tokens.*prompt 1 has 20.*1 or more",
    ),
    "a reward without a chat template": (
        POLICY + " --reward_model_path {w}/no_chat_reward --dataset_name {w}/messages.jsonl",
        "messages.*'no_chat_reward'.*no chat template",
    ),
    "a reward model of a policy that is not there": (
        POLICY + " --reward_model_path {w}/gone",
        "reward_model_path=.*gone",
    ),
    "labels that are one token": (BASELINE + " --judge_model_path {w}/policy", "labels.*judge_labels"),
    "an ensemble with a member missing": (
        PAIRS + " --reward_model_path {w}/ensemble",
        "reward_model_path=.*member_1",
    ),
    "a reference that reads less": (
        POLICY + " --reference_model_path {w}/short_policy",
        "reference_model_path.*24 tokens",
    ),
    "a second policy of another vocabulary": (
        POLICY + " --policy_model_path {w}/policy {w}/other_policy --reference_model_path {w}/policy",
        "'other_policy' and the reference.*vocabularies",
    ),
    "a judge that reads less": (
        JUDGE + " --judge_model_path {w}/short_policy",
        "judge_model_path.*prompt 1 has 21 tokens.*max_completion_length` 8.*24",
    ),
    "a judge of another vocabulary with a long template": (
        BASELINE + " --judge_labels good bad --judge_model_path {w}/other_judge",
        r"judge_model_path.*prompt 1 has \d+ tokens.*context of 24",
    ),
    "a template with another field": (
        JUDGE + " --judge_template {w}/key.txt --judge_model_path {w}/policy",
        "judge_template.*KeyError.*third",
    ),
    "a template with one answer": (
        JUDGE + " --judge_template {w}/one.txt --judge_model_path {w}/policy",
        r"judge_template.*no \['second'\]",
    ),
    "a template that is not there": (JUDGE + " --judge_template {w}/x.txt --judge_model_path {w}/policy", "no file"),
    "a template without a judge": (JUDGE, "judge_template.*judge_model_path"),
    "a column that is missing": (POLICY + " --reward_funcs own_checked_scores:topic_score", "topic_score.*'topic'"),
    "a function that takes too little": (POLICY + " --reward_funcs own_checked_scores:narrow", "narrow.*unexpected"),
    "a coroutine": (POLICY + " --reward_funcs own_checked_scores:slow", "slow.*coroutine"),
    "one name for two scores": (
        POLICY + " --reward_funcs own_checked_scores:reward --reward_model_path {w}/reward",
        r"\['reward'\].*two columns",
    ),
    "a score called judge": (
        JUDGE + " --judge_model_path {w}/policy --reward_funcs own_checked_scores:judge",
        r"\['judge'\].*two columns",
    ),
    "a source column": (PAIRS + " --reward_model_path {w}/reward --source_column origin", "source_column.*"),
    "a source map without sources": (
        PAIRS + " --reward_model_path {w}/reward --source_map a=honest",
        "source_map.*no column",
    ),
    "a second reward model that is not there": (
        PAIRS + " --reward_model_path {w}/reward {w}/gone",
        "reward_model_path=.*gone",
    ),
    "rows that are all too long": (
        PAIRS + " --reward_model_path {w}/reward --max_length 2",
        "longer than 2 tokens.*max_length",
    ),
    "odd bins": (PAIRS + " --reward_model_path {w}/reward --num_bins 5", "num_bins.*5.*even"),
    "no length": (PAIRS + " --reward_model_path {w}/reward --max_length 0", "max_length.*0"),
    "an endless temperature": (POLICY + " --temperature inf", "temperature.*inf.*finite"),
}


@pytest.fixture
def refuse(monkeypatch):
    def called(*args, **kwargs):
        raise AssertionError("a long step began")

    monkeypatch.setattr("rlhf_ext.pipelines.evaluation_policy.sample_completions", called)
    monkeypatch.setattr("rlhf_ext.pipelines.evaluation.score_rows", called)


def run(line, world, out):
    flags = ["--use_cpu", "true", *line.format(w=world, out=out).split()]
    runpy.run_path(str(RECIPE))["main"](*TrlParser((EvaluationArguments,)).parse_args_and_config(flags))


@pytest.mark.parametrize("name", TO_REFUSE)
def test_it_is_refused_before_the_first_long_step(name, world, tmp_path, monkeypatch, refuse):
    line, words = TO_REFUSE[name]
    monkeypatch.chdir(world)
    with pytest.raises(ValueError, match=words):
        run(line, world, tmp_path)


def test_what_fits_gets_to_the_long_step(world, tmp_path, monkeypatch, refuse):
    """Or the refusals above would say nothing: the same lines without what is wrong with them."""
    monkeypatch.chdir(world)
    good = JUDGE + " --judge_model_path {w}/policy --reference_model_path {w}/policy"
    good += " --reward_model_path {w}/no_chat_reward --reward_funcs own_checked_scores:reward"
    for line in (good, PAIRS + " --reward_model_path {w}/reward"):
        with pytest.raises(AssertionError, match="a long step began"):
            run(line, world, tmp_path)


def test_a_judge_of_another_vocabulary_is_asked_for_room_before_the_second_policy(world, tmp_path, monkeypatch):
    """Its context of 24 holds the question, but not two answers of the first policy."""
    monkeypatch.chdir(world)
    sampled = []

    def sample(model, tokenizer, prompts, num_samples, **kwargs):
        sampled.append(prompts)
        ids = [[5] * 8 for _ in prompts]
        return Samples(list(prompts), ["w3 " * 8] * len(prompts), ids, ids, [True] * len(prompts))

    monkeypatch.setattr("rlhf_ext.pipelines.evaluation_policy.sample_completions", sample)
    line = JUDGE + " --judge_model_path {w}/other_judge --num_samples 1"
    (world / "short.jsonl").write_text('{"prompt": "w1 w2 w3 w4 w5 w6 w7 w8"}\n{"prompt": "w1"}')
    with pytest.raises(ValueError, match="'policy'.*judge_model_path.*prompt 0 has 25 tokens.*context of 24"):
        run(line + " --dataset_name {w}/short.jsonl", world, tmp_path)
    assert len(sampled) == 1


def judge_of(tokenizer, context):
    model = tiny_causal_lm("llama", tokenizer, max_position_embeddings=context)
    how = {"question": "w1?", "template": "{prompt} {first} w2 {second} w3", "labels": ("good", "bad")}
    return build_judge(model, tokenizer, **how)


def test_a_judge_has_room_for_exactly_two_answers():
    """Question: 2 words of prompt, 2 of the template, 1 of the label, and 5 + 5 of the answers are 15 tokens."""
    own, other = tiny_tokenizer(), tiny_tokenizer(words=(*WORDS, "more"))
    assert check_judge(judge_of(own, 15), {"p": own}, ["w1", "w1 w2"], 5) is True
    with pytest.raises(ValueError, match="prompt 1 has 5 tokens.*`max_completion_length` 5.*context of 14"):
        check_judge(judge_of(own, 14), {"p": own}, ["w1", "w1 w2"], 5)
    # Of another vocabulary the answers are not known, but those of the first policy are
    judge = judge_of(other, 14)
    assert check_judge(judge, {"p": own}, ["w1", "w1 w2"], 5) is False

    def answered(text):
        samples = Samples(["w1", "w1", "w1 w2", "w1 w2"], ["w3", "w3 " * 9, text, "w3 " * 9], [], [], [])
        return PolicyEvaluation("p", samples, num_samples=2)

    check_judge_answers(judge, answered("w3 w3 w3 w3"))
    with pytest.raises(ValueError, match="'p'.*prompt 1 has 15 tokens.*14"):
        check_judge_answers(judge, answered("w3 w3 w3 w3 w3"))


def test_a_question_is_as_long_as_the_longest_that_could_be_drawn():
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm("llama", tokenizer, max_position_embeddings=512)
    principles = [Principle("a", "c", "r", "w1?"), Principle("b", "c", "r", "w1 w2 w3?")]
    how = {"labels": (" good", " bad"), "template": BASE_TEMPLATE}
    judge = AIJudge(model, tokenizer, principles, **how, few_shots=["w1 w2", "w3"])
    parts = {"prompt": "w1", "first": "w2 w3", "second": "w4", "few_shots": "w1 w2 w3 "}
    text = BASE_TEMPLATE.format(**parts, question="w1 w2 w3?")
    assert judge.question_lengths(["w1"], ["w2 w3"], ["w4"]) == [len(tokenizer(text)["input_ids"]) + 1]
    assert judge.context == 512
