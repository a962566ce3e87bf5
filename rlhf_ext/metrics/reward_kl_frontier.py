"""Which policies give the most reward for their distance from the reference."""

import datasets
import evaluate

from rlhf_ext.functional.diversity import best_of_n_kl, reward_kl_frontier


_DESCRIPTION = """\
Points (KL, score), one per policy or checkpoint, and those of them that no other beats: none has at least the score
at no more KL, and one of the two better. Beside them the KL of the best of n samples of the reference, ln n - (n -
1) / n nats, the yardstick of Stiennon et al. 2020 and Gao et al. 2023: its score at the same KL is what sampling
alone gives."""

_CITATION = """\
@inproceedings{gao2023scaling,
  title={Scaling Laws for Reward Model Overoptimization},
  author={Gao, Leo and Schulman, John and Hilton, Jacob},
  booktitle={International Conference on Machine Learning},
  year={2023}
}"""

_INPUTS = """
Args:
    predictions (`list` of `float`): mean score of each policy.
    references (`list` of `float`): its KL to the reference, nats per sequence.
    best_of (`list` of `int`, *optional*): sizes n whose KL is wanted.
Returns:
    `dict`: `frontier`, places of the points that stay, by rising KL; `best_of_n_kl`, the KL of each n.
Examples:
    >>> metric = RewardKLFrontier()
    >>> metric.compute(predictions=[0.0, 1.0, 0.5], references=[0.0, 2.0, 3.0])["frontier"]
    [0, 1]
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class RewardKLFrontier(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            reference_urls=["https://huggingface.co/papers/2210.10760"],
        )

    def _compute(self, predictions, references, best_of=(1, 2, 4, 8, 16, 64)):
        frontier = reward_kl_frontier(list(zip(references, predictions, strict=True)))
        return {"frontier": frontier, "best_of_n_kl": {n: best_of_n_kl(n) for n in best_of}}
