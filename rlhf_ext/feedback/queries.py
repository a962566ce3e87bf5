"""SQL that the label store is made of; each function runs inside a transaction of its caller."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, case, exists, func, insert, select, update

from .answers import COUNTING, UNDO
from .records import Candidate, Comparison, Label, NewComparison, Task
from .schema import assignments, candidates, comparisons, labels


_newer = labels.alias()
LABEL_COLUMNS = [labels.c[name] for name in Label._fields]


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to `size` items."""
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def is_current() -> ColumnElement[bool]:
    """That nothing supersedes the label, and that it is no undo."""
    return ~exists().where(_newer.c.supersedes == labels.c.id) & (labels.c.kind != UNDO)


def leases_of_others(annotator: str, now: float) -> Any:
    """How many others hold a lease on the comparison of the outer query."""
    return (
        select(func.count(func.distinct(assignments.c.annotator)))
        .where(
            assignments.c.comparison_id == comparisons.c.id,
            assignments.c.expires > now,
            assignments.c.annotator != annotator,
        )
        .correlate(comparisons)
        .scalar_subquery()
    )


def labelled_by(annotator: str) -> ColumnElement[bool]:
    """That `annotator` has a current label, or skip, on the comparison of the outer query."""
    return exists().where(labels.c.comparison_id == comparisons.c.id, labels.c.annotator == annotator, is_current())


def claimable(annotator: str, now: float, pool: str | None) -> Select[Any]:
    """Ids of comparisons with a free place for `annotator`, oldest first."""
    free = comparisons.c.missing > leases_of_others(annotator, now)
    query = (
        select(comparisons.c.id)
        .where(comparisons.c.missing > 0, free, ~labelled_by(annotator))
        .order_by(comparisons.c.id)
    )
    return query if pool is None else query.where(comparisons.c.pool == pool)


def newest_pool(connection: Connection, annotator: str, now: float, seen: Iterable[int]) -> str | None:
    """The pool of the newest comparison with a free place for `annotator`, those in `seen` left out."""
    free = claimable(annotator, now, None).where(comparisons.c.id.not_in(list(seen)))
    query = free.with_only_columns(comparisons.c.pool).order_by(None).order_by(comparisons.c.id.desc()).limit(1)
    return connection.execute(query).scalar_one_or_none()


def held(annotator: str, now: float, pool: str | None) -> Select[Any]:
    """Ids of comparisons that `annotator` holds a lease on, newest claim first."""
    query = (
        select(assignments.c.comparison_id)
        .join(comparisons, comparisons.c.id == assignments.c.comparison_id)
        .where(assignments.c.annotator == annotator, assignments.c.expires > now, comparisons.c.missing > 0)
        .where(~labelled_by(annotator))
        .order_by(assignments.c.claimed.desc(), assignments.c.id.desc())
    )
    return query if pool is None else query.where(comparisons.c.pool == pool)


def has_place(connection: Connection, comparison_id: int, annotator: str, now: float) -> bool:
    """Whether `annotator` holds a lease on a comparison, or it wants more labels than others have leases on it."""
    leases = select(assignments.c.annotator).where(
        assignments.c.comparison_id == comparison_id, assignments.c.expires > now
    )
    holders = set(connection.execute(leases).scalars())
    missing = connection.execute(select(comparisons.c.missing).where(comparisons.c.id == comparison_id)).scalar_one()
    return annotator in holders or missing > len(holders)


def lease(connection: Connection, ids: Sequence[int], annotator: str, now: float, expires: float) -> None:
    """Lease comparisons: a lease that the annotator still holds is prolonged, else there is a new one."""
    live = (
        (assignments.c.annotator == annotator) & (assignments.c.expires > now) & assignments.c.comparison_id.in_(ids)
    )
    kept = set(connection.execute(select(assignments.c.comparison_id).where(live)).scalars())
    connection.execute(update(assignments).where(live).values(expires=expires))
    new = [
        {"comparison_id": id, "annotator": annotator, "claimed": now, "expires": expires}
        for id in ids
        if id not in kept
    ]
    if new:
        connection.execute(insert(assignments), new)


def end_lease(connection: Connection, comparison_id: int, annotator: str, now: float) -> bool:
    """End the annotator's lease on a comparison; whether there was one."""
    live = (
        (assignments.c.comparison_id == comparison_id)
        & (assignments.c.annotator == annotator)
        & (assignments.c.expires > now)
    )
    return connection.execute(update(assignments).where(live).values(expires=now)).rowcount > 0


def lock(connection: Connection, comparison_id: int) -> Row[Any] | None:
    """The comparison, kept from every other writer until the transaction ends (SQLite has one writer anyway)."""
    return connection.execute(
        select(comparisons).where(comparisons.c.id == comparison_id).with_for_update()
    ).one_or_none()


def last_of_chain(connection: Connection, comparison_id: int, annotator: str) -> Label | None:
    """The row at the end of the annotator's history of a comparison, be it an undo."""
    row = connection.execute(
        select(*LABEL_COLUMNS).where(
            labels.c.comparison_id == comparison_id,
            labels.c.annotator == annotator,
            ~exists().where(_newer.c.supersedes == labels.c.id),
        )
    ).one_or_none()
    return None if row is None else Label(*row)


def insert_label(connection: Connection, **values: Any) -> Label:
    """Add one row to the history."""
    row = connection.execute(insert(labels).values(**values).returning(*LABEL_COLUMNS)).one()
    return Label(*row)


def count_missing(connection: Connection, ids: Sequence[int] | None = None) -> None:
    """Derive `missing` from overlap and labels again."""
    counted = (
        select(func.count())
        .select_from(labels)
        .where(labels.c.comparison_id == comparisons.c.id, labels.c.kind.in_(COUNTING), is_current())
        .correlate(comparisons)
        .scalar_subquery()
    )
    # "At least 0" is `max` in SQLite and `greatest` in PostgreSQL; a CASE is the same in both.
    missing = case((comparisons.c.overlap > counted, comparisons.c.overlap - counted), else_=0)
    query = update(comparisons).values(missing=missing)
    connection.execute(query if ids is None else query.where(comparisons.c.id.in_(ids)))


def insert_comparisons(
    connection: Connection, new: Sequence[NewComparison], pool: str, now: float
) -> tuple[list[int], set[int]]:
    """Add comparisons with their candidates; the ids in order, and which of them are new."""
    prints = [item.fingerprint for item in new]
    by_print = dict(
        connection.execute(
            select(comparisons.c.fingerprint, comparisons.c.id).where(
                comparisons.c.pool == pool, comparisons.c.fingerprint.in_(prints)
            )
        ).all()
    )
    fresh = {print: item for print, item in zip(prints, new, strict=True) if print not in by_print}
    if fresh:
        rows = [
            {
                "pool": pool,
                "prompt": item.prompt,
                "num_candidates": len(item.candidates),
                "extra": item.extra,
                "fingerprint": print,
                "created": now,
                "overlap": item.overlap,
                "missing": item.overlap,
            }
            for print, item in fresh.items()
        ]
        query = insert(comparisons).returning(comparisons.c.id, sort_by_parameter_order=True)
        ids = connection.execute(query, rows).scalars().all()
        by_print.update(zip(fresh, ids, strict=True))
        connection.execute(
            insert(candidates),
            [
                {
                    "comparison_id": id,
                    "position": position,
                    "completion": candidate.completion,
                    "policy": candidate.policy,
                    "sampling": candidate.sampling,
                    "truncated": candidate.truncated,
                    "checksum": candidate.checksum,
                }
                for id, item in zip(ids, fresh.values(), strict=True)
                for position, candidate in enumerate(item.candidates)
            ],
        )
    return [by_print[print] for print in prints], {by_print[print] for print in fresh}


def fetch_comparisons(connection: Connection, ids: Sequence[int]) -> dict[int, Comparison]:
    """Comparisons with their candidates, by id."""
    parts: dict[int, list[Candidate]] = {}
    query = select(candidates).where(candidates.c.comparison_id.in_(ids))
    for row in connection.execute(query.order_by(candidates.c.comparison_id, candidates.c.position)):
        candidate = Candidate(row.completion, row.policy, row.sampling, row.truncated)
        parts.setdefault(row.comparison_id, []).append(candidate)
    rows = connection.execute(select(comparisons).where(comparisons.c.id.in_(ids)))
    return {
        row.id: Comparison(
            row.id, row.pool, row.prompt, parts[row.id], row.overlap, row.missing, row.extra, row.created
        )
        for row in rows
    }


def fetch_labels(connection: Connection, ids: Sequence[int]) -> dict[int, list[Label]]:
    """Current labels by comparison, oldest first."""
    query = select(*LABEL_COLUMNS).where(labels.c.comparison_id.in_(ids), is_current()).order_by(labels.c.id)
    found: dict[int, list[Label]] = {id: [] for id in ids}
    for row in connection.execute(query):
        found[row.comparison_id].append(Label(*row))
    return found


def fetch_tasks(connection: Connection, ids: Sequence[int], annotator: str, now: float) -> list[Task]:
    """Tasks in the order of `ids`."""
    found = fetch_comparisons(connection, ids)
    leases = {
        row.comparison_id: row
        for row in connection.execute(
            select(assignments).where(
                assignments.c.comparison_id.in_(ids),
                assignments.c.annotator == annotator,
                assignments.c.expires > now,
            )
        )
    }
    return [
        Task(
            id,
            found[id].pool,
            found[id].prompt,
            [candidate.completion for candidate in found[id].candidates],
            [candidate.truncated for candidate in found[id].candidates],
            leases[id].claimed,
            leases[id].expires,
        )
        for id in ids
    ]
