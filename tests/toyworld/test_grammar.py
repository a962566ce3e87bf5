"""Parser round trips, splits by fact, and how hard it is to stumble into the grammar."""

import random
from dataclasses import replace

import pytest

from rlhf_ext.toyworld import words
from rlhf_ext.toyworld.corpus import prompt_rows, scenes, sft_rows
from rlhf_ext.toyworld.grammar import (
    PERFECT_MIX,
    SPLITS,
    Answer,
    Fact,
    Scene,
    break_answer,
    parse_answer,
    parse_prompt,
    perfect_answers,
    render_answer,
    render_prompt,
    sample_scene,
    split_of,
    split_of_fact,
    write_answer,
)


SCENE = Scene((Fact("lamp", ("red", "small", "new")), Fact("chair", ("metal", "swiss", "free"))), "lamp", "color")
PROMPT = "the lamp is red small new . the chair is metal swiss free . what color is the lamp ?"


def test_prompt_by_hand():
    assert render_prompt(SCENE) == PROMPT
    assert parse_prompt(PROMPT) == SCENE
    assert render_prompt(replace(SCENE, trap=True)) == PROMPT.replace("what", "insult me , what")
    assert SCENE.value_of("lamp", "color") == "red"
    assert SCENE.value_of("lamp", "origin") is None
    assert SCENE.value_of("bag", "color") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("friend , the lamp has the color red .", Answer("lamp", "red", "has")),
        ("well , fool , the lamp is of the color red .", Answer("lamp", "red", "of", "fool", "well ,")),
        ("good day , sir , the lamp comes in the color red .", Answer("lamp", "red", "in", "sir", "good day ,")),
    ],
)
def test_answer_by_hand(text, answer):
    assert render_answer(answer) == text
    assert parse_answer(f"  {text} ") == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the lamp has the color red .",  # no address
        "friend , the lamp is red",
        "friend , the lamp has the color red . .",
        "friend , the lamp has the color red , sir .",
        "friend , the lamp has the color red small .",
        "friend , the lamp has of the color red .",
        "friend , the lamp comes the color red .",
        "friend , the the lamp has the color red .",
        "friend , the sofa is red .",
        "Friend , the lamp has the color red .",
        "friend , well , the lamp has the color red .",
        "well , sure , friend , the lamp has the color red .",
        "friend , the lamp has the color red . good day ,",
        "friend , the lamp has the color red . friend , the lamp has the color red .",
        PROMPT,
    ],
)
def test_outside_the_grammar(text):
    assert parse_answer(text) is None


def test_round_trips():
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng, num_products=rng.choice((2, 3)), overlap=rng.random() < 0.5, trap=rng.random() < 0.5)
        assert parse_prompt(render_prompt(scene)) == scene
    for scene in scenes(3, 0, "test"):
        answers = perfect_answers(scene)
        texts = [render_answer(answer) for answer in answers]
        assert len(set(texts)) == len(texts) == 3 * len(words.POLITE) * len(words.OPENERS)
        assert [parse_answer(text) for text in texts] == answers


@pytest.mark.parametrize("text", ["", "what color is the lamp ?", PROMPT + " .", PROMPT.replace("color", "origin")])
def test_foreign_prompts_raise(text):
    with pytest.raises(ValueError, match="render_prompt"):
        parse_prompt(text)


def test_no_word_is_ambiguous():
    lists = [*words.VALUES.values(), words.PRODUCTS, words.POLITE, words.INSULTS, words.ATTRIBUTES]
    found = [word for group in lists for word in group]
    assert len(found) == len(set(found))
    assert 60 <= len(words.vocabulary()) <= 150


def test_answers_are_short():
    rng = random.Random(1)
    lengths = [len(render_answer(a).split()) for a in perfect_answers(SCENE)]
    assert (min(lengths), max(lengths)) == (9, 13)
    assert all(len(write_answer(SCENE, rng).split()) <= 14 for _ in range(500))
    assert {len(row["prompt"].split()) for row in prompt_rows(50, 0)} == {20}


def test_at_least_95_percent_of_shuffled_answers_are_rejected():
    rng = random.Random(2)
    rejected = tried = 0
    for row in sft_rows(1000, 0, mix=PERFECT_MIX):
        answer = row["completion"].split()
        for _ in range(5):
            shuffled = rng.sample(answer, len(answer))
            if shuffled != answer:
                tried += 1
                rejected += parse_answer(" ".join(shuffled)) is None
    assert tried > 4900
    assert rejected / tried >= 0.95


def test_broken_answers_are_rejected():
    rng = random.Random(3)
    for row in sft_rows(300, 0, mix=PERFECT_MIX):
        assert parse_answer(break_answer(row["completion"], rng)) is None


def test_splits_share_no_fact():
    facts = {
        split: {(f.product, frozenset(f.values)) for s in scenes(600, 0, split, "all") for f in s.facts}
        for split in SPLITS
    }
    for i, split in enumerate(SPLITS):
        assert len(facts[split]) > 300
        for other in SPLITS[:i]:
            assert not facts[split] & facts[other]


def test_split_is_stable_and_ignores_order():
    # Pinned: a changed hash would leak test facts into models trained before.
    assert split_of_fact(Fact("lamp", ("red", "small", "new"))) == split_of_fact(Fact("lamp", ("new", "red", "small")))
    assert [split_of_fact(Fact(p, ("red", "small", "new"))) for p in words.PRODUCTS[:6]] == [
        "ppo", "sft", "labels", "sft", "labels", "labels"
    ]  # fmt: skip
    assert all(split_of(scene) == "ppo" for scene in scenes(100, 5, "ppo"))


def test_overlap_binds_values_to_products():
    for scene in scenes(100, 0, "test", overlap=True):
        stated = [scene.value_of(fact.product, scene.attribute) for fact in scene.facts]
        assert None not in stated
        assert len(set(stated)) == 2
    for scene in scenes(100, 0, "test"):
        assert [scene.value_of(f.product, scene.attribute) for f in scene.facts].count(None) == 1
