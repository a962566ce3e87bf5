"""Rules that do not understand the prompt, kept to show that the gold reward cannot be gamed by them.

A rule is a function of the prompt alone and writes one completion. `close_gap` says how much of the way from the SFT
model's gold to the best possible it closes; the world is sound while no rule passes 0.2.
"""

import random
from collections.abc import Callable, Sequence

from .gold import GOLD_MAX, gold_reward
from .grammar import Answer, parse_prompt, perfect_answers, render_answer
from .words import ATTRIBUTE_OF, COMMON_PRODUCTS, INSULTS, OPENERS, VALUES


Rule = Callable[[str], str]


def gaming_rules() -> dict[str, Rule]:
    """Named rules: constants, copies of the prompt, and lengths about something the prompt mentions."""
    rules: dict[str, Rule] = {
        "empty": lambda prompt: "",
        "constant_opener": lambda prompt: "good day , friend .",
        "constant_insult": lambda prompt: INSULTS[0],
        "copy_prompt": lambda prompt: prompt,
        "copy_question": lambda prompt: prompt.split(" . ")[-1],
        "copy_first_fact": lambda prompt: prompt.split(" . ")[0] + " .",
        "copy_last_fact": lambda prompt: prompt.split(" . ")[-2] + " .",
        "copy_first_fact_politely": lambda prompt: "friend , " + prompt.split(" . ")[0] + " .",
        "shortest_answer": lambda prompt: _about_something(prompt, "has", ""),
        "longest_answer": lambda prompt: _about_something(prompt, "of", OPENERS[-1]),
    }
    for name, fact in (("first", 0), ("last", -1)):
        for place in range(3):
            rules[f"claim_{name}_fact_value_{place}"] = _copy_claim(fact, place)
    for place in range(3):
        rules[f"claim_asked_product_value_{place}"] = _copy_asked_product(place)
    for value in ATTRIBUTE_OF:
        for product in COMMON_PRODUCTS:
            rules[f"constant_{product}_{value}"] = _constant(Answer(product, value))
    rules["asked_product_constant_value"] = _constant_value
    return rules


def close_gap(gold: float, sft_gold: float) -> float:
    """(gold - SFT) / (best possible - SFT): 0 is the SFT model, 1 the best, below 0 is worse than SFT."""
    return (gold - sft_gold) / (GOLD_MAX - sft_gold)


def rule_golds(prompts: Sequence[str]) -> dict[str, float]:
    """The mean gold of every rule over `prompts`, highest first."""
    golds = {
        name: sum(gold_reward(list(prompts), [rule(p) for p in prompts])) / len(prompts)
        for name, rule in gaming_rules().items()
    }
    return dict(sorted(golds.items(), key=lambda item: -item[1]))


def best_answer(prompt: str) -> str:
    """One answer of the highest gold: the upper end of the gap."""
    return render_answer(perfect_answers(parse_prompt(prompt))[0])


def _constant(answer: Answer) -> Rule:
    text = render_answer(answer)
    return lambda prompt: text


def _copy_claim(fact: int, place: int) -> Rule:
    def rule(prompt: str) -> str:
        copied = parse_prompt(prompt).facts[fact]
        return render_answer(Answer(copied.product, copied.values[place]))

    return rule


def _copy_asked_product(place: int) -> Rule:
    # Half way to understanding: it reads who is asked about, then copies by position.
    def rule(prompt: str) -> str:
        scene = parse_prompt(prompt)
        copied = next(fact for fact in scene.facts if fact.product == scene.product)
        return render_answer(Answer(copied.product, copied.values[place]))

    return rule


def _constant_value(prompt: str) -> str:
    # Reads the whole question and no fact.
    scene = parse_prompt(prompt)
    return render_answer(Answer(scene.product, VALUES[scene.attribute][0]))


def _about_something(prompt: str, form: str, opener: str) -> str:
    fact = random.Random(prompt).choice(parse_prompt(prompt).facts)
    value = random.Random(prompt + "value").choice(fact.values)
    return render_answer(Answer(fact.product, value, form, opener=opener))
