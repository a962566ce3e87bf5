"""Rules of the label store, on SQLite and PostgreSQL: leases, places, the chain of labels, what is refused."""

import threading
import time
from contextlib import contextmanager

import pytest
from sqlalchemy import delete, select, text, update
from sqlalchemy.exc import DBAPIError

from rlhf_ext.feedback import queries
from rlhf_ext.feedback.database import shown_location, store_url
from rlhf_ext.feedback.schema import candidates, comparisons, labels
from rlhf_ext.feedback.store import Candidate, LabelRefused, LabelStore, NewComparison, NewLabel, open_store


def new(prompt, *texts, **kwargs):
    return NewComparison(prompt, [Candidate(text, f"policy of {text}") for text in texts or ("a", "b")], **kwargs)


@contextmanager
def refused(reason):
    with pytest.raises(LabelRefused) as caught:
        yield
    assert caught.value.reason == reason


def check_counts(store):
    """That `missing` is what the labels say, for every comparison."""
    query = select(comparisons.c.id, comparisons.c.missing).order_by(comparisons.c.id)
    with store.database.write() as connection:
        before = connection.execute(query).all()
        queries.count_missing(connection)
        assert connection.execute(query).all() == before


def test_what_is_stored_is_what_was_given(store):
    messages = [{"role": "user", "content": "<b>Hé \u4f60\u597d \0 \U0001f600</b>"}]
    sampling = {"temperature": 0.7, "top_p": None, "seed": 3}
    given = [
        Candidate([{"role": "assistant", "content": "a"}], "sft", sampling),
        Candidate([{"role": "assistant", "content": ""}]),
        Candidate([{"role": "assistant", "content": "a"}], "ppo"),
    ]
    (id,) = store.add([NewComparison(messages, given, overlap=2, extra={"round": 1})], pool="round 1")
    comparison = store.comparison(id)
    assert comparison[:5] == (id, "round 1", messages, given, 2)
    assert comparison[5:] == (2, {"round": 1}, 1_000_000.0)
    task = store.claim("ann")
    assert (task.prompt, task.completions) == (messages, [candidate.completion for candidate in given])
    assert "sft" not in repr(task)
    label = store.submit("ann", id, "best", 2, seconds=3, comment="\u2014", shown=[2, 0, 1])
    assert store.history(id) == store.labels_since() == store.labels_of("ann") == [label]
    assert label[1:9] == (id, "ann", "best", 2, 3.0, "\u2014", [2, 0, 1], 1_000_000.0)
    with store.database.read() as connection:
        sums = connection.execute(select(candidates.c.checksum).order_by(candidates.c.position)).scalars().all()
    assert sums[0] == sums[2] != sums[1]


def test_the_same_comparison_is_added_once(store):
    first = store.add([new("p"), new("q"), new("p")])
    assert first[0] == first[2] != first[1]
    assert store.add([new("q"), new("r")])[0] == first[1]
    assert store.add([new("p", copy=1), new("p", "b", "a")], pool="default")[0] not in first
    assert store.add([new("p")], pool="other")[0] not in first
    assert store.progress().comparisons == 6
    labelled = new("p", labels=[NewLabel("ann", "best", 0)])
    assert store.add([labelled, labelled]) == [first[0]] * 2
    assert store.add([labelled]) == first[:1]
    assert [label.annotator for label in store.history(first[0])] == ["ann"]
    assert store.comparison(first[0]).missing == 0


def test_two_annotators_never_hold_the_same(store):
    ids = store.add([new("p"), new("q"), new("r", overlap=2)])
    held = [store.claim(name).comparison_id for name in ("ann", "bob", "cy", "dan")]
    assert held == [*ids, ids[2]]  # the third wants two
    assert store.claim("eve") is None
    assert store.claim("ann").comparison_id == ids[0]  # the page was loaded again
    store.submit("cy", ids[2], "best", 0)
    assert store.claim("cy") is None  # not twice by one annotator
    store.submit("dan", ids[2], "best", 1)
    assert [store.comparison(id).missing for id in ids] == [1, 1, 0]
    assert store.progress("cy") == (3, 1, 2, 2, 2, 0, 1, 0, 2)
    check_counts(store)


def test_claims_of_several_and_of_a_pool(store):
    store.add([new(f"p{i}") for i in range(3)], pool="one")
    two = store.add([new(f"p{i}") for i in range(3)], pool="two")
    tasks = store.claim_many("ann", 2, pool="two")
    assert [task.comparison_id for task in tasks] == two[:2]
    again = store.claim_many("ann", 5, pool="two")
    assert {task.comparison_id for task in again} == set(two)
    assert len(store.claim_many("bob", 9)) == 3
    assert store.progress(pool="two").leased == 3
    store.submit("ann", two[0], "incomparable")
    assert [row[0].id for row in store.labelled(pool="two")] == [two[0]]
    assert list(store.labelled(pool="one")) == []


def test_a_lease_runs_out(store, clock):
    (id,) = store.add([new("p")])
    task = store.claim("ann", lease_seconds=60)
    assert task.expires == clock.now + 60
    clock.now += 50
    assert store.claim("ann", lease_seconds=60).expires == clock.now + 60  # and begins anew
    clock.now += 59
    assert store.claim("bob") is None
    clock.now += 1
    assert store.claim("bob").comparison_id == id
    with refused("taken"):
        store.submit("ann", id, "best", 0)
    assert store.history(id) == []
    clock.now += 1000
    assert store.submit("ann", id, "best", 0).value == 0  # late, and still wanted
    with refused("taken"):
        store.submit("bob", id, "best", 0)
    assert store.comparison(id).missing == 0


def test_a_lease_keeps_its_place(store):
    (id,) = store.add([new("p")])
    store.claim("ann")
    with refused("taken"):
        store.submit("bob", id, "best", 0)
    assert store.release("ann", id) and not store.release("ann", id)
    assert store.claim("bob").comparison_id == id
    assert store.submit("bob", id, "tie").value == [0, 1]


def test_a_skip_goes_to_somebody_else(store):
    (id,) = store.add([new("p")])
    store.claim("ann")
    skip = store.submit("ann", id, "skip", comment="not my field")
    assert store.claim("ann") is None
    assert store.claim("bob").comparison_id == id
    with refused("taken"):  # a skip that becomes a label needs a place
        store.submit("ann", id, "best", 0, supersedes=skip.id)
    undone = store.undo("ann", skip.id)  # and so does one that is taken back
    assert store.claim("ann") is None
    with refused("taken"):
        store.submit("ann", id, "best", 0)
    again = store.submit("ann", id, "skip")
    assert again.supersedes == undone.id
    store.submit("bob", id, "best", 0)
    assert store.progress("ann")[4:8] == (1, 1, 0, 1)
    (other,) = store.add([new("q")])
    store.undo("ann", store.submit("ann", other, "skip").id)
    assert store.claim("ann").comparison_id == other


def test_what_was_labelled_elsewhere_is_not_held_any_more(store):
    """An import brings a label of an annotator who holds the comparison here."""
    (id,) = store.add([new("p", overlap=2)])
    store.claim("ann")
    store.add([new("p", labels=[NewLabel("ann", "best", 0)])])
    assert store.claim("ann") is None and store.claim("bob").comparison_id == id


def test_undo_and_correction_add_rows(store):
    (id,) = store.add([new("p")])
    first = store.submit("ann", id, "best", 0)
    with refused("labelled"):
        store.submit("ann", id, "best", 1)
    second = store.submit("ann", id, "best", 1, supersedes=first.id)
    with refused("stale"):
        store.submit("ann", id, "tie", supersedes=first.id)
    with refused("stale"):
        store.undo("ann", first.id)
    undone = store.undo("ann", second.id)
    assert store.undo("ann", second.id) == undone  # asked twice, done once
    assert store.labels_of("ann") == [] and store.comparison(id).missing == 1
    assert store.claim("bob") is None  # it is with ann again
    assert store.claim("ann").comparison_id == id
    third = store.submit("ann", id, "incomparable")
    assert [row.kind for row in store.history(id)] == ["best", "best", "undo", "incomparable"]
    assert [row.supersedes for row in store.history(id)] == [None, first.id, second.id, undone.id]
    assert [current for _, current in store.labelled()] == [[third]]
    assert store.labels_since(second.id) == [undone, third] and store.labels_since(third.id) == []
    with refused("unknown"):
        store.undo("bob", third.id)
    check_counts(store)


def test_undo_and_own_labels_of_a_pool(store):
    (one,), (two,) = (store.add([new("p")], pool=pool) for pool in ("one", "two"))
    first, second = (store.submit("ann", id, "best", 0) for id in (one, two))
    assert store.labels_of("ann", pool="one") == [first] and store.labels_of("ann") == [second, first]
    with pytest.raises(LabelRefused, match="no label.*in the pool 'two'"):
        store.undo("ann", first.id, pool="two")
    assert store.labels_of("ann") == [second, first]
    assert store.undo("ann", first.id, pool="one").supersedes == first.id
    assert store.labels_of("ann") == [second]


def test_undo_shows_the_undone_first(store):
    ids = store.add([new("p"), new("q")])
    store.claim("ann")
    label = store.submit("ann", ids[0], "best", 0)
    store.database._clock.now += 1
    store.claim("ann")
    store.database._clock.now += 1
    store.undo("ann", label.id)
    assert store.claim("ann").comparison_id == ids[0]
    store.submit("ann", ids[0], "best", 1)
    assert store.claim("ann").comparison_id == ids[1]


def test_a_key_is_used_once(store, clock):
    ids = store.add([new("p"), new("q")])
    store.claim("ann")
    label = store.submit("ann", ids[0], "best", 0, key="k1")
    clock.now += 10_000
    assert store.submit("ann", ids[0], "best", 0, key="k1") == label
    with refused("key"):
        store.submit("ann", ids[0], "best", 1, key="k1")
    with refused("key"):
        store.submit("ann", ids[1], "best", 0, key="k1")
    store.undo("ann", label.id)
    assert store.submit("ann", ids[0], "best", 0, key="k1") == label  # a late repetition brings nothing back
    assert store.submit("bob", ids[1], "best", 0, key="k1").id != label.id  # keys are each annotator's own
    assert len(store.labels_since()) == 3


def test_other_overlap(store):
    ids = store.add([new("p"), new("q")])
    for name in ("ann", "bob"):
        with LabelStore(store.database.url, clock=store.database._clock) as other:
            other.set_overlap(2)
        store.submit(name, ids[0], "best", 0)
    store.claim("ann")
    store.set_overlap(1)
    assert [store.comparison(id).missing for id in ids] == [0, 1]
    assert store.claim("bob") is None
    store.submit("ann", ids[1], "best", 0)
    store.set_overlap(3, pool="default")
    assert [store.comparison(id).missing for id in ids] == [1, 2]
    check_counts(store)


def test_the_database_refuses_changes_of_labels(store):
    (id,) = store.add([new("p")])
    store.submit("ann", id, "best", 0)
    for statement in (update(labels).values(value=1), delete(labels), update(candidates).values(policy="x")):
        with pytest.raises(DBAPIError, match="append-only"), store.database.write() as connection:
            connection.execute(statement)
    with pytest.raises(DBAPIError), store.database.write() as connection:  # foreign keys are on
        connection.execute(labels.insert().values(comparison_id=99, annotator="a", kind="skip", created=0.0))
    with pytest.raises(DBAPIError), store.database.write() as connection:  # a second first label
        connection.execute(labels.insert().values(comparison_id=id, annotator="ann", kind="skip", created=0.0))
    assert [label.value for label in store.history(id)] == [0]


def test_what_failed_leaves_nothing(store):
    with pytest.raises(RuntimeError), store.database.write(exclusive=True) as connection:
        queries.insert_comparisons(connection, [new("p")], "default", 0.0)
        raise RuntimeError
    assert store.progress().comparisons == 0
    with pytest.raises(ValueError, match="candidates"):
        store.add([new("p"), NewComparison("q", [Candidate("a")])])
    assert store.progress().comparisons == 0


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("best", 2),
        ("best", -1),
        ("best", True),
        ("best", "0"),
        ("tie", [0]),
        ("tie", [0, 0]),
        ("ranking", [0, 0]),
        ("ranking", None),
        ("target", [0.5, 0.6]),
        ("target", [float("nan"), 1.0]),
        ("incomparable", 0),
        ("undo", None),
        ("worst", 0),
    ],
)
def test_wrong_answers_are_named(tmp_path, kind, value):
    store = LabelStore(tmp_path / "labels.db")
    (id,) = store.add([new("p")])
    with pytest.raises(ValueError, match=f"kind|{kind}"):
        store.submit("ann", id, kind, value)
    assert store.history(id) == []


def test_wrong_arguments_are_named(tmp_path):
    store = LabelStore(tmp_path / "labels.db")
    (id,) = store.add([new("p")])
    for field, call in {
        "annotator": lambda: store.claim(""),
        "lease_seconds": lambda: store.claim("ann", lease_seconds=0),
        "count": lambda: store.claim_many("ann", 0),
        "seconds": lambda: store.submit("ann", id, "best", 0, seconds=-1.0),
        "comment": lambda: store.submit("ann", id, "best", 0, comment="\0"),
        "shown": lambda: store.submit("ann", id, "best", 0, shown=[0, 0]),
        "overlap": lambda: store.add([new("q", overlap=0)]),
        "prompt": lambda: store.add([new("")]),
        "sampling": lambda: store.add([NewComparison("q", [Candidate("a", sampling={"t": float("nan")})] * 2)]),
        "completion": lambda: store.add([new("q", "a", "\ud800")]),
        "policy": lambda: store.add([NewComparison("q", [Candidate("a", policy="\0")] * 2)]),
        "labels": lambda: store.add([new("q", labels=[NewLabel("ann", "skip")] * 2)]),
    }.items():
        with pytest.raises(ValueError, match="ranking" if field == "shown" else field):
            call()
    with refused("unknown"):
        store.submit("ann", 99, "best", 0)
    with refused("unknown"):
        store.comparison(99)
    assert store.labels_since() == []


def test_a_location_that_is_none_is_said_once():
    with pytest.raises(ValueError, match="with three slashes") as caught:
        open_store("sqlite://labels.db")
    assert str(caught.value).count("`store` is") == 1


def test_a_command_hears_one_sentence_from_a_server_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match="^`store` is 'postgres://me:.*/labels', which cannot be opened .*runs"
    ) as caught:
        open_store("postgres://me:pass123@127.0.0.1:1/labels", create=False)
    assert "pass123" not in str(caught.value) and "\n" not in str(caught.value)
    with open_store(tmp_path / "labels.db") as store:
        assert store.progress().comparisons == 0


def test_pools_are_named_oldest_first(store):
    assert store.pools() == []
    store.add([new("p")], pool="z")
    store.add([new("p"), new("q")], pool="a")
    assert store.pools() == ["z", "a"]


def test_wrong_locations_are_named(tmp_path):
    for location in (":memory:", "sqlite://", "mysql://host/db", tmp_path / "no" / "labels.db"):
        with pytest.raises(ValueError, match="store"):
            LabelStore(location)
    for location in ("sqlite://labels.db", "sqlite:///labels.db?mode=ro"):
        with pytest.raises(ValueError, match="Give labels.db, or with three slashes sqlite:///labels.db.$"):
            LabelStore(location)
    with pytest.raises(ValueError, match="is no URL") as caught:
        LabelStore("postgresql://pass123@host:port/x")
    assert "import_rows" not in str(caught.value)
    with pytest.raises(ValueError, match=r"no such file.*`import_rows\(LabelStore\(...\), rows\)`.*the loop"):
        LabelStore(tmp_path / "labels.db", create=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "text.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(ValueError, match="not an SQLite file"):
        LabelStore(tmp_path / "text.jsonl")
    assert (tmp_path / "text.jsonl").read_text() == '{"prompt": "p"}\n'
    secret = "postgresql://me:pass123@localhost:1/x"
    assert "pass123" not in str(store_url(secret)) and store_url(secret).drivername == "postgresql+psycopg"


@pytest.mark.parametrize(
    "location",
    [
        "postgresql://me:pass 123@db/x",
        'postgresql://me:pass"123@db/x',
        "postgresql://me@db/x?password=pass123",
        "postgresql://me@db/x?sslpassword=pass123&sslmode=require",
        "postgresql://me:pass123@db:port/x",  # no URL
        "postgresql://me@server:pass123@server.example/x",
        "postgresql://me:pa@ss123@db/x",
        "postgresql://me@db/x?x-password=pass123",
        "postgresql://me@db/x?pass%77ord=pass123",
    ],
)
def test_a_location_is_shown_without_passwords(location):
    shown = shown_location(location)
    assert "123" not in shown and "***" in shown and "me" in shown and "/x" in shown


def test_tables_of_another_version_are_refused(location):
    with LabelStore(location) as store, store.database.write() as connection:
        connection.execute(text("UPDATE rlhf_ext_store SET value = 99"))
    with pytest.raises(ValueError, match="version 99"):
        LabelStore(location)


def test_sqlite_keeps_what_it_said(tmp_path):
    store = LabelStore(tmp_path / "labels.db")
    with store.database.write() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
        assert found == ["wal", 2]  # 2 is FULL
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000


def test_a_reader_sees_one_moment(store, monkeypatch):
    monkeypatch.setattr("rlhf_ext.feedback.store._CHUNK", 1)
    ids = store.add([new("p"), new("q"), new("r")])
    first = [store.submit("ann", id, "best", 0) for id in ids[:2]]
    rows = store.labelled()
    assert next(rows) == (store.comparison(ids[0]), [first[0]])
    store.submit("ann", ids[1], "best", 1, supersedes=first[1].id)  # nobody waits for the reader
    store.submit("ann", ids[2], "best", 0)
    assert [labels for _, labels in rows] == [[first[1]]]
    assert [labels[0].value for _, labels in store.labelled()] == [0, 1, 0]


@pytest.mark.parametrize("leased", [True, False])
def test_a_claim_waits_before_it_says_that_nothing_is_left(postgres_location, leased):
    """Another writer holds the row: it may lease the comparison in that moment, or leave it as it is."""
    with LabelStore(postgres_location) as store:
        (id,) = store.add([new("p")])
        claimed = []
        thread = threading.Thread(target=lambda: claimed.append(store.claim("bob")))
        with store.database.write() as connection:
            queries.lock(connection, id)
            thread.start()
            waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            deadline = time.monotonic() + 10
            while not claimed and not connection.execute(waiting).scalar() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert claimed == []
            if leased:
                now = store.database.now(connection)
                queries.lease(connection, [id], "ann", now, now + 60)
        thread.join()
        assert [task and task.comparison_id for task in claimed] == [None if leased else id]


def test_no_label_appears_behind_a_cursor(postgres_location):
    """Ids of PostgreSQL are drawn before a row can be seen: a later id must not be seen before an earlier one."""
    with LabelStore(postgres_location) as store:
        ids = store.add([new("p"), new("q")])
        thread = threading.Thread(target=lambda: store.submit("bob", ids[1], "best", 1))
        with store.database.write(exclusive=True) as connection:
            queries.insert_label(connection, comparison_id=ids[0], annotator="ann", kind="best", value=0, created=0.0)
            thread.start()
            thread.join(0.3)
            assert store.labels_since() == []
        thread.join()
        assert [label.annotator for label in store.labels_since()] == ["ann", "bob"]


def test_threads_of_one_store(store):
    """What a server does: many threads, one store; fewer connections than threads."""
    ids = store.add([new(f"p{i}") for i in range(60)])
    errors = []

    def work(name):
        try:
            while (task := store.claim(name)) is not None:
                store.submit(name, task.comparison_id, "best", 0, key=str(task.comparison_id))
        except Exception as error:  # a thread's error is nobody's
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"annotator {i}",)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(label.comparison_id for label in store.labels_since()) == ids
    assert [label.id for label in store.labels_since()] == sorted(label.id for label in store.labels_since())
    check_counts(store)
