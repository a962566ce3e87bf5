"""The page for readers of the notes: every block runs and checks something, every formula has its four parts."""

import ast
import re
from pathlib import Path

import pytest

from rlhf_ext import functional


PAGE = (Path(__file__).resolve().parents[1] / "docs/notes_zh.md").read_text(encoding="utf-8")
# A formula's heading is of level 3. Text between code fences may hold no heading, so splitting by lines is safe.
FORMULAS = {part.splitlines()[0]: part for part in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]}
FORMULAS = {title: re.split(r"^## ", part, flags=re.MULTILINE)[0] for title, part in FORMULAS.items()}
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(title, block) for title, part in FORMULAS.items() for block in FENCE.findall(part)]


@pytest.mark.parametrize(("title", "block"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_block_runs_and_checks_something(title, block):
    tree = ast.parse(block)
    assert any(isinstance(node, ast.Assert) for node in ast.walk(tree))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules <= {"itertools", "math", "torch", "rlhf_ext.functional"}
    assert max(map(len, block.splitlines())) <= 119
    exec(compile(block, f"docs/notes_zh.md: {title}", "exec"), {})


def test_no_python_block_is_left_out():
    assert len(FENCE.findall(PAGE)) == len(BLOCKS) == PAGE.count("```python")


def test_every_formula_has_its_four_parts_in_order():
    order = ("\n$$\n", "\n**函数**：", "\n**笔记印错之处**：", "\n```python\n")
    for title, part in FORMULAS.items():
        positions = [part.find(mark) for mark in order]
        assert -1 not in positions and positions == sorted(positions), title
        assert part.count("\n$$\n") % 2 == 0, title


def test_formulas_are_numbered_and_cross_references_exist():
    assert [int(title.split(".")[0]) for title in FORMULAS] == list(range(1, len(FORMULAS) + 1))
    referred = {int(number) for number in re.findall(r"第 (\d+) 条", PAGE)}
    referred |= {int(number) for pair in re.findall(r"第 (\d+) 到 (\d+) 条", PAGE) for number in pair}
    assert referred <= set(range(1, len(FORMULAS) + 1))


def test_every_function_is_named_and_every_name_exists():
    named = set(re.findall(r"`rlhf_ext\.functional\.(\w+)`", PAGE))
    assert named == set(functional.__all__)


def test_every_config_field_exists():
    # Read, not imported: TRL takes ten seconds to import.
    fields = {}
    for name, file in (("PPOConfig", "ppo_config"), ("PreferenceRewardConfig", "reward_config")):
        path = Path(functional.__file__).resolve().parents[1] / f"trainers/{file}.py"
        classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        fields[name] = {
            node.target.id
            for item in classes
            if item.name == name
            for node in item.body
            if isinstance(node, ast.AnnAssign)
        }
    inherited = {"epsilon", "temperature"}
    for name, field in re.findall(r"`(PPOConfig|PreferenceRewardConfig)\.(\w+)`", PAGE):
        assert field in fields[name] | inherited, (name, field)
    for name, arguments in re.findall(r"`(PPOConfig|PreferenceRewardConfig)\(([^)]*)\)`", PAGE):
        assert set(re.findall(r"(\w+)=", arguments)) <= fields[name], (name, arguments)
