"""A classifier of entailment as a function of pairs: labels by name, in any order of its config."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from rlhf_ext.metrics.diversity import Diversity
from rlhf_ext.models.nli import load_nli
from tests.tiny import tiny_tokenizer


LABELS = {0: "CONTRADICTION", 1: "neutral", 2: "Entailment"}


def saved(folder, labels=LABELS, positions=32):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=positions,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_labels_and_probabilities_are_those_of_a_plain_forward(tmp_path):
    model, tokenizer = saved(tmp_path)
    pairs = [("good", "bad"), ("w1 w2 w3", "w1"), ("cat", "cat sat on the mat")]
    for (premise, hypothesis), (label, p) in zip(pairs, load_nli(str(tmp_path), batch_size=2)(pairs), strict=True):
        probabilities = model(**tokenizer(premise, hypothesis, return_tensors="pt")).logits[0].softmax(0)
        assert label == LABELS[int(probabilities.argmax())].lower() and p == pytest.approx(probabilities.max().item())
    found = Diversity().compute(predictions=[["good", "bad"], ["cat", "mat"]], nli=load_nli(str(tmp_path)))
    assert -2 <= found["per_input_nli"] <= 2


def test_long_pairs_are_cut_to_what_the_model_reads(tmp_path):
    saved(tmp_path)
    assert len(load_nli(str(tmp_path))([("w1 " * 50, "w2 " * 50)])) == 1


def test_other_labels_are_refused(tmp_path):
    saved(tmp_path, labels={0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})
    with pytest.raises(ValueError, match="label_0.*id2label"):
        load_nli(str(tmp_path))
