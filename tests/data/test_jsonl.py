"""Rows from JSONL files, and prompts as text."""

import pytest

from rlhf_ext.data.jsonl import read_jsonl
from rlhf_ext.data.texts import text_of


def test_rows_may_hold_any_character_and_a_cut_line_is_left_out_only_where_it_may_be(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": "x\u2028y\x85z"}\n\n{"a": 2}\n'.encode())
    rows = [{"a": "x\u2028y\x85z"}, {"a": 2}]
    assert read_jsonl(path) == read_jsonl(path, may_be_cut=True) == rows
    with path.open("a") as file:
        file.write('{"a": 3}')
    assert read_jsonl(path) == [*rows, {"a": 3}]
    assert read_jsonl(path, may_be_cut=True) == rows, "whole by chance: its line was not ended"
    with path.open("a") as file:
        file.write('\n{"a": "cu')
    assert read_jsonl(path, may_be_cut=True) == [*rows, {"a": 3}]
    with pytest.raises(ValueError, match=r"line 5 of '.*rows.jsonl' is broken JSON.*remove its step"):
        read_jsonl(path)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(("line", "words"), [(b"[1]", "no JSON object"), (b'{"a": "\xff"}', "broken JSON")])
def test_a_line_that_is_no_row_is_named(tmp_path, line, words, cut):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"line 2 of .*{words}"):
        read_jsonl(path, may_be_cut=cut)


def test_prompts_and_answers_as_text():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert text_of(turns) == "system: s\n\nuser: q"
    assert text_of(turns[1:]) == "user: q", "a lone turn of somebody else keeps its role"
    assert text_of([{"role": "assistant", "content": "a"}]) == text_of(["a"]) == text_of("a") == "a"
    assert text_of(None) == ""
