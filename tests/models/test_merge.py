"""`rlhf-ext merge`: what is written is what was trained, or nothing is."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from rlhf_ext import cli
from rlhf_ext.models.base_quantization import QUANTIZATION_FILE, save_base_quantization
from rlhf_ext.models.merge import merge_adapters
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer


IDS = torch.tensor([[5, 6, 7, 8, 1], [9, 10, 11, 12, 13]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def lora(**kwargs):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **kwargs})


def add_adapter(base, folder, seed, **kwargs):
    """An adapter with weights of its own on `base`, saved; the wrapped model."""
    model = get_peft_model(base, lora(**kwargs))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def base(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_causal_lm("llama", tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_logits_equal_base_plus_adapter(kind, tmp_path):
    tiny_causal_lm(kind, tiny_tokenizer()).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(base)
    expected = logits(add_adapter(base, tmp_path / "adapter", 1, use_rslora=True, lora_alpha=3))
    merge_adapters([str(tmp_path / "adapter")], str(tmp_path / "merged"))
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 0.1
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize("saved_between", [True, False], ids=["base_is_a_folder", "merged_in_memory"])
def test_a_stack_of_sft_and_ppo_adapters(base, tmp_path, saved_between, caplog):
    sft = add_adapter(base, tmp_path / "sft", 1)
    only_sft = logits(sft)
    merged = sft.merge_and_unload()
    if saved_between:
        merge_adapters([str(tmp_path / "sft")], str(tmp_path / "sft_merged"))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "sft_merged")
    expected = logits(add_adapter(merged, tmp_path / "ppo", 2))
    merge_adapters([str(tmp_path / "sft"), str(tmp_path / "ppo")], str(tmp_path / "merged"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - only_sft).abs().max() > 0.1
    # Both adapters name one base where the first was merged in memory: nothing on disk tells that from a mistake.
    assert ("names the same base" in caplog.text) != saved_between
    if saved_between:
        merge_adapters([str(tmp_path / "ppo")], str(tmp_path / "again"))
        again = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
        torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


def test_an_adapter_that_went_on_from_another_is_merged_alone(base, tmp_path):
    add_adapter(base, tmp_path / "sft", 1)
    continued = add_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "ppo", 2)
    continued.add_adapter("ref", lora())
    continued.save_pretrained(tmp_path / "ppo")  # as PPO saves the reference of a continued adapter
    with pytest.raises(ValueError, match="went on from another adapter.*Merge it alone"):
        merge_adapters([str(tmp_path / "sft"), str(tmp_path / "ppo")], str(tmp_path / "merged"))
    merge_adapters([str(tmp_path / "ppo")], str(tmp_path / "merged"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    continued.set_adapter("default")
    torch.testing.assert_close(found, logits(continued), atol=1e-5, rtol=0)


def test_dtype_is_written_and_the_sum_is_taken_in_float32(base, tmp_path):
    model = add_adapter(base, tmp_path / "adapter", 1)
    expected = {name: t.bfloat16() for name, t in model.merge_and_unload().state_dict().items()}
    merge_adapters([str(tmp_path / "adapter")], str(tmp_path / "merged"), dtype="bfloat16")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert found.dtype == torch.bfloat16
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.items())
    base.bfloat16().save_pretrained(tmp_path / "base_bf16")
    merge_adapters([str(tmp_path / "adapter")], str(tmp_path / "own"), base=str(tmp_path / "base_bf16"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "own").dtype == torch.bfloat16


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(
    ("settings", "on_disk"),
    [(NF4, True), (NF4, False), ({"load_in_8bit": True}, False)],
    ids=["nf4_checkpoint", "nf4_when_loaded", "int8_when_loaded"],
)
def test_a_quantised_base(tmp_path, settings, on_disk):
    """Merged as the weights it computed with; 64 wide, the block of NF4."""
    tokenizer = tiny_tokenizer()
    wide = tiny_causal_lm("llama", tokenizer, hidden_size=64, intermediate_size=128)
    wide.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    name = str(tmp_path / "base")
    quantised = AutoModelForCausalLM.from_pretrained(
        name, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32
    )
    if on_disk:
        quantised.save_pretrained(tmp_path / "nf4")
        name = str(tmp_path / "nf4")
        quantised = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = add_adapter(quantised, tmp_path / "adapter", 1)
    save_base_quantization(model.get_base_model(), str(tmp_path / "adapter"))
    # In training mode: for inference on a CPU bitsandbytes repacks the weights and computes in bfloat16.
    with torch.no_grad():
        expected = model.train()(input_ids=IDS).logits
    line = ["merge", "--adapter", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    with pytest.raises(SystemExit, match=f"is quantised .*{4 if settings is NF4 else 8}-bit.*--dequantize"):
        cli.main(line)
    assert not (tmp_path / "merged").exists()
    assert cli.main([*line, "--dequantize", "--dtype", "float32"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None and merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    full = PeftModel.from_pretrained(wide, tmp_path / "adapter")
    assert (logits(full) - expected).abs().max() > 1e-2, "the base in full precision is another function"


def test_what_cannot_be_merged_is_refused(base, tmp_path):
    out = str(tmp_path / "merged")
    reward = tiny_reward_model("llama", tiny_tokenizer())
    get_peft_model(reward, lora(task_type="SEQ_CLS", modules_to_save=["score"])).save_pretrained(tmp_path / "reward")
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(base, prompt).save_pretrained(tmp_path / "prompt")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    add_adapter(base, tmp_path / "adapter", 1)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/adapter_config.json").write_text((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").write_text("")
    for adapter, message in (
        ("reward", "is a SEQ_CLS adapter, a reward model or a critic.*load_critic"),
        ("prompt", "of type PROMPT_TUNING; only LoRA"),
        ("pickled", "has no adapter_model.safetensors"),
        ("base", "has no adapter_config.json"),
        ("nowhere", "is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_adapters([str(tmp_path / adapter)], out)
    with pytest.raises(ValueError, match="is not empty"):
        merge_adapters([str(tmp_path / "adapter")], str(tmp_path / "full"))
    with pytest.raises(ValueError, match="dtype='int8'"):
        merge_adapters([str(tmp_path / "adapter")], out, dtype="int8")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names no base"):
        merge_adapters([str(tmp_path / "adapter")], out)
    merge_adapters([str(tmp_path / "adapter")], out, base=str(tmp_path / "base"))


def test_tied_output_layer_is_refused(tmp_path):
    tiny_causal_lm("llama", tiny_tokenizer(), tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    add_adapter(base, tmp_path / "adapter", 1, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="one tensor in this base"):
        merge_adapters([str(tmp_path / "adapter")], str(tmp_path / "merged"))


def test_no_file_says_quantised_for_a_plain_base(base, tmp_path):
    save_base_quantization(base, str(tmp_path))
    assert not (tmp_path / QUANTIZATION_FILE).exists()
