"""A PPO run's models on the meta device, without data, and the bytes that their shapes come to."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from .roles import CRITIC, POLICY, REFERENCE, REWARD
from .trunk_cache import DEFAULT_GIB, num_frozen_layers


# Bytes of optimizer state per trained fp32 parameter; the blocks of an 8-bit state have two fp32 scales per 256.
OPTIMIZER_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_bnb_8bit": 2 + 8 / 256,
    "adamw_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 2 + 8 / 256,
    "paged_adamw": 8.0,
    "paged_adamw_32bit": 8.0,
    "sgd": 0.0,
}
SHARDINGS = ("none", "ddp", "zero2", "zero3", "fsdp2")


@dataclass(kw_only=True)
class RunShape:
    """What of a PPO run decides its memory.

    Args:
        config, critic_config, reward_configs (`PretrainedConfig`):
            Architectures of the policy, and of a critic and of reward models that are models of their own.
        dtype (`torch.dtype`):
            What the base is loaded in; the other models are float32.
        quantization (`BitsAndBytesConfig`, *optional*):
            4 or 8 bits for the base's linear layers.
        lora (`LoraConfig`, *optional*):
            The policy's adapter; `None` trains all of it.
        reward_lora (`LoraConfig`, *optional*):
            The reward adapter on the policy's base, which the critic copies. `None`: there is none.
        reference (`str`):
            `"base"` (the base without adapter), `"adapter"` (a copy of the policy's adapter), `"copy"`, or `"none"`.
        critic (`str`):
            `"adapter"`, `"shared"`, `"model"` or `"none"`.
        rows, rollout (`int`):
            Rows of a micro-batch, and rows of a rollout on one process.
        ranks, sharding (`int`, `str`):
            Processes, and how they share: one of `SHARDINGS`.
        gathers_for_generation (`bool`):
            Whether ZeRO-3 puts the policy together on every rank while it samples (`ds3_gather_for_generation`).
        trunk_cache_gib (`float`, *optional*):
            Limit for the outputs of frozen lower layers, which lie in the CPU's memory.
    """

    config: PretrainedConfig
    dtype: torch.dtype = torch.float32
    quantization: BitsAndBytesConfig | None = None
    lora: LoraConfig | None = None
    reward_lora: LoraConfig | None = None
    reference: str = "base"
    critic: str = "adapter"
    critic_config: PretrainedConfig | None = None
    reward_configs: list[PretrainedConfig] = field(default_factory=list)
    rows: int
    rollout: int
    prompt_length: int
    completion_length: int
    gradient_checkpointing: bool = False
    accumulates: bool = False
    autocast: bool = False
    optim: str = "adamw_torch_fused"
    attn_implementation: str | None = None
    device: str = "cuda"
    ranks: int = 1
    sharding: str = "none"
    gathers_for_generation: bool = True
    trunk_cache_gib: float | None = None

    def __post_init__(self) -> None:
        if self.optim not in OPTIMIZER_BYTES:
            raise ValueError(f"optim={self.optim!r} has no known size; the plan knows {sorted(OPTIMIZER_BYTES)}.")
        if self.sharding not in SHARDINGS:
            raise ValueError(f"sharding={self.sharding!r} is unknown; choose one of {list(SHARDINGS)}.")
        if self.sharding == "zero3":
            # Our configurations leave DeepSpeed's bf16 mode off, since it casts adapters and heads; then all is fp32.
            self.dtype, self.autocast = torch.float32, False
        if self.quantization is not None and self.sharding in ("zero3", "fsdp2"):
            raise ValueError(
                f"sharding={self.sharding!r} with a quantised base cannot be planned yet. Plan with 'ddp' or 'zero2', "
                "which keep the base whole on every rank, or with a base in bfloat16."
            )


def build_on_meta(shape: RunShape) -> tuple[nn.Module, set[str]]:
    """The model with all its trained roles, without data, and the names of the base's quantised linear layers."""
    kwargs = {} if shape.attn_implementation is None else {"attn_implementation": shape.attn_implementation}
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shape.config, dtype=shape.dtype, **kwargs)
        quantized = quantized_layers(base) if shape.quantization is not None else set()
        model: nn.Module = base
        if shape.lora is not None:
            model = get_peft_model(base, copy.deepcopy(shape.lora), adapter_name=POLICY)  # PEFT writes into it
            others = {REFERENCE: shape.lora} if shape.reference == "adapter" else {}
            if shape.reward_lora is not None:
                others |= {REWARD: shape.reward_lora} | (
                    {CRITIC: shape.reward_lora} if shape.critic == "adapter" else {}
                )
            for name, config in others.items():
                model.add_adapter(name, copy.deepcopy(config))
            for name, parameter in model.named_parameters():
                trains = f".{POLICY}." in name or f".{CRITIC}." in name
                parameter.requires_grad_(".lora_" in name and trains)
        hidden = shape.config.get_text_config().hidden_size
        for role in (REWARD, CRITIC) if shape.critic in ("adapter", "shared") else (REWARD,):
            if shape.reward_lora is not None:
                head = nn.Linear(hidden, 1, bias=False, dtype=torch.float32).requires_grad_(role == CRITIC)
                base.add_module(f"{role}_head", head)
        if shape.critic == "model":
            base.add_module(CRITIC, classifier_on_meta(shape.critic_config or shape.config))
    return model, quantized


def classifier_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    config = type(config)(**{**config.to_dict(), "num_labels": 1})
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


def classifier_bytes(config: PretrainedConfig) -> int:
    """Bytes of a reward model that stands alone, in float32."""
    return sum(p.numel() * p.element_size() for p in classifier_on_meta(config).parameters())


def quantized_layers(base: PreTrainedModel) -> set[str]:
    """Linear layers that bitsandbytes takes: all but the output head and what is tied to it (transformers decides)."""
    kept = get_keys_to_not_convert(base)
    linear = {name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return {name for name in linear if not any(name == key or name.startswith(f"{key}.") for key in kept)}


def bytes_of(name: str, parameter: torch.Tensor, quantized: set[str], config: BitsAndBytesConfig | None) -> int:
    """Bytes of one parameter, with the state of its quantisation."""
    size = parameter.numel()
    layer = name.removeprefix("base_model.model.").removesuffix(".weight").replace(".base_layer", "")
    if config is None or layer not in quantized or not name.endswith(".weight"):
        return size * parameter.element_size()
    if config.load_in_8bit:
        return size + 4 * parameter.shape[0]
    blocks = math.ceil(size / 64)
    # Scales of blocks in fp32, or in 8 bits with a code of 256 entries, an offset and scales of their own.
    scales = blocks + 4 * math.ceil(blocks / 256) + 4 * 256 + 4 if config.bnb_4bit_use_double_quant else 4 * blocks
    return math.ceil(size / 2) + scales + 4 * 16


def cache_bytes(shape: RunShape, tokens: int | None = None) -> int:
    """Keys and values of the whole rollout, sliding windows in full."""
    config = shape.config.get_text_config()
    tokens = shape.prompt_length + shape.completion_length if tokens is None else tokens
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head_dim * hidden_dtype(shape).itemsize
    return per_token * tokens * shape.rollout


def decode_workspace(shape: RunShape) -> int:
    """Beside the cache while a token is sampled: logits and four fp32 copies, and one layer's keys, being extended."""
    config = shape.config.get_text_config()
    logits = shape.rollout * config.vocab_size * (hidden_dtype(shape).itemsize + 4 * 4)
    return max(logits, cache_bytes(shape) // (2 * config.num_hidden_layers))


def trunk_bytes(shape: RunShape, model: nn.Module) -> int:
    """Outputs of the frozen lower layers of a whole rollout, as far as the limit lets them be kept."""
    config = shape.quantization
    reads_neighbours = config is not None and config.load_in_8bit and config.llm_int8_threshold > 0
    if num_frozen_layers(model) == 0 or reads_neighbours or shape.sharding in ("zero2", "zero3", "fsdp2"):
        return 0
    limit = int((DEFAULT_GIB if shape.trunk_cache_gib is None else shape.trunk_cache_gib) * 2**30)
    tokens = shape.rollout * (shape.prompt_length + shape.completion_length)
    return min(limit, tokens * shape.config.get_text_config().hidden_size * shape.dtype.itemsize)


def hidden_dtype(shape: RunShape) -> torch.dtype:
    # `generate` of a PEFT model runs outside autocast.
    return torch.bfloat16 if shape.autocast and shape.lora is None else shape.dtype


def compute_dtype(shape: RunShape) -> torch.dtype:
    config = shape.quantization
    return config.bnb_4bit_compute_dtype if config is not None and config.load_in_4bit else shape.dtype


def owner_of(name: str) -> str | None:
    parts = name.split(".")
    if f"{CRITIC}_head" in parts or f"{REWARD}_head" in parts or any(part.startswith("lora_") for part in parts):
        return "adapters"
    return CRITIC if CRITIC in parts else None


def layer_bytes(base: nn.Module) -> Iterator[int]:
    """Bytes of each decoder layer, and of the embeddings and the head: what is gathered at a time."""
    modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    lists = [m for m in base.base_model.modules() if isinstance(m, nn.ModuleList)]
    modules += [layer for layers in lists for layer in layers]
    for module in modules:
        yield sum(p.numel() * p.element_size() for p in module.parameters())
