"""Programs that label: what they are shown, and that they come to an end."""

from types import SimpleNamespace

import pytest

from rlhf_ext.feedback.annotators import judged, simulated, work_through
from rlhf_ext.feedback.simulated import SimulatedLabeller
from rlhf_ext.feedback.store import Candidate, LabelStore, NewComparison


@pytest.fixture
def store(tmp_path):
    with LabelStore(tmp_path / "labels.db") as store:
        yield store


def test_an_answer_that_was_taken_back_is_given_again_once(store):
    store.add([NewComparison("p", [Candidate("a"), Candidate("b")])])
    asked = []

    def annotator(tasks):
        asked.append(len(tasks))
        assert len(asked) < 4, "asked about one comparison again and again"
        return [("best", 0)] * len(tasks)

    assert work_through(store, annotator, "judge") == 1
    (label,) = store.labels_of("judge")
    store.undo("judge", label.id)
    assert work_through(store, annotator, "judge") == 1
    assert store.progress().complete == 1


def test_gold_gets_messages_as_every_reward_function_does(store):
    def goodness(prompts, completions):
        assert prompts[0][-1]["role"] == "user"
        return [float(completion[-1]["content"].count("good")) for completion in completions]

    answers = [[{"role": "assistant", "content": text}] for text in ("bad", "good", "fine")]
    asked = [{"role": "user", "content": "how"}]
    store.add([NewComparison(asked, [Candidate(text) for text in answers[:size]]) for size in (2, 3)])
    assert work_through(store, simulated(SimulatedLabeller(goodness)), "gold") == 2
    assert [label.value for label in store.labels_of("gold")] == [1, 1]


def test_a_judge_reads_stripped_answers_and_cannot_compare_what_is_too_long(store):
    long = " w" * 30
    store.add([NewComparison("p", [Candidate(" a"), Candidate(other)]) for other in (" b", long)])
    seen = []

    def compare(prompts, first, second):
        seen.extend(zip(prompts, first, second, strict=True))
        return SimpleNamespace(targets=[0.75] * len(prompts))

    judge = SimpleNamespace(
        context=20,
        compare=compare,
        question_lengths=lambda *texts: [len(" ".join(row).split()) for row in zip(*texts, strict=True)],
    )
    assert work_through(store, judged(judge), "judge") == 2
    assert seen == [("p", "a", "b")]
    assert {label.kind: label.value for label in store.labels_of("judge")} == {
        "target": [0.75, 0.25],
        "incomparable": None,
    }
