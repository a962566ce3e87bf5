"""A 4-bit base stays what it was when something is evaluated on it.

What is tested happens on CPUs with AVX512-BF16 alone; on others nothing here can turn red.
"""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from rlhf_ext.models.base_quantization import without_cpu_packing
from rlhf_ext.models.build import build_roles, load_policy
from rlhf_ext.models.scoring import load_reward_model
from rlhf_ext.trainers.reward_config import PreferenceRewardConfig
from rlhf_ext.trainers.reward_trainer import PreferenceRewardTrainer
from tests.tiny import tiny_causal_lm, tiny_tokenizer
from tests.trainers.test_reward_trainer import PAIRS, loss_of, options


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    tiny_causal_lm("llama", tiny_tokenizer(), hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def lora(task):
    return LoraConfig(r=4, target_modules="all-linear", task_type=task, init_lora_weights=False)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def test_reward_training_goes_on_with_the_same_gradient_after_an_evaluation(tmp_path, sft):
    trainer = PreferenceRewardTrainer(
        model=sft,
        args=PreferenceRewardConfig(**options(tmp_path, max_steps=1)),
        train_dataset=Dataset.from_list(PAIRS),
        eval_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer(),
        quantization_config=BitsAndBytesConfig(**NF4),
        peft_config=lora("SEQ_CLS"),
    )
    model = trainer.model.train()
    before, scores = gradients(model, loss_of(trainer)[0]), loss_of(trainer)[1].detach()
    trainer.evaluate()
    model.eval()
    assert torch.equal(loss_of(trainer)[1].detach(), scores)
    model.train()
    after = gradients(model, loss_of(trainer)[0])
    assert before.keys() == after.keys()
    assert not [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    trainer.save_model()
    loaded = load_reward_model(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(loaded.train()))


def test_policies_and_roles_train_on_after_an_evaluation(sft):
    stock = AutoModelForSequenceClassification.from_pretrained(
        sft, num_labels=1, quantization_config=BitsAndBytesConfig(**NF4), dtype=torch.float32
    )
    packed = get_peft_model(stock, lora("SEQ_CLS"))
    expected = logits_of(packed.train())
    logits_of(packed.eval())  # packs
    torch.testing.assert_close(logits_of(without_cpu_packing(packed).train()), expected, rtol=0.1, atol=0.1)
    policy = get_peft_model(load_policy(sft, quantization_config=BitsAndBytesConfig(**NF4)), lora("CAUSAL_LM"))
    fresh = copy.deepcopy(policy)
    for model in (policy, build_roles(fresh, critic="none").model):
        model.train()
        loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.square().mean()
        before = gradients(model, loss)
        assert torch.equal(logits_of(model), logits_of(model.eval()))
        model.train()
        loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.square().mean()
        after = gradients(model, loss)
        assert before and not [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
