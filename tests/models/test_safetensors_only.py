"""Weights are read from safetensors files alone; a pickle is named, with the way to convert it."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlhf_ext.models.build import load_policy
from rlhf_ext.pipelines.evaluation_checks import check_policy_files
from tests.tiny import tiny_causal_lm, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A full model and an adapter on it, each beside a copy whose weights are a pickle, and an adapter on that."""
    model = tiny_causal_lm("llama", tiny_tokenizer())
    model.save_pretrained(tmp_path / "full")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((tmp_path / "full" / "config.json").read_text())
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    adapter.peft_config["default"].base_model_name_or_path = str(tmp_path / "full")
    adapter.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for name, base, weights in (
        ("pickled_adapter", "full", "adapter_model.bin"),
        ("adapter_on_pickled", "pickled", "adapter_model.safetensors"),
    ):
        (tmp_path / name).mkdir()
        changed = {**config, "base_model_name_or_path": str(tmp_path / base)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(changed))
        (tmp_path / name / weights).write_bytes((tmp_path / "adapter" / "adapter_model.safetensors").read_bytes())
    return tmp_path


@pytest.mark.parametrize("read", [load_policy, lambda path: check_policy_files(path, "model path")])
def test_pickles_are_refused(folder, read):
    for good in ("full", "adapter"):
        read(str(folder / good))
    for bad, words in (
        ("pickled", "model path=.*pickled' has its weights in pytorch_model.bin, a pickle.*AutoModelForCausalLM"),
        ("pickled_adapter", "model path=.*adapter_model.bin, a pickle.*peft.AutoPeftModelForCausalLM"),
        ("adapter_on_pickled", "adapter_on_pickled'.*pickled' has its weights in pytorch_model.bin.*convert it"),
    ):
        with pytest.raises(ValueError, match=words):
            read(str(folder / bad))
    (folder / "pickled" / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="has no weights, no model.safetensors.*Save it again"):
        read(str(folder / "pickled"))
