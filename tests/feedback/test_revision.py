"""Critique and revision: what the model reads in each round, what is kept, what becomes of it."""

import pytest

from rlhf_ext.feedback import revision
from rlhf_ext.feedback.constitution import Principle
from rlhf_ext.feedback.revision import Reviser, Transcript, revision_rows
from rlhf_ext.models.generation import Samples
from tests.tiny import tiny_causal_lm, tiny_tokenizer


PRINCIPLES = [Principle(name, f"criticise {name}", f"revise {name}", f"{name}?") for name in ("a", "b", "c")]
PROMPTS, ANSWERS = ["Human: w1\n\nAssistant:", "Human: w2\n\nAssistant:"], [" good", " bad w3"]


@pytest.fixture
def heard(monkeypatch):
    """Requests in the order they are made; the model's reply is the number of the request."""
    requests = []

    def reply(model, tokenizer, prompts, **kwargs):
        texts = []
        for prompt in prompts:
            texts.append(f" reply {len(requests)}\n\nCritique request: more")
            requests.append(prompt)
        return Samples(prompts, texts, [], [], [True] * len(texts))

    monkeypatch.setattr(revision, "sample_completions", reply)
    return requests


def base_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def reviser(tokenizer, **kwargs):
    return Reviser(tiny_causal_lm("llama", tokenizer), tokenizer, PRINCIPLES, **kwargs)


def test_a_revision_is_the_answer_of_the_next_round(heard):
    first, second = reviser(base_tokenizer(), num_rounds=2, few_shots="SHOTS\n\n").revise(PROMPTS, ANSWERS)
    one, two = (entry.principle for entry in first.rounds)
    assert one != two
    assert heard[0] == f"SHOTS\n\n{PROMPTS[0]} good\n\nCritique request: criticise {one}\n\nCritique:"
    assert heard[2] == (
        f"SHOTS\n\n{PROMPTS[0]} good\n\nCritique request: criticise {one}\n\nCritique: reply 0\n\n"
        f"Revision request: revise {one}\n\nRevision:"
    )
    assert heard[4] == f"SHOTS\n\n{PROMPTS[0]} reply 2\n\nCritique request: criticise {two}\n\nCritique:"
    assert [(r.critique, r.revision) for r in first.rounds] == [("reply 0", "reply 2"), ("reply 4", "reply 6")]
    assert (first.answer, first.revision, second.revision) == (" good", "reply 6", "reply 7")
    # Cut by length, but behind the empty line where the revision ends.
    assert first.row()["rounds"][1] == {
        "principle": two,
        "critique": "reply 4",
        "revision": "reply 6",
        "truncated": False,
    }
    assert revision_rows([first, Transcript("p", " ")]) == [{"prompt": PROMPTS[0], "completion": " reply 6"}]


def test_a_revision_that_is_cut_is_no_row(monkeypatch):
    """Cut texts before an empty line came; the second revision ends by itself, and only the last one counts."""
    replies = iter([["a", "b"], ["cu", "cu"], ["c", "d"], ["whole", "agai"]])
    flags = iter([[False, False], [True, True], [True, True], [False, True]])
    monkeypatch.setattr(
        revision, "sample_completions", lambda m, t, prompts, **_: Samples(prompts, next(replies), [], [], next(flags))
    )
    transcripts = reviser(base_tokenizer(), num_rounds=2).revise(PROMPTS, ANSWERS)
    assert [[part.truncated for part in made.rounds] for made in transcripts] == [[True, False], [True, True]]
    assert revision_rows(transcripts) == [{"prompt": PROMPTS[0], "completion": " whole"}]


def test_chat_models_are_asked_in_turns(heard):
    (transcript,) = reviser(tiny_tokenizer()).revise(["w1"], ["good"])
    assert transcript.rounds[0].truncated  # no document that goes on: the turn was cut
    name = transcript.rounds[0].principle
    assert [(turn["role"], turn["content"]) for turn in heard[1]] == [
        ("user", "w1"),
        ("assistant", "good"),
        ("user", f"criticise {name}"),
        ("assistant", "reply 0\n\nCritique request: more"),
        ("user", f"revise {name}"),
    ]


def test_a_real_model_writes_the_same_for_the_same_seed():
    tokenizer = base_tokenizer()
    runs = [
        [t.row() for t in reviser(tokenizer, num_rounds=2, max_new_tokens=5, seed=seed).revise(PROMPTS, ANSWERS)]
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    # The draw depends on the answer itself, not on its place.
    alone = reviser(tokenizer, num_rounds=2, max_new_tokens=5).revise(PROMPTS[1:], ANSWERS[1:])
    assert [r.principle for r in alone[0].rounds] == [r["principle"] for r in runs[0][1]["rounds"]]


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="num_rounds.*4, of 3"):
        reviser(base_tokenizer(), num_rounds=4)
    with pytest.raises(ValueError, match="few_shots.*chat template"):
        reviser(tiny_tokenizer(), few_shots="x")
