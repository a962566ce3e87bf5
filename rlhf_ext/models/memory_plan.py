"""What a PPO run will hold in memory, added up before launch from the real architecture on the meta device.

Weights, adapters, gradients, optimizer state and the cache are counted by shape, activations are traced
([`~rlhf_ext.models.memory_trace`]). Counted in full where a run may need less: sliding windows in the cache, rows that
end early, paged optimizer state.
"""

import math
from dataclasses import dataclass

from peft import PeftModel
from torch import nn

from .memory import gib
from .memory_shape import (
    OPTIMIZER_BYTES,
    RunShape,
    build_on_meta,
    bytes_of,
    cache_bytes,
    classifier_bytes,
    compute_dtype,
    decode_workspace,
    layer_bytes,
    owner_of,
    trunk_bytes,
)
from .memory_trace import Activations, trace_activations
from .roles import CRITIC


# CUDA context, kernels of torch, cuBLAS and bitsandbytes, and fragmentation. Assumed: no GPU was here to measure it.
CUDA_RESERVE = 2**30
# ZeRO-2's `reduce_bucket_size`, in elements, and the two layers that ZeRO-3 and FSDP2 hold gathered at a time.
ZERO_BUCKET, GATHERED_LAYERS = 500_000_000, 2

REMEDIES = {
    "base": "load_in_4bit, a smaller model, or shard it with accelerate_configs/fsdp2.yaml or zero3.yaml",
    "reference": "LoRA (use_peft), whose reference is the base without its adapter",
    "critic model": "critic='adapter' with a reward_adapter_path, or a smaller critic_model_path",
    "reward model": "a reward_adapter_path on the policy's base, or a smaller reward model",
    "adapters, heads": "a smaller lora_r, or fewer lora_target_modules",
    "gradients": "LoRA (use_peft), a smaller lora_r, or zero2.yaml",
    "gradients so far": "LoRA (use_peft), a smaller lora_r, or zero2.yaml",
    "optimizer workspace": "optim='adamw_torch_fused'",
    "rollout tensors": "a smaller per_device_train_batch_size x steps_per_generation",
    "gathered": "fewer parameters per layer",
    "whole policy": "ds3_gather_for_generation=False, or a base in 4 bits under ddp",
    "buckets": "a smaller lora_r, or a smaller reduce_bucket_size in the DeepSpeed configuration",
    "optimizer": "optim='paged_adamw_8bit', LoRA, or zero2.yaml",
    "trunk cache": "a smaller trunk_cache_gib; what lies beyond is computed each time",
    "cache": "a smaller per_device_train_batch_size x steps_per_generation, or a shorter max_completion_length",
    "sampling": "a smaller per_device_train_batch_size x steps_per_generation",
    "prompts": "a smaller per_device_train_batch_size x steps_per_generation, or shorter prompts",
    "activations": "a smaller per_device_train_batch_size with more gradient_accumulation_steps, "
    "gradient_checkpointing, or shorter prompts and completions",
    "scoring": "a smaller per_device_train_batch_size",
    "reserve": "a larger card",
}


@dataclass
class MemoryPlan:
    """Bytes of one process.

    Attributes:
        parts: What there is, by name.
        phases: The parts alive together, by phase of a step.
    """

    parts: dict[str, int]
    phases: dict[str, list[str]]

    def phase_bytes(self, phase: str) -> int:
        return sum(self.parts[name] for name in self.phases[phase])

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phase_bytes)

    @property
    def peak(self) -> int:
        return self.phase_bytes(self.peak_phase)

    @property
    def largest(self) -> str:
        """Largest part of the phase with the peak."""
        return max(self.phases[self.peak_phase], key=self.parts.__getitem__)

    def check_fits(self, card: int) -> None:
        """Raise `ValueError` if the peak is above `card` bytes, with the largest part and what makes it smaller."""
        if self.peak > card:
            raise ValueError(
                f"The plan needs {gib(self.peak)} in the phase {self.peak_phase!r}, the card has {gib(card)}. Largest "
                f"part: {self.largest}, {gib(self.parts[self.largest])}; smaller with {REMEDIES[self.largest]}."
            )


def count_parts(shape: RunShape, model: nn.Module, quantized: set[str]) -> dict[str, int]:
    """What the shapes alone say, in bytes of one process alone; `model` and `quantized` of [`build_on_meta`]."""
    sizes = [(name, bytes_of(name, p, quantized, shape.quantization)) for name, p in model.named_parameters()]
    owned = {owner: sum(size for name, size in sizes if owner_of(name) == owner) for owner in (CRITIC, "adapters")}
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = shape.rollout * (shape.prompt_length + shape.completion_length)
    base = sum(size for _, size in sizes) - sum(owned.values()) + buffers
    return {
        "base": base,
        "reference": base if shape.reference == "copy" else 0,
        "critic model": owned[CRITIC],
        "reward model": sum(classifier_bytes(config) for config in shape.reward_configs),
        "adapters, heads": owned["adapters"],
        "gradients": 4 * trained,
        "optimizer": math.ceil(trained * OPTIMIZER_BYTES[shape.optim]),
        # Torch's AdamW without `fused` makes lists of temporaries as large as the parameters on a GPU.
        "optimizer workspace": 4 * trained if (shape.optim, shape.device) == ("adamw_torch", "cuda") else 0,
        "cache": cache_bytes(shape),
        "sampling": decode_workspace(shape),
        # Ids and masks of whole rows, six numbers per sampled token, and the same once more while they are shuffled.
        "rollout tensors": 2 * (tokens * 2 * 8 + shape.rollout * shape.completion_length * 6 * 4),
    }


def trace_run(shape: RunShape) -> Activations:
    """Activations of the run; they depend on whether weights are in pieces, and not on the number of ranks."""
    model, quantized = build_on_meta(shape)
    return trace_activations(
        model,
        quantized=quantized,
        compute_dtype=compute_dtype(shape),
        rollout=shape.rollout,
        rows=shape.rows,
        prompt_length=shape.prompt_length,
        completion_length=shape.completion_length,
        gradient_checkpointing=shape.gradient_checkpointing,
        autocast=shape.autocast,
        accumulates=shape.accumulates,
        device=shape.device,
        fused=shape.sharding in ("none", "ddp"),
    )


def plan_memory(shape: RunShape, activations: Activations | None = None) -> MemoryPlan:
    """Add up what one process of the run holds.

    Args:
        activations ([`~rlhf_ext.models.memory_trace.Activations`], *optional*):
            Those of [`trace_run`] for another number of ranks; tracing 80 layers takes half a minute.

    Returns:
        [`MemoryPlan`]: bytes by part and by phase.
    """
    model, quantized = build_on_meta(shape)
    parts = count_parts(shape, model, quantized)
    layer = max(layer_bytes(model.get_base_model() if isinstance(model, PeftModel) else model))
    traced = trace_run(shape) if activations is None else activations
    parts |= {
        # Without accumulation the first micro-batch starts from none, and few are there when activations are most.
        "gradients so far": parts["gradients"] if shape.accumulates else traced.gradients,
        "activations": traced.update,
        "scoring": traced.scoring,
        "prompts": traced.prefill,
    }
    trunk = trunk_bytes(shape, model)
    if shape.device == "cpu" and trunk:  # a card holds none of it
        parts["trunk cache"] = trunk
    _share(parts, shape, layer)
    resident = ["base", "reference", "critic model", "reward model", "adapters, heads", "optimizer"]
    resident += [name for name in ("gathered", "buckets", "reserve") if name in parts]
    whole = ["whole policy"] if "whole policy" in parts else []
    kept = ["rollout tensors", *(["trunk cache"] if "trunk cache" in parts else [])]
    return MemoryPlan(
        parts=parts,
        phases={
            "reading prompts": [*resident, *whole, "prompts"],
            "sampling": [*resident, *whole, "cache", "sampling"],
            "scoring": [*resident, *kept, "scoring"],
            "update": [*resident, *kept, "gradients so far", "activations"],
            "optimizer step": [*resident, *kept, "gradients", "optimizer workspace"],
        },
    )


def _share(parts: dict[str, int], shape: RunShape, layer: int) -> None:
    """Turn the bytes of one process alone into those of one of `ranks`."""
    ranks, sharding = shape.ranks, shape.sharding
    trained = parts["gradients"]
    if sharding == "ddp":
        parts["buckets"] = trained
    if sharding == "zero2":
        # Gradients are reduced through a bucket and kept by their rank, which also holds its part in fp32 once more.
        parts["buckets"] = min(trained, 4 * ZERO_BUCKET)
        parts["optimizer"] = math.ceil((parts["optimizer"] + trained) / ranks)
    if sharding == "zero3" and shape.gathers_for_generation:
        parts["whole policy"] = parts["base"] + parts["adapters, heads"]
    if sharding in ("zero3", "fsdp2"):
        # Reward models of their own are not prepared, so they stay whole.
        for name in ("base", "reference", "critic model", "adapters, heads", "optimizer"):
            parts[name] = math.ceil(parts[name] / ranks)
        parts["gathered"] = GATHERED_LAYERS * layer
        if sharding == "zero3":
            parts["buckets"] = min(trained, 4 * ZERO_BUCKET)
            parts["optimizer"] += math.ceil(trained / ranks)
    if sharding in ("zero2", "zero3", "fsdp2"):
        for name in ("gradients", "gradients so far"):
            if name in parts:
                parts[name] = math.ceil(parts[name] / ranks)
    if shape.device == "cuda":
        parts["reserve"] = CUDA_RESERVE
