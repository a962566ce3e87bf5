"""The plan: its sums by hand, its prediction against real steps, and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, Gemma3TextConfig, GPT2Config, LlamaConfig

from rlhf_ext.models.memory_plan import CUDA_RESERVE, REMEDIES, count_parts, plan_memory
from rlhf_ext.models.memory_shape import RunShape, build_on_meta, quantized_layers


ROOT = Path(__file__).resolve().parents[2]
NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)
LORA = LoraConfig(r=2, target_modules="all-linear")
SIZES = {"rows": 2, "rollout": 4, "prompt_length": 8, "completion_length": 8}


def llama(**kwargs):
    sizes = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**sizes, **kwargs})


def shape(config=None, **kwargs):
    return RunShape(config=config or llama(), **{"lora": LORA, "reward_lora": LORA, **SIZES, **kwargs})


def parts_of(*args, **kwargs):
    """The parts that need no tracing."""
    settings = shape(*args, **kwargs)
    return count_parts(settings, *build_on_meta(settings))


def benchmark():
    spec = importlib.util.spec_from_file_location("memory_benchmark", ROOT / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_benchmark"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arm", ["lora_fp32", "lora_nf4", "full"])
def test_prediction_is_within_15_percent(arm, tmp_path):
    """Two steps in a process of its own; peak above what it holds after its imports and a tiny run."""
    line = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--run", arm, "--output_dir", str(tmp_path)]
    environment = {**os.environ, **benchmark().ALLOCATOR, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-4000:]
    numbers = json.loads(process.stdout.splitlines()[-1])
    assert numbers["peak"] > 100 * 2**20
    assert numbers["planned"] == pytest.approx(numbers["peak"], rel=0.15)


def test_weights_by_hand():
    """h=64, i=128, V=100, 2 layers, 4 heads and 2 for keys: 24,576 + 12,288 entries a layer."""
    linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    rest = 2 * 100 * 64 + 5 * 64  # embeddings, head, norms
    buffers = parts_of(dtype=torch.float32)["base"] - 4 * (linear + rest)
    assert 0 <= buffers <= 2 * 4 * 16  # the rotation's frequencies
    assert parts_of(dtype=torch.bfloat16)["base"] == 2 * (linear + rest) + buffers
    eight = parts_of(dtype=torch.bfloat16, quantization=BitsAndBytesConfig(load_in_8bit=True))["base"]
    rows = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    assert eight == linear + 4 * rows + 2 * rest + buffers
    four = parts_of(dtype=torch.bfloat16, quantization=NF4)["base"]
    # Half a byte a weight; one byte for 64 weights; per layer fp32 scales for 256 blocks, a code, an offset, a map.
    scales = linear // 64 + 14 * (4 + 4 * 256 + 4 + 64)
    assert four == linear // 2 + scales + 2 * rest + buffers


def test_tied_embeddings_stay_whole_and_count_once():
    tied, quantized = build_on_meta(shape(llama(tie_word_embeddings=True), quantization=NF4))
    assert len(quantized) == 14 and not any("lm_head" in name for name in quantized)
    untied = parts_of(quantization=NF4)["base"]
    assert untied - parts_of(llama(tie_word_embeddings=True), quantization=NF4)["base"] == 4 * 100 * 64


def test_roles_by_hand():
    adapter = 4 * 2 * 2 * (4 * 64 + 64 + 64 + 32 + 32 + 2 * (64 + 128) + 128 + 64)  # fp32, r=2, 2 layers
    parts = parts_of(dtype=torch.bfloat16)
    assert parts["adapters, heads"] == 3 * adapter + 2 * 4 * 64
    assert parts["gradients"] == 2 * adapter + 4 * 64  # policy and critic
    assert parts["optimizer"] == 2 * parts["gradients"]
    shared = parts_of(critic="shared")  # one adapter less, and of the critic only its head trains
    assert shared["adapters, heads"] == 2 * adapter + 2 * 4 * 64 and shared["gradients"] == adapter + 4 * 64
    assert parts_of(reference="adapter")["adapters, heads"] == 4 * adapter + 2 * 4 * 64
    eight_bit = parts_of(optim="paged_adamw_8bit")["optimizer"]
    assert eight_bit < 0.3 * parts["optimizer"]
    # Keys and values of 4 rows x 16 tokens: 2 layers x 2 heads x 16, in bf16.
    assert parts["cache"] == 2 * 2 * (2 * 16) * (4 * 16) * 2


def test_full_fine_tuning_has_four_models():
    parts = parts_of(lora=None, reward_lora=None, reference="copy", critic="model", reward_configs=[llama()])
    assert parts["reference"] == parts["base"] and parts["critic model"] == parts["reward model"] > 0
    assert parts["gradients"] == pytest.approx(parts["base"] + parts["critic model"], rel=0.01)


@pytest.mark.parametrize(
    "config",
    [
        Gemma3TextConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            sliding_window=4,
        ),
        GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=2, n_positions=64),
    ],
    ids=["gemma3", "gpt2"],
)
def test_other_architectures_are_traced(config):
    plan = plan_memory(shape(config, quantization=NF4, dtype=torch.bfloat16, gradient_checkpointing=True))
    assert min(plan.parts[name] for name in ("cache", "activations", "prompts", "scoring")) > 0


def test_activations_follow_their_causes():
    def activations(**kwargs):
        sizes = {"rows": 4, "completion_length": 56, "device": "cpu"}
        return plan_memory(shape(llama(num_hidden_layers=3), **{**sizes, **kwargs})).parts["activations"]

    plain = activations()
    assert activations(gradient_checkpointing=True) < 0.7 * plain
    assert activations(rows=8, rollout=8) == pytest.approx(2 * plain, rel=0.02)
    assert activations(critic="none") < 0.7 * plain  # both graphs live until one backward
    assert activations(critic="shared") < 0.7 * plain  # a frozen trunk keeps nothing
    assert activations(attn_implementation="eager") > 1.1 * plain  # all weights of attention are kept
    assert activations(dtype=torch.bfloat16, autocast=True) < 0.8 * plain


def test_logits_of_the_whole_vocabulary_are_never_held():
    """TRL's head works on tiles of 4,096 x 32,768: a vocabulary of 131,072 costs no more than one of 32,768."""
    sizes = {"rows": 4, "rollout": 4, "completion_length": 1024, "gradient_checkpointing": True, "critic": "none"}
    tile = 4096 * 32768 * 4
    small, large = (plan_memory(shape(llama(vocab_size=v), **sizes)).parts["activations"] for v in (32768, 131072))
    assert small == large and tile < small < 1.2 * tile


def test_ranks_share():
    alone = plan_memory(shape(llama(num_hidden_layers=1), dtype=torch.bfloat16)).parts
    kwargs = {"dtype": torch.bfloat16, "ranks": 8, "config": llama(num_hidden_layers=1)}
    ddp, zero2, zero3, fsdp2 = (
        plan_memory(shape(sharding=name, **kwargs)).parts for name in ("ddp", "zero2", "zero3", "fsdp2")
    )
    assert ddp["base"] == zero2["base"] == alone["base"]
    assert ddp["buckets"] == alone["gradients"] and ddp["optimizer"] == alone["optimizer"]
    assert zero2["gradients"] == pytest.approx(alone["gradients"] / 8, abs=1)
    # ZeRO's partition of the parameters in fp32 is a copy.
    assert zero2["optimizer"] == pytest.approx((alone["optimizer"] + alone["gradients"]) / 8, abs=1)
    assert fsdp2["base"] == pytest.approx(alone["base"] / 8, abs=1) and fsdp2["gathered"] > 0
    # Where weights are in pieces LoRA layers are PEFT's own, and keep more.
    assert ddp["activations"] == alone["activations"] < zero2["activations"] == fsdp2["activations"]
    # Without DeepSpeed's bf16 mode the base is in fp32, and it is put together to sample.
    assert zero3["base"] == pytest.approx(2 * alone["base"] / 8, rel=0.01)
    assert zero3["whole policy"] == pytest.approx(8 * (zero3["base"] + zero3["adapters, heads"]), abs=32)
    whole, cut = (
        plan_memory(shape(sharding="zero3", gathers_for_generation=gathers, **kwargs)) for gathers in (True, False)
    )
    assert whole.phase_bytes("sampling") == cut.phase_bytes("sampling") + zero3["whole policy"]


def test_above_the_card_names_the_largest_part_and_a_remedy():
    plan = plan_memory(shape(llama(hidden_size=512, intermediate_size=2048)))
    plan.check_fits(plan.peak)
    with pytest.raises(ValueError, match=r"The plan needs .* the card has .* Largest part: reserve, 1.00 GiB"):
        plan.check_fits(plan.peak - 1)
    assert plan.parts["reserve"] == CUDA_RESERVE
    assert {name for phase in plan.phases.values() for name in phase} <= set(REMEDIES)


def test_a_bf16_head_is_not_copied_on_a_cpu():
    """Its rows are contiguous: torch 2.13 would copy it once per row of a strided slice."""
    cpu, cuda = (plan_memory(shape(device=d, dtype=torch.bfloat16)).parts["prompts"] for d in ("cpu", "cuda"))
    assert cpu == cuda


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"optim": "lion_8bit"}, "optim='lion_8bit' has no known size"),
        ({"sharding": "zero4"}, "sharding='zero4' is unknown"),
        ({"sharding": "zero3", "quantization": NF4}, "'zero3' with a quantised base"),
    ],
)
def test_what_cannot_be_planned_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        shape(**kwargs)


def test_quantized_layers_are_those_of_bitsandbytes():
    model, quantized = build_on_meta(shape(lora=None, reward_lora=None, quantization=NF4))
    assert quantized == quantized_layers(model) and all("layers." in name for name in quantized)


def test_the_trunk_cache_by_hand():
    """Rollout of 4 x 16 tokens of 64 numbers, on a CPU alone, as far as the limit goes."""
    upper = {
        "lora": LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]),
        "reward_lora": LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]),
    }
    assert plan_memory(shape(device="cpu", **upper)).parts["trunk cache"] == 4 * 16 * 64 * 4
    assert plan_memory(shape(device="cpu", trunk_cache_gib=2**-20, **upper)).parts["trunk cache"] == 1024
    for other in (
        shape(device="cpu"),
        shape(device="cuda", **upper),
        shape(device="cpu", trunk_cache_gib=0.0, **upper),
        shape(device="cpu", quantization=BitsAndBytesConfig(load_in_8bit=True), **upper),
    ):
        assert "trunk cache" not in plan_memory(other).parts
    without_outliers = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    assert "trunk cache" in plan_memory(shape(device="cpu", quantization=without_outliers, **upper)).parts
    assert "trunk cache" in REMEDIES
