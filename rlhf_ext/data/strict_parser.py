"""TRL's parser of flags and `--config`, which takes whole names only and says which was meant."""

import sys
from collections.abc import Iterable
from typing import Any

import yaml
from trl import TrlParser

from .config_file import did_you_mean, with_config


class StrictParser(TrlParser):
    """
    [`~trl.TrlParser`] without abbreviated flags: `--num_round 2` would else count as `--num_rounds`.

    Raises:
        ValueError: an unknown flag or key of the YAML, with the one like it; a `--config` that is no file, or no YAML.
    """

    def __init__(self, dataclass_types: Any = None, **kwargs: Any):
        super().__init__(dataclass_types, **{"allow_abbrev": False, **kwargs})

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """As TRL's."""
        try:
            return super().parse_args_and_config(with_config(sys.argv[1:] if args is None else args), **kwargs)
        except yaml.YAMLError as error:
            raise ValueError(f"`--config` is no YAML: {error}") from error

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuses what is left over here, before the arguments are checked, which may miss what was misspelt."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            name = rest[0].split("=")[0]
            options = ["--config", *(option for option in self._option_string_actions if "-" not in option[2:])]
            raise ValueError(f"There is no flag {name!r}.{did_you_mean(name, options)} `--help` lists the flags.")
        return found, rest

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """As TRL's, and refuses a key that no flag has."""
        rest = super().set_defaults_with_config(**kwargs)
        if rest:
            known = [action.dest for action in self._actions]
            name = rest[0].removeprefix("--")
            raise ValueError(f"`--config` has the key {name!r}, which no flag has.{did_you_mean(name, known)}")
        return rest
