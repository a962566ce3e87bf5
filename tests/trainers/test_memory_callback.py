"""The memory table of a run: measured numbers are those of the tensors, and stand beside the plan."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from rlhf_ext import PPOConfig, PPOTrainer
from rlhf_ext.models.memory import model_bytes, optimizer_bytes
from rlhf_ext.models.memory_plan import plan_memory
from rlhf_ext.models.memory_shape import RunShape
from rlhf_ext.trainers.memory_callback import ROWS, MemoryCallback
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer


def run(tmp_path, lora, plan=None, **config):
    tokenizer = tiny_tokenizer()
    memory = MemoryCallback("cpu", plan)
    trainer = PPOTrainer(
        model=tiny_causal_lm("llama", tokenizer),
        reward_funcs=tiny_reward_model("llama", tokenizer),
        args=PPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            steps_per_generation=2,
            gradient_accumulation_steps=2,
            num_iterations=2,
            max_completion_length=6,
            max_steps=3,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **config,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["the cat", "bad mat", "w1 w2", "on mat", "w3 w4", "w5 w6"]}),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[memory],
    )
    memory.watch(trainer)
    trainer.train()
    return trainer, memory


def test_measured_numbers_are_those_of_the_tensors(tmp_path, capsys):
    trainer, memory = run(tmp_path, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    owners = model_bytes(trainer.model)
    reward = sum(model_bytes(trainer.reward_funcs[0].reward.model).values())
    assert memory.measured["adapters and heads"] == owners["adapter default"]
    assert memory.measured["weights"] == owners["base"] + owners["critic"] + reward
    trained = sum(p.numel() * 4 for p in trainer.model.parameters() if p.requires_grad)
    assert memory.measured["gradients"] == trained
    assert memory.measured["optimizer"] == optimizer_bytes(trainer.optimizer) >= 2 * trained
    # Keys and values of 4 rows and up to 2 + 5 tokens (the last one is never read): 2 layers of 16 entries.
    assert memory.measured["cache"] in [2 * 2 * 16 * 4 * 4 * tokens for tokens in range(3, 8)]
    assert memory.measured["peak"] >= 0  # a warm process may have held more before
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("memory", "planned", "measured", *ROWS))
    assert json.loads((tmp_path / "memory.json").read_text()) == {"measured": memory.measured, "planned": None}
    assert not trainer.model.get_base_model()._forward_hooks and not trainer.model.get_base_model()._forward_pre_hooks


def test_plan_stands_beside_it(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    config = tiny_causal_lm("llama", tokenizer).config
    plan = plan_memory(
        RunShape(
            config=config,
            reference="copy",
            critic="model",
            reward_configs=[config],
            rows=2,
            rollout=4,
            prompt_length=2,
            completion_length=6,
            accumulates=True,
            device="cpu",
        )
    )
    _, memory = run(tmp_path, None, plan)
    for name in ("weights", "gradients", "optimizer"):
        assert memory.planned[name] == pytest.approx(memory.measured[name], rel=0.02), name
    assert json.loads((tmp_path / "memory.json").read_text())["planned"]["peak"] == plan.peak
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("weights"))
    assert len(line.split()) == 5  # a name, and twice a number with its unit


def test_an_update_is_told_from_a_rollout(tmp_path):
    """Activations are the rise of an update: with the meter on hand, 30 MiB more in the rollout do not count."""

    class Meter:
        held, high = 100, 100

        def now(self):
            return self.held

        def reset(self):
            self.high = self.held

        def peak(self):
            return self.high

    memory, meter = MemoryCallback("cpu"), Meter()
    memory.meter, memory.baseline = meter, 60
    model = torch.nn.Linear(2, 1)
    meter.high = 500  # a rollout
    with torch.no_grad():
        memory._before_forward(model, ())
    memory._before_forward(model, ())
    meter.high = 130
    memory._end_of_update(model)
    assert memory.measured["activations"] == 30 and memory.measured["peak"] == 440
