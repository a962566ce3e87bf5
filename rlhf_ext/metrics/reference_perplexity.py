"""How likely answers are under a reference model."""

import datasets
import evaluate

from rlhf_ext.functional.statistics import perplexity
from rlhf_ext.models.generation import Samples, completion_logps


_DESCRIPTION = """\
Perplexity of answers under a reference, given their prompts: exp(- sum of log p / number of tokens), pooled over
all answers, the end-of-sequence token included. It rises where a policy leaves the language of the reference; it
falls, too, where answers become dull."""

_CITATION = """\
@article{jelinek1977perplexity,
  title={Perplexity - a measure of the difficulty of speech recognition tasks},
  author={Jelinek, Fred and Mercer, Robert L and Bahl, Lalit R and Baker, James K},
  journal={The Journal of the Acoustical Society of America},
  year={1977}
}"""

_INPUTS = """
Args:
    predictions (`list` of `list` of `int`): token ids of each answer.
    references (`list` of `list` of `int`): token ids of its prompt.
    model: the reference, a causal language model with the same tokenizer.
    pad_token_id (`int`, *optional*, defaults to 0): padding of the batches.
    batch_size (`int`, *optional*, defaults to 32): rows per forward.
Returns:
    `dict`: `perplexity`, `nll` (nats per token), `tokens`.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ReferencePerplexity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions, references, model, pad_token_id=0, batch_size=32):
        # Without a prompt nothing stands before the first token, which is then not predicted.
        tokens = sum(len(ids) - (not prompt) for ids, prompt in zip(predictions, references, strict=True) if ids)
        if tokens == 0:
            raise ValueError("`predictions` has no token to predict. Give at least one answer with one.")
        samples = Samples([], [], references, predictions, [])
        logps = completion_logps(model, samples, pad_token_id=pad_token_id, batch_size=batch_size)
        value, nll = perplexity(logps, num_tokens=tokens)
        return {"perplexity": value.item(), "nll": nll.item(), "tokens": tokens}
