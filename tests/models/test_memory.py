"""What is measured: unique storages with the state of quantisation, and one base under four roles."""

import gc
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DynamicCache,
    LlamaConfig,
)

from rlhf_ext import PPOConfig, PPOTrainer
from rlhf_ext.models.build import load_policy
from rlhf_ext.models.memory import (
    PeakMemory,
    cache_bytes,
    gib,
    gradient_bytes,
    model_bytes,
    optimizer_bytes,
    unique_bytes,
)
from rlhf_ext.models.memory_plan import plan_memory
from rlhf_ext.models.memory_shape import RunShape
from tests.tiny import tiny_causal_lm, tiny_tokenizer


NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose linear layers hold most of the bytes even in 4 bits, its tokenizer, and a reward adapter."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    lora = LoraConfig(**LORA, task_type="SEQ_CLS", modules_to_save=["score"])
    get_peft_model(classifier, lora).save_pretrained(folder / "reward")
    return folder


@pytest.fixture(scope="module")
def trainer(folder, tmp_path_factory):
    """Four roles on one NF4 base."""
    return PPOTrainer(
        model=load_policy(str(folder), quantization_config=NF4, dtype=torch.float32),
        reward_adapter=str(folder / "reward"),
        args=PPOConfig(
            output_dir=str(tmp_path_factory.mktemp("out")),
            per_device_train_batch_size=2,
            steps_per_generation=1,
            num_iterations=1,
            max_completion_length=4,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["the cat", "bad mat sat", "w1 w2", "on"]}),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
    )


def test_four_roles_hold_one_base(trainer, folder):
    """Request 7: all weights of four roles are at most 1.10 x one NF4 base, adapters and heads."""
    alone = load_policy(str(folder), quantization_config=NF4, dtype=torch.float32)
    one_base = sum(model_bytes(alone).values())
    linear = sum(
        unique_bytes([p, p.quant_state.absmax])
        for p in alone.parameters()
        if getattr(p, "quant_state", None) is not None
    )
    assert linear > 0.8 * one_base
    owners = model_bytes(trainer.model)
    assert set(owners) == {"base", "adapter default", "adapter critic", "adapter reward", "heads"}
    small = sum(size for owner, size in owners.items() if owner != "base")
    assert owners["adapter critic"] == owners["adapter reward"] == owners["adapter default"] > 0
    # Whatever else is kept, by whomever: every other tensor of the process that is large is counted against the bound.
    del alone
    gc.collect()
    of_model = {t.untyped_storage().data_ptr() for t in tensors_of(trainer.model)}
    resident = sum(owners.values())
    for tensor in [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_model and storage.nbytes() >= 512 * 512 // 2:
            resident += storage.nbytes()
    assert resident <= 1.10 * (one_base + small)
    assert trainer.reference is None


def tensors_of(model):
    return [*model.parameters(), *model.buffers()]


def test_one_base_counts_with_its_quantisation_state(trainer):
    """The footprint that transformers reports leaves the state out."""
    base = model_bytes(trainer.model)["base"]
    weights = [p for n, p in trainer.model.named_parameters() if "lora_" not in n and "_head.weight" not in n]
    weights += [p for n, p in trainer.model.named_parameters() if n.endswith("lm_head.weight")]
    without = unique_bytes([*weights, *trainer.model.buffers()])
    scales = [p.quant_state.absmax for p in weights if getattr(p, "quant_state", None) is not None]
    assert len(scales) == 4 * 7 and all(scale.dtype == torch.uint8 for scale in scales)
    assert base - without > unique_bytes(scales)


def test_planned_weights_are_the_measured_ones(trainer, folder):
    """To 1%: base with its quantisation, adapters and heads exactly, optimizer but for the counters of steps."""
    trainer.train()
    lora = LoraConfig(**LORA)
    plan = plan_memory(
        RunShape(
            config=trainer.model.get_base_model().config,
            quantization=NF4,
            lora=lora,
            reward_lora=lora,
            rows=2,
            rollout=2,
            prompt_length=3,
            completion_length=4,
            device="cpu",
        )
    )
    owners = model_bytes(trainer.model)
    assert plan.parts["adapters, heads"] == sum(size for owner, size in owners.items() if owner != "base")
    assert plan.parts["base"] == pytest.approx(owners["base"], rel=0.01)
    assert plan.parts["optimizer"] == pytest.approx(optimizer_bytes(trainer.optimizer), rel=0.01)


def test_storages_count_once():
    base = torch.zeros(100)
    assert unique_bytes([base, base[:10], base.view(10, 10), torch.zeros(5)]) == 400 + 20
    model = tiny_causal_lm("gpt2", tiny_tokenizer())  # its head is tied to its embeddings
    parameters = sum(p.numel() * 4 for p in model.parameters())
    assert model_bytes(model)["base"] == parameters + sum(b.numel() * b.element_size() for b in model.buffers())


def test_gradients_optimizer_and_cache():
    layer = torch.nn.Linear(10, 20, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    assert gradient_bytes(layer) == optimizer_bytes(optimizer) == 0
    layer(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert gradient_bytes(layer) == 800
    assert optimizer_bytes(optimizer) == 2 * 800 + 4  # two moments, one counter of steps
    cache = DynamicCache()
    for index in range(3):
        cache.update(torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 7, 8), index)
    assert cache_bytes(cache) == 3 * 2 * 2 * 4 * 7 * 8 * 4
    assert cache_bytes(None) == 0


@pytest.mark.parametrize("way", ["high water mark", "samples"])
def test_peak_sees_what_has_gone_again(way, monkeypatch):
    if way == "samples":
        monkeypatch.setattr(PeakMemory, "_reset_high_water", staticmethod(lambda: False))
    elif not sys.platform.startswith("linux"):
        pytest.skip("the kernel's mark is Linux's")
    meter = PeakMemory()
    before = meter.now()
    block = torch.ones(64 * 2**20 // 4)
    if way == "samples":
        for _ in range(20):
            block += 1
    del block
    assert 60 * 2**20 < meter.peak() - before < 80 * 2**20
    meter.reset()
    assert meter.peak() - before < 20 * 2**20


def test_sizes_as_text():
    assert [gib(1.5 * 2**30), gib(3 * 2**20), gib(2**30 // 5)] == ["1.50 GiB", "3.0 MiB", "0.20 GiB"]
