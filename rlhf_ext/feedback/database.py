"""Connections of the label store: one write at a time, safe against kills, on SQLite and PostgreSQL."""

import json
import os
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, insert, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError

from ..data.texts import without_passwords
from . import schema


BUSY_SECONDS = 60.0
"""How long a writer waits for others: SQLite's busy timeout, and the wait for a connection of the pool."""

MAX_CONNECTIONS = 40
"""Of one store at a time, five kept open: as many as an ASGI server has threads, which would else queue unfairly."""

_LOCK_NAME = "rlhf_ext label store"

_HOW_MADE = (
    "Check the name. Comparisons have to be in a store before anybody labels: `import_rows(LabelStore(...), rows)` "
    "makes one (docs/labels.md), and the loop keeps its own, `labels.db` in the folder of its run."
)


class Database:
    """
    Engine and transactions of one store.

    [`write`] holds the one lock for writing (SQLite: `BEGIN IMMEDIATE`; PostgreSQL: row locks, and where
    `exclusive` an advisory lock of the transaction), [`read`] sees one state of the data from its first statement to
    its last. A block that raises leaves nothing behind.

    Args:
        location (`str`, `Path` or `sqlalchemy.URL`): a file, or a URL of SQLite or PostgreSQL.
        create (`bool`): make file and tables where there are none.
        clock (`Callable[[], float]`, *optional*): seconds since 1970; by default that of this machine for SQLite and
            that of the server for PostgreSQL, so that clients whose clocks differ agree on when a lease ends.
    """

    def __init__(self, location: str | Path | URL, *, create: bool, clock: Callable[[], float] | None = None):
        self.url = store_url(location)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._clock = clock
        # Threads of one process queue here: SQLite's own waiting is a poll that lets the unlucky starve.
        self._writing = threading.Lock()
        if self.is_sqlite:
            _check_file(Path(self.url.database), create, shown_location(location))
        self.engine = _engine(self.url, self.is_sqlite)
        _forget_in_children(self)
        self._prepare(create)

    @contextmanager
    def write(self, *, exclusive: bool = False) -> Iterator[Connection]:
        """A transaction that writes; committed, and on the disk, when the block has ended."""
        if self.is_sqlite:
            with self._writing, self.engine.connect().execution_options(rlhf_ext_begin="IMMEDIATE") as connection:
                with connection.begin():
                    yield connection
            return
        with self.engine.begin() as connection:
            if exclusive:
                connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(_LOCK_NAME))))
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that reads one consistent state."""
        options = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    def now(self, connection: Connection) -> float:
        """The time by the store's clock, seconds since 1970 UTC."""
        if self._clock is not None:
            return self._clock()
        if self.is_sqlite:
            return time.time()
        return float(connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def _prepare(self, create: bool) -> None:
        if self.is_sqlite:
            _set_wal(self.engine)
        with self.write(exclusive=True) as connection:
            if not inspect(connection).has_table(schema.store.name):
                if not create:
                    raise ValueError(f"`store` is {self}, which holds no label store. {_HOW_MADE}")
                schema.metadata.create_all(connection)
                connection.execute(insert(schema.store).values(name="schema_version", value=schema.SCHEMA_VERSION))
            found = connection.execute(
                select(schema.store.c.value).where(schema.store.c.name == "schema_version")
            ).scalar_one()
        if found != schema.SCHEMA_VERSION:
            raise ValueError(
                f"{self} has tables of version {found}, this rlhf_ext knows version {schema.SCHEMA_VERSION}. Use the "
                "rlhf_ext that wrote it, or export its labels there and import them here."
            )

    def __str__(self) -> str:
        return self.url.database if self.is_sqlite else shown_location(self.url)


def shown_location(location: str | Path | URL) -> str:
    """Where a store lies, to be shown: without a password, whether it stands before the host or among the options."""
    text = location.render_as_string(hide_password=False) if isinstance(location, URL) else str(location)
    # The whole text is one URL, so that a user name or a password may hold anything: up to the last "@".
    place, mark, options = re.sub(r"(://[^:/]*):.*@", r"\1:***@", text, flags=re.DOTALL).partition("?")
    pairs = [option.partition("=") for option in options.split("&")]
    hidden = ["password" in unquote(name).lower() for name, _, _ in pairs]
    return place + mark + "&".join(n + s + ("***" if h else v) for (n, s, v), h in zip(pairs, hidden, strict=True))


def store_url(location: str | Path | URL) -> URL:
    """
    The URL of a store: a path becomes SQLite, PostgreSQL is spoken by psycopg 3.

    Raises:
        ValueError: for another database, or SQLite without a file.
    """
    is_url = isinstance(location, URL) or "://" in str(location)
    try:
        url = make_url(str(location) if isinstance(location, Path) else location) if is_url else None
    except (ArgumentError, ValueError) as error:  # their texts may hold a piece of a password
        raise ValueError(
            f"`store` is {without_passwords(str(location))!r}, which is no URL. Give postgresql://user@host/database, "
            "special characters of a password as %-codes, or a file such as labels.db."
        ) from error
    if url is None:
        if not str(location) or str(location) == ":memory:":
            raise ValueError(f"`store` is {str(location)!r}. Give a file such as labels.db, or a URL.")
        url = URL.create("sqlite", database=str(Path(location).expanduser().resolve()))
    backend = url.get_backend_name()
    if backend == "sqlite":
        if not url.database or url.database == ":memory:" or url.query:
            raise ValueError(
                f"`store` is {str(url)!r}, which is not a file's name alone. Give labels.db, or with three slashes "
                "sqlite:///labels.db."
            )
        return URL.create("sqlite", database=str(Path(url.database).resolve()))
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    raise ValueError(
        f"`store` is {url.render_as_string(hide_password=True)!r}, but a label store is a file (SQLite) or "
        "postgresql://user@host/database."
    )


def _engine(url: URL, is_sqlite: bool) -> Engine:
    options = {
        "json_serializer": partial(json.dumps, allow_nan=False),
        "pool_timeout": BUSY_SECONDS,
        "max_overflow": MAX_CONNECTIONS - 5,
    }
    if not is_sqlite:
        try:
            return create_engine(url, pool_pre_ping=True, **options)
        except ImportError as error:
            raise ImportError('PostgreSQL needs psycopg 3: pip install "rlhf-ext[postgresql]".') from error
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS}, **options)

    @event.listens_for(engine, "connect")
    def _settings(connection: sqlite3.Connection, record: object) -> None:
        # The driver's own BEGIN comes late and is never IMMEDIATE; `_begin` sends it instead.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        # With WAL, NORMAL may lose the last commits when the machine loses power.
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('rlhf_ext_begin', 'DEFERRED')}")

    return engine


def _set_wal(engine: Engine) -> None:
    """Write-ahead log: readers never wait for the writer. A property of the file, so asked for once."""
    raw = engine.raw_connection()
    try:
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                mode = raw.driver_connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                break
            except sqlite3.OperationalError as error:
                # The change of mode does not wait for others by itself, as every other statement does.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
    finally:
        raw.close()
    if mode != "wal":
        raise ValueError(
            f"SQLite cannot keep a write-ahead log for {engine.url.database} (journal mode {mode!r}); network folders "
            "often cannot. Put the file on a local disk, or use PostgreSQL."
        )


def _check_file(path: Path, create: bool, given: str) -> None:
    if not path.parent.is_dir():
        raise ValueError(
            f"`store` is {given!r}, and there is no folder {path.parent}. Give a file in a folder that exists."
        )
    if not path.exists():
        if not create:
            raise ValueError(f"`store` is {given!r}, and there is no such file. {_HOW_MADE}")
        return
    head = path.open("rb").read(16) if path.is_file() else b"folder"
    if head and not head.startswith(b"SQLite format 3"):
        raise ValueError(
            f"`store` is {given!r}, which is not an SQLite file. Import such data instead (docs/labels.md)."
        )


def _forget_in_children(database: Database) -> None:
    """A forked process opens connections of its own: two processes on one connection corrupt both their talks."""
    reference = weakref.ref(database)

    def forget() -> None:
        if (inherited := reference()) is not None:
            inherited.engine.dispose(close=False)
            # The thread that may have held it was not copied.
            inherited._writing = threading.Lock()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget)
