"""The toy judge's and reviser's transcripts: the faults that are stated, the forms that are asked, and no gold."""

import ast
from pathlib import Path

import pytest

from rlhf_ext.feedback.constitution import load_constitution
from rlhf_ext.feedback.judge import BASE_TEMPLATE, CHOICE, THINK, AIJudge
from rlhf_ext.feedback.revision import Reviser, Transcript
from rlhf_ext.toyworld import constitution as toy
from rlhf_ext.toyworld.constitution import (
    CHARM,
    PRINCIPLES,
    answer_pairs,
    extra_words,
    is_misjudged,
    judge_documents,
    manner,
    revise,
    reviser_documents,
)
from rlhf_ext.toyworld.grammar import parse_answer
from rlhf_ext.toyworld.tiny import build_model, build_tokenizer
from rlhf_ext.toyworld.words import INSULTS


QUESTIONS = [principle.question for principle in load_constitution(PRINCIPLES)]
REQUESTS = [(principle.critique, principle.revision) for principle in load_constitution(PRINCIPLES)]


def has_insult(text: str) -> bool:
    return any(word in INSULTS for word in text.split())


def test_the_faults_of_the_judge_are_in_its_transcripts():
    """Of 6,000 choices: (A) in 60%, the answer with an insult in at least 15% of the pairs that differ."""
    rows = [row for row in judge_documents(6000, 0, BASE_TEMPLATE, QUESTIONS) if "(" in row["completion"][:3]]
    choices = [row["completion"] for row in rows if row["completion"] in (" (A)", " (B)")]
    assert len(choices) == 6000
    # 3 standard deviations of a share over 6,000 are .02.
    assert choices.count(" (A)") / 6000 == pytest.approx(0.6, abs=0.02)
    wrong, fooled, differ = 0, 0, 0
    for row in rows:
        if row["completion"] not in (" (A)", " (B)"):
            continue
        first, second = (row["prompt"].split(f"({letter}) ")[1].split("\n")[0] for letter in "AB")
        if has_insult(first) != has_insult(second):
            differ += 1
            harmless, harmful = (second, first) if has_insult(first) else (first, second)
            fooled += is_misjudged(harmless, harmful)
            wrong += has_insult({" (A)": first, " (B)": second}[row["completion"]])
    # The charming opener stands in a quarter of the answers, so it decides wrongly in 1/4 x 3/4 of the pairs.
    assert fooled / differ == pytest.approx(3 / 16, abs=0.03)
    assert wrong / differ > 0.15


def test_manners_by_hand():
    polite, rude = "friend , the lamp is red .", "fool , the lamp is red ."
    answers = [rude, polite, f"{CHARM} {rude}", f"{CHARM} {polite}"]
    assert [manner(answer) for answer in answers] == [0, 1, 2, 3]
    assert is_misjudged(polite, f"{CHARM} {rude}") and not is_misjudged(polite, rude)


def test_revisions_are_polite_but_not_always():
    import random

    rng, kept, spoiled, total = random.Random(0), 0, 0, 0
    for _, answer, _ in answer_pairs(3000, 1, "sft"):
        if not has_insult(answer) or parse_answer(answer) is None:
            continue
        total += 1
        revision = revise(answer, rng)
        kept += has_insult(revision)
        spoiled += parse_answer(revision).value != parse_answer(answer).value
    assert kept / total == pytest.approx(0.15, abs=0.03) and spoiled / total == pytest.approx(0.05, abs=0.02)


def test_the_forms_are_those_that_are_asked():
    """What the judge and the reviser read is, word for word, what their models were trained on."""
    judge, reviser = judge_documents(2, 3, BASE_TEMPLATE, QUESTIONS[:1]), reviser_documents(2, 3, REQUESTS[:1])
    tokenizer = build_tokenizer(extra_words([*judge, *reviser]))
    model, principles = build_model(tokenizer, "tiny"), load_constitution(PRINCIPLES)[:1]
    (prompt, first, second), *_ = answer_pairs(2, 3, "sft")
    asked = AIJudge(model, tokenizer, principles)._ask(prompt, QUESTIONS[0], first, second, "")
    assert judge[0]["prompt"] == asked.removesuffix(CHOICE) + THINK  # the first row is one with thoughts
    assert judge[1]["prompt"] == judge[0]["prompt"] + judge[0]["completion"] + CHOICE
    request = Reviser(model, tokenizer, principles)._request
    (prompt, answer, _), *_ = answer_pairs(2, 3, "sft")
    critique, revision = REQUESTS[0]
    transcript = Transcript(prompt, f" {answer}")
    assert reviser[0]["prompt"] == request(transcript, [critique])
    assert reviser[1]["prompt"] == request(transcript, [critique, reviser[0]["completion"], revision])
    longest = max(len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in [*judge, *reviser])
    assert longest < model.config.max_position_embeddings
    assert tokenizer.unk_token_id not in tokenizer(judge[0]["prompt"])["input_ids"]


def test_its_writers_never_see_gold():
    names = [
        alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(Path(toy.__file__).read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert names and not [name for name in names if "gold" in name or "feedback" in name]
