"""The page over all rounds of a run, from a fabricated run folder: no model is trained or loaded."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_ext import cli
from rlhf_ext.data.jsonl import read_jsonl
from rlhf_ext.feedback.exchange import export_rows
from rlhf_ext.feedback.records import Candidate, NewComparison
from rlhf_ext.feedback.store import LabelStore
from rlhf_ext.pipelines.loop_record import read_loop
from rlhf_ext.pipelines.loop_report import _accuracy, loop_page, progress, settings_section, write_loop_report
from rlhf_ext.pipelines.loop_report_plots import function_scorers, policy_plots, round_plots
from rlhf_ext.pipelines.loop_report_texts import _verdicts


HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & </div>"
PROMPTS = ["What do otters eat?", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]]
PROMPTS += [f"Prompt number {i}, which is a little longer than the first?" for i in range(10)]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def add_evaluation(run, number, samples=2):
    """Gold rises, then falls, while the reward model's score goes on rising."""
    gold = [0.30, 0.55, 0.62, 0.41][number]
    result = {"score/gold": gold, "score/gold_se": 0.02, "length_mean": 20.0 + 9 * number, "eos_rate": 0.9}
    result |= {"per_input_ead": 0.8 - 0.1 * number, "across_input_ead": 0.9 - 0.1 * number, "perplexity": 7.5}
    if number:
        result |= {"kl": 4.0 * number, "kl_se": 0.3, "score/reward": 1.5 * number, "score/reward_se": 0.1}
        low, high = gold - 0.1, gold + 0.08
        interval = {"win_rate": gold, "low": low, "high": high, "prompts": len(PROMPTS)}
        result["win_rate"] = {"gold": interval, "reward": {**interval, "win_rate": 0.7, "low": 0.6, "high": 0.78}}
    rows = []
    for place, prompt in enumerate(PROMPTS):
        for sample in range(samples):
            text = f"Answer {sample} of round {number}. " * (1 + 20 * (place == 1))
            scores = {"gold": (gold, 0.3, 0.1)[place % 3], **({"reward": 1.5 * number} if number else {})}
            completion = HOSTILE if place == 0 and number == 2 and sample == 0 else text
            rows.append({"prompt": prompt, "completion": completion, "scores": scores})
    folder = run / f"round_{number}" / "evaluation"
    write_rows(folder / "answers.jsonl", rows)
    write_json(folder / "run.json", {"settings": {}, "result": result})


def add_step(run, number, step, result):
    write_json(run / f"round_{number}" / step / "run.json", {"settings": {}, "result": result})


def add_round(run, number):
    add_step(run, number, "samples", {})
    add_step(run, number, "selection", {"candidates": 20, "disagreement_mean": None, "disagreement_selected": 0.5})
    labels = {
        "labels": 10,
        "ties": 1,
        "incomparable": 1,
        "gold_agreement": 0.85,
        "annotators": {"anna": {}, "<b>bo": {}},
    }
    labels["agreement"] = {"percent": 0.8 + 0.01 * number, "alpha": 0.6}
    labels["split"] = number - 1
    if number > 1:
        parts = {"pair": {"percent": 0.7, "alpha_nominal": 0.5}, "ranking": {"percent": 0.9, "alpha_nominal": 0.4}}
        labels["agreement_by_question"] = parts
    add_step(run, number, "labels", labels)
    pair = {"completions": ["A fish.", HOSTILE], "policies": ["sft", "round_1"], "truncated": [False, True]}
    blank = {"target": None, "best": None, "ranking": None, "incomparable": False, "num_labels": 2}
    rows = [{"prompt": f"Compare {i}", **pair, **blank, "best": 0} for i in range(6)]
    rows += [{"prompt": "A tie", **pair, **blank, "target": [0.5, 0.5]}]
    rows += [{"prompt": "Voted", **pair, **blank, "target": [0.25, 0.75]}]
    rows += [{"prompt": PROMPTS[1], **pair, **blank, "incomparable": True}]
    write_rows(run / f"round_{number}" / "labels" / "rows.jsonl", rows)
    add_step(run, number, "reward", {"rows": 10 * number, "accuracy": 0.7 + 0.05 * number})
    history = [
        {"step": 5 * i, "kl": 0.4 * i * number, "reward": 0.1 * i, "value_loss": 1 / i, "probe/gold/mean": 0.05 * i}
        for i in range(1, 9)
    ]
    add_step(run, number, "policy", {"updates": 8, "history": history})
    add_evaluation(run, number)


def manifest(run):
    steps = [
        {"round": int(path.parts[-3].split("_")[1]), "step": path.parts[-2], "seconds": 12.3, "finished": "2026"}
        for path in sorted(run.glob("round_*/*/run.json"))
    ]
    write_json(run / "manifest.json", {"steps": steps})


@pytest.fixture
def run(tmp_path):
    """Three rounds, of which the third was stopped inside its policy."""
    run = tmp_path / "otters"
    loop = {"num_rounds": 3, "labels": "people", "gold_func": None, "output_dir": "otters", "ppo": {"kl_coef": 0.05}}
    loop["store"] = "postgresql://anna:secret@host/labels?password=hidden"
    write_json(run / "settings.json", {"loop": loop, "model": {"model_name_or_path": "models/sft", "dtype": "auto"}})
    add_evaluation(run, 0)
    for number in (1, 2, 3):
        add_round(run, number)
    for step in ("policy", "evaluation"):
        shutil.rmtree(run / "round_3" / step)
    (run / "round_3" / "_unfinished_policy").mkdir()
    manifest(run)
    return run


class Elements(HTMLParser):
    """Tags of a page, its attributes, and the text in it."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def row_of(page, label):
    """Cells of the row of a table that begins with a label."""
    (row,) = re.findall(rf"<tr><td class=text>{re.escape(label)}</td>(.*?)</tr>", page)
    return re.findall(r"<td[^>]*>(.*?)</td>", row)


def test_an_accuracy_has_its_interval_and_its_rows_and_that_of_the_last_model_stands_beside():
    found = {"accuracy": 0.75, "interval": [0.5, 0.9], "num_rows": 17}
    assert _accuracy(found) == "0.750 [0.500, 0.900]" and _accuracy({"accuracy": None}) == "-"


def test_the_table_by_round(run):
    page = loop_page(read_loop(run))
    assert row_of(page, "labels so far") == ["-", "10", "20", "30"]
    assert row_of(page, "agreement, share of pairs") == ["-", "0.810", "0.820", "0.830"]
    assert row_of(page, "agreement on ranking, share of pairs") == ["-", "-", "0.900", "0.900"]
    assert row_of(page, "agreement on pair, Krippendorff&#x27;s alpha") == ["-", "-", "0.500", "0.500"]
    assert row_of(page, "comparisons on which annotators split evenly") == ["-", "-", "1", "2"]
    assert row_of(page, "ensemble&#x27;s disagreement, those selected") == ["-", "0.500", "0.500", "0.500"]
    assert "disagreement, all samples" not in page  # a line without a number
    assert row_of(page, "reward model: held-out accuracy") == ["-", "0.750", "0.800", "0.850"]
    assert row_of(page, "score by gold") == ["0.300 ± 0.020", "0.550 ± 0.020", "0.620 ± 0.020", "-"]
    assert row_of(page, "win rate over SFT by gold") == ["-", "0.550 [0.450, 0.630]", "0.620 [0.520, 0.700]", "-"]
    assert row_of(page, "KL, nats per answer") == ["-", "4.000 ± 0.300", "8.000 ± 0.300", "-"]
    assert row_of(page, "answers that end by themselves")[:3] == ["0.900"] * 3
    assert row_of(page, "policy") == ["", "12 s", "12 s", "started"]
    assert row_of(page, "together") == ["12 s", "74 s", "74 s", "49 s"]


def test_what_is_next(run):
    record = read_loop(run)
    assert progress(record) == (
        "2 of 3 rounds are finished. Next: round 3, policy (started, not finished). Steps missing: 2."
    )
    shutil.rmtree(run / "round_0" / "evaluation")
    assert "Next: round 3, policy (started, not finished). Steps missing: 3." in progress(read_loop(run))
    (run / "round_3" / "_unfinished_policy").rmdir()
    assert "Next: round 0, evaluation (not started)." in progress(read_loop(run))
    add_evaluation(run, 0)
    shutil.rmtree(run / "round_2" / "reward")
    record = read_loop(run)
    assert "Next: round 2, reward (not started)." in progress(record)
    assert record.rounds[2]["reward"].seconds is None  # of a folder that was removed
    add_round(run, 3)
    add_round(run, 2)
    assert progress(read_loop(run)) == "3 of 3 rounds are finished."


def test_text_of_models_stays_text(run):
    page = loop_page(read_loop(run))
    found = Elements(page)
    assert "script" not in found.tags and "link" not in found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    sources = [value for name, value in found.attributes if name in ("src", "href")]
    assert sources and all(value.startswith("data:image/png;base64,") for value in sources)
    assert HOSTILE in found.text and "<b>bo" in found.text
    assert "default-src 'none'" in page


def test_passwords_stay_out(run):
    page = loop_page(read_loop(run))
    assert "postgresql://anna:***@host/labels?password=***" in page
    assert "secret" not in page and "hidden" not in page
    for password in ("pa/ss", "p@ss", "a/b@c"):
        shown = settings_section({"loop": {"store": f"postgresql://anna:{password}@host/labels"}})
        assert "postgresql://anna:***@host/labels" in shown and password not in shown


def test_answers_side_by_side(run):
    page = loop_page(read_loop(run))
    section = page.split("side by side</h2>")[1].split("<h2>")[0]
    prompts = section.split('<section class="prompt">')[1:]
    assert len(prompts) == 8 and "The first 8 of 12 held-out prompts" in section
    first = prompts[0]
    assert first.index("<b>SFT</b>") < first.index("<b>Round 1</b>") < first.index("<b>Round 2</b>")
    assert "gold 0.550 ▲ wins" in first and "reward 1.500<" in first
    assert "gold 0.300 = ties" in prompts[1] and "Answer 1 of" not in section
    assert "system: Be kind.\n\nuser: Hello!" in prompts[1] and "<details>" in prompts[1]
    losing = run / "round_2" / "evaluation" / "answers.jsonl"
    rows = read_jsonl(losing)
    rows[0]["scores"]["gold"] = -1.0
    write_rows(losing, rows)
    assert "gold -1.000 ▼ loses" in loop_page(read_loop(run))
    rows[2]["prompt"] = "Another one"
    write_rows(losing, rows)
    with pytest.raises(ValueError, match=r"line 3 of '.*round_2/evaluation/answers.jsonl' answers another prompt"):
        loop_page(read_loop(run))


def test_comparisons_show_every_kind_of_label(run):
    page = loop_page(read_loop(run))
    section = page.split("how it was labelled</h2>")[1]
    assert section.count("4 of 9 comparisons, labelled by anna, &lt;b&gt;bo") == 3
    for said in ("best; 2 labels", "tie; 2 labels", "shares of the votes", "cannot be compared", "▲ 0.75", "▲ best"):
        assert said in section
    assert "<b>round_1 (cut)</b>" in section


def test_rows_of_a_real_store(run):
    """What the label store exports, message prompts and rankings among it."""
    with LabelStore(run / "labels.db") as store:
        pair = [Candidate("one", "sft"), Candidate([{"role": "assistant", "content": "two"}], "round_1")]
        labels = [("ranking", [2, 0, 1]), ("best", 1), ("tie", None), ("incomparable", None)]
        for place, (kind, value) in enumerate(labels):
            three = [*pair, Candidate("three", "sft")] if kind == "ranking" else pair
            store.add([NewComparison(PROMPTS[1] if place else "Rank", three, copy=place)])
            task = store.claim(f"anna-{place}")
            store.submit(f"anna-{place}", task.comparison_id, kind, value)
        write_rows(run / "round_1" / "labels" / "rows.jsonl", list(export_rows(store)))
    section = loop_page(read_loop(run)).split("how it was labelled</h2>")[1].split("<summary>Round 2")[0]
    for said in ("ranking; 1 label", "▲ 1<", ">2</div>", "▲ best", "tie; 1 label", "cannot be compared; 1 label"):
        assert said in section, said
    assert "user: Hello!" in section and ">two</div>" in section


def test_what_was_asked_comes_before_what_was_not(run):
    """Flags that differ from the defaults first, off and 0 among them; the rest folded."""
    settings = json.loads((run / "settings.json").read_text())
    settings["loop"] |= {"wait_for_labels": False, "eval_fraction": 0.0, "overlap": 1, "reward": {}}
    settings["model"]["use_peft"] = True
    usual = {"num_rounds": 4, "labels": "people", "gold_func": None, "output_dir": "", "ppo": None, "store": None}
    usual |= {"wait_for_labels": True, "eval_fraction": 0.05, "overlap": 1, "reward": None}
    model = {"model_name_or_path": None, "dtype": "auto", "use_peft": False}
    write_json(run / "settings.json", {**settings, "defaults": {"loop": usual, "model": model}})
    page = loop_page(read_loop(run))
    section = page.split("What was asked</h2>")[1].split("<h2>")[0]
    first, *folded = section.split("<details>")
    names = re.findall("<td class=text>([a-z_]+)</td><td", first)
    asked = ["num_rounds", "output_dir", "ppo", "store", "wait_for_labels", "eval_fraction"]
    assert names == [*asked, "model_name_or_path", "use_peft"]
    assert row_of(first, "wait_for_labels") == ["false"] and row_of(first, "eval_fraction") == ["0.0"]
    assert "secret" not in section and "hidden" not in section
    assert len(folded) == 2 and "loop: flags at their defaults" in folded[0] and "dtype" in folded[1]
    assert row_of(folded[0], "overlap") == ["1"] and row_of(folded[0], "labels") == ["people"]


def test_votes_that_split_are_no_tie():
    row = {"completions": ["one", "two"], "target": [0.5, 0.5], "num_labels": 2}
    assert _verdicts({**row, "split": False})[0] == "tie"
    assert _verdicts({**row, "split": True})[0] == "split evenly"


def test_plots(run):
    record = read_loop(run)
    titles = [title for title, _ in round_plots(record)]
    assert function_scorers(record) == ["gold"]
    for title in ("Scores of the answers", "Win rate over SFT, 95% intervals", "KL, nats per answer"):
        assert title in titles
    assert "Over-optimisation: gold and reward-model score" in titles and "Agreement of labels" in titles
    curves = dict(policy_plots(record))
    assert "gold of the rollouts, never paid" in curves
    lines = curves["KL to the reference, nats per answer"].axes[0].get_lines()
    assert [list(line.get_xdata())[:2] for line in lines] == [[5, 10], [5, 10]]
    assert [line.get_ydata()[0] for line in lines] == pytest.approx([0.4, 0.8])
    assert len({line.get_linestyle() for line in lines}) == 2


@pytest.mark.parametrize("flat", [True, False])
def test_little_is_enough(tmp_path, flat):
    """A run that has only begun, and one of a single round; settings flat or in parts."""
    loop = {"num_rounds": 1, "labels": "judge"}
    write_json(tmp_path / "settings.json", loop if flat else {"loop": loop, "model": {}})
    page = loop_page(read_loop(tmp_path))
    assert "0 of 1 rounds are finished. Next: round 1, samples (not started)." in page
    assert "Nothing is measured yet." in page and "judge" in page
    add_evaluation(tmp_path, 0)
    add_round(tmp_path, 1)
    page = loop_page(read_loop(tmp_path))
    assert "1 of 1 rounds are finished." in page and "Over-optimisation" not in page
    assert row_of(page, "samples") == ["", "finished"]  # no manifest, no seconds


def test_what_is_no_run_is_refused_by_name(run, tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    assert f"rlhf-ext report: '{tmp_path / 'nowhere'}' is no folder." in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 1
    assert f"'{tmp_path}' has no settings.json" in capsys.readouterr().err
    assert cli.main(["report", str(run), "--output", str(tmp_path)]) == 1
    assert f"'{tmp_path}' is a folder" in capsys.readouterr().err
    path = run / "round_1" / "evaluation" / "answers.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:2], lines[2][:30], *lines[3:]]))
    assert cli.main(["report", str(run)]) == 1
    assert f"line 3 of '{path}' is broken JSON" in capsys.readouterr().err
    assert not (run / "report.html").exists()
    (run / "manifest.json").write_text('{"steps": [')
    with pytest.raises(ValueError, match="manifest.json' is broken JSON"):
        read_loop(run)


def test_numbers_that_are_none_and_odd_texts(run):
    path = run / "round_1" / "evaluation" / "run.json"
    path.write_text('{"result": {"score/gold": NaN, "kl": Infinity, "kl_se": null, "win_rate": null}}')
    rows = run / "round_1" / "evaluation" / "answers.jsonl"
    rows.write_text('{"prompt": "What do otters eat?", "completion": "\\ud800\u2028", "scores": {"gold": NaN}}\n')
    page = Path(write_loop_report(run)).read_text(encoding="utf-8")
    assert row_of(page, "KL, nats per answer")[1] == "-" and "\\ud800\u2028" in page


def test_the_command_loads_no_model_library(run, tmp_path):
    """In a process of its own: this one has torch."""
    code = "import sys; from rlhf_ext.cli import main; code = main(); print('torch' in sys.modules); sys.exit(code)"
    output = tmp_path / "page.html"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(run), "--output", str(output)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.stdout == f"{output}\nFalse\n", done.stderr
    assert output.exists() and not (run / "report.html").exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser(run, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    path = write_loop_report(run)
    with playwright.sync_playwright() as driver:
        flags = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags, chromium_sandbox=False)
        for name, width in (("wide", 1280), ("phone", 390)):
            page = browser.new_page(viewport={"width": width, "height": 844})
            asked, faults = [], []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("console", lambda message, faults=faults: faults.append(message.text))
            page.goto(Path(path).resolve().as_uri())
            assert page.title() == "The loop: otters" and faults == []
            assert all(url.startswith(("file:", "data:")) for url in asked)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("img").evaluate_all("all => all.every(image => image.naturalWidth > 0)")
            page.screenshot(path=str(tmp_path / f"{name}.png"), full_page=True)
        browser.close()
