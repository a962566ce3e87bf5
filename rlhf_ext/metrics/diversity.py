"""Diversity of a policy's samples, per input and across inputs."""

import datasets
import evaluate
import torch

from rlhf_ext.functional.diversity import (
    across_inputs,
    distinct_n,
    embedding_diversity,
    expectation_adjusted_distinct,
    nli_diversity,
    per_input,
)
from rlhf_ext.models.sentence_encoder import load_encoder


_DESCRIPTION = """\
Per input: mean over prompts of the diversity of a prompt's samples. Across inputs: diversity of the first samples
of all prompts. Measured by EAD (expectation-adjusted distinct n-grams, mean over n = 1..5) and distinct-1 and -2;
with an encoder also by 1 - mean cosine of sentence embeddings, with an NLI model by the mean over pairs of the sum
over both directions of the likeliest label, + for a contradiction, - for an entailment, from -2 to 2. Higher is
more diverse throughout. Compare policies at one temperature and one number of samples only."""

_CITATION = """\
@inproceedings{kirk2024understanding,
  title={Understanding the Effects of RLHF on LLM Generalisation and Diversity},
  author={Kirk, Robert and others},
  booktitle={International Conference on Learning Representations},
  year={2024}
}"""

_INPUTS = """
Args:
    predictions (`list` of `list` of `str`): samples of each prompt, two or more; with one sample of each there is
        nothing per input, with one prompt nothing across.
    encoder (`Callable` or `str`, *optional*): gives one vector per text of a list; or the folder or name of a
        sentence-transformers model (extra `diversity`).
    nli (`Callable`, *optional*): takes a list of pairs of texts (premise, hypothesis) and gives for each the label
        (entailment, neutral, contradiction) and its probability.
Returns:
    `dict`: `per_input_NAME`, `across_input_NAME` for `ead`, `distinct_1`, `distinct_2`, `embedding`, `nli`.
Examples:
    >>> metric = Diversity()
    >>> metric.compute(predictions=[["a b", "a b"], ["c d", "e f"]])["per_input_distinct_1"]
    0.75
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Diversity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("string"))}),
            reference_urls=["https://huggingface.co/papers/2310.06452"],
        )

    def _compute(self, predictions, encoder=None, nli=None):
        measures = {
            "ead": expectation_adjusted_distinct,
            "distinct_1": lambda texts: distinct_n(texts, n=1),
            "distinct_2": lambda texts: distinct_n(texts, n=2),
        }
        if encoder is not None:
            encode = load_encoder(encoder) if isinstance(encoder, str) else encoder
            measures["embedding"] = lambda texts: embedding_diversity(torch.as_tensor(encode(list(texts))))
        if nli is not None:
            measures["nli"] = lambda texts: nli_diversity(_both_directions(nli, texts))
        has_several = any(len(texts) > 1 for texts in predictions)
        if len(predictions) < 2 and not has_several:
            raise ValueError("`predictions` has 1 prompt with 1 sample: diversity takes two texts or more.")
        found = {}
        for name, measure in measures.items():
            if has_several:
                found[f"per_input_{name}"], found[f"per_input_{name}_std"] = per_input(predictions, measure)
            if len(predictions) > 1:
                found[f"across_input_{name}"] = across_inputs(predictions, measure)
        return found


def _both_directions(nli, texts):
    pairs = [(texts[i], texts[j]) for i in range(len(texts)) for j in range(i + 1, len(texts))]
    forth, back = nli(pairs), nli([(b, a) for a, b in pairs])
    return [(*one, *other) for one, other in zip(forth, back, strict=True)]
