"""The labelling page by its calls: who may do what, what is stored, what is refused."""

import json
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient

from rlhf_ext import cli
from rlhf_ext.feedback.page.accounts import Accounts, Sessions
from rlhf_ext.feedback.page.app import MAX_BODY, build_app
from rlhf_ext.feedback.page.server import is_loopback, serve
from rlhf_ext.feedback.records import Candidate, NewComparison
from rlhf_ext.feedback.store import LabelStore


URL = "http://127.0.0.1:7860"


@pytest.fixture
def store(tmp_path):
    with LabelStore(tmp_path / "labels.db") as store:
        yield store


def fill(store, count=3, size=4):
    return store.add(
        NewComparison(f"prompt {i}", [Candidate(f"answer {i}.{k}", policy=f"policy {k}") for k in range(size)])
        for i in range(count)
    )


def client(store, name=None, password=None, **kwargs):
    caller = TestClient(build_app(store, **kwargs), base_url=URL)
    if name is not None:
        answer = caller.post("/api/login", json={"name": name, "password": password})
        assert answer.status_code == 200, answer.text
    return caller


def task_of(caller):
    found = caller.post("/api/task", json={})
    assert found.status_code == 200, found.text
    return found.json()["task"]


def test_a_label_is_of_the_answer_that_was_shown(store):
    fill(store)
    anna = client(store, "anna")
    task = task_of(anna)
    assert task_of(anna) == task  # a reload shows the same, in the same order
    assert set(task) == {"comparison_id", "prompt", "completions", "truncated"}  # no policy, nobody's label
    chosen = task["completions"][2]
    answer = {"comparison_id": task["comparison_id"], "kind": "best", "value": 2, "seconds": 3.5, "comment": "clear"}
    found = anna.post("/api/label", json={**answer, "key": "k1"}).json()
    assert found["progress"] == {"own": 1, "skipped": 0, "labels": 1, "wanted": 3}
    again = anna.post("/api/label", json={**answer, "key": "k1"}).json()
    assert again["label_id"] == found["label_id"]  # a lost reply is no second label
    (label,) = store.labels_since()
    stored = store.comparison(task["comparison_id"])
    assert stored.candidates[label.value].completion == chosen
    assert [stored.candidates[k].completion for k in label.shown] == task["completions"]
    assert (label.annotator, label.seconds, label.comment) == ("anna", 3.5, "clear")


def test_orders_differ_between_annotators_and_comparisons(store):
    fill(store, 40)
    orders = set()
    for name in ("anna", "bo"):
        caller = client(store, name)
        for _ in range(20):
            task = task_of(caller)
            orders.add((name, tuple(text.split(".")[1] for text in task["completions"])))
            caller.post("/api/label", json={"comparison_id": task["comparison_id"], "kind": "tie"})
    assert len(orders) > 20  # 24 orders each
    assert len({label.comparison_id for label in store.labels_since()}) == 40


def test_rankings_ties_skips_and_undo(store):
    fill(store)
    anna = client(store, "anna")
    task = task_of(anna)
    call = {"comparison_id": task["comparison_id"], "kind": "ranking", "value": [3, 0, 2, 1]}
    label_id = anna.post("/api/label", json=call).json()["label_id"]
    stored, (label,) = store.comparison(task["comparison_id"]), store.labels_since()
    ranked = [stored.candidates[k].completion for k in label.value]
    assert ranked == [task["completions"][k] for k in (3, 0, 2, 1)]
    assert anna.get("/api/labels").json()["labels"][0]["id"] == label_id
    assert anna.post("/api/undo", json={"label_id": label_id}).json()["progress"]["own"] == 0
    assert task_of(anna) == task
    assert anna.post("/api/label", json={**call, "kind": "skip", "value": None}).status_code == 200
    other = task_of(anna)
    assert other["comparison_id"] != task["comparison_id"]
    bo = client(store, "bo")
    assert task_of(bo)["comparison_id"] == task["comparison_id"]  # what was skipped goes to somebody else
    refused = bo.post("/api/undo", json={"label_id": label_id})
    assert refused.status_code == 409 and refused.json()["reason"] == "unknown"
    assert bo.get("/api/labels").json()["labels"] == []


@pytest.mark.parametrize(
    "call, words",
    [
        ({"kind": "best", "value": 4}, "position"),
        ({"kind": "best", "value": True}, "position"),
        ({"kind": "best", "value": 0.0}, "position"),  # the store takes it for 0, which is another candidate
        ({"kind": "best", "value": 10**400}, "position"),
        ({"kind": "best"}, "position"),
        ({"kind": "tie", "value": [0, 1.0]}, "position"),
        ({"kind": "target", "value": [1.0, 0, 0, 0]}, "kind"),
        ({"kind": ["best"]}, "kind"),
        ({"kind": "ranking", "value": [0, 0, 1, 2]}, "every position"),
        ({"kind": "undo"}, "kind"),
        ({"kind": "tie", "seconds": -1}, "seconds"),
        ({"kind": "tie", "seconds": "x"}, "seconds"),
        ({"kind": "tie", "seconds": [1]}, "seconds"),
        ({"kind": "tie", "seconds": True}, "seconds"),
        ({"kind": "tie", "seconds": 10**400}, "seconds"),
        ({"kind": "tie", "key": 1}, "key"),
        ({"kind": "tie", "comparison_id": 10**30}, "comparison_id"),
        ({"kind": "tie", "comparison_id": 1.0}, "comparison_id"),
        ({"kind": "tie", "comment": "x" * 4001}, "comment"),
        ({"kind": "tie", "comment": ["x"]}, "comment"),
    ],
)
def test_answers_that_are_none_are_named(store, call, words):
    (first, *_) = fill(store)
    anna = client(store, "anna")
    answer = anna.post("/api/label", json={"comparison_id": first, **call})
    assert answer.status_code == 400 and words in answer.json()["message"]
    assert store.labels_since() == []
    assert anna.post("/api/label", json={"comparison_id": "1", "kind": "tie"}).status_code == 400
    unknown = anna.post("/api/label", json={"comparison_id": 99, "kind": "tie"})
    # Annotators do not learn where the store lies.
    assert unknown.status_code == 409 and unknown.json()["message"] == "There is no comparison 99."


def test_calls_from_elsewhere_are_refused(store):
    fill(store)
    anna = client(store, "anna")
    evil = [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},  # another program on this machine
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ]
    for headers in evil:
        assert anna.post("/api/task", json={}, headers=headers).status_code == 403, headers
    own = {"Origin": URL, "Sec-Fetch-Site": "same-origin"}
    assert anna.post("/api/task", json={}, headers=own).status_code == 200
    plain = anna.post("/api/task", content="{}", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    assert anna.post("/api/task", content="[]", headers={"Content-Type": "application/json"}).status_code == 400
    long = anna.post("/api/task", content=" " * (MAX_BODY + 1), headers={"Content-Type": "application/json"})
    assert long.status_code == 413
    # A foreign name that resolves to this machine
    assert anna.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert anna.get("/api/labels").cookies == {}


def test_every_answer_carries_the_policy(store):
    caller = client(store)
    for path in ("/", "/static/page.js", "/api/session", "/nothing", "/api/task"):
        policy = caller.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert caller.get("/", headers={"Host": "evil.example"}).headers["x-content-type-options"] == "nosniff"
    assert "<script>" not in caller.get("/").text  # all of it from files, as the policy wants


def test_a_fault_of_the_server_carries_the_policy_too(store, monkeypatch):
    fill(store)
    app = build_app(store)
    anna = TestClient(app, base_url=URL, raise_server_exceptions=False)
    anna.post("/api/login", json={"name": "anna"})
    monkeypatch.setattr(store, "claim", lambda *args, **kwargs: 1 / 0)
    failed = anna.post("/api/task", json={})
    assert failed.status_code == 500 and failed.json()["reason"] == "failed" and "division" not in failed.text
    assert "default-src 'none'" in failed.headers["content-security-policy"]
    deep = anna.post("/api/task", content='{"a":' * 10_000, headers={"Content-Type": "application/json"})
    assert deep.status_code == 400 and deep.headers["x-content-type-options"] == "nosniff"


def test_a_page_of_one_pool_touches_no_other(store):
    (old,) = store.add([NewComparison("first round", [Candidate("a"), Candidate("b")])], pool="one")
    store.add([NewComparison("second round", [Candidate("c"), Candidate("d")])], pool="two")
    store.claim("anna", pool="one")
    label = store.submit("anna", old, "best", 0)
    anna = client(store, "anna", pool="two")
    assert anna.get("/api/labels").json()["labels"] == []
    refused = anna.post("/api/undo", json={"label_id": label.id})
    assert refused.status_code == 409 and refused.json()["reason"] == "unknown"
    assert store.labels_of("anna") == [label] and task_of(anna)["prompt"] == "second round"
    everywhere = client(store, "anna")
    assert everywhere.get("/api/labels").json()["labels"][0]["id"] == label.id
    assert client(store, "anna", pool="one").post("/api/undo", json={"label_id": label.id}).status_code == 200


def test_annotators_learn_which_texts_were_cut(store):
    store.add([NewComparison("?", [Candidate("whole"), Candidate("cu", truncated=True), Candidate("whole too")])])
    task = task_of(client(store, "anna"))
    assert dict(zip(task["completions"], task["truncated"], strict=True)) == {
        "whole": False,
        "cu": True,
        "whole too": False,
    }


def test_guidelines_are_for_those_who_logged_in(store, tmp_path):
    accounts = Accounts(tmp_path / "users.json")
    accounts.set_password("anna", "correct horse")
    stranger = client(store, guidelines="our rules", accounts=accounts)
    assert "our rules" not in stranger.get("/api/session").text
    anna = client(store, "anna", "correct horse", guidelines="our rules", accounts=accounts)
    assert anna.get("/api/session").json()["guidelines"] == "our rules"


def test_a_session_ends_with_its_password(store, tmp_path):
    fill(store)
    accounts = Accounts(tmp_path / "users.json")
    accounts.set_password("anna", "correct horse")
    accounts.set_password("bo", "battery staple")
    app = build_app(store, accounts=accounts)
    anna, bo = (TestClient(app, base_url=URL) for _ in range(2))
    for caller, name, password in ((anna, "anna", "correct horse"), (bo, "bo", "battery staple")):
        assert caller.post("/api/login", json={"name": name, "password": password}).status_code == 200
    # By another process, as `rlhf-ext label-user` is one.
    Accounts(tmp_path / "users.json").set_password("anna", "another horse")
    assert anna.post("/api/task", json={}).status_code == 401
    assert anna.get("/api/session").json()["name"] is None
    assert task_of(bo) is not None
    saved = json.loads((tmp_path / "users.json").read_text())
    (tmp_path / "users.json").write_text(json.dumps({"anna": saved["anna"]}))
    assert bo.post("/api/task", json={}).status_code == 401
    assert anna.post("/api/login", json={"name": "anna", "password": "another horse"}).status_code == 200
    assert task_of(anna) is not None


def test_tries_at_once_are_counted_before_they_are_checked(store, tmp_path, monkeypatch):
    accounts = Accounts(tmp_path / "users.json")
    accounts.set_password("anna", "correct horse")
    caller = client(store, accounts=accounts)
    checked, all_in = [], threading.Event()

    def check(name, password):
        checked.append(password)
        all_in.wait(timeout=20)  # as long as the others take to get here
        return False

    monkeypatch.setattr(accounts, "check", check)

    def attempt(number):
        answer = caller.post("/api/login", json={"name": "anna", "password": f"guess {number}"}).status_code
        if answer == 429:
            all_in.set()  # the eleventh was refused while ten are being checked
        return answer

    with ThreadPoolExecutor(20) as threads:
        found = list(threads.map(attempt, range(20)))
    assert len(checked) == 10 and sorted(found) == [403] * 10 + [429] * 10
    assert Sessions().may_try("anna")


def test_nobody_labels_without_a_login(store, tmp_path):
    fill(store)
    assert client(store).post("/api/task", json={}).status_code == 401
    accounts = Accounts(tmp_path / "users.json")
    accounts.set_password("anna", "correct horse")
    guarded = client(store, accounts=accounts)
    assert guarded.get("/api/session").json()["needs_password"] is True
    for name, password in (("anna", "wrong horse"), ("bo", "correct horse"), ("anna", "")):
        assert guarded.post("/api/login", json={"name": name, "password": password}).status_code == 403
    anna = client(store, "anna", "correct horse", accounts=accounts)
    assert task_of(anna) is not None
    cookie = anna.post("/api/login", json={"name": "anna", "password": "correct horse"}).headers["set-cookie"]
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
    anna.post("/api/logout", json={})
    assert anna.post("/api/task", json={}).status_code == 401
    for _ in range(10):
        guarded.post("/api/login", json={"name": "anna", "password": "wrong horse"})
    late = guarded.post("/api/login", json={"name": "anna", "password": "correct horse"})
    assert late.status_code == 429


def test_passwords_are_hashed_in_a_file_of_ones_own(tmp_path):
    accounts = Accounts(tmp_path / "users.json")
    accounts.set_password("anna", "correct horse")
    accounts.set_password("bo", "correct horse")
    text = (tmp_path / "users.json").read_text()
    assert "horse" not in text and stat.S_IMODE((tmp_path / "users.json").stat().st_mode) == 0o600
    saved = json.loads(text)
    assert saved["anna"]["hash"] != saved["bo"]["hash"]  # each with its own salt
    assert accounts.check("anna", "correct horse") and not accounts.check("anna", "correct horse ")
    accounts.set_password("anna", "another one")
    assert not accounts.check("anna", "correct horse")
    with pytest.raises(ValueError, match="8 or more"):
        accounts.set_password("cy", "short")


def test_sessions_end():
    sessions = Sessions(seconds=0.0)
    assert sessions.name_of(sessions.start("anna")) is None
    sessions = Sessions()
    token = sessions.start("anna")
    assert (
        sessions.name_of(token) == "anna" and sessions.name_of(token + "x") is None and sessions.name_of(None) is None
    )
    sessions.end(token)
    assert sessions.name_of(token) is None


def test_other_addresses_need_accounts(tmp_path):
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("192.168.0.7") and not is_loopback("example.org")
    with pytest.raises(ValueError, match="--host.*0.0.0.0.*label-user"):
        serve(str(tmp_path / "labels.db"), host="0.0.0.0")
    with pytest.raises(ValueError, match="holds no account"):
        serve(str(tmp_path / "labels.db"), host="0.0.0.0", users=str(tmp_path / "users.json"))
    with pytest.raises(ValueError, match="labels.db"):
        serve(str(tmp_path / "labels.db"))


def test_a_pool_that_is_not_there_is_named(store, tmp_path):
    with pytest.raises(ValueError, match="`--pool` is 'one', but the store has no comparisons yet"):
        serve(str(tmp_path / "labels.db"), pool="one", port=99999)
    fill(store)
    with pytest.raises(ValueError, match="`--pool` is 'defualt', but the store has 'default'"):
        serve(str(tmp_path / "labels.db"), pool="defualt", port=99999)


def test_an_address_that_is_taken_ends_with_1(store, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["label", "--store", str(tmp_path / "labels.db"), "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"`--port` is {port}, which another program uses" in said and "--port 0" in said
    with pytest.raises(ValueError, match="`--port` 99999 cannot be listened on"):
        serve(str(tmp_path / "labels.db"), port=99999)
