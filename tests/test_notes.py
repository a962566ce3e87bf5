"""The page for readers of the notes: every block runs, every function it names exists, none is left out."""

import re
from pathlib import Path

import pytest

from rlhf_ext import functional


PAGE = (Path(__file__).resolve().parents[1] / "docs/notes_zh.md").read_text(encoding="utf-8")
SECTIONS = {part.splitlines()[0]: part for part in PAGE.split("\n## ")[1:]}
BLOCKS = [
    (title, block) for title, part in SECTIONS.items() for block in re.findall(r"```python\n(.*?)```", part, re.DOTALL)
]


@pytest.mark.parametrize(("title", "block"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_every_block_runs_and_checks_something(title, block):
    assert "assert " in block
    exec(compile(block, title, "exec"), {})


def test_every_section_with_a_formula_has_a_block():
    assert [
        title for title, part in SECTIONS.items() if "$" in part and "|---|" not in part and "```" not in part
    ] == []


def test_every_function_is_on_the_page():
    assert set(re.findall(r"`rlhf_ext\.functional\.(\w+)`", PAGE)) <= set(functional.__all__)
    assert [name for name in functional.__all__ if name not in PAGE] == []
