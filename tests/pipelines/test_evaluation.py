"""Evaluation against numbers worked out by a plain forward, and reports that load nothing."""

import json
import math
import re

import pytest
import torch
from datasets import Dataset

from rlhf_ext.functional.diversity import expectation_adjusted_distinct
from rlhf_ext.metrics.reference_perplexity import ReferencePerplexity
from rlhf_ext.models.build import shortest_context
from rlhf_ext.models.reward_checkpoints import save_reward_config
from rlhf_ext.models.scoring import ModelReward, load_reward_model, save_normalization
from rlhf_ext.pipelines.evaluation import evaluate_reward_model
from rlhf_ext.pipelines.evaluation_policy import (
    PolicySettings,
    Reference,
    Scorer,
    build_judge,
    check_sampling,
    evaluate_policy,
    wins_by_judge,
    wins_by_score,
)
from rlhf_ext.pipelines.evaluation_report import write_policy_report, write_reward_report
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer


INSULTS = ["bad", "w1", "w2", "w3"]
EVIL = "<script>fetch('//evil')</script><img src=//evil/x>"
ROWS = [
    {"prompt": "the cat", "completions": ["sat", "sat on mat"], "target": [1.0, 0.0], "source": "PandaLM"},
    {"prompt": "the cat", "completions": ["good good", "bad"], "target": [0.0, 1.0], "source": "PandaLM"},
    {"prompt": "w1 w2", "completions": ["fine", "w3 w4"], "target": [0.5, 0.5], "source": "LLMBar x"},
    {"prompt": "w5", "completions": ["w6 w7 w8", "w9"], "target": [0.8, 0.2], "source": EVIL},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def reward(tokenizer):
    return tiny_reward_model("llama", tokenizer)


def plain_score(model, tokenizer, text):
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


def test_a_reward_model_on_rows(reward, tokenizer, tmp_path):
    gaps = [
        plain_score(reward, tokenizer, f"{row['prompt']} {row['completions'][0]}")
        - plain_score(reward, tokenizer, f"{row['prompt']} {row['completions'][1]}")
        for row in ROWS
    ]
    # Word tokens: prompt + completion without the blank between them would be another word
    rows = [{**row, "completions": [f" {text}" for text in row["completions"]]} for row in ROWS]
    result = evaluate_reward_model(ModelReward(reward, tokenizer, tokenizer, name="rm"), Dataset.from_list(rows))
    signs = [1, -1, 0, 1]
    credits = [0.5 + 0.5 * sign * math.copysign(1, gap) for sign, gap in zip(signs, gaps, strict=True)]
    assert result["overall"]["accuracy"] == pytest.approx(sum(credits) / 4)
    assert result["overall"]["decisive_accuracy"] == pytest.approx((credits[0] + credits[1] + credits[3]) / 3)
    # Longer: wrong, wrong, -, right
    assert result["overall"]["longer_accuracy"] == pytest.approx(1 / 3)
    assert result["overall"]["prompts"] == 3 and result["overall"]["ties"] == 1
    assert result["sources"]["PandaLM"]["accuracy"] == pytest.approx((credits[0] + credits[1]) / 2)
    assert result["three_h"]["helpful"]["pairs"] == 2 and result["three_h"]["trap"]["pairs"] == 1
    assert result["three_h"]["trap"]["decisive_accuracy"] is None
    assert result["unmapped"] == [EVIL]
    p = [1 / (1 + math.exp(-gap)) for gap in gaps]
    bins = {}
    for prob, target in zip([*p, *(1 - x for x in p)], [1, 0, 0.5, 0.8, 0, 1, 0.5, 0.2], strict=True):
        bins.setdefault(int(prob * 10), []).append((prob, target))
    ece = sum(abs(sum(a for a, _ in b) - sum(t for _, t in b)) for b in bins.values()) / 8
    assert result["calibration"]["ece"] == pytest.approx(ece, abs=1e-5)

    markdown = write_reward_report(str(tmp_path), [result], {"dataset_name": "rows"})
    assert f"{sum(credits) / 4:.3f} [" in markdown and "| helpful | 2 |" in markdown
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved["reward_models"][0]["overall"]["pairs"] == 4
    assert (tmp_path / "evaluation.md").read_text() == markdown
    check_page((tmp_path / "report.html").read_text())


def check_page(page):
    assert "<script" not in page and not re.search("https?:", page) and "<img src=//" not in page
    assert "default-src 'none'" in page
    assert page.count("data:image/png;base64,") == page.count("<img ") >= 2


def test_rankings_and_best_of_k_are_pairs(reward, tokenizer):
    rows = [
        {"prompt": "w1", "completions": [" w2", " w3", " w4"], "target": None, "ranking": [2, 0, 1]},
        {"prompt": "w1", "completions": [" w2", " w3", " w4"], "target": [0.0, 1.0, 0.0], "ranking": None},
    ]
    result = evaluate_reward_model(ModelReward(reward, tokenizer, tokenizer), Dataset.from_list(rows))
    s = [plain_score(reward, tokenizer, f"w1 {word}") for word in ("w2", "w3", "w4")]
    wanted = [s[0] > s[1], s[2] > s[0], s[2] > s[1], s[1] > s[0], s[1] > s[2]]
    assert result["overall"]["accuracy"] == pytest.approx(sum(wanted) / 5)
    assert result["overall"]["pairs"] == 5 and result["overall"]["prompts"] == 1


def test_long_rows_are_counted(reward, tokenizer):
    rows = [dict(ROWS[0], source="a"), {**ROWS[3], "completions": [" w1" * 40, " w2"], "source": "a"}]
    result = evaluate_reward_model(ModelReward(reward, tokenizer, tokenizer), Dataset.from_list(rows), max_length=20)
    assert result["rows"]["overlong"] == 1 and result["rows"]["judged"] == 1
    with pytest.raises(ValueError, match="max_length"):
        evaluate_reward_model(ModelReward(reward, tokenizer, tokenizer), Dataset.from_list(rows), max_length=2)


def models(tokenizer, *seeds):
    return [tiny_causal_lm("llama", tokenizer, seed=seed) for seed in seeds]


def test_a_policy_on_prompts(reward, tokenizer, tmp_path):
    policy, base, judge = models(tokenizer, 1, 2, 3)
    prompts = ["the cat", "w1 w2 w3", "w5"]
    seen = {}

    def length(completions, completion_ids, prompt_ids, topic, **kwargs):
        seen.update(topic=topic, starts=prompt_ids)
        return [-float(len(ids)) for ids in completion_ids]

    scorers = [Scorer("rm", reward, tokenizer), Scorer("short", function=length)]
    settings = PolicySettings(num_samples=2, max_completion_length=8, insult_words=INSULTS, batch_size=4)
    reference = Reference(base, tokenizer)
    columns = {"topic": ["a", "b", "c"]}
    check_sampling(tokenizer, Dataset.from_dict({"prompt": prompts}), 8, shortest_context(policy))
    found = [
        evaluate_policy(name, model, tokenizer, prompts, scorers, settings, reference=reference, columns=columns)
        for name, model in (("policy", policy), ("base", base))
    ]
    ours, theirs = found
    assert seen["topic"] == ["a", "a", "b", "b", "c", "c"] and len(seen["starts"]) == 6

    # Against plain forwards, one answer at a time
    log_ratio, nll, tokens, scores = [], 0.0, 0, []
    for start, ids in zip(ours.samples.prompt_ids, ours.samples.completion_ids, strict=True):
        row = torch.tensor([start + ids])
        logps = [
            m(input_ids=row)
            .logits[0, len(start) - 1 : -1]
            .log_softmax(-1)
            .gather(-1, row[0, len(start) :, None])
            .sum()
            for m in (policy, base)
        ]
        log_ratio.append((logps[0] - logps[1]).item())
        nll, tokens = nll - logps[1].item(), tokens + len(ids)
        scores.append(reward(input_ids=row).logits[0, 0].item())
    assert ours.metrics["kl"] == pytest.approx(sum(log_ratio) / 6, abs=1e-4) and abs(ours.metrics["kl"]) > 0.01
    assert theirs.metrics["kl"] == pytest.approx(0.0, abs=1e-5)
    assert ours.metrics["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert ours.metrics["score/rm"] == pytest.approx(sum(scores) / 6, abs=1e-5)
    assert ours.metrics["length_mean"] == pytest.approx(tokens / 6) == -ours.metrics["score/short"]
    assert ours.metrics["eos_rate"] == sum(not cut for cut in ours.samples.truncated) / 6
    by_prompt = [ours.samples.texts[i : i + 2] for i in (0, 2, 4)]
    for key, sets in (("per_input", by_prompt), ("across_input", [[texts[0] for texts in by_prompt]])):
        words = [" ".join(texts).split() for texts in sets]
        shares = [len(set(some)) / max(len(some), 1) for some in words]  # without a word: 0
        assert ours.metrics[f"{key}_distinct_1"] == pytest.approx(sum(shares) / len(shares))
        eads = [expectation_adjusted_distinct(s) for s in sets]
        assert ours.metrics[f"{key}_ead"] == pytest.approx(sum(eads) / len(eads))
    insults = sum(any(word in text.split() for word in INSULTS) for text in ours.samples.texts)
    assert ours.metrics["insult_rate"] == insults / 6 and 0 < insults < 6
    assert any(ours.samples.truncated) and not all(ours.samples.truncated)

    wins = {"policy": wins_by_score(ours, theirs)}
    for name in ("rm", "short"):
        both = zip(ours.scores[name], theirs.scores[name], strict=True)
        credits = [1 if a > b else 0.5 if a == b else 0 for a, b in both]
        assert wins["policy"][name]["win_rate"] == pytest.approx(sum(credits) / 6)
    assert wins["policy"]["rm"]["win_rate"] != 0.5  # or the sign would go unseen
    assert wins["policy"]["short"]["prompts"] == 3
    how = {"question": "w1?", "template": "{prompt} {first} w2 {second} w3", "labels": ("good", "bad")}
    asked = build_judge(judge, tokenizer, **how)
    judged, back = wins_by_judge(asked, ours, theirs), wins_by_judge(asked, theirs, ours)
    by_hand, p_a = 0.0, {1: [], -1: []}
    for i in (0, 2, 4):
        for first, second, sign in ((ours, theirs, 1), (theirs, ours, -1)):
            text = f"{prompts[i // 2]} {first.samples.texts[i]} w2 {second.samples.texts[i]} w3"
            logits = judge(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
            p = logits[tokenizer.convert_tokens_to_ids(["good", "bad"])].softmax(0)[0].item()
            by_hand += (p if sign == 1 else 1 - p) / 6
            p_a[sign].append(p)
    assert judged["win_rate"] == pytest.approx(by_hand, abs=1e-5)
    assert judged["win_rate"] + back["win_rate"] == pytest.approx(1.0, abs=1e-6)
    assert judged["prompts"] == 3
    bias = sum(p_a[1] + p_a[-1]) / 6 - 0.5
    assert judged["position_bias"] == pytest.approx(bias, abs=1e-5) and abs(bias) > 0.01
    turned = [(one > 0.5) == (other > 0.5) for one, other in zip(p_a[1], p_a[-1], strict=True)]
    assert judged["disagreement"] == sum(turned) / 3
    # Two equal answers are a tie.
    decided = [0.5 if one == other else float(one > other) for one, other in zip(p_a[1], p_a[-1], strict=True)]
    assert judged["decided"] == pytest.approx(sum(decided) / 3)
    wins["policy"]["judge"] = judged

    ours.samples.texts[0] = EVIL
    markdown = write_policy_report(str(tmp_path), [ours], theirs, wins, {"seed": 42})
    assert "| policy | judge |" in markdown and "| kl |" in markdown
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved["wins"]["policy"]["short"]["prompts"] == 3 and "base" in saved["frontier"]["rm"]
    check_page((tmp_path / "report.html").read_text())
    assert "&lt;script&gt;" in (tmp_path / "report.html").read_text()


def test_the_same_seed_gives_the_same_answers_and_greedy_has_no_kl(tokenizer):
    (policy,) = models(tokenizer, 1)
    settings = PolicySettings(num_samples=1, max_completion_length=6, temperature=0.7)
    settings.encoder, settings.nli = (
        (lambda texts: torch.eye(len(texts))),
        (lambda pairs: [("neutral", 1.0)] * len(pairs)),
    )
    reference = Reference(policy, tokenizer)

    def call(settings):
        return evaluate_policy("p", policy, tokenizer, ["w1", "w2"], [], settings, reference=reference)

    first, second = call(settings), call(settings)
    assert first.samples.texts == second.samples.texts
    assert first.metrics["kl"] == pytest.approx(0.0, abs=1e-5)
    assert "across_input_ead" in first.metrics and "per_input_ead" not in first.metrics
    assert first.metrics["across_input_embedding"] == pytest.approx(1.0) and first.metrics["across_input_nli"] == 0.0
    # At temperature 1, whatever the sampling's: the number of the metric module
    given = {"predictions": first.samples.completion_ids, "references": first.samples.prompt_ids, "model": policy}
    assert first.metrics["perplexity"] == pytest.approx(ReferencePerplexity().compute(**given)["perplexity"])
    greedy = call(PolicySettings(num_samples=1, max_completion_length=6, temperature=0.0))
    assert "kl" not in greedy.metrics and greedy.metrics["perplexity"] > 1


def test_messages_reach_the_policy_through_its_template(reward, tokenizer):
    (policy,) = models(tokenizer, 1)
    prompts = [[{"role": "user", "content": "the cat"}], [{"role": "user", "content": "w1 w2 w3"}]]
    seen = {}

    def spy(prompts, completions, **kwargs):
        seen.update(prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    scorers = [Scorer("rm", reward, tokenizer), Scorer("spy", function=spy)]
    settings = PolicySettings(num_samples=1, max_completion_length=4)
    found = evaluate_policy("p", policy, tokenizer, prompts, scorers, settings)
    template = tokenizer.apply_chat_template(prompts[0], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert found.samples.prompt_ids[0] == template["input_ids"]
    assert seen["completions"][0] == [{"role": "assistant", "content": found.samples.texts[0]}]
    assert seen["prompts"] == prompts
    scores = []
    for start, ids in zip(found.samples.prompt_ids, found.samples.completion_ids, strict=True):
        scores.append(reward(input_ids=torch.tensor([start + ids])).logits[0, 0].item())
    assert found.metrics["score/rm"] == pytest.approx(sum(scores) / 2, abs=1e-5)


def test_what_cannot_be_measured_is_refused(tokenizer):
    (policy,) = models(tokenizer, 1)
    other = tiny_tokenizer(words=["w1", "w2"])
    settings = PolicySettings(num_samples=1, max_completion_length=4)
    with pytest.raises(ValueError, match="vocabularies"):
        evaluate_policy("p", policy, tokenizer, ["w1"], [], settings, reference=Reference(policy, other))
    with pytest.raises(ValueError, match="'none'.*row 0"):
        scorer = Scorer("none", function=lambda prompts, **kwargs: [None] * len(prompts))
        evaluate_policy("p", policy, tokenizer, ["w1"], [scorer], settings)
    with pytest.raises(ValueError, match="context"):
        check_sampling(tokenizer, Dataset.from_dict({"prompt": ["w1 " * 127]}), 8, shortest_context(policy))


def test_calibration_is_in_the_unit_of_training(tmp_path):
    """Gain and bias that are set afterwards change scores, and not what a difference of them was trained to mean."""
    tokenizer = tiny_tokenizer()
    model = tiny_reward_model("llama", tokenizer)
    model.save_pretrained(tmp_path)
    rows = Dataset.from_list(
        [{"prompt": f"w{i} ", "chosen": f"good w{i + 1}", "rejected": f"bad w{i + 2} w3"} for i in range(12)]
    )

    def ece(gain=None, **training):
        save_reward_config(tmp_path, "last", torch.float32, **training)
        if gain is not None:
            save_normalization(tmp_path, gain, 0.7)
        loaded = load_reward_model(tmp_path)
        found = evaluate_reward_model(ModelReward(loaded, tokenizer, tokenizer), rows)
        return found["calibration"]["ece"]

    assert ece(0.2) == pytest.approx(ece(), abs=1e-6) == ece(5.0)
    # Trained under a gain of 3: the same raw scores are three times the log-odds
    three = {"normalization": (3.0, 0.0), "training": (3.0, 0.0)}
    assert ece(0.2, **three) == pytest.approx(ece(**three), abs=1e-6) != pytest.approx(ece(), abs=1e-3)
    assert ece(training=(1.0, 0.5)) != pytest.approx(ece(), abs=1e-3)  # the noise that the loss allowed for
