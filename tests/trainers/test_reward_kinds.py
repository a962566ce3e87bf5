"""Ways to train a reward model, one case each: an NF4 base, a stream of rows; both resumed to the same bits."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from rlhf_ext.models.scoring import classifier_of, load_reward_model
from rlhf_ext.trainers.reward_config import PreferenceRewardConfig
from rlhf_ext.trainers.reward_trainer import PreferenceRewardTrainer
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.test_reward_trainer import build as build_rows
from tests.trainers.test_reward_trainer import loss_of, options


ROWS = [
    {"prompt": f"w{i} ", "completions": ["good", f"bad w{i % 3}", "w4"][: 2 + i % 2], "best": i % 2} for i in range(10)
]
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "learning_rate": 1e-2}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    tiny_causal_lm("llama", tiny_tokenizer(), hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_an_nf4_base_trains_resumes_and_loads(tmp_path, sft):
    def build(**kwargs):
        return PreferenceRewardTrainer(
            model=sft,
            args=PreferenceRewardConfig(**options(tmp_path, **{**SAVING, **kwargs})),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tiny_tokenizer(),
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            ),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"),
        )

    trainer = build(learning_rate=3e-6)
    start = weights(trainer)
    assert classifier_of(trainer.model).is_loaded_in_4bit
    assert {p.dtype for p in start.values()} == {torch.float32}
    assert start.keys() == {n for n, p in trainer.model.named_parameters() if "lora_" in n or "modules_to_save" in n}
    trainer.train()
    for name, tensor in weights(trainer).items():  # in bf16 they would stand still at this rate
        if "lora_A" not in name:
            assert (tensor != start[name]).float().mean() > 0.9, name
    resumed = build(learning_rate=3e-6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in weights(trainer).items():
        assert torch.equal(weights(resumed)[name], tensor), name
    trainer.save_model()
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(load_reward_model(tmp_path)(input_ids=ids).logits, expected)


def build_stream(folder, **kwargs):
    return PreferenceRewardTrainer(
        model=tiny_reward_model("llama", tiny_tokenizer()),
        args=PreferenceRewardConfig(**options(folder, **kwargs)),
        train_dataset=Dataset.from_list(ROWS).to_iterable_dataset(),
        eval_dataset=Dataset.from_list(ROWS).to_iterable_dataset(),
        processing_class=tiny_tokenizer(),
    )


def test_a_stream_gives_the_loss_of_the_same_rows_and_resumes(tmp_path):
    # All rows in one batch, so that their order is no difference.
    one = {"max_steps": 1, "per_device_train_batch_size": 10, "per_device_eval_batch_size": 10}
    stream, rows = build_stream(tmp_path, **one), build_rows(tmp_path, ROWS, eval_rows=ROWS, **one)
    expected = loss_of(rows)[0].item()
    stream.train()
    assert stream.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)
    rows.train()
    for name, tensor in weights(rows).items():
        torch.testing.assert_close(weights(stream)[name], tensor, atol=1e-5, rtol=0)
    assert stream.evaluate()["eval_loss"] == pytest.approx(rows.evaluate()["eval_loss"], abs=1e-5)
    # Into the second pass: 10 rows are 5 steps.
    whole = build_stream(tmp_path / "whole", **SAVING)
    whole.train()
    resumed = build_stream(tmp_path / "resumed", **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name


def test_every_process_cuts_a_stream_for_itself(tmp_path):
    """TRL's rule, on which we lean: accelerate would cut a flat batch of candidates as if all tensors were as long."""
    assert build_stream(tmp_path).args.accelerator_config.dispatch_batches is False
    assert build_rows(tmp_path, ROWS).args.accelerator_config.dispatch_batches is None
