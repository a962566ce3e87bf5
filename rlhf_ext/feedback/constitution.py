"""A constitution: principles by which a model criticises, revises and compares answers, from a YAML file."""

from dataclasses import dataclass, fields
from pathlib import Path

import yaml


DEFAULT_CONSTITUTION = Path(__file__).with_name("constitution.yaml")


@dataclass(frozen=True)
class Principle:
    """
    One principle.

    Attributes:
        name (`str`): how reports call it.
        critique (`str`): request to say what is wrong with an answer.
        revision (`str`): request to write it again.
        question (`str`): asked about two answers, (A) and (B).
    """

    name: str
    critique: str
    revision: str
    question: str


def load_constitution(path: str | Path = DEFAULT_CONSTITUTION) -> list[Principle]:
    """
    Read the principles of a file.

    Raises:
        ValueError: the file has no list `principles`, or an entry lacks a field, has an unknown or an empty one, or a
            name that was there before.
    """
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    entries = content.get("principles") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{str(path)!r} has no list `principles`. See {str(DEFAULT_CONSTITUTION)!r} for the form.")
    names = [field.name for field in fields(Principle)]
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != set(names):
            found = sorted(entry) if isinstance(entry, dict) else entry
            raise ValueError(f"{str(path)!r}: principle {number} has {found}; give exactly {names}.")
        empty = [name for name in names if not isinstance(entry[name], str) or not entry[name].strip()]
        if empty:
            raise ValueError(f"{str(path)!r}: principle {number} has no text in {empty}. Fill it in.")
    principles = [Principle(**entry) for entry in entries]
    doubles = sorted({p.name for p in principles if sum(q.name == p.name for q in principles) > 1})
    if doubles:
        raise ValueError(f"{str(path)!r} names {doubles} more than once. Give each principle its own name.")
    return principles
