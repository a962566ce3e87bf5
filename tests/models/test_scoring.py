"""Scores by the attention mask, reward models from disk, and reward functions."""

import asyncio
import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from rlhf_ext.data.candidates import tokenize_candidates
from rlhf_ext.models.scoring import (
    ModelReward,
    checked_reward,
    last_token_scores,
    load_reward_model,
    pool_by_attention_mask,
    pooled_aggregation,
    sum_token_scores,
    token_scores,
)
from tests.tiny import WORDS, tiny_causal_lm, tiny_reward_model, tiny_tokenizer


KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2"])


def rows(*lists, side="right", width=None):
    width = width or max(map(len, lists))
    ids, mask = torch.zeros(len(lists), width, dtype=torch.long), torch.zeros(len(lists), width, dtype=torch.long)
    for index, row in enumerate(lists):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), None)
        ids[index, where], mask[index, where] = torch.tensor(row), 1
    return ids, mask


@KINDS
def test_the_pooled_forward_is_the_stock_forward_where_text_holds_no_pad(kind):
    model = tiny_reward_model(kind, tiny_tokenizer())
    ids, mask = rows([5, 6, 7, 8], [9, 10])
    stock = model(input_ids=ids, attention_mask=mask).logits
    assert pool_by_attention_mask(model) is model
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, stock)
    assert model(input_ids=ids, attention_mask=mask, return_dict=False)[0].shape == (2, 1)


def test_pooling_survives_copies_pickles_peft_and_changes_of_aggregation():
    model = pool_by_attention_mask(tiny_reward_model("llama", tiny_tokenizer()))
    forward = model.forward
    assert pool_by_attention_mask(model).forward is forward
    ids, mask = rows([5, 6, 7], [9])
    expected = model(input_ids=ids, attention_mask=mask).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert pooled_aggregation(other) == "last"
        with torch.no_grad():
            other.score.weight.zero_()
        assert other(input_ids=ids, attention_mask=mask).logits.abs().max() == 0.0
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    wrapped = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    )
    assert pooled_aggregation(wrapped) == "last"
    assert torch.equal(wrapped(input_ids=ids, attention_mask=mask).logits, expected)
    assert torch.equal(last_token_scores(token_scores(wrapped, ids, mask), mask), expected[:, 0])
    assert pooled_aggregation(pool_by_attention_mask(wrapped, "sum")) == "sum"


def test_sums_count_the_tokens_they_are_told():
    model = pool_by_attention_mask(tiny_reward_model("gpt2", tiny_tokenizer()), "sum")
    ids, mask = rows([5, 6, 7], [9, 10])
    scores = token_scores(model, ids, mask)
    everything = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    assert torch.equal(everything, torch.stack([scores[0].sum(), scores[1, :2].sum()]))
    part = torch.tensor([[0, 1, 1], [0, 1, 0]])
    some = model(input_ids=ids, attention_mask=mask, completion_mask=part).logits[:, 0]
    assert torch.equal(some, torch.stack([scores[0, 1:].sum(), scores[1, 1]]))
    assert sum_token_scores(torch.tensor([[1.0, float("nan")]]), torch.tensor([[1, 0]])).item() == 1.0


def test_the_head_is_fp32_under_bf16_and_autocast():
    model = tiny_reward_model("llama", tiny_tokenizer(), torch.bfloat16)
    ids, mask = rows([5, 6, 7], [9, 10])
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = (hidden.float() @ model.score.weight.float().T).squeeze(-1)
    scores = token_scores(model, ids, mask)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(token_scores(model, ids, mask), expected)


def test_wrong_models_masks_and_labels_are_refused():
    tokenizer = tiny_tokenizer()
    ids, mask = rows([5, 6, 7], [9, 10])
    with pytest.raises(ValueError, match="without a head named `score`"):
        token_scores(tiny_causal_lm("llama", tokenizer), ids, mask)
    two = tiny_reward_model("llama", tokenizer)
    two.config.num_labels = 2
    with pytest.raises(ValueError, match="num_labels.*2"):
        token_scores(two, ids, mask)
    with pytest.raises(ValueError, match=r"no real token in rows \[1\]"):
        last_token_scores(torch.zeros(2, 3), torch.tensor([[0, 1, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        last_token_scores(torch.zeros(2, 3), torch.ones(2, 4))
    model = pool_by_attention_mask(tiny_reward_model("llama", tokenizer))
    with pytest.raises(ValueError, match="aggregation.*mean"):
        pool_by_attention_mask(model, "mean")
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=ids, attention_mask=mask, labels=torch.zeros(2))
    with pytest.raises(ValueError, match="completion_mask"):
        model(input_ids=ids, attention_mask=mask, completion_mask=mask)


def test_a_head_may_come_with_the_base_and_has_one_label(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_causal_lm("llama", tokenizer).save_pretrained(tmp_path / "lm")
    two = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=1)
    get_peft_model(two, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "no-head")
    tiny_reward_model("llama", tokenizer).save_pretrained(tmp_path / "rm")
    # A base that is a reward model itself brings the head.
    assert load_reward_model(tmp_path / "no-head", base_model=tmp_path / "rm") is not None
    with pytest.raises(ValueError, match="is no adapter"):
        load_reward_model(tmp_path / "rm", base_model=tmp_path / "lm")
    config = two.config
    config.num_labels = 2
    type(two)(config).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="one score per text"):
        load_reward_model(tmp_path / "two")


def test_a_reward_model_scores_the_very_ids_of_the_rollout():
    tokenizer = tiny_tokenizer()
    model = tiny_reward_model("gpt2", tokenizer).train()
    reward = ModelReward(model, tokenizer, tiny_tokenizer(pad_is_eos=True), name="rm", batch_size=2)
    assert reward.shares_tokenizer and reward.__name__ == "rm"
    prompts, prompt_ids = ["w0 w1", "w2", "w3"], [[5, 6], [7], [8]]
    completion_ids = [[9, 1], [9], [10, 11, 12]]
    scores = reward(prompts, ["w4", "w4", "w5 w6 w7"], completion_ids, prompt_ids=prompt_ids, trainer_state=None)
    assert model.training
    model.eval()
    for score, start, ids in zip(scores, prompt_ids, completion_ids, strict=True):
        row = torch.tensor([start + ids])
        assert score == pytest.approx(token_scores(model, row, torch.ones_like(row))[0, -1].item(), abs=1e-5)
    assert reward(prompts, ["w4", "w4", "w5 w6 w7"], completion_ids) == scores  # prompt ids made from the prompts
    cut, finished = reward(["w2", "w2"], ["w4", "w4"], [[9], [9, 1]])
    assert cut != finished


def test_request_2_another_tokenizer_reads_the_text():
    policy = tiny_tokenizer()
    own = tiny_tokenizer(words=tuple(reversed(WORDS)))
    model = tiny_reward_model("llama", own)
    reward = ModelReward(model, own, policy)
    assert not reward.shares_tokenizer
    eos = policy.eos_token_id
    scores = reward(["w1 ", "w1 "], ["good w2", "good w2"], [[6, 7, eos], [6, 7]])
    for score, text in zip(scores, ("w1 good w2<eos>", "w1 good w2"), strict=True):
        ids = torch.tensor([own(text)["input_ids"]])
        assert score == pytest.approx(token_scores(model, ids, torch.ones_like(ids))[0, -1].item(), abs=1e-5)
    reward.eos_token_ids = {7}
    assert reward(["w1 "], ["good w2"], [[6, 7]])[0] == pytest.approx(scores[0], abs=1e-6)


def test_a_cut_text_stays_open_where_the_tokenizer_closes_every_text():
    own = tiny_tokenizer(words=tuple(reversed(WORDS)))
    end = [("<eos>", own.eos_token_id)]
    own.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=end)
    reward = ModelReward(tiny_reward_model("llama", own), own, tiny_tokenizer())
    for finished in (True, False):
        row = {"prompt": "w1 ", "completions": ["good", "bad"], "truncated": [not finished, False]}
        assert reward._text_ids("w1 ", "good", finished) == tokenize_candidates(row, own)["candidate_ids"][0]


def test_an_encoder_is_read_through_its_own_forward():
    tokenizer = tiny_tokenizer(words=tuple(reversed(WORDS)))
    tokenizer.eos_token = None
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=1,
    )
    model = BertForSequenceClassification(config).eval()
    reward = ModelReward(model, tokenizer, tiny_tokenizer())
    scores = reward(["w1 ", "w1 "], ["good", "good w2 w3"], [[6, 1], [6, 7, 8]])
    for score, text in zip(scores, ("w1 good", "w1 good w2 w3"), strict=True):
        expected = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0].item()
        assert score == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=r"at most 16 tokens.*rows \[1\] have \[18\]"):
        reward(["w1 ", "w1 " * 17], ["good", "good"], [[6], [6]])


def test_a_summing_model_counts_the_completion():
    tokenizer = tiny_tokenizer()
    model = pool_by_attention_mask(tiny_reward_model("llama", tokenizer), "sum")
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = token_scores(model, ids, torch.ones_like(ids))[0, 2:].sum().item()
    assert ModelReward(model, tokenizer, tokenizer)(["w0 w1"], ["w2 w3"], [[7, 8]])[0] == pytest.approx(expected)
    own = tiny_tokenizer(words=tuple(reversed(WORDS)))
    text = ModelReward(model, own, tokenizer)
    ids = torch.tensor([own("w0 w1 w2 w3")["input_ids"]])
    expected = token_scores(model, ids, torch.ones_like(ids))[0, 2:].sum().item()
    assert text(["w0 w1 "], ["w2 w3"], [[7, 8]])[0] == pytest.approx(expected)


def constant(prompts, completions, value=1.0, **kwargs):
    return [value] * len(completions)


class Scorer:
    def __call__(self, prompts, completions, **kwargs):
        return torch.tensor([0.5] * len(completions))


async def later(prompts, completions, **kwargs):
    return [1, None]


@pytest.mark.parametrize(
    "value, words",
    [
        (float("nan"), r"'constant'.*nan.*rows \[0, 1\]"),
        (float("inf"), r"inf.*rows \[0, 1\]"),
        ("1", r"'1'.*rows \[0, 1\]"),
    ],
)
def test_values_that_are_no_finite_number_are_refused(value, words):
    with pytest.raises(ValueError, match=words):
        checked_reward(constant)(prompts=["a", "b"], completions=["c", "d"], value=value)


def test_checked_rewards_keep_names_and_values():
    batch = {"prompts": ["a", "b"], "completions": ["c", "d"]}
    assert checked_reward(constant)(**batch) == [1.0, 1.0]
    assert checked_reward(constant)(["a"], ["c"], np.float32(2.0)) == [2.0]
    assert checked_reward(constant)(**batch, value=None) == [None, None]
    assert checked_reward(constant)(**batch, value=True) == [1.0, 1.0]
    scorer = checked_reward(Scorer())
    assert scorer(**batch) == [0.5, 0.5] and scorer.__name__ == "Scorer"
    assert checked_reward(scorer) is scorer
    assert checked_reward(functools.partial(constant, value=3.0)).__name__ == "constant"
    waiting = checked_reward(later)
    assert asyncio.iscoroutinefunction(waiting) and waiting.__name__ == "later"
    assert asyncio.run(waiting(**batch)) == [1.0, None]
    with pytest.raises(ValueError, match="'later' returned 2 rewards for 3 completions"):
        asyncio.run(waiting(prompts=["a"] * 3, completions=["b"] * 3))
    with pytest.raises(ValueError, match="returned a float"):
        checked_reward(lambda **kwargs: 1.0)(**batch)
