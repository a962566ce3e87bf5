"""The two READMEs say the same: headings, commands and code; what they link and list exists."""

import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")}


def blocks(text: str) -> list[str]:
    return re.findall(r"```.*?```", text, re.DOTALL)


def test_headings_code_and_tables_are_alike():
    english, chinese = PAGES.values()
    levels = [[len(mark) for mark in re.findall(r"^(#+) ", text, re.MULTILINE)] for text in (english, chinese)]
    assert levels[0] == levels[1]
    assert blocks(english) == blocks(chinese)
    rows = [len(re.findall(r"^\|", text, re.MULTILINE)) for text in (english, chinese)]
    assert rows[0] == rows[1]


def test_the_two_commands_are_there_and_in_ci():
    ci = (ROOT / ".ci/run").read_text()
    for command in ("pip install -e . && rlhf-ext quickstart", 'pip install -e ".[test]" && pytest'):
        assert all(f"```bash\n{command}\n```" in text for text in PAGES.values())
        assert command in ci


def test_links_and_tree_exist():
    for text in PAGES.values():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert (ROOT / target).exists(), target
    tree = next(block for block in blocks(PAGES["README.md"]) if block.startswith("```text"))
    folder = ROOT
    for line in tree.splitlines()[1:-1]:
        name = line.split()[0]
        folder = ROOT if not line.startswith(" ") else ROOT / "rlhf_ext"
        assert (folder / name).exists(), name
