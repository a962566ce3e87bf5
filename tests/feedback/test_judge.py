"""The AI judge: two orders, principles, clamping; every probability against plain logits."""

import math

import pytest
import torch

from rlhf_ext.feedback.constitution import DEFAULT_CONSTITUTION, Principle, load_constitution
from rlhf_ext.feedback.judge import BASE_TEMPLATE, AIJudge
from rlhf_ext.functional.ai_feedback import clamp_label, judge_probabilities, position_bias, swap_average
from tests.tiny import WORDS, tiny_causal_lm, tiny_tokenizer


LETTERS = ("(A)", "(B)", "Choice:", "Question:", "Conversation:", "kind?", "true?")
PRINCIPLES = [Principle("kind", "c", "r", "kind?"), Principle("true", "c", "r", "true?")]
PAIRS = (["w1 w2", "w3", "w4 w5 w6"], ["good", "w7 w8", "bad bad"], ["bad w9", "fine", "good w1"])


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer(words=(*WORDS, *LETTERS))
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_causal_lm("llama", tokenizer, max_position_embeddings=256)


def plain_p_a(model, tokenizer, text):
    """P((A)) against P((B)) from a forward without padding."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    logps = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
    a, b = (logps[tokenizer.convert_tokens_to_ids(x)].exp().item() for x in ("(A)", "(B)"))
    return a / (a + b)


def test_labels_are_those_of_plain_logits_in_both_orders(model, tokenizer):
    judge = AIJudge(model, tokenizer, PRINCIPLES, principles_per_pair=2, batch_size=3)
    verdicts = judge.compare(*PAIRS)
    questions = {p.name: p.question for p in PRINCIPLES}
    changes = []
    for n, (prompt, first, second) in enumerate(zip(*PAIRS, strict=True)):
        labels = []
        for m, name in enumerate(verdicts.principles[n]):
            given = {"prompt": prompt, "question": questions[name], "few_shots": ""}
            one = plain_p_a(model, tokenizer, BASE_TEMPLATE.format(first=first, second=second, **given))
            two = plain_p_a(model, tokenizer, BASE_TEMPLATE.format(first=second, second=first, **given))
            assert verdicts.first_as_a[n, m].item() == pytest.approx(one, abs=1e-6)
            assert verdicts.second_as_a[n, m].item() == pytest.approx(two, abs=1e-6)
            labels.append((one + 1 - two) / 2)
            changes.append((one > 0.5) == (two > 0.5))
        assert verdicts.targets[n] == pytest.approx(sum(labels) / 2, abs=1e-6)
    assert verdicts.swap_disagreement == pytest.approx(sum(changes) / len(changes))
    bias = torch.stack([verdicts.first_as_a, verdicts.second_as_a]).mean().item() - 0.5
    assert verdicts.position_bias == pytest.approx(bias, abs=1e-6)


def test_the_other_way_round_gives_the_other_label(model, tokenizer):
    judge = AIJudge(model, tokenizer, PRINCIPLES, seed=3)
    prompts, first, second = PAIRS
    forth, back = judge.compare(prompts, first, second), judge.compare(prompts, second, first)
    assert forth.principles == back.principles  # the draw does not depend on the order
    assert [a + b for a, b in zip(forth.targets, back.targets, strict=True)] == pytest.approx([1.0] * 3)
    alone = judge.compare(prompts[1:2], first[1:2], second[1:2])
    assert alone.targets == pytest.approx(forth.targets[1:2], abs=1e-6)
    drawn = {AIJudge(model, tokenizer, PRINCIPLES, seed=s).compare(*PAIRS).principles[0][0] for s in range(8)}
    assert drawn == {"kind", "true"}


def test_rows_are_soft_labels(model, tokenizer):
    rows = AIJudge(model, tokenizer, PRINCIPLES).rows(*PAIRS)
    assert [row["prompt"] for row in rows] == PAIRS[0]
    assert all(sum(row["target"]) == pytest.approx(1.0) and len(row["completions"]) == 2 for row in rows)


def test_a_chain_of_thought_is_written_kept_and_clamped(model, tokenizer):
    options = {"chain_of_thought": True, "max_thought_tokens": 4}
    assert AIJudge(model, tokenizer, PRINCIPLES, **options).clamp == (0.4, 0.6)
    free = AIJudge(model, tokenizer, PRINCIPLES, **options, clamp=(0.0, 1.0)).compare(*PAIRS)
    assert [len(thoughts) for thoughts in free.thoughts] == [2, 2, 2] and any(any(t) for t in free.thoughts)
    text = BASE_TEMPLATE.format(prompt="w1 w2", question="{q}", first="good", second="bad w9", few_shots="")
    questions = {p.name: p.question for p in PRINCIPLES}
    text = text.replace("{q}", questions[free.principles[0][0]]).removesuffix("\nChoice:")
    written = f"{text}\nThoughts on both:{free.thoughts[0][0]}\nChoice:"
    assert free.first_as_a[0, 0].item() == pytest.approx(plain_p_a(model, tokenizer, written), abs=1e-6)
    tight = AIJudge(model, tokenizer, PRINCIPLES, **options, clamp=(0.499, 0.501)).compare(*PAIRS)
    assert all(0.499 <= p <= 0.501 for p in tight.targets) and any(not 0.499 <= p <= 0.501 for p in free.targets)


def test_a_chat_template_is_used_where_there_is_one(model, tokenizer):
    chat = tiny_tokenizer(words=(*WORDS, *LETTERS))
    judge = AIJudge(model, chat, PRINCIPLES)
    assert judge.uses_chat
    (question, *_) = [judge._ask("w1", "kind?", "good", "bad", "")]
    assert question.startswith("<|user|> Read") and question.endswith("<|assistant|> ")
    with pytest.raises(ValueError, match="few_shots"):
        AIJudge(model, chat, PRINCIPLES, few_shots=["x"])
    assert not AIJudge(model, chat, PRINCIPLES, few_shots=["x"], template=BASE_TEMPLATE).uses_chat


def test_what_cannot_work_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="principles_per_pair.*3 of 2"):
        AIJudge(model, tokenizer, PRINCIPLES, principles_per_pair=3)
    with pytest.raises(ValueError, match="labels"):
        AIJudge(model, tokenizer, PRINCIPLES, labels=("(A)", "(A)"))
    judge = AIJudge(model, tokenizer, PRINCIPLES)
    with pytest.raises(ValueError, match="context 256"):
        judge.compare(["w1 " * 300], ["good"], ["bad"])
    with pytest.raises(ValueError, match="empty"):
        judge.compare([], [], [])


def test_formulas_by_hand():
    p = judge_probabilities(torch.tensor([[math.log(0.3), math.log(0.1)]], dtype=torch.float64))
    assert p.item() == pytest.approx(0.75)
    one, two = torch.tensor([0.9, 0.8]), torch.tensor([0.3, 0.6])
    assert swap_average(one, two).tolist() == pytest.approx([0.8, 0.6])
    assert position_bias(one, two).item() == pytest.approx(0.15)
    assert clamp_label(torch.tensor([0.05, 0.5, 0.97])).tolist() == pytest.approx([0.4, 0.5, 0.6])
    with pytest.raises(ValueError, match="second_as_a.*outside"):
        swap_average(one, -two)
    with pytest.raises(ValueError, match="low=0.6 and high=0.4"):
        clamp_label(one, low=0.6, high=0.4)
    with pytest.raises(ValueError, match=r"\(2,\).*|expected"):
        judge_probabilities(torch.zeros(3))


def test_the_constitution_that_is_shipped_is_whole():
    principles = load_constitution()
    assert len(principles) >= 8
    assert all(p.question.endswith("?") for p in principles)


@pytest.mark.parametrize(
    "text, words",
    [
        ("- a", "no list `principles`"),
        ("principles: []", "no list `principles`"),
        ("principles: [{name: a, critique: b}]", "principle 0 has.*exactly"),
        ("principles: [{name: a, critique: b, revision: ' ', question: d}]", "no text in.*revision"),
        (
            "principles: [{name: a, critique: b, revision: c, question: d}, "
            "{name: a, critique: b, revision: c, question: d}]",
            "names.*more than once",
        ),
    ],
)
def test_a_faulty_constitution_is_named(tmp_path, text, words):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_constitution(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text(DEFAULT_CONSTITUTION.read_text())
    assert load_constitution(tmp_path / "own.yaml") == load_constitution()
