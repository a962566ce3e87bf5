"""The table of patches stays true: each applies to one place and names a test, and no pitfall is left out."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent
spec = importlib.util.spec_from_file_location("mutants_invariants", ROOT / "benchmarks" / "mutants_invariants.py")
mutants = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutants)


def numbered_tests() -> set[str]:
    """`file.py::test_name` of every test of a pitfall or request."""
    found = set()
    for path in FOLDER.glob("test_*.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        found |= {f"{path.name}::{f.name}" for f in functions if f.name.startswith(("test_s", "test_r"))}
    return found


def test_every_patch_applies_to_one_place_and_names_a_test():
    entries = [entry for entry in mutants.read_table() if "reason" not in entry]
    lost = {entry["test"] for entry in entries} - numbered_tests()
    assert not lost, f"no such tests: {sorted(lost)}"
    for entry in entries:
        ast.parse(mutants.patched(entry))
        for number in mutants.numbers_of(entry):
            token = f"{number[0].lower()}{int(number[1:]):02d}_"
            assert token in entry["test"].split("::")[1], f"{entry['number']} is checked by {entry['test']}"


def test_every_pitfall_and_every_test_has_an_entry():
    numbers = {number for entry in mutants.read_table() for number in mutants.numbers_of(entry)}
    assert {f"S{i}" for i in range(1, 35)} - numbers == set()
    tokens = {f"{number[0].lower()}{int(number[1:]):02d}" for number in numbers}
    for test in numbered_tests():
        own = [part for part in test.split("::test_")[1].split("_") if part[1:].isdigit() and part[0] in "sr"]
        assert set(own) <= tokens, f"{test} has no patch"


def test_the_published_table_is_that_of_the_patches():
    result = json.loads((ROOT / "benchmarks" / "results" / "mutants.json").read_text())
    entries = mutants.read_table()
    assert [row[0] for row in result["rows"]] == [entry["number"] for entry in entries], "run `make mutants`"
    tried = {entry["number"]: entry for entry in entries if "reason" not in entry}
    for number, wrong, test, _, outcome in result["rows"]:
        if number in tried:
            assert outcome == mutants.NOTICED, f"{number} stays green"
            assert tried[number]["test"].endswith(test.strip("`")) and wrong == tried[number]["wrong"]


def test_a_patch_without_its_place_is_refused(tmp_path):
    table = tmp_path / "table.yaml"
    entry = {
        "number": "S1",
        "wrong": "a",
        "patch": "b",
        "test": "c",
        "file": "README.md",
        "old": "no such text",
        "new": "",
    }
    table.write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="S1: 'no such text' stands 0 times in README.md, not once"):
        mutants.read_table(table)
    table.write_text(json.dumps([{"number": "S1", "wrong": "a"}]))
    with pytest.raises(ValueError, match="S1 has the fields"):
        mutants.read_table(table)
