"""Prompts and completions, text or messages, as text to be read."""

import re
from typing import Any


def text_of(value: Any) -> str:
    """A prompt or completion to be read: a lone answer as its text, messages with their roles, nothing as ""."""
    if not isinstance(value, list):
        return "" if value is None else str(value)
    turns = [turn if isinstance(turn, dict) else {"content": turn} for turn in value]
    if len(turns) == 1 and turns[0].get("role") in ("assistant", None):
        return str(turns[0].get("content"))
    return "\n\n".join(f"{turn.get('role', '?')}: {turn.get('content')}" for turn in turns)


def without_passwords(text: str) -> str:
    """A text in which passwords inside URLs are `***`: it may hold the URL of a label store, and be shown around."""
    # Up to the last "@": a password may hold a slash or an "@".
    text = re.sub(r"(://[^:/\s]*):[^\s\"]*@", r"\1:***@", text)
    return re.sub(r"([?&]\w*password=)[^&\s\"]*", r"\1***", text)
