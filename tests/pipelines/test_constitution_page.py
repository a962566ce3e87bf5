"""The page of Constitutional AI in a real browser, from fabricated rows: every text can be opened, nothing runs."""

import json

from rlhf_ext.pipelines.constitution_evaluation import NAMES
from rlhf_ext.pipelines.constitution_report import write_constitution_report
from tests.feedback.test_page_browser import browser, pytestmark  # noqa: F401 (a fixture, the skip without a browser)


HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> </details>"
COUNT = 130


def write_run(folder, count, filler=""):
    """Rows of every kind, and what the steps record."""
    rounds = [{"principle": "kind", "critique": "too short", "revision": "rev", "truncated": True}]
    wins = {"win_rate": 0.5}
    scores = {name: {"score/reward": 1.0} for name in NAMES}
    kinds = {"revisions/transcripts": [], "labels/rows": [], "evaluation/samples": []}
    for number in range(1, count + 1):
        prompt = f"prompt {number} {HOSTILE}"
        revised = [{**rounds[0], "revision": f"revision {number}{filler}"}]
        row = {"prompt": prompt, "answer": f"answer {number}", "truncated": False, "rounds": revised}
        kinds["revisions/transcripts"].append(row)
        pair = {"completions": [f"first {number}", HOSTILE], "truncated": [True, False], "target": [0.5, 0.5]}
        judged = {"principles": ["kind"], "first_as_a": [0.6], "second_as_a": [0.6], "thoughts": ["", HOSTILE]}
        kinds["labels/rows"].append({"prompt": prompt, **pair, **judged})
        kinds["evaluation/samples"].append({"prompt": prompt, "answers": {name: f"{name} {number}" for name in NAMES}})
    for name, rows in kinds.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {step: {"rows": count} for step in ("responses", "revisions", "sft", "labels", "reward")}
    found["policy"] = {"history": [{"step": 1, "reward": 0.0, "kl": 0.1, "completions/mean_length": 3.0}]}
    later = {name: {"reward": wins} for name in NAMES[1:]}
    return {**found, "evaluation": {"policies": scores, "wins": later, "prompts": count}}


def test_every_text_can_be_opened(browser, tmp_path):  # noqa: F811
    path = write_constitution_report(tmp_path, write_run(tmp_path, COUNT), 50, NAMES)
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    assert page.locator("details.page").count() == 9 and page.get_by_text("All 130 prompts.").count() == 3
    for name in ("answer 130", "first 130", "rl-cai 130"):  # the last of each kind, two clicks away
        cell = page.get_by_text(name, exact=True)
        assert cell.count() == 1 and not cell.is_visible()
        block = page.locator("details.page > details", has=cell)
        outer = page.locator("details.page", has=cell)
        outer.locator("> summary").click()
        block.locator("> summary").click()
        assert cell.is_visible()
    assert page.get_by_text("101 to 130").count() == 3
    assert page.get_by_text("revision (cut by length)").count() == COUNT
    assert page.title() == "Constitutional AI" and not [url for url in asked if not url.startswith(("file:", "data:"))]
    page.close()
