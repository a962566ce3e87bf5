"""What can be said about flags before any library is loaded: whether `--config` is there, and which flag was meant."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def with_config(flags: Iterable[str]) -> list[str]:
    """
    The flags, `--config=FILE` as two words (TRL's parser knows no other form).

    Raises:
        ValueError: `--config` names no file.
    """
    words: list[str] = []
    for flag in flags:
        words += flag.split("=", 1) if flag.startswith("--config=") else [flag]
    if "--config" in words:
        after = words[words.index("--config") + 1 :]
        if not after:
            raise ValueError("`--config` comes without a file. Give a YAML file after it.")
        if not Path(after[0]).is_file():
            raise ValueError(
                f"`--config` is {after[0]!r}, and there is no such file. Check the path, from {Path.cwd()}."
            )
    return words


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the flag or key meant, with a space before it; nothing where none is like it."""
    known = list(known)
    found = [option for option in known if option.startswith(name)][:3] or get_close_matches(name, known, n=1)
    return f" Did you mean {' or '.join(found)}?" if found else ""
