"""What goes into the label store and what comes out of it."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .answers import check_answer


Message = dict[str, Any]
TextOrMessages = str | list[Message]


class LabelRefused(ValueError):
    """
    A label that the store did not take; nothing was written.

    Attributes:
        reason (`str`): `unknown` (no such comparison or label), `taken` (the lease ran out and others have or will
            label it), `labelled` (the annotator has labelled it already), `stale` (the label to be replaced is not the
            annotator's current one), `key` (the idempotency key was used for another answer).
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Candidate:
    """One completion of a comparison, and where it came from.

    Args:
        completion (`str` or `list[dict]`): text or messages.
        policy (`str`, *optional*): name of the policy that wrote it; annotators never see it.
        sampling (`dict`, *optional*): settings of sampling, as JSON.
        truncated (`bool`, *optional*, defaults to `False`): whether the text was cut and does not end here.
    """

    completion: TextOrMessages
    policy: str | None = None
    sampling: dict[str, Any] | None = None
    truncated: bool = False

    @property
    def checksum(self) -> str:
        """SHA-256 of the completion."""
        return sha256(self.completion)


@dataclass(frozen=True)
class NewLabel:
    """A label that comes along with its comparison, from an import: nobody claimed it here."""

    annotator: str
    kind: str
    value: Any = None
    seconds: float | None = None
    comment: str | None = None


@dataclass(frozen=True)
class NewComparison:
    """What is to be labelled.

    Args:
        prompt (`str`, `list[dict]` or `None`): text or messages; `None` where the candidates hold it.
        candidates (`list[Candidate]`): two or more.
        overlap (`int`, *optional*, defaults to `1`): how many annotators shall label it.
        extra (`dict`, *optional*): anything to keep with it, as JSON; exported again as columns.
        copy (`int`, *optional*, defaults to `0`): the same texts in one pool are one comparison; another number makes
            another one of them.
        labels (`list[NewLabel]`): labels it already has.
    """

    prompt: TextOrMessages | None
    candidates: list[Candidate]
    overlap: int = 1
    extra: dict[str, Any] | None = None
    copy: int = 0
    labels: list[NewLabel] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that makes it this comparison and no other of its pool."""
        # Policies count: the same text from two policies is a different question to whoever compares the two.
        sources = [
            [candidate.checksum, candidate.policy, candidate.sampling, candidate.truncated]
            for candidate in self.candidates
        ]
        return sha256([self.prompt, sources, self.copy])


class Comparison(NamedTuple):
    """A stored comparison; `candidates` in their stored order, `missing` labels still wanted."""

    id: int
    pool: str
    prompt: TextOrMessages | None
    candidates: list[Candidate]
    overlap: int
    missing: int
    extra: dict[str, Any] | None
    created: float


class Task(NamedTuple):
    """What an annotator gets to see: no policy, nobody else's label. `expires` is the end of the lease."""

    comparison_id: int
    pool: str
    prompt: TextOrMessages | None
    completions: list[TextOrMessages]
    truncated: list[bool]
    claimed: float
    expires: float


class Label(NamedTuple):
    """One row of the history. `kind` is an answer, or `undo` for a row that takes the label `supersedes` back."""

    id: int
    comparison_id: int
    annotator: str
    kind: str
    value: Any
    seconds: float | None
    comment: str | None
    shown: list[int] | None
    created: float
    supersedes: int | None


class Progress(NamedTuple):
    """Counts over comparisons, current labels of everybody (skips apart) and, where asked for, of one annotator."""

    comparisons: int
    complete: int
    missing: int
    leased: int
    labels: int
    skips: int
    own_labels: int
    own_skips: int
    last_label_id: int


def sha256(value: Any) -> str:
    """SHA-256 of a JSON value, in the one spelling that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def check_comparison(new: NewComparison) -> list[Any]:
    """
    Refuse what cannot be shown to an annotator or not be stored.

    Returns:
        `list`: the values of its labels, in the form that is stored.

    Raises:
        ValueError: naming field, value and remedy.
    """
    if new.prompt is not None:
        _check_text("prompt", new.prompt)
    if len(new.candidates) < 2:
        raise ValueError(f"`candidates` has {len(new.candidates)} items. A comparison needs two or more.")
    for position, candidate in enumerate(new.candidates):
        _check_text(f"candidates[{position}].completion", candidate.completion, may_be_empty=new.prompt is not None)
        if candidate.policy is not None:
            check_name(f"candidates[{position}].policy", candidate.policy)
        if not isinstance(candidate.truncated, bool):
            raise ValueError(f"`candidates[{position}].truncated` is {candidate.truncated!r}. Give True or False.")
        if candidate.truncated and not candidate.completion:
            raise ValueError(f"`candidates[{position}]` is `truncated` and empty: nothing is left that was cut.")
        _check_json(f"candidates[{position}].sampling", candidate.sampling)
    if isinstance(new.overlap, bool) or not isinstance(new.overlap, int) or new.overlap < 1:
        raise ValueError(f"`overlap` is {new.overlap!r}. Give the number of labels wanted, at least 1.")
    _check_json("extra", new.extra)
    names = [check_name("annotator", label.annotator) for label in new.labels]
    if len(set(names)) < len(names):
        raise ValueError(f"`labels` has the annotators {names}. An annotator labels a comparison once.")
    for label in new.labels:
        check_seconds(label.seconds)
        if label.comment is not None:
            check_name("comment", label.comment, may_be_empty=True)
    return [check_answer(label.kind, label.value, len(new.candidates)) for label in new.labels]


def check_seconds(seconds: float | None) -> None:
    """Refuse a time that is none."""
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"`seconds` is {seconds}. Give the time an answer took, at least 0, or None.")


def check_name(field: str, value: Any, *, may_be_empty: bool = False) -> str:
    """
    Check a short text that is stored as it is (names, keys, comments): PostgreSQL knows no NUL, UTF-8 no half pair.

    Raises:
        ValueError: naming field and value.
    """
    if not isinstance(value, str) or not (value or may_be_empty):
        raise ValueError(f"`{field}` is {value!r}. Give a {'' if may_be_empty else 'non-empty '}text.")
    if "\0" in value or value.encode("utf-8", "replace").decode("utf-8") != value:
        raise ValueError(f"`{field}` is {value!r}, which holds a character that is no text. Remove it.")
    return value


def _check_text(field: str, value: Any, may_be_empty: bool = False) -> None:
    if isinstance(value, str) and (value or may_be_empty):
        _check_json(field, value)
        return
    if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
        _check_json(field, value)
        return
    shown = repr(value)[:200]
    raise ValueError(f"`{field}` is {shown}. Give a non-empty text or a list of messages.")


def _check_json(field: str, value: Any) -> None:
    try:
        # Half of a surrogate pair is no text: neither Arrow nor UTF-8 can hold it.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{field}` is {value!r}, which is no JSON ({error}). Use numbers, texts and lists."
        ) from error
