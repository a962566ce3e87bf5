"""The worked numbers of `vectors.json`, as tensors."""

import json
from pathlib import Path

import torch


CASES = {case["id"]: case for case in json.loads((Path(__file__).parent / "vectors.json").read_text())["cases"]}

# Absolute tolerances of the cases, by the precision the function is called with.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}


def case(name):
    return CASES[name]["inputs"], CASES[name]["expected"]


def close(actual, expected, dtype=torch.float64):
    """Compare by the case's absolute tolerance alone (1e-6 in float64, 1e-5 in float32)."""
    actual = torch.as_tensor(actual, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype])


def differs(actual, wrong):
    """Assert that a number the notes' misprint would give is not what we give."""
    actual = torch.as_tensor(actual, dtype=torch.float64)
    assert (actual - torch.as_tensor(wrong, dtype=torch.float64)).abs().max() > 1e-3
