"""Accuracy of scores on preference pairs, by source, with intervals and with length taken out."""

import datasets
import evaluate
import torch

from rlhf_ext.functional.pairs import length_statistics, preference_accuracy


_DESCRIPTION = """\
Share of pairs whose better completion has the higher score. Equal scores count one half, and so does a pair whose
label is a tie. With a 95% Wilson interval, for all pairs and for each source; with lengths also the correlation of
score and length, and the accuracy of what length does not predict (`rlhf_ext.functional.pairs`)."""

_CITATION = """\
@article{stiennon2020learning,
  title={Learning to summarize from human feedback},
  author={Stiennon, Nisan and others},
  journal={Advances in Neural Information Processing Systems},
  year={2020}
}"""

_INPUTS = """
Args:
    predictions (`list` of pairs of `float`): scores of both completions of each pair.
    references (`list` of `float`): P(first is better): 1, 0, 0.5 for a tie, or a vote.
    sources (`list` of `str`, *optional*): where each pair comes from.
    prompts (`list` of `str`, *optional*): prompt of each pair; pairs of one prompt are not independent, and the
        intervals are wider for it.
    lengths (`list` of pairs of `int`, *optional*): length of both completions.
Returns:
    `dict`: `accuracy`, `low`, `high`, `pairs`; `sources`, the same by name; with lengths `length_correlation`,
    `length_slope`, `accuracy_length_regressed`, `accuracy_longer`.
Examples:
    >>> metric = PreferenceAccuracy()
    >>> metric.compute(predictions=[[2.0, 1.0], [0.0, 0.0]], references=[1.0, 1.0])["accuracy"]
    0.75
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class PreferenceAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64"), length=2),
                    "references": datasets.Value("float64"),
                }
            ),
            reference_urls=["https://huggingface.co/papers/2009.01325"],
        )

    def _compute(self, predictions, references, sources=None, prompts=None, lengths=None):
        scores = torch.tensor(predictions, dtype=torch.float64).view(-1, 2)
        targets = torch.tensor(references, dtype=torch.float64)
        for name, given in (("sources", sources), ("prompts", prompts), ("lengths", lengths)):
            if given is not None and len(given) != len(targets):
                raise ValueError(f"`{name}` has {len(given)} entries for {len(targets)} pairs. Give one for each.")
        found = preference_accuracy(scores, targets, prompts)
        if lengths is not None:
            sizes = torch.tensor(lengths, dtype=torch.float64).view(-1, 2)
            found |= {k: v for k, v in length_statistics(scores, sizes, targets).items() if k != "accuracy"}
        if sources is not None:
            found["sources"] = {}
            for source in sorted(set(sources)):
                rows = torch.tensor([name == source for name in sources])
                own = None if prompts is None else [p for p, row in zip(prompts, rows.tolist(), strict=True) if row]
                found["sources"][source] = preference_accuracy(scores[rows], targets[rows], own)
        return found
