"""Win rate of a policy over a baseline on the same prompts."""

import datasets
import evaluate
import torch

from rlhf_ext.functional.pairs import win_rate


_DESCRIPTION = """\
Mean credit of the policy over prompts: 1 where it is preferred to the baseline, 0 where the baseline is, one half
for a tie, or a judge's probability. A judge is asked in both orders: `predictions` with the policy in the first
place, `swapped` with it in the second; they are averaged, and how much depends on the place is reported. Interval:
Wilson's at 95% over prompts."""

_CITATION = """\
@article{zheng2023judging,
  title={Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena},
  author={Zheng, Lianmin and others},
  journal={Advances in Neural Information Processing Systems},
  year={2023}
}"""

_INPUTS = """
Args:
    predictions (`list` of `float`): credit of the policy on each prompt, from 0 to 1.
    swapped (`list` of `float`, *optional*): the same in the other order of places.
Returns:
    `dict`: `win_rate`, `low`, `high`, `prompts`; with `swapped` also `disagreement` and `position_bias`.
Examples:
    >>> metric = WinRate()
    >>> metric.compute(predictions=[1.0, 0.5, 0.0, 1.0])["win_rate"]
    0.625
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class WinRate(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
            reference_urls=["https://huggingface.co/papers/2306.05685"],
        )

    def _compute(self, predictions, swapped=None):
        other = None if swapped is None else torch.tensor(swapped, dtype=torch.float64)
        return win_rate(torch.tensor(predictions, dtype=torch.float64), swapped=other)
