"""The head of a reward model in training: drawn where it is new, trained and saved where there are adapters."""

import copy

import torch
from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from ..models.hub import has_safetensors
from ..models.pooling import classifier_of
from ..models.reward_checkpoints import read_head


logger = get_logger(__name__)

HEAD = "score"


def score_peft_config(peft_config: PeftConfig) -> PeftConfig:
    """
    A copy of `peft_config` under which the head is trained and saved as it is, and never wrapped by an adapter.

    Left alone, LoRA on all linear layers wraps the head (huggingface/peft#2027) or forgets it on saving
    (huggingface/peft#1070), and it comes back random.

    Raises:
        ValueError: if the kind of adapter cannot save whole modules.
    """
    if not hasattr(peft_config, "modules_to_save"):
        raise ValueError(
            f"`peft_config` is a {type(peft_config).__name__}, which has no `modules_to_save`, so the head `{HEAD}` "
            "would not be saved. Use a `LoraConfig`."
        )
    peft_config = copy.deepcopy(peft_config)
    if HEAD not in (peft_config.modules_to_save or []):
        logger.info(f"`peft_config.modules_to_save` gets {HEAD!r}: the head of the reward model is trained and saved.")
        peft_config.modules_to_save = [*(peft_config.modules_to_save or []), HEAD]
    if peft_config.task_type != "SEQ_CLS":
        logger.info(f"`peft_config.task_type` becomes 'SEQ_CLS' (was {peft_config.task_type!r}).")
        peft_config.task_type = "SEQ_CLS"
    targets = getattr(peft_config, "target_modules", None)
    if isinstance(targets, str):
        excluded = peft_config.exclude_modules
        peft_config.exclude_modules = (
            rf"({excluded})|((.*\.)?{HEAD})" if isinstance(excluded, str) else sorted({*(excluded or []), HEAD})
        )
    elif targets is not None and HEAD in targets:
        logger.info(f"{HEAD!r} leaves `peft_config.target_modules`: the head is trained in full.")
        peft_config.target_modules = type(targets)(name for name in targets if name != HEAD)
    return peft_config


def check_adapter(model: PeftModel) -> None:
    """
    Check that the head of a model with adapters is trained and saved.

    Raises:
        ValueError: if it is wrapped by an adapter, or frozen.
    """
    head = classifier_of(model).score
    if any(isinstance(module, BaseTunerLayer) for module in head.modules()):
        raise ValueError(
            f"The head `{HEAD}` is wrapped by an adapter, whose base stays random. Take it out of `target_modules` "
            f'and put it in `modules_to_save=["{HEAD}"]`.'
        )
    if not any(parameter.requires_grad for parameter in head.parameters()):
        raise ValueError(
            f"The head `{HEAD}` of the PEFT model is frozen and would not be saved. Build it with "
            f'`modules_to_save=["{HEAD}"]` and `task_type="SEQ_CLS"`, or load it with `is_trainable=True`.'
        )


def checkpoint_head(path: str, revision: str | None = None) -> dict[str, torch.Tensor] | None:
    """
    The head in the files of a checkpoint.

    Returns:
        `dict[str, torch.Tensor]` or `None`: its tensors; `None` if the files have no head. Empty if there are no
        safetensors files to look into, so that nothing is known.
    """
    if not has_safetensors(path, revision):
        return {}
    return read_head(path, revision) or None


def new_head(base: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    r"""
    Draw a head: \(w \sim N(0, 1 / (d + 1))\), d the hidden size, bias 0 (Ziegler et al. 2019; Stiennon et al. 2020,
    appendix B.1).
    """
    size = base.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(seed)
    std = (size + 1) ** -0.5
    logger.info(f"The checkpoint has no head `{HEAD}`: drawn with standard deviation {std:.4f}, seed {seed}.")
    return {"weight": torch.randn(1, size, generator=generator) * std, "bias": torch.zeros(1)}
