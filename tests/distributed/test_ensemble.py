"""Two processes train the members that one trains, and write each once."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed import worker
from tests.distributed.launcher import difference, launch


pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("ensemble_worker.py")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    world = worker.build_world(folder / "world")
    launch("one", world, folder / "one", ["ensemble", "ensemble-samples"], script=SCRIPT)
    return world, folder / "one"


@pytest.mark.parametrize("case", ["ensemble", "ensemble-samples"])
def test_members_are_those_of_one_process(alone, tmp_path, case):
    world, one = alone
    launch("ddp", world, tmp_path, [case], script=SCRIPT)
    first, second = (json.loads((folder / case / "ensemble.json").read_text()) for folder in (one, tmp_path))
    for member, other in zip(first["members"], second["members"], strict=True):
        assert member["accuracy"] == other["accuracy"] and member["num_rows"] == other["num_rows"] > 0
        assert other["gain"] == pytest.approx(member["gain"], rel=1e-4)
        weights = [load_file(f / case / member["folder"] / "adapter_model.safetensors") for f in (one, tmp_path)]
        assert difference(*weights) < 1e-5
    names = {member["folder"] for member in second["members"]}
    assert {path.name for path in (tmp_path / case).iterdir() if path.is_dir()} == names


def test_deepspeed_is_refused_before_training(alone, tmp_path):
    with pytest.raises(AssertionError, match="ValueError: DeepSpeed is on.*Launch the loop without it"):
        launch("zero2", alone[0], tmp_path, ["ensemble"], script=SCRIPT)
