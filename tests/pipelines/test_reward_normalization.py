"""Gain and bias from samples of the fixed reference: before and after training, never multiplied, not of the trunk."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from rlhf_ext.data.candidates import tokenize_candidates
from rlhf_ext.models.generation import sample_completions
from rlhf_ext.models.pooling import normalization_of
from rlhf_ext.models.reward_functions import ModelReward
from rlhf_ext.models.scoring import load_reward_model, saved_normalization
from rlhf_ext.pipelines import reward_normalization
from rlhf_ext.pipelines.reward_normalization import (
    load_samples,
    normalize_after,
    normalize_before,
    raw_scores,
    reference_answers,
    reference_samples,
)
from rlhf_ext.trainers.reward_config import PreferenceRewardConfig
from rlhf_ext.trainers.reward_trainer import PreferenceRewardTrainer
from tests.functional.vectors import case
from tests.tiny import WORDS, tiny_causal_lm, tiny_tokenizer
from tests.trainers.test_reward_trainer import PAIRS, loss_of, options, reference_scores


PROMPTS = [f"w{i} w{i + 1} " for i in range(20)]


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    tiny_causal_lm("llama", tiny_tokenizer()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def samples(sft):
    return reference_samples(sft, tiny_tokenizer(), PROMPTS, max_new_tokens=6)


def build(folder, sft, **kwargs):
    return PreferenceRewardTrainer(
        model=sft,
        args=PreferenceRewardConfig(**options(folder, **kwargs)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer(),
    )


def given(samples):
    return {
        "prompts": samples.prompts,
        "completions": samples.texts,
        "completion_ids": samples.completion_ids,
        "prompt_ids": samples.prompt_ids,
    }


def loaded_scores(folder, samples):
    reward = ModelReward(load_reward_model(folder), tiny_tokenizer(), tiny_tokenizer())
    return torch.tensor(reward(**given(samples))).double()


@pytest.mark.parametrize("aggregation", ["last", "sum"])
def test_before_and_after_give_one_unit_each_and_never_their_product(tmp_path, sft, samples, aggregation):
    trainer = build(tmp_path, sft, reward_aggregation=aggregation)
    raw = raw_scores(trainer.model, trainer.processing_class, samples)
    first = (
        torch.stack([reference_scores(trainer, row) for row in trainer.train_dataset])
        if aggregation == "last"
        else None
    )
    gain, bias = normalize_before(trainer, samples)
    assert (gain, bias) == pytest.approx(
        (1 / raw.std(correction=0).item(), -(raw.mean() / raw.std(correction=0)).item())
    )
    if first is not None:  # the loss of the first step is in the new unit
        margins = gain * (first[:, 0] - first[:, 1])
        torch.testing.assert_close(loss_of(trainer)[0], -torch.nn.functional.logsigmoid(margins).mean())
    trainer.train()
    trainer.save_model()
    assert saved_normalization(str(tmp_path)) == (gain, bias)  # saved as it trained, if nothing follows
    before = loaded_scores(tmp_path, samples)
    torch.testing.assert_close(
        before, raw_scores(trainer.model, tiny_tokenizer(), samples) * gain + bias, atol=1e-4, rtol=0
    )
    assert abs(before.std(correction=0).item() - 1) > 1e-3, "training that moves nothing proves nothing"
    after = normalize_after(trainer, tmp_path, samples)
    scores = loaded_scores(tmp_path, samples)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5) and scores.std(correction=0).item() == pytest.approx(
        1, abs=1e-5
    )
    assert saved_normalization(str(tmp_path)) == after == normalization_of(trainer.model)
    assert normalize_after(trainer, tmp_path, samples) == pytest.approx(after)  # again: the same, not its square


def test_a_resumed_run_trains_on_in_the_unit_it_began_with(tmp_path, sft, samples):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = build(tmp_path, sft, **saving)
    normalize_before(trainer, samples)
    trainer.train()
    resumed = build(tmp_path, sft, **saving)
    normalize_before(resumed, samples)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert normalization_of(resumed.model) == normalization_of(trainer.model)


def test_samples_come_from_the_fixed_reference(tmp_path, sft, samples):
    again = reference_samples(sft, tiny_tokenizer(), PROMPTS, max_new_tokens=6)
    assert again.completion_ids == samples.completion_ids  # whatever was trained meanwhile
    torch.manual_seed(0)
    policy = tiny_causal_lm("llama", tiny_tokenizer())
    from transformers import set_seed

    set_seed(0)
    column = Dataset.from_dict({"prompt": PROMPTS})["prompt"]  # what `datasets` gives is no list
    by_hand = sample_completions(policy, tiny_tokenizer(), column, max_new_tokens=6, batch_size=64)
    assert by_hand.completion_ids == samples.completion_ids
    other = tmp_path / "other"
    tiny_causal_lm("llama", tiny_tokenizer(), seed=3).save_pretrained(other)
    found = reference_samples(str(other), tiny_tokenizer(), PROMPTS, max_new_tokens=6)
    assert found.completion_ids != samples.completion_ids
    messages = [[{"role": "user", "content": "w1"}]]
    chat = reference_samples(sft, tiny_tokenizer(), messages, max_new_tokens=2)
    assert chat.prompt_ids == [
        tiny_tokenizer().apply_chat_template(messages[0], add_generation_prompt=True)["input_ids"]
    ]


def fake_scores(monkeypatch, scores):
    monkeypatch.setattr(reward_normalization, "raw_scores", lambda *args: torch.tensor(scores, dtype=torch.float64))


def test_vectors_of_both_papers_reach_the_saved_model(tmp_path, sft, monkeypatch):
    trainer = build(tmp_path, sft)
    trainer.save_model()
    inputs, expected = case("rm.norm.ziegler")
    fake_scores(monkeypatch, inputs["raw"])
    assert normalize_after(trainer, tmp_path, SimpleNamespace()) == pytest.approx((expected["gain"], expected["bias"]))
    assert saved_normalization(str(tmp_path)) == pytest.approx((expected["gain"], expected["bias"]))
    inputs, expected = case("rm.norm.stiennon")
    fake_scores(monkeypatch, inputs["ref_scores"])
    gain, bias = normalize_after(trainer, tmp_path, SimpleNamespace(), scale=False)
    assert [gain * score + bias for score in inputs["scores"]] == pytest.approx(expected["normalized"])


def test_reference_answers_are_read_from_rows_and_end(tmp_path, sft):
    file = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"w{i} ", "completion": f"good w{i}"} for i in range(4)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    samples = load_samples(str(file), None, tiny_tokenizer())
    assert samples.prompt_ids[2] == tiny_tokenizer()("w2 ")["input_ids"]
    assert samples.completion_ids[2] == [*tiny_tokenizer()("good w2")["input_ids"], 1]
    trainer = build(tmp_path / "rm", sft)
    trainer.save_model()
    gain, _ = normalize_after(trainer, tmp_path / "rm", samples, scale=False)
    scores = loaded_scores(tmp_path / "rm", samples)
    assert gain == 1.0 and scores.mean().item() == pytest.approx(0, abs=1e-6)
    file.write_text("\n".join(json.dumps({"prompt": row["prompt"]}) for row in rows))
    with pytest.raises(ValueError, match="prompts only.*reference_model_path.*completion"):
        load_samples(str(file), None, tiny_tokenizer())
    assert load_samples(None, None, tiny_tokenizer()) is None


def test_reference_answers_end_as_training_ends_them(tmp_path):
    """Templates close a turn with a token of their own, behind which no end of sequence was ever read."""
    tokenizer = tiny_tokenizer(words=(*WORDS, "<end_of_turn>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<end_of_turn>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'<end_of_turn>'")
    prompt, answer = [{"role": "user", "content": "w1 w2"}], [{"role": "assistant", "content": "good"}]
    [read] = tokenize_candidates({"prompt": prompt, "completions": [answer]}, tokenizer)["candidate_ids"]
    for completion in (answer, "good"):
        samples = reference_answers(Dataset.from_list([{"prompt": prompt, "completion": completion}]), tokenizer)
        assert samples.prompt_ids[0] + samples.completion_ids[0] == read
    assert tokenizer.convert_ids_to_tokens(read)[-1] == "<end_of_turn>" and samples.texts == ["good"]


def test_saving_again_keeps_the_unit_of_training(tmp_path, sft, samples):
    """`push_to_hub` saves once more, after the model got its gain."""
    trainer = build(tmp_path, sft)
    normalize_before(trainer, samples)
    trainer.train()
    trainer.save_model()
    gain, bias = normalize_after(trainer, tmp_path, samples)
    before = json.loads((tmp_path / "reward_config.json").read_text())
    trainer.save_model()
    assert json.loads((tmp_path / "reward_config.json").read_text()) == before
    assert before["score_gain"] == gain and before["training_gain"] == trainer.training_gain != gain


def test_a_reference_without_a_pad_token_is_sampled(sft, samples):
    bare = tiny_tokenizer()
    bare.pad_token = None
    found = reference_samples(sft, bare, PROMPTS, max_new_tokens=6)
    assert found.completion_ids == samples.completion_ids


def test_a_reference_is_quantised_as_in_training(tmp_path, sft, monkeypatch):
    seen = {}
    monkeypatch.setattr(reward_normalization, "load_policy", lambda path, **kwargs: seen.update(kwargs) or 1 / 0)
    shutil.copytree(sft, tmp_path / "sft")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "sft" / "base_quantization.json").write_text(json.dumps(settings))
    with pytest.raises(ZeroDivisionError):
        reference_samples(str(tmp_path / "sft"), tiny_tokenizer(), PROMPTS)
    assert seen["quantization_config"].load_in_4bit


def test_the_reference_stops_where_the_policy_does(tmp_path):
    """An instruct model ends its turn on an id that only its generation config names."""
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm("llama", tokenizer)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(5, len(tokenizer))]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    samples = reference_samples(str(tmp_path), tokenizer, ["w1 ", "w2 "], max_new_tokens=12)
    assert max(map(len, samples.completion_ids)) < 12 and not any(samples.truncated)
    wide = tiny_tokenizer(words=tuple(f"x{i}" for i in range(200)))
    with pytest.raises(ValueError, match="do not belong together"):
        reference_samples(str(tmp_path), wide, ["x1 "], max_new_tokens=2)
