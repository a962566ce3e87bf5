"""Functions that a command line names."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path


def import_function(name: str) -> Callable:
    """The function that `module:function` names."""
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`reward_funcs` names {name!r}: {error}. Write it as `module:function`.") from error
