"""The AI judge: two orders, principles, clamping; every probability against plain logits.

Red when, each tried once: the second order is not swapped; `position_bias` or `swap_average` has the other sign; the
two labels change places; the clamp is left out; a chat's question is read by another label than the reply begins with.
"""

import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers.modeling_outputs import CausalLMOutput

from rlhf_ext.feedback import judge as judge_module
from rlhf_ext.feedback.constitution import DEFAULT_CONSTITUTION, Principle, load_constitution
from rlhf_ext.feedback.judge import BASE_TEMPLATE, AIJudge
from rlhf_ext.functional.ai_feedback import clamp_label, judge_probabilities, position_bias, swap_average
from rlhf_ext.models.generation import sample_completions
from tests.tiny import WORDS, tiny_causal_lm, tiny_config, tiny_tokenizer


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
    assert verdicts.position_bias == pytest.approx(bias, abs=1e-6) and abs(bias) > 0.01
    assert max(abs(p - 0.5) for p in verdicts.targets) > 1e-4  # a judge of nothing but positions gives one half


class Knowing(torch.nn.Module):
    """Knows that `good` is better, by `quality` nats, and likes what stands as (A), by `bias` nats."""

    def __init__(self, tokenizer, quality, bias):
        super().__init__()
        self.config, self.weight = tiny_config("llama", tokenizer), torch.nn.Parameter(torch.zeros(1))
        self.ids, self.quality, self.bias = tokenizer.convert_tokens_to_ids, quality, bias

    def forward(self, input_ids, logits_to_keep, **kwargs):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            first = ids.index(self.ids("good")) < ids.index(self.ids("(B)"))
            logits[row, :, self.ids("(A)")] = self.bias + (self.quality if first else -self.quality)
        return CausalLMOutput(logits=logits[:, -logits_to_keep:])


@pytest.mark.parametrize("quality, bias", [(1.0, 2.0), (1.0, -2.0), (2.0, 0.0), (0.0, 3.0)])
def test_a_known_judge_is_right_whatever_place_it_likes(tokenizer, quality, bias):
    """P(A) is sigmoid(bias + quality) with the better one as (A), and sigmoid(bias - quality) with the worse one."""

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    judge = AIJudge(Knowing(tokenizer, quality, bias), tokenizer, PRINCIPLES)
    better, worse = sigmoid(bias + quality), sigmoid(bias - quality)
    verdicts = judge.compare(["w1", "w2"], ["good", "bad"], ["bad", "good"])
    assert verdicts.first_as_a[:, 0].tolist() == pytest.approx([better, worse])
    assert verdicts.second_as_a[:, 0].tolist() == pytest.approx([worse, better])
    target = (better + 1 - worse) / 2
    assert verdicts.targets == pytest.approx([target, 1 - target])
    assert (target > 0.5) == (quality > 0)
    assert verdicts.position_bias == pytest.approx((better + worse) / 2 - 0.5, abs=1e-6)
    assert verdicts.position_bias * bias > 0.01 or bias == 0
    assert verdicts.swap_disagreement == (1.0 if abs(bias) > quality else 0.0)


def test_the_other_way_round_gives_the_other_label(model, tokenizer):
    judge = AIJudge(model, tokenizer, PRINCIPLES, seed=3)
    prompts, first, second = PAIRS
    forth, back = judge.compare(prompts, first, second), judge.compare(prompts, second, first)
    assert forth.principles == back.principles  # the draw does not depend on the order
    assert [a + b for a, b in zip(forth.targets, back.targets, strict=True)] == pytest.approx([1.0] * 3, abs=1e-6)
    assert max(abs(target - 0.5) for target in forth.targets) > 1e-4  # else any judge would pass
    alone = judge.compare(prompts[1:2], first[1:2], second[1:2])
    assert alone.targets == pytest.approx(forth.targets[1:2], abs=1e-6)
    drawn = {AIJudge(model, tokenizer, PRINCIPLES, seed=s).compare(*PAIRS).principles[0][0] for s in range(8)}
    assert drawn == {"kind", "true"}


def test_rows_are_soft_labels(model, tokenizer):
    judge = AIJudge(model, tokenizer, PRINCIPLES)
    rows, verdicts = judge.rows(*PAIRS), judge.compare(*PAIRS)
    assert [row["prompt"] for row in rows] == PAIRS[0]
    assert [row["completions"] for row in rows] == [list(pair) for pair in zip(*PAIRS[1:], strict=True)]
    assert [row["target"] for row in rows] == [pytest.approx([p, 1 - p]) for p in verdicts.targets]
    assert [row["principles"] for row in rows] == verdicts.principles


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
    swapped = text.replace("(A) good\n(B) bad w9", "(A) bad w9\n(B) good")
    assert swapped != text
    written = f"{swapped}\nThoughts on both:{free.thoughts[0][1]}\nChoice:"
    assert free.second_as_a[0, 0].item() == pytest.approx(plain_p_a(model, tokenizer, written), abs=1e-6)
    tight = AIJudge(model, tokenizer, PRINCIPLES, **options, clamp=(0.499, 0.501)).compare(*PAIRS)
    assert all(0.499 <= p <= 0.501 for p in tight.targets) and any(not 0.499 <= p <= 0.501 for p in free.targets)


def test_a_chat_begins_once_before_a_chain_of_thought_too(model, monkeypatch):
    chat = tiny_tokenizer(words=(*WORDS, *LETTERS))
    begin = ("<eos>", chat.eos_token_id)  # in the place of a token of its own, for which the model has no row
    chat.bos_token = begin[0]
    chat.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[begin])
    chat.chat_template = "{{ bos_token + ' ' }}" + chat.chat_template
    starts = []

    def spy(*args, **kwargs):
        samples = sample_completions(*args, **kwargs)
        starts.extend(samples.prompt_ids)
        return samples

    monkeypatch.setattr(judge_module, "sample_completions", spy)
    AIJudge(model, chat, PRINCIPLES, chain_of_thought=True, max_thought_tokens=2).compare(["w1"], ["good"], ["bad"])
    assert [ids[:2].count(begin[1]) for ids in starts] == [1, 1]


def test_a_chat_template_is_used_where_there_is_one(model, tokenizer):
    chat = tiny_tokenizer(words=(*WORDS, *LETTERS))
    judge = AIJudge(model, chat, PRINCIPLES)
    assert judge.uses_chat
    (question, *_) = [judge._ask("w1", "kind?", "good", "bad", "")]
    assert question.startswith("<|user|> Read") and question.endswith("<|assistant|> ")
    found = judge.compare(["w1"], ["good"], ["bad"])
    asked = {p.name: p.question for p in PRINCIPLES}[found.principles[0][0]]
    for p_a, places in ((found.first_as_a, ("good", "bad")), (found.second_as_a, ("bad", "good"))):
        text = judge._ask("w1", asked, *places, "")
        assert p_a.item() == pytest.approx(plain_p_a(model, chat, text), abs=1e-6)
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
    with pytest.raises(ValueError, match=r"\(3,\), expected"):
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
