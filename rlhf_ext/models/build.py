"""From what the caller passes to the one wrapped model that holds every trained role."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

from .adapters import add_policy_copy, add_scalar_adapter, check_leaves_base
from .base_quantization import QUANTIZATION_FILE, without_cpu_packing
from .hub import check_safetensors, find_file, local_folder
from .reward_checkpoints import is_saved_critic
from .roles import CRITIC, POLICY, REFERENCE, REWARD, TARGET, RoleSwitch, ScalarHead, base_of, bind_roles
from .sharding import whole_weights


logger = logging.get_logger(__name__)


def load_policy(path: str, *, trust_remote_code: bool = False, in_pieces: bool = False, **kwargs: Any) -> nn.Module:
    """Load a policy to train: a full model, or a LoRA adapter, whose config names its base. Safetensors only.

    Args:
        path (`str`):
            Folder, or id on the Hub.
        in_pieces (`bool`, *optional*, defaults to `False`):
            Whether ZeRO-3 may cut a full model up while it loads. Enough under a fresh adapter, which copies nothing.
        kwargs:
            Passed to `from_pretrained`: `dtype` (float32 unless given, as in TRL's trainers), `revision`,
            `quantization_config`, ...

    Raises:
        ValueError: the weights, those of an adapter's base too, are in no safetensors file.
    """
    kwargs.setdefault("dtype", torch.float32)
    kwargs["use_safetensors"] = True
    revision = kwargs.get("revision")
    if not {"gguf_file", "subfolder", "variant"} & kwargs.keys():  # whose files have other names
        check_safetensors(path, "model path", revision)
    if find_file(path, "adapter_config.json", revision) is not None:
        base = PeftConfig.from_pretrained(path, revision=revision)
        if base.base_model_name_or_path:
            check_safetensors(base.base_model_name_or_path, f"base of the adapter {path!r}", base.revision)
        if "quantization_config" not in kwargs and find_file(path, QUANTIZATION_FILE, revision) is not None:
            logger.warning(
                f"{path!r} was trained on a quantised base (see its {QUANTIZATION_FILE}) and is now loaded on the "
                "base in full precision, where it is another policy. To go on from it, pass the same "
                "`quantization_config`."
            )
        with whole_weights():
            adapter = AutoPeftModelForCausalLM.from_pretrained(
                path, is_trainable=True, trust_remote_code=trust_remote_code, **kwargs
            )
            return without_cpu_packing(adapter)
    with whole_weights(zero3=not in_pieces):
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)
    return without_cpu_packing(model)


@dataclass
class Roles:
    """The wrapped model with its critic, the switch between its adapters, and the reference where it is a copy.

    Attributes:
        model: What `Trainer` trains: the causal language model, or its [`~peft.PeftModel`].
        switch: Chooses the adapter of a forward.
        reference: A frozen copy of a policy without adapters, else `None`.
        reference_adapter: Adapter of the reference, `None` for the bare base. Read only where `reference` is `None`.
        target: A frozen copy as masking policy, where one is needed and the policy has no adapters, else `None`.
        trainable: Names of the parameters that train.
    """

    model: nn.Module
    switch: RoleSwitch
    reference: PreTrainedModel | None = None
    reference_adapter: str | None = None
    target: PreTrainedModel | None = None
    trainable: set[str] = field(default_factory=set)

    @property
    def base(self) -> PreTrainedModel:
        return base_of(self.model)

    def target_forward(self, **kwargs: Any) -> Any:
        """Forward of the masking policy."""
        if self.target is not None:
            return self.target(**kwargs)
        with self.switch.use(TARGET):
            return self.base(**kwargs)

    def target_weights(self) -> dict[str, torch.Tensor]:
        """Weights of the masking policy by the names of the policy's."""
        if self.target is not None:
            return dict(self.target.named_parameters())
        named = dict(self.model.named_parameters())
        part, own = f".{TARGET}.", f".{POLICY}."
        return {name.replace(part, own): parameter for name, parameter in named.items() if part in name}

    def renew_target(self) -> None:
        """Make the masking policy the policy as it is now."""
        now = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.target_weights().items():
                parameter.copy_(now[name])

    def freeze(self) -> None:
        """Hide all parameters from the parent: on a quantised base it rounds every trainable one to bfloat16."""
        self.trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.model.requires_grad_(False)

    def unfreeze(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trainable)


def build_roles(
    model: nn.Module,
    *,
    critic: str,
    critic_model: nn.Module | str | None = None,
    reward_adapter: str | None = None,
    value_unit: tuple[float, float] = (1.0, 0.0),
    peft_config: PeftConfig | None = None,
    keep_reference: bool = True,
    keep_target: bool = False,
) -> Roles:
    """Put policy, reference, critic and reward adapter together.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Policy.
        critic (`str`):
            `"model"`: `critic_model` becomes the submodule `critic` of the base. `"adapter"`: the reward adapter is
            added twice, frozen as `reward` and trainable as `critic`. `"shared"`: added once, frozen, with a second,
            trainable head for the values. `"none"`: no values.
        critic_model (`PreTrainedModel`, `PeftModel` or `str`, *optional*):
            Sequence classifier with one label; for `"adapter"` the folder of a critic adapter to start from.
        reward_adapter (`str`, *optional*):
            Folder or Hub id of a reward adapter trained on the same base.
        value_unit (`tuple[float, float]`, *optional*):
            Gain and bias from the adapter's scores to what PPO pays for them; the critic starts there.
        peft_config (`PeftConfig`, *optional*):
            Adapter to put on a plain policy.
        keep_reference (`bool`, *optional*, defaults to `True`):
            Whether a reference is needed at all.
        keep_target (`bool`, *optional*, defaults to `False`):
            Whether a masking policy is needed (NLPO), which starts as the policy.

    Raises:
        ValueError: the parts do not fit (see the messages).
    """
    without_cpu_packing(model)
    for config in [peft_config] if peft_config is not None else list(getattr(model, "peft_config", {}).values()):
        check_leaves_base(config, "peft_config" if peft_config is not None else "The policy's adapter")
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ValueError("peft_config was given for a model that has adapters already. Pass one of the two.")
        fresh, model = True, get_peft_model(model, peft_config)
    else:
        fresh = False
    is_peft = isinstance(model, PeftModel)
    if is_peft and POLICY not in model.peft_config:
        raise ValueError(
            f"The policy's adapter is named {list(model.peft_config)}, not {POLICY!r}, the name under which it is "
            "saved and switched. Load it with `adapter_name='default'`."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No parameter of the policy requires a gradient, so it would never change. Load its adapter with "
            "`is_trainable=True`, or pass a `peft_config`."
        )
    narrow = {
        name: p.dtype
        for name, p in model.named_parameters()
        if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) and ".lora_" not in name
    }
    if narrow:
        name, dtype = next(iter(narrow.items()))
        raise ValueError(
            f"{len(narrow)} parameters of the policy train in {dtype}, {name!r} first, where updates at the learning "
            "rates of RLHF round to nothing. Load it with dtype=torch.float32 (`bf16=True` computes in bf16 all the "
            "same), or train LoRA weights alone (`peft_config` without `modules_to_save`)."
        )
    if not is_peft and reward_adapter is not None:
        raise ValueError(
            "reward_adapter shares the base with the policy's adapter, but the policy has none. Give a `peft_config`, "
            "or load the adapter as a standalone reward model with `load_reward_model` and pass it in `reward_funcs`."
        )

    reference = None
    if keep_reference and not is_peft:
        reference = copy.deepcopy(model).requires_grad_(False).eval()
    if keep_reference and is_peft and not fresh:
        add_policy_copy(model, REFERENCE)
    target = None
    if keep_target and is_peft:
        add_policy_copy(model, TARGET)
    elif keep_target:
        target = copy.deepcopy(model).requires_grad_(False).eval()

    heads = {}
    if reward_adapter is not None:
        weight, (gain, bias) = add_scalar_adapter(model, REWARD, reward_adapter)
        heads[REWARD] = ScalarHead(weight, gain, bias, trainable=False)
        if critic == "adapter" and critic_model is not None:
            weight, (gain, bias) = add_scalar_adapter(model, CRITIC, critic_model, field="critic_model")
            # A critic is in the unit that PPO pays in already, a reward adapter in its own.
            value_unit = (1.0, 0.0) if is_saved_critic(local_folder(critic_model)) else value_unit
        elif critic == "adapter":
            add_scalar_adapter(model, CRITIC, reward_adapter)
        if critic in ("adapter", "shared"):
            unit = value_unit[0] * gain, value_unit[0] * bias + value_unit[1]
            heads[CRITIC] = ScalarHead(weight * unit[0], 1.0, unit[1], trainable=True)
    roles = Roles(model, RoleSwitch(model), reference, REFERENCE if is_peft and not fresh else None, target)
    # After PEFT and after the switch has its layers: `all-linear` cannot wrap a head that is not there yet, and the
    # adapters of a critic of its own stay as they are when the policy's are switched.
    device = next(roles.base.parameters()).device
    for name, head in heads.items():
        roles.base.add_module(f"{name}_head", head.to(device))
    if critic == "model":
        if critic_model is None:
            raise ValueError('critic="model" needs a `critic_model`.')
        roles.base.add_module(CRITIC, critic_model)
    bind_roles(model, roles.switch, shared_trunk=critic == "shared")
    if is_peft:
        for name, parameter in model.named_parameters():
            if any(f".{frozen}." in name for frozen in (REWARD, REFERENCE, TARGET)):
                parameter.requires_grad_(False)
            elif ".lora_" in name and CRITIC in name.split("."):  # A and B, and what DoRA adds
                parameter.requires_grad_(critic == "adapter" or parameter.requires_grad)
    return roles


def shortest_context(*models: nn.Module | None) -> int | None:
    """Tokens of prompt and completion that every one of `models` can read; `None` without a limit."""
    limits = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in models if m is not None]
    return min((limit for limit in limits if limit is not None), default=None)


def without_dropout(*models: nn.Module | None) -> None:
    """Switch off the dropout that modules apply as a function of a rate they keep, attention above all.

    The parent's `disable_dropout` knows modules of the class `nn.Dropout` only. Left on, the ratio would differ from 1
    and the KL from 0 before the first update. Configurations are left alone: they are saved with the model.
    """
    for module in (module for model in models if model is not None for module in model.modules()):
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
