"""How long answers are, and how many end by themselves."""

import datasets
import evaluate
import torch


_DESCRIPTION = """\
Mean, median, 5% and 95% quantile of the number of tokens of an answer, its end-of-sequence token included; with
`finished` the share of answers that end by themselves instead of being cut. A reward that rises together with
length is to be read with both."""

_INPUTS = """
Args:
    predictions (`list` of `int`): tokens of each answer.
    finished (`list` of `bool`, *optional*): whether it ends by itself.
Returns:
    `dict`: `length_mean`, `length_median`, `length_q05`, `length_q95`, and with `finished` `eos_rate`.
Examples:
    >>> metric = Length()
    >>> metric.compute(predictions=[2, 4, 9], finished=[True, True, False])["length_median"]
    4.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Length(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64")}),
        )

    def _compute(self, predictions, finished=None):
        lengths = torch.tensor(predictions, dtype=torch.float64)
        low, median, high = lengths.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
        found = {
            "length_mean": lengths.mean().item(),
            "length_median": median,
            "length_q05": low,
            "length_q95": high,
        }
        if finished is not None:
            if len(finished) != len(lengths):
                raise ValueError(
                    f"`finished` has {len(finished)} entries for {len(lengths)} answers. Give one for each."
                )
            found["eos_rate"] = sum(map(bool, finished)) / len(finished)
        return found
