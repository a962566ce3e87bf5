"""Supervised fine-tuning leaves what the next step needs: how its base was quantised, and a card without paths."""

import json

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig

from rlhf_ext.trainers.sft_trainer import CompleteSFTTrainer
from tests.tiny import tiny_causal_lm, tiny_tokenizer


def test_an_adapter_says_how_its_base_was_quantised(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_causal_lm("llama", tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    arguments = {"bf16": False, "use_cpu": True, "report_to": "none", "max_steps": 1, "save_steps": 1}
    trainer = CompleteSFTTrainer(
        model=str(tmp_path / "base"),
        args=SFTConfig(str(tmp_path / "out"), **arguments, gradient_checkpointing=False, disable_tqdm=True),
        train_dataset=Dataset.from_list([{"prompt": "w1 w2", "completion": " good"}] * 4),
        processing_class=tokenizer,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "out" / "checkpoint-1"):
        assert json.loads((folder / "base_quantization.json").read_text())["load_in_4bit"] is True
    trainer.create_model_card("out", dataset_name=str(tmp_path / "rows.jsonl"))
    assert "rows.jsonl" not in (tmp_path / "out" / "README.md").read_text()
