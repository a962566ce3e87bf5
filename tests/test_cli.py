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


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config", "iterate_tny.yaml"], "`--config` is 'iterate_tny.yaml', and there is no such file"),
        (["--config=iterate_tny.yaml"], "`--config` is 'iterate_tny.yaml', and there is no such file"),
        (["--config"], "`--config` comes without a file"),
    ],
)
def test_a_config_that_is_not_there_is_named_before_imports(flags, words, monkeypatch, capsys):
    for name in ("trl", "rlhf_ext.data.strict_parser", "rlhf_ext.pipelines.loop"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would raise
    assert cli.main(["iterate", *flags]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, config, words",
    [
        (["--num_round", "2"], "", "no flag '--num_round'. Did you mean --num_rounds?"),  # an abbreviation
        (["--nmu_rounds=2"], "", "no flag '--nmu_rounds'. Did you mean --num_rounds?"),
        (["--cofig", "a.yaml"], "", "no flag '--cofig'. Did you mean --config?"),
        (["--zzz", "2"], "", "no flag '--zzz'. `--help`"),
        (["--config", "a.yaml"], "num_round: 2", "key 'num_round', which no flag has. Did you mean num_rounds?"),
        (["--config", "a.yaml"], "a: [", "`--config` is no YAML"),
    ],
)
def test_flags_of_the_loop_are_whole_names(flags, config, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(config)
    assert cli.main(["iterate", *flags]) == 1
    assert words in capsys.readouterr().err


def test_flags_of_the_loop_reach_it(tmp_path, monkeypatch):
    """A stand-in for the loop; flags of both spellings, and a YAML below them."""
    seen = {}
    stand_in, labels = type(sys)("loop"), type(sys)("loop_labels")
    stand_in.run_loop = lambda *args: seen.update(args=args)
    labels.LabelsMissing = type("LabelsMissing", (Exception,), {})
    monkeypatch.setitem(sys.modules, "rlhf_ext.pipelines.loop", stand_in)
    monkeypatch.setitem(sys.modules, "rlhf_ext.pipelines.loop_labels", labels)
    (tmp_path / "a.yaml").write_text("toy: true\nnum_rounds: 7\nlabels_per_round: 8\nlabels: people\n")
    flags = [f"--config={tmp_path / 'a.yaml'}", "--num-rounds", "2", "--output_dir", "x"]
    assert cli.main(["iterate", *flags]) == 0
    loop = seen["args"][0]
    assert (loop.num_rounds, loop.labels_per_round, loop.output_dir) == (2, 8, "x")


def test_every_recipe_takes_whole_names_only():
    recipes = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.py"))
    assert recipes and all(
        "StrictParser(" in path.read_text() and "TrlParser" not in path.read_text() for path in recipes
    )
