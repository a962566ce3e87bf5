"""Scores in a known unit: mean 0 and deviation 1 over samples of the fixed reference, or reference answers at 0.

Ziegler et al. 2019, Sec. 2.1, normalise before and after training; Stiennon et al. 2020, Sec. 3.4, shift once. The
samples come from the reference (SFT) policy and never from the trunk that trained
(vwxyzjn/lm-human-preference-details#8).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from ..data.candidates import tokenize_candidates
from ..data.loading import load_rows, require_columns
from ..functional.scores import score_normalization
from ..models.base_quantization import QUANTIZATION_FILE, as_loading_option, read_base_quantization
from ..models.build import load_policy
from ..models.generation import Samples, end_token_ids, sample_completions
from ..models.hub import find_file
from ..models.pooling import has_normalization, normalization_of, set_normalization
from ..models.reward_checkpoints import save_normalization
from ..models.reward_functions import ModelReward
from ..trainers.reward_trainer import PreferenceRewardTrainer
from .finished_runs import digest_of


def reference_samples(
    reference_model_path: str,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> Samples:
    """
    One sample of the reference policy per prompt.

    Args:
        reference_model_path (`str`):
            Folder or Hub id of the fixed reference: a full policy, or a LoRA adapter.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of reference and reward model.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`):
            Text, or messages, which the chat template turns into text.
        max_new_tokens (`int`), temperature (`float`):
            As the policy will be sampled: scores of texts cut elsewhere have another mean.
        seed (`int`, *optional*, defaults to 0):
            The samples of a resumed run are those of the first.
        device (`str` or `torch.device`, *optional*):
            Where to sample.
        kwargs:
            As for [`~rlhf_ext.models.build.load_policy`].
    """
    options = as_loading_option(read_base_quantization(find_file(reference_model_path, QUANTIZATION_FILE)))
    policy = load_policy(reference_model_path, **{**options, **kwargs}).eval()
    if processing_class.pad_token is None:  # as the trainers do; the mask hides it
        processing_class.pad_token = processing_class.eos_token
    policy = policy if device is None else policy.to(device)
    set_seed(seed)
    texts = [prompt_text(prompt, processing_class) for prompt in prompts]
    size = policy.get_input_embeddings().weight.shape[0]
    if size < len(processing_class):
        raise ValueError(
            f"The reference {reference_model_path!r} has {size} tokens and the tokenizer {len(processing_class)}: "
            "they do not belong together. Give the SFT model that the reward model starts from."
        )
    return sample_completions(
        policy,
        processing_class,
        texts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=64,
        eos_token_ids=end_token_ids(policy, processing_class),
    )


def reference_answers(rows: Dataset, processing_class: PreTrainedTokenizerBase) -> Samples:
    """
    Answers that people wrote, as samples: rows with `prompt` and `completion`, each closed as in reward training.

    Raises:
        ValueError: a column is missing or empty.
    """
    require_columns(rows, ["prompt", "completion"], what="the reference answers")
    found = Samples([], [], [], [], [])
    for row in rows:
        completion = row["completion"]
        if not isinstance(row["prompt"], str) and isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        # Tokenised and closed as reward training does it; templates close with other tokens than the end of sequence.
        read = tokenize_candidates({**row, "completions": [completion]}, processing_class)
        [ids], [start] = read["candidate_ids"], read["completion_starts"]
        found.prompts.append(prompt_text(row["prompt"], processing_class))
        found.texts.append(completion if isinstance(completion, str) else completion[-1]["content"])
        found.prompt_ids.append(ids[:start])
        found.completion_ids.append(ids[start:])
        found.truncated.append(False)
    return found


def load_samples(
    name: str | None, reference_model_path: str | None, processing_class: PreTrainedTokenizerBase, **kwargs: Any
) -> Samples | None:
    """
    What `--normalize_prompts` names: prompts to sample the reference on, or reference answers; `None` for `None`.

    Args:
        name (`str`, *optional*):
            A data set with `prompt`, and `completion` if it holds answers.
        reference_model_path (`str`, *optional*):
            The reference; not read where there are answers.
        kwargs:
            As for [`reference_samples`].

    Raises:
        ValueError: prompts without a reference to sample from.
    """
    if name is None:
        return None
    rows = load_rows(name)
    if "completion" in rows.column_names:
        return reference_answers(rows, processing_class)
    require_columns(rows, ["prompt"], what="`normalize_prompts`")
    if reference_model_path is None:
        raise ValueError(
            f"`normalize_prompts` {name!r} has prompts only, and `reference_model_path` is empty. Give the SFT model, "
            "or rows with a `completion` as reference answers."
        )
    return reference_samples(reference_model_path, processing_class, list(rows["prompt"]), **kwargs)


def raw_scores(model: nn.Module, processing_class: PreTrainedTokenizerBase, samples: Samples) -> torch.Tensor:
    """Scores `(B,)` of samples before any gain and bias; the model keeps those it has."""
    reward = ModelReward(model, processing_class, processing_class)
    with _without_normalization(model):
        scores = reward(samples.prompts, samples.texts, samples.completion_ids, prompt_ids=samples.prompt_ids)
    return torch.tensor(scores, dtype=torch.float64)


def normalize_before(trainer: PreferenceRewardTrainer, samples: Samples, *, scale: bool = True) -> tuple[float, float]:
    """
    Let training start in the unit of the reference: gain and bias are constants of the forward from now on.

    What trains is the raw score, so a model that is normalised again afterwards gets one gain and not two.

    Returns:
        `tuple[float, float]`: gain and bias.
    """
    gain, bias = score_normalization(raw_scores(trainer.model, trainer.processing_class, samples), scale=scale)
    gain, bias = broadcast_object_list([gain, bias])  # processes on unlike devices round apart, and train in one unit
    set_normalization(trainer.model, gain, bias)
    trainer.training_gain = gain
    return gain, bias


def normalize_after(
    trainer: PreferenceRewardTrainer, folder: str | Path, samples: Samples, *, scale: bool = True
) -> tuple[float, float]:
    """
    Save gain and bias of the trained model in its folder, where its loader finds them; they replace earlier ones.

    Args:
        folder (`str` or `Path`):
            Where `trainer.save_model` wrote the model.

    Returns:
        `tuple[float, float]`: gain and bias.
    """
    scores = raw_scores(trainer.model, trainer.processing_class, samples)
    return save_unit(trainer, folder, scores, scale=scale)


def save_unit(
    trainer: PreferenceRewardTrainer, folder: str | Path, scores: torch.Tensor, *, scale: bool = True
) -> tuple[float, float]:
    """As [`normalize_after`], for raw scores that are there already."""
    gain, bias = broadcast_object_list(list(score_normalization(scores, scale=scale)))
    set_normalization(trainer.model, gain, bias)
    if trainer.args.should_save:
        save_normalization(folder, gain, bias)
    return gain, bias


def unit_settings(samples: Samples | None, scale: bool) -> dict[str, Any]:
    """What decides the unit of a run, as plain values."""
    ids = None if samples is None else zip(samples.prompt_ids, samples.completion_ids, strict=True)
    return {"samples": digest_of(ids), "scale": scale}


@contextmanager
def _without_normalization(model: nn.Module) -> Iterator[None]:
    if not has_normalization(model):
        yield
        return
    before = normalization_of(model)
    set_normalization(model, 1.0, 0.0)
    try:
        yield
    finally:
        set_normalization(model, *before)


def prompt_text(prompt: Any, processing_class: PreTrainedTokenizerBase) -> str:
    """A prompt as the text that the tokenizer makes the ids of the chat template of."""
    if isinstance(prompt, str):
        return prompt
    text = processing_class.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    # The tokenizer writes the token again that many templates begin with.
    begin = processing_class.bos_token
    return text.removeprefix(begin) if begin is not None and _adds_bos(processing_class) else text


def _adds_bos(processing_class: PreTrainedTokenizerBase) -> bool:
    return processing_class(text="a")["input_ids"][:1] == [processing_class.bos_token_id]
