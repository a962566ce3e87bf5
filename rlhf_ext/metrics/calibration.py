"""Expected calibration error of a reward model's preferences, and the table of its reliability plot."""

import datasets
import evaluate
import torch

from rlhf_ext.functional.pairs import calibration


_DESCRIPTION = """\
ECE = sum over bins of (share of pairs in the bin) |mean label - mean probability|, bins of equal width from 0 to 1.
The probability of a pair is sigmoid(score of the first - score of the second). Each pair is entered in both orders.
0 means that of the pairs called 70:30, 70% go that way; a model can be calibrated and know nothing (all 50:50)."""

_CITATION = """\
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017}
}"""

_INPUTS = """
Args:
    predictions (`list` of `float`): P(first is better), from 0 to 1.
    references (`list` of `float`): P(first is better) as labelled; soft labels allowed.
    num_bins (`int`, *optional*, defaults to 10): bins.
Returns:
    `dict`: `ece`, and `bins`, a list of `low`, `high`, `count`, `predicted`, `observed`.
Examples:
    >>> metric = Calibration()
    >>> metric.compute(predictions=[0.9, 0.9], references=[1.0, 0.0])["ece"]
    0.4
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Calibration(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            reference_urls=["https://huggingface.co/papers/1706.04599"],
        )

    def _compute(self, predictions, references, num_bins=10):
        probabilities = torch.tensor(predictions, dtype=torch.float64)
        targets = torch.tensor(references, dtype=torch.float64)
        return calibration(probabilities, targets, num_bins=num_bins)
