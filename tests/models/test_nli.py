"""A classifier of entailment as a function of pairs: labels by name, in any order of its config.

The classifier is random, with pairs chosen so that it says each of the three labels, and another one the other way
round. Red when, each tried once: labels are read by a fixed order in place of the config's; premise and hypothesis
change places in `load_nli`; `_both_directions` asks one direction twice; NLI_VALUES or the sum has the other sign.
"""

import itertools

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from rlhf_ext.metrics.diversity import Diversity
from rlhf_ext.models.nli import load_nli
from tests.tiny import WORDS, tiny_tokenizer


NAMES = ("CONTRADICTION", "neutral", "Entailment")
VALUES = {"CONTRADICTION": 1.0, "neutral": 0.0, "Entailment": -1.0}
PAIRS = list(itertools.pairwise(WORDS))


def saved(folder, names=NAMES, positions=32):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=positions,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # or the order of the two texts would hardly be seen
            if parameter.dim() == 2:
                parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def plain(model, tokenizer, premise, hypothesis):
    """The place of the likeliest label and its probability, from a forward without padding."""
    with torch.no_grad():
        probabilities = model(**tokenizer(premise, hypothesis, return_tensors="pt")).logits[0].softmax(0)
    return int(probabilities.argmax()), probabilities.max().item()


@pytest.mark.parametrize("names", itertools.permutations(NAMES))
def test_labels_and_probabilities_are_those_of_a_plain_forward(tmp_path, names):
    model, tokenizer = saved(tmp_path, names)
    nli = load_nli(str(tmp_path), batch_size=2)
    forth = [plain(model, tokenizer, a, b) for a, b in PAIRS]
    back = [plain(model, tokenizer, b, a) for a, b in PAIRS]
    assert {place for place, _ in forth} == {0, 1, 2}
    assert any(one[0] != other[0] for one, other in zip(forth, back, strict=True))
    for (label, p), (place, expected) in zip(nli(PAIRS), forth, strict=True):
        assert label == names[place].lower() and p == pytest.approx(expected, abs=1e-5)
    # Diversity: each pair in both directions, + for a contradiction
    found = Diversity().compute(predictions=[list(pair) for pair in PAIRS], nli=nli)
    values = [sum(VALUES[names[place]] * p for place, p in both) for both in zip(forth, back, strict=True)]
    one_way = [2 * VALUES[names[place]] * p for place, p in forth]
    assert found["per_input_nli"] == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert abs(sum(values)) > 0.1 and abs(sum(values) - sum(one_way)) > 0.1  # a wrong sign or direction would be seen


def test_long_pairs_are_cut_to_what_the_model_reads(tmp_path):
    model, tokenizer = saved(tmp_path)
    ((label, p),) = load_nli(str(tmp_path))([("w1 " * 50, "w2 " * 50)])
    place, expected = plain(model, tokenizer, "w1 " * 16, "w2 " * 16)
    assert label == NAMES[place].lower() and p == pytest.approx(expected, abs=1e-5)


def test_other_labels_are_refused(tmp_path):
    saved(tmp_path, names=("LABEL_0", "LABEL_1", "LABEL_2"))
    with pytest.raises(ValueError, match="label_0.*id2label"):
        load_nli(str(tmp_path))
