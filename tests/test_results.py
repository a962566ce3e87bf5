"""Numbers in docs/ are those of the result files, to the letter."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "results.py"
RESULT = {
    "title": "Accuracy",
    "command": "make something",
    "commit": "abc1234",
    "seed": [0, 1],
    "columns": ["arm", "accuracy"],
    "rows": [["ours", 0.123456], ["theirs", 1]],
    "notes": "Three seeds.",
}
TABLE = """**Accuracy**

| arm | accuracy |
| --- | --- |
| ours | 0.1235 |
| theirs | 1 |

Three seeds.

`make something`, commit `abc1234`, seed 0, 1.
"""


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=60)


def test_docs_are_in_step_with_the_results():
    process = run("--check")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "no page shows it" not in process.stdout, process.stdout


def test_a_block_is_filled_and_the_rest_of_the_page_left_alone(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "results" / "acc.json").write_text(json.dumps(RESULT))
    page = tmp_path / "docs" / "results.md"
    page.write_text("before\n<!-- results:acc -->\nold\n<!-- /results:acc -->\nafter\n")
    places = ["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    assert run("--check", *places).returncode == 1
    assert run(*places).returncode == 0
    assert page.read_text() == f"before\n<!-- results:acc -->\n{TABLE}<!-- /results:acc -->\nafter\n"
    assert run("--check", *places).returncode == 0


def test_a_second_result_stands_beside_the_first(tmp_path):
    for name in ("results", "docs"):
        (tmp_path / name).mkdir()
    theirs = {**RESULT, "command": "make others", "columns": ["arm", "speed"], "rows": [["theirs", 3]], "notes": []}
    (tmp_path / "results" / "acc.json").write_text(json.dumps({**RESULT, "beside": "speed"}))
    (tmp_path / "results" / "speed.json").write_text(json.dumps(theirs))
    page = tmp_path / "docs" / "results.md"
    page.write_text("<!-- results:acc -->\n<!-- /results:acc -->\n")
    places = ["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    done = run(*places)
    assert done.returncode == 0 and "no page shows it" not in done.stdout, done.stderr
    text = page.read_text()
    for line in ("| arm | accuracy | speed |", "| ours | 0.1235 | - |", "| theirs | 1 | 3 |", "`make others`, commit"):
        assert line in text
    (tmp_path / "results" / "speed.json").write_text(json.dumps({**theirs, "rows": [["nobody", 3]]}))
    assert "nobody" in run(*places).stderr


def test_a_result_that_is_not_whole_is_refused(tmp_path):
    spec = importlib.util.spec_from_file_location("results", SCRIPT)
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    path = tmp_path / "acc.json"
    path.write_text(json.dumps({**RESULT, "rows": [["ours"]]}))
    with pytest.raises(ValueError, match="acc.json: row 0 has 1 cells for 2 columns"):
        results.read_result(path)
    path.write_text(json.dumps({key: value for key, value in RESULT.items() if key != "seed"}))
    with pytest.raises(ValueError, match="acc.json has no seed"):
        results.read_result(path)
    with pytest.raises(ValueError, match="has a block results:gone"):
        results.fill("<!-- results:gone -->\n<!-- /results:gone -->", {})
