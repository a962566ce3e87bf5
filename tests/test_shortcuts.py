"""The table of `benchmarks/shortcuts.py`: paired by seed, and an exact shortcut is held to its losses."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import shortcuts  # noqa: E402

from rlhf_ext import PPOConfig  # noqa: E402


def run_of(gold, losses=(0.5, 0.25)):
    return {"gold": gold, "training": [0.0, gold], "losses": list(losses), "cpu_seconds": 10.0, "commit": "abc"}


def test_differences_are_paired_by_seed():
    found = {(arm, seed): run_of(0.1 * seed) for arm in shortcuts.ARMS for seed in range(3)}
    for seed in range(3):
        found["no padding", seed] = run_of(0.1 * seed + 0.2, losses=(9.0, 9.0))
    rows = {row[0]: row for row in shortcuts.result(found, [0, 1, 2])["rows"]}
    assert rows["none"][2] == "0.100 [-0.148, 0.348]" and rows["none"][4:] == ["-", "-", "-"]
    assert rows["no padding"][4:6] == ["0.200 [0.200, 0.200]", "0.100 [0.100, 0.100]"]
    assert rows["frozen layers once"][6] == "0"
    found["frozen layers once", 2] = run_of(0.2, losses=(0.5, 0.125))
    (row,) = [row for row in shortcuts.result(found, [0, 1, 2])["rows"] if row[0] == "frozen layers once"]
    assert row[6] == "0.12"
    found["frozen layers once", 2] = run_of(0.2, losses=(0.5,))
    with pytest.raises(ValueError, match="zip"):
        shortcuts.result(found, [0, 1, 2])


@pytest.mark.parametrize("arm", shortcuts.ARMS)
def test_arms_are_settings_of_ppo(tmp_path, arm):
    fields = {**shortcuts.PLAIN, **shortcuts.ARMS[arm]}
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, num_iterations=4, **fields)
    assert {name: getattr(args, name) for name in fields} == fields
