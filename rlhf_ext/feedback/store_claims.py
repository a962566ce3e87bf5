"""Who works on which comparison: leases, given and taken back (rules: `store.py`)."""

import math

from sqlalchemy import Connection

from . import queries
from .database import Database
from .records import Task, check_name
from .schema import comparisons


LEASE_SECONDS = 900.0


class StoreClaims:
    """The part of [`LabelStore`] that gives work to annotators."""

    database: Database

    def claim(self, annotator: str, *, pool: str | None = None, lease_seconds: float = LEASE_SECONDS) -> Task | None:
        """
        The next task of an annotator, or `None` if there is nothing for them to do now: of the newest pool that has
        any, unless one is named, the oldest comparison.

        A task that they hold already is given again, the one claimed last first, and its lease begins anew: a page
        that is loaded again shows what it showed.
        """
        return next(iter(self.claim_many(annotator, 1, pool=pool, lease_seconds=lease_seconds)), None)

    def claim_many(
        self, annotator: str, count: int, *, pool: str | None = None, lease_seconds: float = LEASE_SECONDS
    ) -> list[Task]:
        """Up to `count` tasks at once, as [`claim`] gives one; those held already are among them."""
        check_name("annotator", annotator)
        check_lease(lease_seconds)
        if count < 1:
            raise ValueError(f"`count` is {count}. Ask for at least one task.")
        # Others' rows are passed over first; waiting for them is only needed before one says that nothing is left.
        for skip_locked in (True,) if self.database.is_sqlite else (True, False):
            with self.database.write() as connection:
                now = self.database.now(connection)
                ids = list(dict.fromkeys(connection.execute(queries.held(annotator, now, pool)).scalars()))[:count]
                ids += self._find(connection, annotator, now, pool, count - len(ids), set(ids), skip_locked)
                if ids:
                    queries.lease(connection, ids, annotator, now, now + lease_seconds)
                    return queries.fetch_tasks(connection, ids, annotator, now)
        return []

    def _find(
        self,
        connection: Connection,
        annotator: str,
        now: float,
        pool: str | None,
        count: int,
        held: set[int],
        skip_locked: bool,
    ) -> list[int]:
        found: list[int] = []
        seen = set(held)
        while len(found) < count:
            # The newest pool first: a loop waits for its last round, not for what an earlier one left open.
            newest = pool if pool is not None else queries.newest_pool(connection, annotator, now, seen)
            if newest is None:
                break
            query = queries.claimable(annotator, now, newest)
            open_query = query.where(comparisons.c.id.not_in(seen)) if seen else query
            locked = list(
                connection.execute(
                    open_query.limit(count - len(found)).with_for_update(of=comparisons, skip_locked=skip_locked)
                ).scalars()
            )
            if not locked:
                break
            seen.update(locked)
            if self.database.is_sqlite:
                found += locked
                continue
            # PostgreSQL chose by what it saw when the statement began; only now, with the row locked, does nobody
            # lease or label it any more. A second statement sees what was committed in between.
            found += connection.execute(query.where(comparisons.c.id.in_(locked))).scalars()
        return found

    def release(self, annotator: str, comparison_id: int) -> bool:
        """Give a task back before its lease ends; whether the annotator held it."""
        with self.database.write() as connection:
            queries.lock(connection, comparison_id)
            return queries.end_lease(connection, comparison_id, annotator, self.database.now(connection))


def check_lease(lease_seconds: float) -> None:
    if not (math.isfinite(lease_seconds) and lease_seconds > 0):
        raise ValueError(f"`lease_seconds` is {lease_seconds}. Give a positive number of seconds.")
