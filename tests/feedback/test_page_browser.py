"""The labelling page in a real headless Chromium, served by the real command in a process of its own."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf_ext.feedback.records import Candidate, NewComparison
from rlhf_ext.feedback.store import LabelStore


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update"]
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>**bold** &amp;"

if CHROMIUM is None and os.environ.get("RLHF_EXT_IN_CI") == "True":
    pytest.fail("There is no Chromium, and CI has to run the page in one: install the Debian package `chromium`.")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS, chromium_sandbox=False)
        yield browser
        browser.close()


@pytest.fixture
def store(tmp_path):
    with LabelStore(tmp_path / "labels.db") as store:
        yield store


@pytest.fixture
def page_of(browser, tmp_path, store):
    """Opens the page as one annotator; the server is a process, started by the command."""
    (tmp_path / "guidelines.txt").write_text("Prefer the truth.\n你好")
    command = "import sys; from rlhf_ext.cli import main; sys.exit(main())"
    server = subprocess.Popen(
        [sys.executable, "-c", command, "label", "--store", str(tmp_path / "labels.db"), "--port", "0"]
        + ["--guidelines", str(tmp_path / "guidelines.txt")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    line = server.stdout.readline()
    address = line.split(" at ")[1].split(" ")[0]
    contexts = []

    def open_page(name, lost=None, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        if lost is not None:  # before the page loads: an interception set later may miss the request that comes next
            page.route("**/api/*", lambda handler: lose(handler, lost))
        page.faults = []
        page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto(address)
        page.fill("#name", name)
        page.click("#login button")
        return page

    yield open_page
    for context in contexts:
        context.close()
    server.terminate()
    server.wait(timeout=20)


def lose(handler, lost):
    """Lets the server answer, but the answers of the paths in `lost` do not reach the page."""
    if Path(handler.request.url).name in lost:
        handler.fetch()
        handler.abort()
    else:
        handler.continue_()


def fill(store, count, texts=("one", "two", "three", "four")):
    return store.add(
        NewComparison(f"prompt {i}", [Candidate(f"{text} {i}", policy=f"secret-{text}") for text in texts])
        for i in range(count)
    )


def shown(page):
    page.wait_for_selector(".candidate .text")
    return page.locator("#prompt").inner_text(), page.locator(".candidate .text").all_inner_texts()


def press(page, key):
    """A key, and the wait until the next task is there."""
    before = shown(page)
    page.keyboard.press(key)
    page.wait_for_function(
        "before => document.querySelector('#prompt').textContent !== before || document.querySelector('#work').hidden",
        arg=before[0],
    )


def test_keys_label_undo_and_rank(store, page_of):
    fill(store, 6)
    page = page_of("anna")
    prompt, texts = shown(page)
    assert "Prefer the truth.\n你好" in page.locator("#guidelines-text").inner_text()
    assert "secret" not in page.content()
    press(page, "2")
    (label,) = store.labels_since()
    stored = store.comparison(label.comparison_id)
    assert (stored.prompt, stored.candidates[label.value].completion) == (prompt, texts[1])
    assert 0 < label.seconds < 30
    page.keyboard.press("z")  # back to the first
    page.wait_for_function("before => document.querySelector('#prompt').textContent === before", arg=prompt)
    assert shown(page) == (prompt, texts)
    page.keyboard.press("r")
    for key in "3124":
        page.keyboard.press(key)
    press(page, "Enter")
    ranking = store.labels_of("anna")[0]
    assert ranking.kind == "ranking"
    assert [stored.candidates[k].completion for k in ranking.value] == [texts[k] for k in (2, 0, 1, 3)]
    page.fill("#comment", "t x s 1")  # keys in the comment are letters
    page.locator("#comment").blur()
    press(page, "t")
    press(page, "x")
    press(page, "s")
    kinds = [label.kind for label in store.labels_of("anna")]
    assert kinds == ["skip", "incomparable", "tie", "ranking"]
    assert store.labels_of("anna")[2].comment == "t x s 1"
    assert "3" in page.locator("#progress").inner_text()
    assert page.faults == []


def test_markup_in_a_completion_stays_text(store, page_of):
    store.add([NewComparison(HOSTILE, [Candidate(HOSTILE), Candidate("<b>b</b>"), Candidate("javascript:alert(1)")])])
    page = page_of("anna")
    prompt, texts = shown(page)
    assert prompt == HOSTILE and set(texts) == {HOSTILE, "<b>b</b>", "javascript:alert(1)"}
    assert page.title() != "owned" and page.locator("#work img, #work b, #work script").count() == 0
    # What no text does, the policy forbids besides: a script and an image that are put into the page do nothing.
    page.evaluate(
        "() => { document.querySelector('#prompt').innerHTML = \"<img src=x onerror=document.title='owned'>\" }"
    )
    page.wait_for_timeout(300)
    assert page.title() != "owned" and any("Content Security Policy" in fault for fault in page.faults)


def test_a_cut_answer_says_so(store, page_of):
    texts = [Candidate("It is so because", truncated=True), Candidate("It is so.")]
    store.add([NewComparison("Why?", texts), NewComparison("Why not?", texts)])
    page = page_of("anna")
    shown(page)
    notes = page.locator(".candidate").evaluate_all("all => all.map(box => box.innerText.includes('Cut here'))")
    assert notes == [text == "It is so because" for text in shown(page)[1]]
    page.click("#language")
    assert "截断" in page.locator(".cut").inner_text()
    assert page.faults == []


def test_a_reload_goes_on_where_it_was(store, page_of):
    fill(store, 3)
    page = page_of("anna")
    press(page, "1")
    before = shown(page)
    page.reload()
    assert shown(page) == before
    assert page.locator("#undo").is_visible()
    page.click("#undo")  # the label of before the reload
    page.wait_for_function("before => document.querySelector('#prompt').textContent !== before", arg=before[0])
    assert store.labels_of("anna") == []


def test_two_annotators_label_fifty_between_them(store, page_of):
    """Both pages are open and answered in turn; none sees a task that the other has."""
    fill(store, 50, texts=("one", "two"))
    anna, bo = page_of("anna"), page_of("bo", locale="zh-CN")
    assert bo.locator("[data-text=tie]").inner_text() == "一样好"
    while not (anna.locator("#done").is_visible() or bo.locator("#done").is_visible()):
        assert shown(anna)[0] != shown(bo)[0]
        press(anna, "1")
        press(bo, "2")
    for page in (anna, bo):
        while not page.locator("#done").is_visible():
            press(page, "t")
    labels = store.labels_since()
    assert len(labels) == 50 == len({label.comparison_id for label in labels})
    assert {label.annotator for label in labels} == {"anna", "bo"}
    assert anna.faults == bo.faults == []


def test_it_can_be_read_on_a_phone(store, page_of, tmp_path):
    long = "A long answer that goes on and on. " * 12
    store.add([NewComparison("A question?", [Candidate(long + str(k)) for k in range(4)])])
    page = page_of("anna", viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    shown(page)
    page.screenshot(path=str(tmp_path / "phone.png"), full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = page.locator("button:visible").evaluate_all("all => all.map(b => b.getBoundingClientRect().height)")
    assert min(sizes) >= 40  # a finger's width
    page.locator(".candidate button").nth(3).tap()
    page.wait_for_selector("#done:not([hidden])")
    assert store.labels_since()[0].kind == "best"
    wide = page_of("bo", viewport={"width": 1280, "height": 900})
    wide.screenshot(path=str(tmp_path / "wide.png"))


def test_a_lost_reply_is_counted_once(store, page_of):
    fill(store, 2)
    lost = set()
    page = page_of("anna", lost)
    before = shown(page)
    lost.add("label")
    page.keyboard.press("1")
    page.wait_for_function("() => document.querySelector('#message').textContent !== ''")
    lost.clear()
    assert shown(page) == before and len(store.labels_since()) == 1
    press(page, "1")
    assert len(store.labels_since()) == 1


def test_an_answer_whose_reply_was_lost_can_be_undone(store, page_of):
    """The page has not seen the second answer stored, and another one is refused: undo takes the second."""
    fill(store, 3)
    lost = set()
    page = page_of("anna", lost)
    press(page, "1")
    lost.add("label")
    page.keyboard.press("1")
    page.wait_for_function("() => document.querySelector('#message').textContent !== ''")
    lost.clear()
    press(page, "2")
    assert "was stored" in page.locator("#message").inner_text()
    first, second = store.labels_since()
    press(page, "z")
    assert [label.id for label in store.labels_since()][:1] == [first.id] and store.labels_of("anna")[0].id == first.id


def test_a_task_that_does_not_come_is_no_lost_answer(store, page_of):
    fill(store, 2)
    lost = set()
    page = page_of("anna", lost)
    shown(page)
    lost.add("task")
    page.keyboard.press("1")
    page.wait_for_function("() => document.querySelector('#message').textContent !== ''")
    assert "The answer was stored" in page.locator("#message").inner_text() and len(store.labels_since()) == 1


def test_many_at_once_over_http(store, page_of):
    """Threads with a session each; the load test with 200 of them is in benchmarks/."""
    import json
    import urllib.request

    fill(store, 60, texts=("one", "two"))
    address = page_of("watcher").url

    def annotate(name):
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())

        def call(path, body):
            request = urllib.request.Request(
                address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            return json.load(opener.open(request, timeout=60))

        call("api/login", {"name": name})
        while (task := call("api/task", {})["task"]) is not None:
            call(
                "api/label",
                {"comparison_id": task["comparison_id"], "kind": "best", "value": 0, "key": name + task["prompt"]},
            )

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(annotate, [f"annotator {i}" for i in range(8)]))
    labels = store.labels_since()
    # The watcher holds one.
    assert len(labels) == 59 == len({label.comparison_id for label in labels})
