"""Many processes at once, and processes killed at any moment: nothing doubled, nothing lost, nothing half there."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from sqlalchemy import func, select, text

from rlhf_ext.feedback.schema import candidates, comparisons
from rlhf_ext.feedback.store import Candidate, LabelStore, NewComparison
from tests import postgres
from tests.feedback.test_store import check_counts


ROOT = Path(__file__).resolve().parents[2]


def start(location, mode, name):
    worker = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/feedback/label_worker.py"), str(location), mode, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return worker


def go(workers):
    for worker in workers:
        assert json.loads(worker.stdout.readline()) == ["ready"]
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()


def said(output):
    """Whole lines of a worker; a kill may cut the last one."""
    return [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith("\n")]


def new(count):
    return [NewComparison(f"prompt {i}", [Candidate("a"), Candidate("b")]) for i in range(count)]


def check_whole(store, acknowledged):
    """All that was acknowledged is there as it was said, and everything that is there is whole."""
    rows = {row.id: row for row in store.labels_since()}
    for _, id, comparison_id, value, key in acknowledged:
        assert rows[id].comparison_id == comparison_id and rows[id].value == value
        assert key is None or rows[id].comment == key * 20
    with store.database.read() as connection:
        short = connection.execute(
            select(comparisons.c.id)
            .outerjoin(candidates)
            .group_by(comparisons.c.id, comparisons.c.num_candidates)
            .having(func.count(candidates.c.position) != comparisons.c.num_candidates)
        ).all()
        assert short == []
        if store.database.is_sqlite:
            assert connection.execute(text("PRAGMA integrity_check")).scalars().all() == ["ok"]
            assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
    check_counts(store)


def test_processes_label_everything_once(location):
    """Four annotators in four processes that open the new store at the same moment."""
    workers = [start(location, "label", f"annotator {i}") for i in range(4)]
    with LabelStore(location) as store:
        store.add(new(80))
        store.set_overlap(1)
        go(workers)
        acknowledged, did = [], []
        for worker in workers:
            output, _ = worker.communicate(timeout=120)
            lines = said(output)
            assert lines[-1] == ["done"], lines[-2:]
            acknowledged += [line for line in lines if line[0] == "label"]
            did.append(len(lines))
        current = [label.comparison_id for _, group in store.labelled() for label in group]
        assert sorted(current) == list(range(1, 81))  # each once, none left
        assert len(store.labels_since()) == len({line[1] for line in acknowledged})  # and no row but those
        # They took turns, not equal ones: SQLite lets whoever asks first write, and one may get none on a busy machine
        assert sum(lines > 1 for lines in did) >= 2
        check_whole(store, acknowledged)


def test_opening_a_new_store_at_once(location):
    workers = [start(location, "label", f"annotator {i}") for i in range(4)]
    go(workers)
    for worker in workers:
        output, _ = worker.communicate(timeout=60)
        assert said(output) == [["done"]]
    with LabelStore(location, create=False) as store:
        assert store.progress().comparisons == 0


@pytest.mark.parametrize("mode", ["label", "import"])
def test_a_killed_writer_loses_nothing(location, mode):
    rng = random.Random(mode)
    acknowledged, added, kills = [], [], 0
    with LabelStore(location) as store:
        store.add(new(1500))
        for attempt in range(5):
            worker = start(location, mode, f"writer {attempt}")
            go([worker])
            assert worker.stdout.readline()  # it writes
            time.sleep(rng.uniform(0.0, 0.25))
            worker.kill()
            output, _ = worker.communicate(timeout=60)
            kills += worker.returncode == -9
            lines = said(output)
            acknowledged += [line for line in lines if line[0] == "label"]
            added += [id for line in lines if line[0] == "import" for id in line[1:]]
        assert kills == 5
        check_whole(store, acknowledged)
        if mode == "import":
            found = {comparison.id: labels for comparison, labels in store.labelled()}
            assert set(added) <= set(found)
            assert all([label.value for label in labels] == [[2, 0, 1]] for labels in found.values())
            assert len(found) % 5 == 0  # five came in one transaction each
        else:
            assert acknowledged
        # Whoever died holds leases, and no lock: others go on at once.
        began = time.monotonic()
        assert store.claim("survivor") is not None
        assert time.monotonic() - began < 5


def test_a_killed_server_loses_nothing():
    """PostgreSQL itself is killed and started again while a process labels."""
    if postgres.find_programs() is None:
        if os.environ["RLHF_EXT_IN_CI"] == "True" and postgres.VARIABLE not in os.environ:
            pytest.fail("no PostgreSQL programs")
        pytest.skip("no PostgreSQL programs")
    parent = Path(tempfile.mkdtemp(prefix="rlhf_ext_postgres_"))
    parent.chmod(0o755)
    try:
        url = postgres.start(parent / "server")
        with LabelStore(url) as store:
            store.add(new(1500))
            worker = start(url, "label", "writer")
            go([worker])
            assert worker.stdout.readline()
            time.sleep(0.3)
            postgres.restart(parent / "server")
            output, _ = worker.communicate(timeout=60)
            acknowledged = [line for line in said(output) if line[0] == "label"]
            assert acknowledged
            check_whole(store, acknowledged)  # its old connections find the server again
            assert store.claim("survivor") is not None
        postgres.stop(parent / "server", "immediate")
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def test_a_fork_opens_its_own_connections(location):
    with LabelStore(location) as store:
        store.add(new(10))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for _ in range(5):
                    store.submit("child", store.claim("child").comparison_id, "best", 0)
                status = 0
            finally:
                os._exit(status)
        for _ in range(5):
            store.submit("parent", store.claim("parent").comparison_id, "best", 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert store.progress().complete == 10
        check_whole(store, [])
