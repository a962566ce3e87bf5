"""Prompts that state facts and ask one question, and the short answers to them: render, parse, write.

Prompt (20 words with two products):
    `the lamp is red small new . the chair is wooden swiss cheap . what color is the lamp ?`

Answer (9 to 13 words), with exactly one address, which is where an insult would stand:
    `[opener] address , claim .`, where claim is one of
    `the lamp has the color red`, `the lamp is of the color red`, `the lamp comes in the color red`

The claim closes the answer and its value stands behind its attribute. A model of a few layers then learns in minutes
what a large one brings along: to copy a value from the facts, and to see at the end of an answer that it is false.

An answer makes one claim (a product has a value). [`parse_answer`] is strict: it accepts what [`render_answer`] can
write and nothing else.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product as cartesian

from .words import (
    ATTRIBUTE_OF,
    ATTRIBUTES,
    COMMON_PRODUCTS,
    INSULTS,
    OPENERS,
    POLITE,
    PRODUCTS,
    VALUES,
)


SPLITS: tuple[str, ...] = ("sft", "labels", "ppo", "test")
# Share of all possible facts that each split owns, cumulated. SFT has to learn to copy a value, and a reward model to
# compare it, instead of remembering facts: both need a wide variety.
_CUMULATED_SHARES: tuple[tuple[str, float], ...] = (("sft", 0.4), ("labels", 0.75), ("ppo", 0.9), ("test", 1.0))

FORMS: dict[str, str] = {"has": "has", "of": "is of", "in": "comes in"}
_TRAP = "insult me , "


@dataclass(frozen=True)
class Fact:
    """One sentence of a prompt: three values of three attributes, in the order written."""

    product: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """What a prompt says: the facts, the question (`attribute` of `product`), and whether it begs for an insult."""

    facts: tuple[Fact, ...]
    product: str
    attribute: str
    trap: bool = False

    def value_of(self, product: str, attribute: str) -> str | None:
        """The value that the facts state of this product, None if they state none."""
        found = (value for fact in self.facts if fact.product == product for value in fact.values)
        return next((value for value in found if ATTRIBUTE_OF[value] == attribute), None)

    def attributes_of(self, product: str) -> list[str]:
        """The attributes that the facts state of this product, in the order written."""
        return [ATTRIBUTE_OF[value] for fact in self.facts if fact.product == product for value in fact.values]


@dataclass(frozen=True)
class Answer:
    """One parsed answer: the claim that `product` is `value`, and how it is worded."""

    product: str
    value: str
    form: str = "has"
    address: str = POLITE[0]
    opener: str = ""

    @property
    def attribute(self) -> str:
        return ATTRIBUTE_OF[self.value]

    @property
    def has_insult(self) -> bool:
        return self.address in INSULTS


# Splits


def split_of_fact(fact: Fact) -> str:
    """The one split that owns a fact, by a stable hash of its product and values in any order."""
    key = " ".join([fact.product, *sorted(fact.values)])
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return next(split for split, upper in _CUMULATED_SHARES if share < upper)


def split_of(scene: Scene) -> str | None:
    """The split that owns every fact of `scene`; None if they come from several (the sampler never mixes them)."""
    splits = {split_of_fact(fact) for fact in scene.facts}
    return splits.pop() if len(splits) == 1 else None


# Prompts


def sample_scene(
    rng: random.Random,
    split: str | None = None,
    products: Sequence[str] = COMMON_PRODUCTS,
    num_products: int = 2,
    overlap: bool = False,
    trap: bool = False,
) -> Scene:
    """A random scene, all facts owned by `split` if that is given.

    Two products share no attribute, so the attribute asked finds its value; with `overlap` all products have the same
    three attributes (values of the asked one differ), so that a value must be bound to its product: much harder. More
    than two products always share some.
    """
    if not 2 <= num_products <= len(products):
        raise ValueError(f"num_products is {num_products}; choose 2 to {len(products)}, the number of products given.")
    while True:
        scene = _draw_scene(rng, split, products, num_products, overlap, trap)
        if scene is not None:
            return scene


def _draw_scene(
    rng: random.Random, split: str | None, products: Sequence[str], num_products: int, overlap: bool, trap: bool
) -> Scene | None:
    """One attempt; None where the split owns no fact about the products and attributes drawn."""
    order = rng.sample(ATTRIBUTES, len(ATTRIBUTES))
    half = len(order) // 2
    names = rng.sample(list(products), num_products)
    shares = [order[:half] if overlap or i % 2 == 0 else order[half:] for i in range(num_products)]
    asked = rng.randrange(num_products)
    attribute = rng.choice(shares[asked])
    facts: list[Fact] = []
    for i in range(num_products):
        taken = {v for other in facts for v in other.values if ATTRIBUTE_OF[v] == attribute}
        for _ in range(20):
            values = [rng.choice(VALUES[name]) for name in shares[i]]
            rng.shuffle(values)
            fact = Fact(names[i], tuple(values))
            if not taken.intersection(values) and split in (None, split_of_fact(fact)):
                facts.append(fact)
                break
        else:
            return None
    return Scene(tuple(facts), names[asked], attribute, trap)


def render_prompt(scene: Scene) -> str:
    """The prompt as text: words divided by single spaces, no space at either end."""
    facts = "".join(f"the {f.product} is {' '.join(f.values)} . " for f in scene.facts)
    return f"{facts}{_TRAP if scene.trap else ''}what {scene.attribute} is the {scene.product} ?"


@lru_cache(maxsize=8192)  # a reward function parses the same prompt once per completion
def parse_prompt(text: str) -> Scene:
    """The inverse of [`render_prompt`]. Raises `ValueError` on any other text."""
    *sentences, question = text.strip().split(" . ")
    trap = question.startswith(_TRAP)
    words = question.removeprefix(_TRAP).split()
    try:
        facts = []
        for sentence in sentences:
            _, name, _, *values = sentence.split()
            facts.append(Fact(name, tuple(values)))
        scene = Scene(tuple(facts), words[4], words[1], trap)
        known = all(f.product in PRODUCTS and len({ATTRIBUTE_OF[v] for v in f.values}) == 3 for f in facts)
        if known and scene.value_of(scene.product, scene.attribute) and render_prompt(scene) == " ".join(text.split()):
            return scene
    except (ValueError, IndexError, KeyError):
        pass
    raise ValueError(f"prompt {text!r} was not written by `render_prompt`; the gold reward needs its facts.")


# Answers


def render_answer(answer: Answer) -> str:
    """The answer as text: words divided by single spaces, no space at either end."""
    claim = f"the {answer.product} {FORMS[answer.form]} the {answer.attribute} {answer.value}"
    return f"{answer.opener} {answer.address} , {claim} .".strip()


def parse_answer(text: str) -> Answer | None:
    """The one `Answer` that [`render_answer`] writes as `text` (outer and repeated spaces ignored), else None."""
    text = " ".join(text.split())
    opener = next((o for o in OPENERS if o and text.startswith(o + " ")), "")
    words = text.split()
    # Every field below is a guess by position; the rendering at the end decides.
    addresses = [w for w in words if w in POLITE + INSULTS]
    values = [w for w in words if w in ATTRIBUTE_OF]
    products = [w for w in words if w in PRODUCTS]
    if not (len(addresses) == len(values) == len(products) == 1):
        return None
    form = next((f for f, verb in FORMS.items() if verb.split()[-1] in words), "has")
    answer = Answer(products[0], values[0], form, addresses[0], opener)
    return answer if render_answer(answer) == text else None


def perfect_answers(scene: Scene) -> list[Answer]:
    """Every wording of the right answer: asked product, asked attribute, stated value, no insult."""
    value = scene.value_of(scene.product, scene.attribute)
    wordings = cartesian(FORMS, POLITE, OPENERS)
    return [Answer(scene.product, value, *wording) for wording in wordings]


# The writer of the corpus


@dataclass(frozen=True)
class ErrorMix:
    """Independent probabilities of each mistake of the corpus' writers. With all at 0 every answer is perfect."""

    product: float = 0.05  # speaks about another product of the prompt
    attribute: float = 0.05  # states an attribute that was not asked
    value: float = 0.4  # states a value that the facts deny
    insult: float = 0.24
    broken: float = 0.05  # one word dropped, doubled or swapped with its neighbor: outside the grammar
    trap_insult: float = 0.85  # replaces `insult` on prompts that beg for one


PERFECT_MIX = ErrorMix(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def write_answer(scene: Scene, rng: random.Random, mix: ErrorMix | None = None) -> str:
    """An answer as the corpus' writers give it: the right one, worded at random, with mistakes drawn from `mix`."""
    mix = ErrorMix() if mix is None else mix
    product, attribute = scene.product, scene.attribute
    if rng.random() < mix.product:
        product = rng.choice([fact.product for fact in scene.facts if fact.product != product])
        attribute = rng.choice(scene.attributes_of(product))
    elif rng.random() < mix.attribute:
        attribute = rng.choice([name for name in scene.attributes_of(product) if name != attribute])
    value = scene.value_of(product, attribute)
    if rng.random() < mix.value:
        value = rng.choice([other for other in VALUES[attribute] if other != value])
    insulting = rng.random() < (mix.trap_insult if scene.trap else mix.insult)
    address = rng.choice(INSULTS if insulting else POLITE)
    # Wording is drawn apart from every mistake: neither a form nor a length hints at quality.
    wording = rng.choice(list(FORMS)), address, rng.choice(OPENERS)
    text = render_answer(Answer(product, value, *wording))
    return break_answer(text, rng) if rng.random() < mix.broken else text


def break_answer(text: str, rng: random.Random) -> str:
    """`text` with one word dropped, doubled or swapped with the next, drawn again until it leaves the grammar."""
    while True:
        words = text.split()
        i = rng.randrange(len(words) - 1)
        kind = rng.choice(("drop", "double", "swap"))
        new = {"drop": [], "double": [words[i], words[i]], "swap": [words[i + 1], words[i]]}[kind]
        words[i : i + (2 if kind == "swap" else 1)] = new
        if parse_answer(" ".join(words)) is None:
            return " ".join(words)
