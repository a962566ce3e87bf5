"""What a label store holds, read: counts, comparisons, labels with their history."""

from collections.abc import Iterator

from sqlalchemy import func, select

from . import queries
from .database import Database
from .records import (
    Comparison,
    Label,
    LabelRefused,
    Progress,
)
from .schema import assignments, comparisons, labels


_CHUNK = 200  # comparisons of one query


class StoreReading:
    """The part of [`LabelStore`] that writes nothing."""

    database: Database

    def progress(self, annotator: str | None = None, *, pool: str | None = None) -> Progress:
        """Counts for a progress bar and for a loop that waits for labels."""
        with self.database.read() as connection:
            now = self.database.now(connection)
            where = [] if pool is None else [comparisons.c.pool == pool]
            done = func.sum(comparisons.c.missing), func.count()
            missing, total = connection.execute(select(*done).where(*where)).one()
            complete = connection.execute(
                select(func.count()).select_from(comparisons).where(comparisons.c.missing == 0, *where)
            ).scalar_one()
            held = (
                select(func.count(func.distinct(comparisons.c.id)))
                .select_from(assignments.join(comparisons))
                .where(assignments.c.expires > now, *where)
            )
            kinds = (
                select(labels.c.annotator, labels.c.kind, func.count())
                .select_from(labels.join(comparisons))
                .where(queries.is_current(), *where)
                .group_by(labels.c.annotator, labels.c.kind)
            )
            counts = [0, 0, 0, 0]
            for name, kind, count in connection.execute(kinds):
                counts[kind == "skip"] += count
                counts[2 + (kind == "skip")] += count if name == annotator else 0
            last = connection.execute(select(func.max(labels.c.id))).scalar_one() or 0
            leased = connection.execute(held).scalar_one()
        return Progress(total, complete, missing or 0, leased, *counts, last)

    def pools(self) -> list[str]:
        """Names of the pools that hold comparisons, oldest first."""
        query = select(comparisons.c.pool).group_by(comparisons.c.pool).order_by(func.min(comparisons.c.id))
        with self.database.read() as connection:
            return list(connection.execute(query).scalars())

    def comparison(self, comparison_id: int) -> Comparison:
        """One comparison with policies and settings.

        Raises:
            LabelRefused: `unknown`.
        """
        with self.database.read() as connection:
            found = queries.fetch_comparisons(connection, [comparison_id])
        if comparison_id not in found:
            raise LabelRefused("unknown", f"There is no comparison {comparison_id}.")
        return found[comparison_id]

    def history(self, comparison_id: int) -> list[Label]:
        """Every row of a comparison, superseded ones and undo rows too, oldest first."""
        with self.database.read() as connection:
            query = select(*queries.LABEL_COLUMNS).where(labels.c.comparison_id == comparison_id).order_by(labels.c.id)
            return [Label(*row) for row in connection.execute(query)]

    def labels_of(
        self, annotator: str, *, pool: str | None = None, limit: int = 50, before: int | None = None
    ) -> list[Label]:
        """An annotator's own current labels, newest first; `before` is the id of the last one seen, for paging."""
        query = select(*queries.LABEL_COLUMNS).where(labels.c.annotator == annotator, queries.is_current())
        if pool is not None:
            query = query.join(comparisons).where(comparisons.c.pool == pool)
        if before is not None:
            query = query.where(labels.c.id < before)
        with self.database.read() as connection:
            return [Label(*row) for row in connection.execute(query.order_by(labels.c.id.desc()).limit(limit))]

    def labels_since(self, cursor: int = 0, *, limit: int | None = None) -> list[Label]:
        """
        Rows added after `cursor`, oldest first, corrections and undo rows too; the last one's id is the next cursor.

        Ids are given out in the order in which rows become visible, so no row is missed.
        """
        query = select(*queries.LABEL_COLUMNS).where(labels.c.id > cursor).order_by(labels.c.id)
        with self.database.read() as connection:
            return [Label(*row) for row in connection.execute(query if limit is None else query.limit(limit))]

    def labelled(self, *, pool: str | None = None, since: int = 0) -> Iterator[tuple[Comparison, list[Label]]]:
        """
        Comparisons that were labelled (after the row `since`), each with all its current labels, in order of their id.

        All of one moment, however long the caller takes. A comparison whose labels were all taken back comes with an
        empty list.
        """
        query = select(labels.c.comparison_id).where(labels.c.id > since).distinct()
        if pool is not None:
            query = query.join(comparisons).where(comparisons.c.pool == pool)
        with self.database.read() as connection:
            ids = connection.execute(query.order_by(labels.c.comparison_id)).scalars().all()
            for chunk in queries.chunks(ids, _CHUNK):
                found, current = queries.fetch_comparisons(connection, chunk), queries.fetch_labels(connection, chunk)
                yield from ((found[id], current[id]) for id in chunk)
