"""Four roles on one quantised base: what is kept in float32 stays there, and everything starts where it should."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from rlhf_ext.models.build import load_policy
from rlhf_ext.models.merge import merge_adapters
from rlhf_ext.models.scoring import token_scores
from rlhf_ext.trainers.ppo_rollout import whole_rows
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.test_ppo_roles import (
    backward,
    build,
    changed,
    check_critic_is_the_score,
    logged,
    lora,
    rollout,
    weights,
)


IDS = torch.tensor([[5, 6, 7, 8, 1], [9, 10, 11, 12, 13]])
SIZES = {"hidden_size": 64, "intermediate_size": 128}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
QUANTISED = {
    "nf4": lambda: BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bf16": lambda: None,
    "fp32": lambda: None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("quantised"))


def make_world(folder):
    """A base, a reward adapter and an SFT adapter on it, each with weights of its own."""
    tokenizer = tiny_tokenizer()
    base = tiny_causal_lm("llama", tokenizer, **SIZES)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    classifier = tiny_reward_model("llama", tokenizer, **SIZES)
    torch.manual_seed(5)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    reward = get_peft_model(classifier, LoraConfig(**config, task_type="SEQ_CLS", modules_to_save=["score"]))
    reward.peft_config["default"].base_model_name_or_path = str(folder / "base")
    reward.save_pretrained(folder / "reward")
    sft = get_peft_model(base, LoraConfig(**config, task_type="CAUSAL_LM", lora_dropout=0.1))
    sft.peft_config["default"].base_model_name_or_path = str(folder / "base")
    with torch.no_grad():
        for name, parameter in sft.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    sft.save_pretrained(folder / "sft")
    return folder


def policy(folder, kind, path="base"):
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    return load_policy(str(folder / path), dtype=dtype, quantization_config=QUANTISED[kind]())


def trainer_on(tmp_path, folder, kind, **kwargs):
    kwargs.setdefault("peft_config", lora())
    return build(tmp_path, policy(folder, kind), reward_adapter=str(folder / "reward"), **kwargs)


@pytest.mark.parametrize("kind", ["nf4", "int8", "bf16"])
def test_the_roles_start_equal_and_stay_float32(tmp_path, folder, kind):
    trainer = trainer_on(tmp_path, folder, kind, config={"bf16": kind == "bf16"})
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name or "critic_head" in name or "reward_head" in name:
            assert parameter.dtype == torch.float32, name
        if "critic" in name:
            # Casting to bf16 and back would leave rounded weights here, and exact ones in the frozen reward adapter.
            twin = trainer.model.get_parameter(
                name.replace(".critic.", ".reward.").replace("critic_head", "reward_head")
            )
            assert torch.equal(parameter, twin), name
    batch = rollout(trainer)
    if kind != "bf16":
        check_critic_is_the_score(trainer, batch)
    ids, mask = whole_rows(batch)
    with torch.no_grad():
        one = trainer.model(input_ids=ids, attention_mask=mask, role="critic")
        other = trainer.model(input_ids=ids, attention_mask=mask, role="reward")
    assert torch.equal(one, other)
    before = weights(trainer.model)
    gradients = backward(trainer, batch)
    assert set(gradients) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert changed(trainer.model, before) == set(gradients)
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-4)


def test_the_saved_adapter_says_that_its_base_was_quantised(tmp_path, folder, caplog, monkeypatch):
    """PEFT's config does not, and on the base in full precision the adapter is another policy."""
    trainer = trainer_on(tmp_path, folder, "nf4")
    trainer.save_model(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="4-bit.*dequantize=True"):
        merge_adapters([str(tmp_path / "saved")], str(tmp_path / "merged"))
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| quantisation of the base |" in card and "bnb_4bit_quant_type=nf4" in card
    assert "--output_dir merged --dequantize`" in card
    # The card's code loads policy, critic and reward model on a base that is rounded as in training.
    # The policy comes by a stock class, whose base bitsandbytes repacks with rounded scales on some CPUs.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(block.replace('repo = "out"', f'repo = "{tmp_path}/saved"'), names)
    for role, model in (("critic", names["critic"]), ("reward", names["reward_model"])):
        assert model.get_base_model().quantization_method == "bitsandbytes"
        ids = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        with torch.no_grad():
            torch.testing.assert_close(token_scores(model, **ids), trainer.model.eval()(**ids, role=role))
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=IDS).logits
        torch.testing.assert_close(names["policy"](input_ids=IDS).logits, expected)
    with caplog.at_level("WARNING"):
        load_policy(str(tmp_path / "saved"))
    assert "another policy" in caplog.text
    trainer_on(tmp_path, folder, "fp32").save_model(str(tmp_path / "plain"))
    merge_adapters([str(tmp_path / "plain")], str(tmp_path / "merged"))


def test_a_critic_cannot_start_from_a_quantised_model_without_adapters(folder, tmp_path):
    classifier = tiny_reward_model("llama", tiny_tokenizer(), **SIZES)
    classifier.save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    quantised = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "reward", quantization_config=QUANTISED["nf4"](), dtype=torch.float32
    )
    with pytest.raises(ValueError, match="quantised model without adapters.*critic_model"):
        build(tmp_path, reward_funcs=quantised)
