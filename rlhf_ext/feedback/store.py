"""The label store: comparisons, who works on which, and labels that are never changed.

Rules (docs/labels.md):

- A claim gives a comparison to one annotator for a time (a lease). As many annotators hold or have labelled one as it
  wants labels (`overlap`, 1 by default), never more, and nobody gets one that they have labelled or skipped.
- Who holds a lease may answer. Without one (it ran out, or never was) a label is taken if a place is free that no
  other annotator holds, and refused otherwise.
- A label is a new row, always. A correction or an undo supersedes the row before; current labels are the rows that
  nothing supersedes, undo rows left out. A skip is no label: the comparison goes on to somebody else.
- A submission may carry a key; the same key again gives back the row it made the first time.
"""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, select, update
from sqlalchemy.exc import SQLAlchemyError

from ..data.texts import without_passwords
from . import queries
from .answers import COUNTING, UNDO, check_answer
from .database import Database, shown_location
from .records import (
    Candidate,
    Label,
    LabelRefused,
    NewComparison,
    NewLabel,
    check_comparison,
    check_name,
    check_seconds,
)
from .schema import comparisons, labels
from .store_claims import LEASE_SECONDS, StoreClaims, check_lease
from .store_reading import StoreReading


__all__ = ["Candidate", "LabelRefused", "LabelStore", "NewComparison", "NewLabel", "open_store"]

_CHUNK = 200  # rows of one transaction: others wait no longer than that takes


class LabelStore(StoreClaims, StoreReading):
    """
    Labels in a database: SQLite in a file by default, PostgreSQL by URL for teams.

    Safe for many threads and many processes at once. When a method that writes has returned, its rows are on the disk;
    when it raised or the process died, none of them is there.

    Args:
        location (`str`, `Path` or `sqlalchemy.URL`): a file such as `labels.db`, or
            `postgresql://user@host/database`.
        create (`bool`, *optional*, defaults to `True`): make the store where there is none; else that is an error.
        clock (`Callable[[], float]`, *optional*): seconds since 1970, for tests of leases.

    Raises:
        ValueError: for a location that is none, or tables of another version.
    """

    def __init__(self, location: str | Path | URL, *, create: bool = True, clock: Callable[[], float] | None = None):
        self.database = Database(location, create=create, clock=clock)

    def __enter__(self) -> "LabelStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close idle connections; the store can be used again."""
        self.database.engine.dispose()

    # Work to be done

    def add(self, new: Iterable[NewComparison], *, pool: str = "default") -> list[int]:
        """
        Add comparisons to a pool (a round, an import; a name of your choice).

        One whose texts, policies and settings are in the pool already gives the id it has, and of its labels those of
        annotators who have none there are added: a run that was killed in here is simply repeated.

        Returns:
            `list[int]`: one id per comparison, in order.
        """
        check_name("pool", pool)
        ids: list[int] = []
        for chunk in queries.chunks(new, _CHUNK):
            answers = [check_comparison(item) for item in chunk]
            with self.database.write(exclusive=True) as connection:
                now = self.database.now(connection)
                found, fresh = queries.insert_comparisons(connection, chunk, pool, now)
                labelled = sorted({id for id, item in zip(found, chunk, strict=True) if item.labels})
                for id in labelled:
                    queries.lock(connection, id)
                for id, item, values in zip(found, chunk, answers, strict=True):
                    for label, value in zip(item.labels, values, strict=True):
                        if id in fresh or queries.last_of_chain(connection, id, label.annotator) is None:
                            queries.insert_label(
                                connection,
                                comparison_id=id,
                                annotator=label.annotator,
                                kind=label.kind,
                                value=value,
                                seconds=label.seconds,
                                comment=label.comment,
                                created=now,
                            )
                            queries.end_lease(connection, id, label.annotator, now)
                    fresh.discard(id)  # twice in one call is once
                if labelled:
                    queries.count_missing(connection, labelled)
            ids += found
        return ids

    def set_overlap(self, overlap: int, *, pool: str | None = None) -> None:
        """Ask for another number of labels per comparison. Labels beyond it stay, and so do leases given already."""
        if isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 1:
            raise ValueError(f"`overlap` is {overlap!r}. Give the number of labels wanted, at least 1.")
        with self.database.write(exclusive=True) as connection:
            query = select(comparisons.c.id).order_by(comparisons.c.id).with_for_update()
            query = query if pool is None else query.where(comparisons.c.pool == pool)
            for ids in queries.chunks(connection.execute(query).scalars().all(), _CHUNK):
                connection.execute(update(comparisons).where(comparisons.c.id.in_(ids)).values(overlap=overlap))
                queries.count_missing(connection, ids)

    # Labels

    def submit(
        self,
        annotator: str,
        comparison_id: int,
        kind: str,
        value: Any = None,
        *,
        seconds: float | None = None,
        comment: str | None = None,
        shown: Sequence[int] | None = None,
        key: str | None = None,
        supersedes: int | None = None,
    ) -> Label:
        """
        Store one answer.

        Args:
            annotator (`str`): who answers.
            comparison_id (`int`): what was asked.
            kind, value (`str`, `Any`): the answer, as in [`~feedback.answers.check_answer`]: positions in the stored
                order.
            seconds (`float`, *optional*): time the answer took.
            comment (`str`, *optional*): free text.
            shown (`Sequence[int]`, *optional*): stored positions in the order shown, to measure position bias.
            key (`str`, *optional*): of the caller's choice, new for each answer. If the reply was lost, submit again
                with the same key: the answer is stored once.
            supersedes (`int`, *optional*): id of the annotator's own current label, which this one corrects.

        Returns:
            `Label`: the stored row.

        Raises:
            LabelRefused: see its `reason`.
            ValueError: if the answer is none to this comparison.
        """
        check_name("annotator", annotator)
        if comment is not None:
            check_name("comment", comment, may_be_empty=True)
        if key is not None:
            check_name("key", key)
        check_seconds(seconds)
        with self.database.write(exclusive=True) as connection:
            row = queries.lock(connection, comparison_id)
            if row is None:
                raise LabelRefused("unknown", f"There is no comparison {comparison_id}.")
            now = self.database.now(connection)
            value = check_answer(kind, value, row.num_candidates)
            if shown is not None:
                shown = check_answer("ranking", list(shown), row.num_candidates)
            if key is not None and (known := _by_key(connection, annotator, key)) is not None:
                if (known.comparison_id, known.kind, known.value) == (comparison_id, kind, value):
                    return known
                raise LabelRefused(
                    "key", f"`key` {key!r} belongs to label {known.id}, another answer. Use a new key for each answer."
                )
            last = queries.last_of_chain(connection, comparison_id, annotator)
            _check_chain(last, supersedes, annotator, comparison_id)
            counted = last is not None and last.kind in COUNTING
            if kind in COUNTING and not counted and not queries.has_place(connection, comparison_id, annotator, now):
                raise LabelRefused(
                    "taken",
                    f"{annotator!r} has no lease on comparison {comparison_id} any more, and others have labelled it "
                    f"or hold it ({row.missing} labels missing). Claim the next task.",
                )
            label = queries.insert_label(
                connection,
                comparison_id=comparison_id,
                annotator=annotator,
                kind=kind,
                value=value,
                seconds=seconds,
                comment=comment,
                shown=shown,
                created=now,
                supersedes=None if last is None else last.id,
                key=key,
            )
            queries.end_lease(connection, comparison_id, annotator, now)
            queries.count_missing(connection, [comparison_id])
        return label

    def undo(
        self, annotator: str, label_id: int, *, pool: str | None = None, lease_seconds: float = LEASE_SECONDS
    ) -> Label:
        """
        Take an own label back. The comparison is leased to the annotator, whose next [`claim`] gives it again.

        Undoing the same label twice is undoing it once. With `pool` a label of another one is refused.

        Returns:
            `Label`: the row of kind `undo`.

        Raises:
            LabelRefused: `unknown` if it is no label of the annotator (in the pool), `stale` if a correction stands in
                its place.
        """
        check_lease(lease_seconds)
        with self.database.write(exclusive=True) as connection:
            label = _by_id(connection, label_id)
            if label is None or label.annotator != annotator or label.kind == UNDO:
                raise LabelRefused("unknown", f"Annotator {annotator!r} has no label {label_id}.")
            locked = queries.lock(connection, label.comparison_id)
            if pool is not None and locked.pool != pool:
                raise LabelRefused("unknown", f"Annotator {annotator!r} has no label {label_id} in the pool {pool!r}.")
            now = self.database.now(connection)
            row = connection.execute(
                select(*queries.LABEL_COLUMNS).where(labels.c.supersedes == label_id)
            ).one_or_none()
            if row is not None:
                newer = Label(*row)
                if newer.kind == UNDO:
                    return newer
                raise LabelRefused("stale", f"Label {label_id} was replaced by label {newer.id}. Undo that one.")
            undone = queries.insert_label(
                connection,
                comparison_id=label.comparison_id,
                annotator=annotator,
                kind=UNDO,
                created=now,
                supersedes=label_id,
            )
            queries.count_missing(connection, [label.comparison_id])
            # A skip left its place to others; it may be theirs by now.
            if queries.has_place(connection, label.comparison_id, annotator, now):
                queries.lease(connection, [label.comparison_id], annotator, now, now + lease_seconds)
        return undone


def open_store(location: str | Path | URL, *, create: bool = True) -> LabelStore:
    """
    A store for a command, looked into once: what a driver or a server says becomes one sentence.

    Raises:
        ValueError: it cannot be opened; `store`, its value (without a password) and why.
    """
    try:
        store = LabelStore(location, create=create)
        store.progress()
    except (ImportError, OSError, SQLAlchemyError, sqlite3.Error) as error:
        shown, why = shown_location(location), without_passwords(" ".join(str(error).split())[:400])
        raise ValueError(
            f"`store` is {shown!r}, which cannot be opened ({type(error).__name__}: {why}). "
            "Give a file in a folder that exists, or postgresql://user@host/database of a server that runs and lets "
            "this user in."
        ) from error
    return store


def _check_chain(last: Label | None, supersedes: int | None, annotator: str, comparison_id: int) -> None:
    current = None if last is None or last.kind == UNDO else last.id
    if current == supersedes:
        return
    if supersedes is None:
        raise LabelRefused(
            "labelled",
            f"Annotator {annotator!r} has labelled comparison {comparison_id}: label {current}. To correct it, say "
            f"`supersedes={current}`.",
        )
    raise LabelRefused(
        "stale",
        f"`supersedes` is {supersedes}, but the current label of annotator {annotator!r} on comparison "
        f"{comparison_id} is {current}. Look at it again.",
    )


def _by_key(connection: Connection, annotator: str, key: str) -> Label | None:
    query = select(*queries.LABEL_COLUMNS).where(labels.c.annotator == annotator, labels.c.key == key)
    row = connection.execute(query).one_or_none()
    return None if row is None else Label(*row)


def _by_id(connection: Connection, label_id: int) -> Label | None:
    row = connection.execute(select(*queries.LABEL_COLUMNS).where(labels.c.id == label_id)).one_or_none()
    return None if row is None else Label(*row)
