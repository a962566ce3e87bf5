"""The command-line surface: people script against it, so its flags and defaults are frozen here."""

import argparse
import sys
import tomllib
from pathlib import Path

import pytest

from rlhf_ext import cli


# command: flag -> (default, type)
SURFACE = {
    "quickstart": {
        "--output_dir": ("quickstart", None),
        "--seed": (0, int),
        "--num_updates": (None, int),
        "--label_error_rate": (None, float),
    },
    "merge": {
        "--adapter": (None, None),
        "--output_dir": (None, None),
        "--base": (None, None),
        "--dtype": (None, None),
        "--dequantize": (False, None),
    },
    "env": {
        "--config": (None, None),
        "--model_config": (None, None),
        "--card_gb": (None, float),
        "--num_processes": (1, int),
        "--sharding": ("none", None),
    },
    "label": {
        "--store": (None, None),
        "--host": ("127.0.0.1", None),
        "--port": (7860, int),
        "--pool": (None, None),
        "--guidelines": (None, None),
        "--users": (None, None),
        "--hostname": (None, None),
        "--https": (False, None),
    },
    "label-user": {"--users": (None, None), "--name": (None, None)},
    "iterate": {},
    "report": {"run": (None, None), "--output": (None, None)},
}


def commands():
    parser = cli.build_parser()
    return next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices


def test_flags_and_defaults():
    found = {
        name: {
            (action.option_strings or [action.dest])[0]: (action.default, action.type)
            for action in command._actions
            if not isinstance(action, argparse._HelpAction)
        }
        for name, command in commands().items()
    }
    assert found == SURFACE


def test_every_flag_has_help():
    for name, command in commands().items():
        assert command.description, name
        for action in command._actions:
            assert action.help, f"{name} {action.option_strings or action.dest}"


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["quickstart", "--speed", "9"], ["quickstart", "--seed", "x"], ["merge", "--adapter", "x"]],
)
def test_unknown_arguments_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: rlhf-ext" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-3"])
def test_bad_number_of_updates(number):
    with pytest.raises(SystemExit, match=f"--num_updates is {number}; give 1 or more"):
        cli.main(["quickstart", "--num_updates", number])


def test_help_needs_no_model_library(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["quickstart", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in SURFACE["quickstart"])


def test_arguments_reach_the_pipeline(monkeypatch):
    """A stand-in for the pipeline, which takes minutes."""
    seen = {}
    stand_in = type(sys)("quickstart")
    stand_in.quick = lambda **changes: changes
    stand_in.run_quickstart = lambda *args: seen.update(args=args)
    monkeypatch.setitem(sys.modules, "rlhf_ext.pipelines.quickstart", stand_in)
    assert cli.main(["quickstart", "--output_dir", "x", "--seed", "7", "--num_updates", "2"]) == 0
    assert seen["args"] == ("x", 7, {"num_updates": 2, "label_error_rate": None})


def test_env_arguments_reach_the_pipeline(monkeypatch, capsys):
    seen = {}
    stand_in = type(sys)("environment")
    stand_in.run_environment = lambda *args: seen.update(args=args)
    monkeypatch.setitem(sys.modules, "rlhf_ext.pipelines.environment", stand_in)
    flags = ["--config", "a.yaml", "--model_config", "m", "--card_gb", "24", "--num_processes", "8"]
    assert cli.main(["env", *flags, "--sharding", "fsdp2"]) == 0
    assert seen["args"] == ("a.yaml", "m", 24.0, 8, "fsdp2")

    def refuse(*args):
        raise ValueError("The plan needs more.")

    stand_in.run_environment = refuse
    assert cli.main(["env"]) == 1
    assert capsys.readouterr().err == "rlhf-ext env: The plan needs more.\n"


def test_the_command_is_installed_under_its_name():
    project = tomllib.loads(Path(__file__).resolve().parents[1].joinpath("pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"rlhf-ext": "rlhf_ext.cli:main"}
