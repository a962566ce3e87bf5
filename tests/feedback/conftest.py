"""Label stores for tests: a new file, or a new database on a real PostgreSQL server."""

import os
import shutil
import tempfile
import uuid
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from rlhf_ext.feedback.store import LabelStore
from tests import postgres


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="session")
def server():
    """URL of a PostgreSQL server: the one that `.ci/run` started, or one of this session's own."""
    if url := os.environ.get(postgres.VARIABLE):
        yield url
        return
    if postgres.find_programs() is None:
        reason = f"no PostgreSQL: install it, or set {postgres.VARIABLE} to the URL of a server for tests"
        if os.environ["RLHF_EXT_IN_CI"] == "True":
            pytest.fail(reason)
        pytest.skip(reason)
    # Not below pytest's own folder, which only its user may enter.
    parent = Path(tempfile.mkdtemp(prefix="rlhf_ext_postgres_"))
    parent.chmod(0o755)
    try:
        yield postgres.start(parent / "server")
        postgres.stop(parent / "server", "immediate")
    finally:
        shutil.rmtree(parent, ignore_errors=True)


@pytest.fixture
def postgres_location(server):
    name = f"test_{uuid.uuid4().hex}"
    engine = create_engine(make_url(server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield make_url(server).set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request, tmp_path):
    """Where a store can be made: a file, then a database of a server."""
    if request.param == "sqlite":
        return str(tmp_path / "labels.db")
    return request.getfixturevalue("postgres_location")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(location, clock):
    with LabelStore(location, clock=clock) as store:
        yield store
