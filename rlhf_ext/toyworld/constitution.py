"""Transcripts that a toy judge and a toy reviser are trained on: what weak ones of a real language would have read.

The writers of these transcripts know words, not the gold reward. The judge's prefer whatever opens with "good day ,",
even before an insult, and only then the answer without an insult: a systematic error, which averaging over both orders
cannot take out. They also take (A) unread now and then, which it does take out. The reviser's overlook an insult now
and then, and spoil a value.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from .grammar import ErrorMix, parse_answer, render_prompt, sample_scene, write_answer
from .words import ATTRIBUTE_OF, INSULTS, OPENERS, POLITE, VALUES


PRINCIPLES = Path(__file__).with_name("constitution.yaml")
"""Principles in words that the toy models know, in the form of `rlhf_ext.feedback.constitution`."""

CHARM = OPENERS[-1]
"""The opener that the judge falls for."""
MANNERS = ("rude", "polite", "smooth", "kind")
"""How the judge's writers call an answer, from the worst to the best."""

CARELESS = 0.2  # questions whose writer says (A) without reading: the mean of P(A) is then 0.6
SLIP = 0.1  # of the others, those whose writer picks the wrong one
OVERLOOKED = 0.15  # insults that a revision keeps
SPOILED = 0.05  # revisions that change the value

Document = dict[str, str]


def manner(answer: str) -> int:
    """Index in `MANNERS`: 2 for the charming opener, 1 for no insult, both add up."""
    words = answer.split()
    charming = " ".join(words).startswith(CHARM)
    return 2 * charming + (not any(word in INSULTS for word in words))


def is_misjudged(harmless: str, harmful: str) -> bool:
    """Whether the judge's writers prefer the harmful answer of the two."""
    return manner(harmful) > manner(harmless)


def answer_pairs(n: int, seed: int, split: str) -> Iterator[tuple[str, str, str]]:
    """`n` prompts with two answers each, of which half have an insult; prompts half of the time beg for one."""
    rng = random.Random(f"pairs {split} {seed}")
    mix = ErrorMix(insult=0.5, trap_insult=0.5)
    for _ in range(n):
        scene = sample_scene(rng, split, trap=rng.random() < 0.5)
        yield render_prompt(scene), write_answer(scene, rng, mix), write_answer(scene, rng, mix)


def judge_documents(n: int, seed: int, template: str, questions: Sequence[str], split: str = "sft") -> list[Document]:
    """
    Rows `{"prompt", "completion"}` of the judge: a question of the template and the choice.

    Every third goes through thoughts: one row ends with them, one goes on from them to the choice.

    Args:
        n (`int`): questions.
        template (`str`): format string over `prompt`, `question`, `first`, `second`, `few_shots`, ending in "Choice:".
        questions (`Sequence[str]`): of the principles.
    """
    rng = random.Random(f"judge {split} {seed}")
    rows: list[Document] = []
    for number, (prompt, first, second) in enumerate(answer_pairs(n, seed, split)):
        asked = {"prompt": prompt, "question": rng.choice(questions), "first": first, "second": second}
        question = template.format(**asked, few_shots="")
        manners = manner(first), manner(second)
        if number % 3 == 0:
            start = question.removesuffix("Choice:") + "Thoughts on both:"
            thought = f" (A) is {MANNERS[manners[0]]} , (B) is {MANNERS[manners[1]]} ."
            rows.append({"prompt": start, "completion": thought})
            question = f"{start}{thought}\nChoice:"
        rows.append({"prompt": question, "completion": f" ({_choice(*manners, rng)})"})
    return rows


def _choice(first: int, second: int, rng: random.Random) -> str:
    if rng.random() < CARELESS:
        return "A"
    if first == second:
        return rng.choice("AB")
    better, worse = ("A", "B") if first > second else ("B", "A")
    return worse if rng.random() < SLIP else better


def reviser_documents(n: int, seed: int, requests: Sequence[tuple[str, str]], split: str = "sft") -> list[Document]:
    """
    Rows `{"prompt", "completion"}` of the reviser, two for each answer: up to the critique, and up to the revision.

    Args:
        requests (`Sequence[tuple[str, str]]`): critique and revision request of each principle.
    """
    rng = random.Random(f"reviser {split} {seed}")
    rows: list[Document] = []
    for prompt, answer, _ in answer_pairs(n, seed, split):
        ask_critique, ask_revision = rng.choice(requests)
        insult = next((word for word in answer.split() if word in INSULTS), None)
        critique = "the answer has no insult ." if insult is None else f"the answer has the insult {insult} ."
        start = f"{prompt} {answer}\n\nCritique request: {ask_critique}\n\nCritique:"
        rows.append({"prompt": start, "completion": f" {critique}"})
        start += f" {critique}\n\nRevision request: {ask_revision}\n\nRevision:"
        rows.append({"prompt": start, "completion": f" {revise(answer, rng)}"})
    return rows


def revise(answer: str, rng: random.Random) -> str:
    """`answer` with a polite address in the place of an insult, as the reviser's writers do it, faults included."""
    polite = [rng.choice(POLITE) if word in INSULTS else word for word in answer.split()]
    words = answer.split() if rng.random() < OVERLOOKED else polite
    if parse_answer(answer) is not None and rng.random() < SPOILED:
        words = [
            rng.choice([v for v in VALUES[ATTRIBUTE_OF[word]] if v != word]) if word in ATTRIBUTE_OF else word
            for word in words
        ]
    return " ".join(words)


def extra_words(documents: Sequence[Document]) -> list[str]:
    """Every word of the documents, for [`~toyworld.tiny.build_tokenizer`]."""
    return sorted({word for row in documents for text in row.values() for word in text.split()})
