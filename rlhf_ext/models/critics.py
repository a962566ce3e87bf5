"""Which critic a run has, and how one that is a model of its own is made."""

import copy
import os
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .base_quantization import without_cpu_packing
from .hub import find_file, is_inside_repo, local_folder
from .score_wrappers import parts_of, unit_of
from .scoring import (
    ModelReward,
    classifier_of,
    load_reward_model,
    normalization_of,
    pool_by_attention_mask,
    pooled_aggregation,
    set_normalization,
)
from .sharding import whole_weights


logger = logging.get_logger(__name__)


def choose_critic(
    critic: str | None,
    *,
    base: PreTrainedModel,
    critic_model: nn.Module | str | None,
    reward_adapter: str | None,
    rewards: list[Any],
    reward_weights: list[float] | None,
    reads_values: bool,
    policy_processing_class: PreTrainedTokenizerBase,
    trust_remote_code: bool = False,
) -> tuple[str, nn.Module | str | None]:
    """Settle which critic a run has, and build it where it is a model of its own.

    Args:
        critic (`str`, *optional*):
            `PPOConfig.critic`; `None` chooses.
        rewards (`list`):
            Functions of [`~rlhf_ext.models.rewards.resolve_rewards`]; the one that is a model with the policy's
            tokenizer starts the critic.
        reads_values (`bool`):
            Whether the advantage estimator reads values at all.

    Returns:
        `tuple[str, nn.Module | str | None]`: `"adapter"`, `"shared"`, `"model"` or `"none"`, and the model for
        `"model"`, the folder of a saved critic for `"adapter"` if one was given.

    Raises:
        ValueError: the critic cannot be built from what was given.
    """
    if critic is None:
        critic = "none" if not reads_values else "adapter" if reward_adapter is not None else "model"
    if critic in ("adapter", "shared") and reward_adapter is None:
        raise ValueError(f"critic={critic!r} starts from a `reward_adapter`, which was not given. Pass its folder.")
    critic_model = os.fspath(critic_model) if isinstance(critic_model, os.PathLike) else critic_model
    if critic == "adapter" and isinstance(critic_model, str):
        return critic, critic_model
    if critic != "model":
        if critic_model is not None:
            raise ValueError(
                f"critic_model was given, but critic={critic!r} does not read it. Set critic='model', or with a "
                "reward_adapter and critic='adapter' pass the folder of a critic adapter."
            )
        return critic, None
    if isinstance(critic_model, str):
        if is_inside_repo(critic_model):
            critic_model = local_folder(critic_model)
        tokenizer = AutoTokenizer.from_pretrained(critic_model, trust_remote_code=trust_remote_code)
        check_vocabularies(policy_processing_class, tokenizer, "critic_model")
        critic_model = load_reward_model(critic_model, dtype=torch.float32, trust_remote_code=trust_remote_code)
        return critic, critic_from_reward(critic_model)
    if critic_model is not None:
        size = critic_model.config.get_text_config().vocab_size
        if size < len(policy_processing_class):
            raise ValueError(
                f"critic_model has a vocabulary of {size}, the policy's tokenizer has {len(policy_processing_class)} "
                "entries, so its tokenizer is another one. Pass a critic with the policy's tokenizer."
            )
        name = getattr(critic_model.config, "_name_or_path", "")
        if name and find_file(name, "tokenizer_config.json") is not None:  # a folder, or an id of the Hub
            check_vocabularies(policy_processing_class, AutoTokenizer.from_pretrained(name), "critic_model")
        # A copy: the caller's model may be frozen, or be the reward model itself, and neither would train.
        return critic, critic_from_reward(critic_model)
    models = [part for r in rewards for part in parts_of(r) if isinstance(part, ModelReward)]
    if len(models) == 1 and len(rewards) == 1:
        reward, (gain, bias) = models[0], unit_of(rewards[0], (reward_weights or [1.0])[0])
        check_vocabularies(
            policy_processing_class, reward.processing_class, "The reward model, from which the critic starts,"
        )
        return critic, critic_from_reward(reward.model, gain, bias)
    if len(models) > 1 or (models and len(rewards) > 1):
        raise ValueError(
            f"The critic cannot start from {max(len(rewards), len(models))} rewards at once. Pass a `critic_model`, "
            "such as the reward model that weighs most, or a member of the ensemble."
        )
    if isinstance(base, PeftModel) or getattr(base, "quantization_method", None) is not None:
        raise ValueError(
            "critic='model' without a reward model copies the policy's trunk, which is not possible for a policy with "
            "adapters or a quantised one. Pass a `critic_model` or a `reward_adapter`."
        )
    logger.warning("No reward model to start the critic from: it starts from the policy's trunk with a head of zeros.")
    return critic, critic_from_policy(base)


@whole_weights()
def critic_from_policy(base: PreTrainedModel) -> PreTrainedModel:
    """A critic for rewards that are no model: the policy's trunk with a head of zeros (Ziegler et al. 2019)."""
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    critic = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    getattr(critic, critic.base_model_prefix).load_state_dict(base.base_model.state_dict())
    nn.init.zeros_(critic.score.weight)
    return critic


def critic_from_reward(reward_model: nn.Module, gain: float = 1.0, bias: float = 0.0) -> nn.Module:
    """A trainable copy of a reward model whose output is gain * score + bias, the unit that PPO pays in.

    The score is that of the model, after the gain and the bias saved with it. Gains go into the head, a bias stays
    beside it as a constant.
    What trains is float32: in bf16 an update at PPO's learning rates rounds to nothing.
    """
    classifier_of(reward_model)  # refuses what has no scalar head, before anything is copied
    if not isinstance(reward_model, PeftModel) and getattr(reward_model, "quantization_method", None) is not None:
        raise ValueError(
            "The critic starts from a quantised model without adapters, whose weights cannot train. Pass a "
            "`critic_model` with adapters or in full precision, a `reward_adapter`, or critic='none'."
        )
    critic = without_cpu_packing(copy.deepcopy(reward_model)).train()
    head = classifier_of(critic).score
    if isinstance(critic, PeftModel):
        critic.requires_grad_(False)
        for name, parameter in critic.named_parameters():
            # The head that PEFT keeps beside the trained one never runs: DDP would wait for its gradient.
            trained = ".lora_" in name or ".score." in name
            parameter.requires_grad_(trained and ".original_module." not in name)
    else:
        critic.requires_grad_(True)
    for parameter in critic.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    saved_gain, saved_bias = normalization_of(critic)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(gain * saved_gain)
    set_normalization(critic, 1.0, gain * saved_bias + bias)
    # A critic is read at every token, whatever made a score of the reward model's.
    return pool_by_attention_mask(critic, "last") if pooled_aggregation(critic) == "sum" else critic


def check_vocabularies(policy: PreTrainedTokenizerBase, critic: PreTrainedTokenizerBase | None, name: str) -> None:
    """The critic reads the policy's token ids, so both must mean the same by them.

    Raises:
        ValueError: the vocabularies differ.
    """
    if critic is not None and critic.get_vocab() != policy.get_vocab():
        raise ValueError(
            f"{name} has another tokenizer ({len(critic)} entries) than the policy ({len(policy)} entries). A critic "
            "reads the rollout's token ids: pass a `critic_model` with the policy's tokenizer. As a reward model it "
            "may keep its own, through `reward_processing_classes`."
        )
