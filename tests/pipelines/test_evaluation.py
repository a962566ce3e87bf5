"""Evaluations against numbers worked by hand: a reward model on labels, a policy on prompts, and their report."""

import json

import pytest
import torch
from datasets import Dataset

from rlhf_ext.data.evaluation_arguments import EvaluationArguments
from rlhf_ext.models.scoring import ModelReward, load_reward_model, token_scores
from rlhf_ext.pipelines.evaluation import run_evaluation
from rlhf_ext.pipelines.evaluation_report import write_evaluation
from rlhf_ext.pipelines.reward_benchmark import (
    evaluate_reward_model,
    labelled_pairs,
    three_h_of,
    with_own_parts,
)
from tests.tiny import WORDS, tiny_causal_lm, tiny_reward_model, tiny_tokenizer


ROWS = [
    {"prompt": "w1 ", "completions": ["good", "bad w2", "w4"], "target": [0.0, 1.0, 0.0], "ranking": None},
    {"prompt": "w2 w3 ", "completions": ["bad", "good w7 w8"], "target": [0.5, 0.5], "ranking": None},
    {"prompt": "w4 ", "completions": ["w5 w6 w7", "w9"], "target": None, "ranking": None, "incomparable": True},
    {"prompt": "w9 ", "completions": ["w1", "w2 w2", "w3 w3 w3"], "target": None, "ranking": [2, 0, 1]},
    {"prompt": "w5 ", "completions": ["fine", "w6"], "target": [0.75, 0.25], "ranking": None},
]
SOURCES = ["PandaLM", "hh-rlhf harmless", "x", "LLMBar Natural", "qa_feedback"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("world"), tiny_tokenizer()
    tokenizer.chat_template = None
    models = {
        "policy": tiny_causal_lm("llama", tokenizer),
        "sft": tiny_causal_lm("llama", tokenizer, seed=1),
        "reward": tiny_reward_model("llama", tokenizer),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = tiny_tokenizer(words=(*WORDS, "(A)", "(B)"))
    words.chat_template = None
    tiny_causal_lm("llama", words, max_position_embeddings=512).save_pretrained(folder / "judge")
    words.save_pretrained(folder / "judge")
    prompts = [{"prompt": f"w{i} w{i + 1}"} for i in range(6)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return folder


def arguments(world, folder, **kwargs):
    given = {"dataset_name": str(world / "prompts.jsonl"), "dataset_test_split": "train", "output_dir": str(folder)}
    return EvaluationArguments(**{**given, "max_new_tokens": 6, "num_samples": 2, **kwargs})


def test_what_a_label_says_of_pairs():
    assert labelled_pairs({"ranking": None, "target": [0.0, 1.0]}) == [(0, 1, 0.0)]
    assert labelled_pairs({"ranking": None, "target": [0.0, 1.0, 0.0]}) == [(0, 1, 0.0), (1, 2, 1.0)]
    assert labelled_pairs({"ranking": [2, 0, 1], "target": None}) == [(2, 0, 1.0), (2, 1, 1.0), (0, 1, 1.0)]
    assert labelled_pairs({"ranking": None, "target": [0.5, 0.25, 0.25]}) == [
        (0, 1, pytest.approx(2 / 3)),
        (0, 2, pytest.approx(2 / 3)),
        (1, 2, 0.5),
    ]


def test_sources_belong_to_an_h():
    assert three_h_of("anthropics/hh-rlhf harmless-base test") == "harmless"
    assert three_h_of("allenai/FineGrainedRLHF qa_feedback dev") == "honest"
    assert three_h_of("LAION-AI/Open-Assistant en_100_tree") == "helpful"
    assert three_h_of("princeton-nlp/LLMBar Natural") == "traps"
    assert three_h_of("somewhere else") is None
    own = with_own_parts(["honest=PandaLM", "helpful=mine"])
    assert three_h_of("WeOpenML/PandaLM", own) == "honest" and three_h_of("a mine b", own) == "helpful"
    with pytest.raises(ValueError, match="three_h.*'kind=x'"):
        with_own_parts(["kind=x"])


def test_a_reward_model_on_labels_is_counted_by_hand(world):
    tokenizer = tiny_tokenizer()
    model = load_reward_model(world / "reward")
    dataset = Dataset.from_list(
        [{"incomparable": False, **row, "source": source} for row, source in zip(ROWS, SOURCES, strict=True)]
    )
    found = evaluate_reward_model(ModelReward(model, tokenizer, tokenizer), tokenizer, dataset, progress=False)

    def score(row, k):
        ids = torch.tensor([tokenizer(row["prompt"] + row["completions"][k])["input_ids"] + [tokenizer.eos_token_id]])
        return token_scores(model, ids, torch.ones_like(ids))[0, -1].item()

    def right(row, better, worse):
        return float(score(row, better) > score(row, worse))

    credits = {
        "PandaLM": [right(ROWS[0], 1, 0), right(ROWS[0], 1, 2)],
        "hh-rlhf harmless": [0.5],
        "LLMBar Natural": [right(ROWS[3], 2, 0), right(ROWS[3], 2, 1), right(ROWS[3], 0, 1)],
        "qa_feedback": [right(ROWS[4], 0, 1)],
    }
    assert found["pairs"] == 7 and found["all"]["accuracy"] == pytest.approx(sum(map(sum, credits.values())) / 7)
    for name, values in credits.items():
        assert found["sources"][name]["accuracy"] == pytest.approx(sum(values) / len(values)), name
    assert found["three_h"].keys() == {"helpful", "honest", "harmless", "traps"}
    assert found["three_h"]["traps"] == found["sources"]["LLMBar Natural"]
    # The longer answer: 2 tokens against 1, and 3 against 2 against 1 (the end of sequence beside)
    assert found["sources"]["PandaLM"]["longer"] == 1.0
    assert found["sources"]["LLMBar Natural"]["longer"] == pytest.approx(2 / 3)
    assert "1 incomparable" in found["rows"]
    with pytest.raises(ValueError, match="source_column.*'origin'"):
        evaluate_reward_model(
            ModelReward(model, tokenizer, tokenizer), tokenizer, dataset, source_column="origin", progress=False
        )


def test_a_policy_against_itself_and_against_another(world, tmp_path):
    def brevity(completions, **kwargs):
        return [-float(len(text.split())) for text in completions]

    same = arguments(
        world,
        tmp_path / "same",
        policy_model_path=str(world / "policy"),
        baseline_model_path=str(world / "policy"),
        reference_model_path=str(world / "policy"),
        reward_funcs=["own:brevity"],
        reward_model_path=[str(world / "reward")],
        judge_model_path=str(world / "judge"),
    )
    found = run_evaluation(same, {"own:brevity": brevity})
    assert found["distance"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert found["scores"] == found["baseline_scores"]
    for name in ("own:brevity", "reward", "judge"):
        assert found["win_rate"][name]["win_rate"] == pytest.approx(0.5), name
    assert found["win_rate"]["judge"]["disagreement"] == 1.0  # of equal answers the place decides
    words = found["answers"]
    assert words["length_mean"] <= 6 and 0 <= words["eos_rate"] <= 1 and "per_input_ead" in words

    other = arguments(
        world,
        tmp_path / "other",
        policy_model_path=str(world / "policy"),
        reference_model_path=str(world / "sft"),
        baseline_model_path=str(world / "sft"),
        reward_model_path=[str(world / "reward")],
    )
    found = run_evaluation(other)
    assert found["distance"]["kl"] > 0.5 and found["distance"]["reference_perplexity"] > 1
    assert found["scores"] != found["baseline_scores"]
    for name in ("evaluation.json", "evaluation.md", "report.html"):
        assert (tmp_path / "other" / name).stat().st_size > 500
    assert "KL to the reference" in (tmp_path / "other" / "evaluation.md").read_text()
    again = run_evaluation(
        arguments(
            world,
            tmp_path / "again",
            **{
                key: getattr(other, key)
                for key in ("policy_model_path", "reference_model_path", "baseline_model_path")
            }
            | {"reward_model_path": other.reward_model_path},
        )
    )
    assert again["scores"] == found["scores"] and again["distance"] == found["distance"]


def test_hostile_texts_stay_texts(tmp_path):
    found = {
        "kind": "policy",
        "model": "<b>m</b>",
        "dataset": "d",
        "seed": 0,
        "seconds": 1.0,
        "prompts": 1,
        "sampling": {},
        "scores": {"r": {"mean": 0.0, "low": 0.0, "high": 0.0}},
        "answers": {"length_mean": 1.0},
    }
    bad = "<script>alert(1)</script><img src=x onerror=alert(2)>|\n"
    write_evaluation(tmp_path, found, [{"prompt": bad, "answer": bad, "baseline": bad, "scores": {"r": 1.0}}])
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and "<b>m" not in page
    assert "default-src 'none'" in page and "http://" not in page and "https://" not in page


@pytest.mark.parametrize(
    "flags, words",
    [
        ({}, "Nothing to evaluate"),
        ({"reward_model_path": ["a", "b"]}, "on preferences give one"),
        ({"reward_model_path": ["a"], "encoder": "e"}, "encoder.*policy_model_path"),
        ({"policy_model_path": "p", "judge_model_path": "j"}, "baseline_model_path"),
        ({"policy_model_path": "p", "three_h": ["helpful=x"]}, "three_h"),
        ({"policy_model_path": "p", "constitution": "c"}, "constitution.*judge_model_path"),
        ({"reward_model_path": ["a"], "num_samples": 0}, "num_samples.*0"),
        ({"reward_model_path": ["a"], "output_dir": ""}, "output_dir"),
    ],
)
def test_flags_that_do_not_fit_are_refused(world, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        arguments(world, tmp_path, **flags)


def test_a_missing_model_is_named_before_any_work(world, tmp_path):
    with pytest.raises(ValueError, match="policy_model_path.*nowhere"):
        run_evaluation(arguments(world, tmp_path, policy_model_path=str(world / "nowhere")))
