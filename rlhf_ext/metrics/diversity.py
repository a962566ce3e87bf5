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


_DESCRIPTION = """\
Per input: mean over prompts of the diversity of a prompt's samples. Across inputs: diversity of the first samples
of all prompts. Measured by EAD (expectation-adjusted distinct n-grams, mean over n = 1..5) and distinct-1 and -2;
with an encoder also by 1 - mean cosine of sentence embeddings, with an NLI model by mean(contradiction -
entailment) over both directions, from -2 to 2. Higher is more diverse throughout. Compare policies at one
temperature and one number of samples only."""

_CITATION = """\
@inproceedings{kirk2024understanding,
  title={Understanding the Effects of RLHF on LLM Generalisation and Diversity},
  author={Kirk, Robert and others},
  booktitle={International Conference on Learning Representations},
  year={2024}
}"""

_INPUTS = """
Args:
    predictions (`list` of `list` of `str`): samples of each prompt, two or more.
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
            encode = _load_encoder(encoder) if isinstance(encoder, str) else encoder
            measures["embedding"] = lambda texts: embedding_diversity(torch.as_tensor(encode(list(texts))))
        if nli is not None:
            measures["nli"] = lambda texts: nli_diversity(_both_directions(nli, texts))
        found = {}
        for name, measure in measures.items():
            found[f"per_input_{name}"], found[f"per_input_{name}_std"] = per_input(predictions, measure)
            found[f"across_input_{name}"] = across_inputs(predictions, measure)
        return found


def _load_encoder(name):
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"`encoder` is {name!r}, a sentence-transformers model, but that package is missing. Install "
            '"rlhf_ext[diversity]", or pass a function that gives vectors.'
        ) from error
    model = SentenceTransformer(name, trust_remote_code=False)
    return lambda texts: model.encode(texts, convert_to_tensor=True, show_progress_bar=False)


def _both_directions(nli, texts):
    pairs = [(texts[i], texts[j]) for i in range(len(texts)) for j in range(i + 1, len(texts))]
    forth, back = nli(pairs), nli([(b, a) for a, b in pairs])
    return [(*one, *other) for one, other in zip(forth, back, strict=True)]
