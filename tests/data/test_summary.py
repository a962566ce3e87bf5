"""Counts that can be done by hand, and the checks that stop a run before it starts."""

import json

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlhf_ext.data.summary import (
    check_context,
    drop_long_prompts,
    report_summaries,
    summarize_preferences,
    summarize_prompts,
    summarize_sft,
)
from tests.tiny import tiny_tokenizer


PAIRS = [
    {"prompt": "w1 w2", "completions": [" w3", " w4 w5"], "target": [1.0, 0.0]},
    {"prompt": "w1 w2", "completions": [" w3", " w4 w5"], "target": [1.0, 0.0]},  # an exact duplicate
    {"prompt": "w1 w2", "completions": [" w3", " w4 w5"], "target": [0.5, 0.5]},  # the same texts, a tie
    {"prompt": "w1", "completions": [" w3", " w4", " w5"], "target": [0.7, 0.2, 0.1]},  # soft, K = 3
]


def test_preference_counts_by_hand():
    other = Dataset.from_list([{"prompt": "w1", "completions": [" a", " b"], "target": [1.0, 0.0]}])
    summary = summarize_preferences(Dataset.from_list(PAIRS), tiny_tokenizer(), other=other, max_length=4)
    assert summary.to_dict() == {
        "kind": "preferences",
        "rows": 4,
        "prompts": 2,
        "prompt_tokens": {"min": 1, "p50": 2, "p90": 2, "max": 2},
        "completion_tokens": {"min": 2, "p50": 2, "p90": 3, "max": 3},
        "candidates": {2: 3, 3: 1},
        "ties": 1,
        "soft_labels": 1,
        "rankings": 0,
        "incomparable": 0,
        "duplicate_rows": 1,
        "leaked_prompts": 1,
        "leaked_rows": 1,
        "over_limit": 3,  # 2 + 2 + the end-of-sequence token
        "boundary_mismatch_rate": 0.0,
    }


def test_trl_pairs_rankings_and_incomparable_rows():
    pairs = Dataset.from_list([{"prompt": "w1", "chosen": " w2", "rejected": " w3"}] * 2)
    summary = summarize_preferences(pairs, tiny_tokenizer())
    assert (summary.rows, summary.candidates, summary.duplicate_rows) == (2, {2: 2}, 1)

    rows = [
        {"prompt": "w1", "completions": [" w2", " w3"], "ranking": [1, 0], "incomparable": False},
        {"prompt": "w1", "completions": [" w2", " w3"], "ranking": None, "incomparable": True},
    ]
    summary = summarize_preferences(Dataset.from_list(rows), tiny_tokenizer())
    assert (summary.rows, summary.rankings, summary.incomparable, summary.ties) == (2, 1, 1, 0)


def test_a_row_that_is_no_preference_is_named():
    rows = [PAIRS[0], {**PAIRS[0], "target": [0.9, 0.9]}]
    with pytest.raises(ValueError, match="Row 1 .*`target`"):
        summarize_preferences(Dataset.from_list(rows), tiny_tokenizer())


def test_rows_without_a_prompt_are_prompts_of_their_own():
    rows = Dataset.from_list([{"completions": ["w1", "w2"], "target": [1.0, 0.0]}] * 2)
    found = summarize_preferences(rows, tiny_tokenizer(), other=rows)
    assert (found.prompts, found.leaked_prompts) == (2, 0)


def test_prompts_and_sft():
    prompts = summarize_prompts(Dataset.from_list([{"prompt": "w1 w2"}, {"prompt": "w3"}]), tiny_tokenizer())
    assert (prompts.rows, prompts.prompt_tokens["max"], prompts.completion_tokens) == (2, 2, {})
    sft = summarize_sft(Dataset.from_list([{"prompt": "w1 w2", "completion": " w3"}]), tiny_tokenizer(), max_length=4)
    assert (sft.prompt_tokens["max"], sft.completion_tokens["max"], sft.over_limit) == (2, 2, 0)
    text = summarize_sft(Dataset.from_list([{"text": "w1 w2 w3"}]), tiny_tokenizer(), max_length=3)
    assert (text.prompt_tokens["max"], text.completion_tokens["max"], text.over_limit) == (0, 4, 1)


def test_messages_count_as_the_template_writes_them():
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    summary = summarize_sft(Dataset.from_list([{"messages": turns}]), tiny_tokenizer())
    # <|user|> w1 w2 <eos> <|assistant|>, then w3 <eos>
    assert (summary.prompt_tokens["max"], summary.completion_tokens["max"]) == (5, 2)
    assert summary.boundary_mismatch_rate == 0.0


def merging_tokenizer():
    """Letters, with `ab` merged into one token: the border between `a` and `b` does not survive joining."""
    vocab = {"<eos>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    backend = Tokenizer(models.BPE(vocab, merges=[("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_s30_boundary_mismatch_rate():
    rows = [
        {"prompt": "ca", "completions": ["b", "c"], "target": [1.0, 0.0]},  # "ca" + "b" = c, ab
        {"prompt": "cc", "completions": ["b", "c"], "target": [1.0, 0.0]},
    ]
    summary = summarize_preferences(Dataset.from_list(rows), merging_tokenizer())
    assert summary.boundary_mismatch_rate == 0.25
    assert "boundary mismatch rate  0.2500" in str(summary)


def test_context():
    rows = Dataset.from_list([{"prompt": "w1", "completion": " w2"}, {"prompt": "w1 w2 w3", "completion": " w4"}])
    check_context(rows, tiny_tokenizer(), 5)
    check_context(rows, tiny_tokenizer(), None)
    with pytest.raises(ValueError, match=r"`max_position_embeddings` of 4 tokens in 1 of 2 rows \(row 1: 3 \+ 2\)"):
        check_context(rows, tiny_tokenizer(), 4)


def test_drop_long_prompts():
    rows = Dataset.from_list([{"prompt": "w1", "id": 0}, {"prompt": "w1 w2 w3", "id": 1}])
    kept, dropped = drop_long_prompts(rows, tiny_tokenizer(), 2)
    assert (kept["id"][:], dropped) == ([0], 1)
    assert drop_long_prompts(rows, tiny_tokenizer(), None) == (rows, 0)
    with pytest.raises(ValueError, match="`max_prompt_length` is 0, but the shortest of 2 prompts has 1"):
        drop_long_prompts(rows, tiny_tokenizer(), 0)


def test_report_is_printed_and_kept(tmp_path, capsys):
    rows = Dataset.from_list(PAIRS)
    summary = summarize_preferences(rows, tiny_tokenizer(), other=rows)
    report_summaries(str(tmp_path), train=summary)
    printed = capsys.readouterr().out
    assert "train preferences:" in printed and "WARNING: prompts stand in both splits" in printed
    assert json.loads((tmp_path / "data_summary.json").read_text())["train"]["leaked_rows"] == 4
