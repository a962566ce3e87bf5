"""A natural-language-inference classifier as a function of pairs of texts."""

from collections.abc import Callable, Sequence

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..functional.diversity import NLI_VALUES
from .reward_functions import inference


def load_nli(
    path: str, *, device: str | torch.device = "cpu", batch_size: int = 32, trust_remote_code: bool = False
) -> Callable[[Sequence[tuple[str, str]]], list[tuple[str, float]]]:
    """
    Load a classifier of entailment, neutral and contradiction. Safetensors only.

    Returns:
        `Callable`: takes pairs (premise, hypothesis) and gives the most probable label of each, with its probability.

    Raises:
        ValueError: the checkpoint's `id2label` does not name exactly the three labels.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, trust_remote_code=trust_remote_code, use_safetensors=True
    ).to(device)
    names = {index: name.lower() for index, name in model.config.id2label.items()}
    if set(names.values()) != set(NLI_VALUES):
        raise ValueError(
            f"`nli_model_path` {path!r} has the labels {sorted(names.values())}; they must be {sorted(NLI_VALUES)}. "
            "Set `id2label` in its config.json."
        )
    # The smaller of the two: RoBERTa has two positions more than it reads.
    limit = min(getattr(model.config, "max_position_embeddings", None) or 10**9, tokenizer.model_max_length)
    limit = limit if limit < 10**9 else None

    def judge(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, float]]:
        found = []
        with inference(model):
            for start in range(0, len(pairs), batch_size):
                premises, hypotheses = zip(*pairs[start : start + batch_size], strict=True)
                batch = tokenizer(
                    list(premises),
                    list(hypotheses),
                    padding=True,
                    truncation=limit is not None,
                    max_length=limit,
                    return_tensors="pt",
                ).to(device)
                top = model(**batch).logits.float().softmax(-1).max(-1)
                found += [(names[i], p) for p, i in zip(*(x.tolist() for x in top), strict=True)]
        return found

    return judge
