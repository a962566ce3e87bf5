"""A resumed reward run is the uninterrupted one, bit by bit, full and with LoRA; a damaged checkpoint is refused."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

from rlhf_ext import PreferenceRewardConfig, PreferenceRewardTrainer
from rlhf_ext.models.checkpoints import check_checkpoint
from rlhf_ext.models.lm_head import keep_lm_head
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer


# Three candidates in some rows; 10 rows in batches of 2 are 5 steps an epoch.
ROWS = [
    {"prompt": f"w{i} ", "completions": ["good", f"bad w{i % 3}", "w4"][: 2 + i % 2], "best": i % 2} for i in range(10)
]


def build(folder, lora, lm=False, **config):
    model = tiny_reward_model("llama", tiny_tokenizer())
    if lm:
        keep_lm_head(model, tiny_causal_lm("llama", tiny_tokenizer()).lm_head.state_dict())
        config["lm_coef"] = 0.5
    options = {
        "per_device_train_batch_size": 2,
        "max_steps": 9,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 2,  # a checkpoint at 3 lies between two of them
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        **config,
    }
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", lora_dropout=0.1) if lora else None
    return PreferenceRewardTrainer(
        model=model,
        args=PreferenceRewardConfig(str(folder), **options),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:4]),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def end_of(trainer):
    names = ("loss", "accuracy", "margin", "learning_rate", "num_tokens")
    logs = [{name: entry[name] for name in names} for entry in trainer.state.log_history if "loss" in entry]
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}, logs


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
# Within the first and within the second epoch
@pytest.mark.parametrize("step, lm", [(3, False), (6, False), (6, True)], ids=["3", "6", "6-lm"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, lora, step, lm):
    trainer = build(tmp_path / "whole", lora, lm)
    trainer.train()
    weights, logs = end_of(trainer)
    resumed = build(tmp_path / "resumed", lora, lm)
    torch.rand(99)  # where the random numbers of this process stand must not matter; its seed orders the data
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    found, logs_found = end_of(resumed)
    assert found.keys() == weights.keys()
    assert not [name for name, tensor in weights.items() if not torch.equal(tensor, found[name])]
    assert logs_found == logs
    head = next(p for n, p in resumed.model.named_parameters() if "score" in n and "original_module" not in n)
    assert head.requires_grad and head.dtype == torch.float32


@pytest.mark.parametrize("limit", [None, 1])
def test_the_best_model_is_found_again(tmp_path, limit):
    """`Trainer` notes the best checkpoint by the folder it was written in, which is renamed afterwards."""
    steps = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_total_limit": limit}
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "learning_rate": 3e-2}
    trainer = build(tmp_path, False, **steps, **best)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    step = max(losses, key=losses.get)
    assert step != 9, "the last one would prove nothing"
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{step}")
    kept = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], tensor) for name, tensor in kept.items())


def test_a_damaged_checkpoint_is_named(tmp_path):
    build(tmp_path, False, max_steps=6).train()
    check_checkpoint(tmp_path / "checkpoint-6")
    file = tmp_path / "checkpoint-6" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="checkpoint-6.* is damaged: model.safetensors has 100 bytes.*checkpoint-3"):
        build(tmp_path, False).train(resume_from_checkpoint=True)
