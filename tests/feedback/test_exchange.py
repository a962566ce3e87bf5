"""In and out of the store: what went in comes out, and what comes out trains a reward model as it is."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from rlhf_ext.data.loading import load_rows
from rlhf_ext.data.preferences import check_preferences
from rlhf_ext.feedback.answers import merge_votes
from rlhf_ext.feedback.exchange import export_rows, import_rows, rows_since, to_dataset, to_pairs, write_rows
from rlhf_ext.feedback.store import Candidate, LabelStore, NewComparison
from rlhf_ext.trainers.reward_config import PreferenceRewardConfig
from rlhf_ext.trainers.reward_trainer import PreferenceRewardTrainer
from tests.tiny import tiny_reward_model, tiny_tokenizer


TEXTS = {"prompt": "the cat ", "completions": ["sat", "on the mat", "bad"]}
EMPTY = {"best": None, "target": None, "ranking": None, "incomparable": False}
ROWS = [
    {**TEXTS, **EMPTY, "best": 2},
    {**TEXTS, **EMPTY, "ranking": [1, 0, 2]},
    {**TEXTS, **EMPTY, "target": [0.5, 0.0, 0.5]},
    {**TEXTS, **EMPTY, "target": [0.125, 0.375, 0.5]},
    {**TEXTS, **EMPTY, "incomparable": True},
    {"prompt": "w1 ", "completions": ["good", ""], **EMPTY, "target": [0.5, 0.5]},
    {"prompt": "w1 ", "completions": ["good", "fine"], **EMPTY, "best": 1},
]
PAIRS = [{"prompt": "w1 ", "chosen": "good", "rejected": "bad"}, {"prompt": "w2 ", "chosen": "w3", "rejected": "w4"}]
MESSAGES = [
    {
        "prompt": [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}],
        "completions": [[{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]],
        **EMPTY,
        "best": 0,
    }
]


@pytest.fixture
def file_store(tmp_path):
    with LabelStore(tmp_path / "labels.db") as store:
        yield store


def core(rows):
    return [{name: row[name] for name in ("prompt", "completions", *EMPTY)} for row in rows]


def train(folder, rows):
    tokenizer = tiny_tokenizer()
    trainer = PreferenceRewardTrainer(
        model=tiny_reward_model("llama", tokenizer),
        args=PreferenceRewardConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_steps=1,
            per_device_train_batch_size=2,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    return trainer.train().training_loss


@pytest.mark.parametrize("form", ["rows", "jsonl", "parquet", "dataset"])
def test_round_trip(location, tmp_path, form):
    """Through the store, a file and a second store; every kind of label, and several labels of one comparison."""
    with LabelStore(location) as store:
        ids = import_rows(store, ROWS, pool="one")
        assert len(ids) == len(set(ids)) == len(ROWS)  # the same texts with other labels are other rows
        assert import_rows(store, ROWS, pool="one") == ids and len(store.labels_since()) == len(ROWS)
        assert core(export_rows(store)) == ROWS
        store.set_overlap(2)
        store.submit("ann", ids[0], "tie", [0, 1], seconds=2.0, comment="close")
        given = list(export_rows(store, votes="single"))
        assert len(given) == len(ROWS) + 1
        if form in ("jsonl", "parquet"):
            again = write_rows(given, tmp_path / f"labels.{form}")
            assert core(load_rows(str(again))) == core(given)
        else:
            again = given if form == "rows" else to_dataset(given)
        with LabelStore(tmp_path / "second.db") as second:
            assert len(import_rows(second, again, pool="one", overlap=2)) == len(ROWS)
            taken = list(export_rows(second, votes="single"))
            assert taken == [dict(row) for row in given]
            assert list(export_rows(second)) == list(export_rows(store))
            ann = second.labels_of("ann")
            assert [(row.kind, row.value, row.seconds, row.comment) for row in ann] == [("tie", [0, 1], 2.0, "close")]


def test_round_trip_of_pairs_and_messages(file_store, tmp_path):
    import_rows(file_store, Dataset.from_list(PAIRS), pool="pairs")
    pairs, report = to_pairs(export_rows(file_store, pool="pairs"))
    assert [{name: pair[name] for name in PAIRS[0]} for pair in pairs] == PAIRS and report == (2, 0, 0)
    import_rows(file_store, write_rows(MESSAGES, tmp_path / "messages.parquet"), pool="messages")
    (row,) = export_rows(file_store, pool="messages")
    assert core([row]) == MESSAGES
    with pytest.raises(ValueError, match="`prompt` is \\['list', 'str'\\]"):
        to_dataset(export_rows(file_store))


def test_policies_settings_and_other_columns_come_along(file_store, tmp_path):
    candidates = [Candidate("good", "sft", {"temperature": 0.7}), Candidate("bad", "ppo-3", {"temperature": 1.0})]
    (id,) = file_store.add([NewComparison("w1 ", candidates, extra={"topic": "x", "weight": [1, 2]})])
    file_store.submit("ann", id, "best", 1)
    path = write_rows(export_rows(file_store), tmp_path / "labels.parquet")
    with LabelStore(tmp_path / "second.db") as second:
        (again,) = import_rows(second, path)
        comparison = second.comparison(again)
        assert comparison.candidates == candidates and comparison.extra == {"topic": "x", "weight": [1, 2]}
        row = {**PAIRS[0], "margin": 0.5, "source": None}
        assert second.comparison(*import_rows(second, [row], pool="two")).extra == {"margin": 0.5}


def test_what_was_cut_stays_cut(file_store, tmp_path):
    rows = [{**TEXTS, **EMPTY, "best": 2, "truncated": [False, True, False]}, {**TEXTS, **EMPTY, "best": 1}]
    import_rows(file_store, [*rows, {**PAIRS[0], "truncated": True}])
    assert file_store.add([NewComparison("w9 ", [Candidate("a", truncated=True), Candidate("b")])]) == [4]
    assert file_store.claim("ann").truncated == [True, False]
    dataset = to_dataset(export_rows(file_store))
    assert dataset["truncated"][:] == [[False, True, False], [False] * 3, [True, True]]
    assert check_preferences(dataset)[1].num_truncated == 3
    pairs, _ = to_pairs(export_rows(file_store))
    assert to_dataset(pairs)["truncated"][:] == [[False, False], [False, True], *[[False] * 2] * 2, [True, True]]
    with LabelStore(tmp_path / "second.db") as second:
        import_rows(second, write_rows(dataset, tmp_path / "rows.jsonl"))
        assert to_dataset(export_rows(second))["truncated"][:] == dataset["truncated"][:]


def test_rows_without_a_label_are_to_be_labelled(file_store):
    rows = [{"prompt": "w1 ", "completions": ["a", "b"]}, {"completions": [["x"], "b"]}]
    with pytest.raises(ValueError, match="Row 1 .*completion"):
        import_rows(file_store, rows)
    many = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "seconds": 300.0 - i} for i in range(400)]
    with pytest.raises(ValueError, match="Row 301 .*seconds"):
        import_rows(file_store, many)
    assert file_store.progress().comparisons == 0
    assert len(import_rows(file_store, [rows[0], {**rows[0], **EMPTY}], overlap=3)) == 2
    assert file_store.progress().missing == 6
    for row, word in [({**TEXTS, "best": 3}, "best"), ({"chosen": "a"}, "chosen|rejected|completion")]:
        with pytest.raises(ValueError, match=f"Row 0.*({word})"):
            import_rows(file_store, [row])
    with pytest.raises(ValueError, match="no rows"):
        to_dataset(export_rows(file_store))


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_third_stays_a_third(file_store, tmp_path, form):
    (id,) = import_rows(file_store, [{**TEXTS, **EMPTY, "best": 2}], overlap=3)
    file_store.submit("ann", id, "best", 0)
    file_store.submit("bob", id, "best", 1)
    (row,) = load_rows(str(write_rows(export_rows(file_store), tmp_path / f"rows.{form}")))
    assert row["target"] == pytest.approx([1 / 3] * 3, abs=1e-15)  # the reader of JSON lines may err in the last bit


def test_votes_are_joined_by_the_rule():
    best, tie, ranking, none = ("best", 0), ("tie", [0, 1]), ("ranking", [2, 0, 1]), ("incomparable", None)
    for answers, wanted in [
        ([], None),
        ([("skip", None)], None),
        ([best, ("skip", None)], best),
        ([ranking, ranking], ranking),
        ([best, best, ("best", 1)], ("target", pytest.approx([2 / 3, 1 / 3, 0]))),
        ([best, tie], ("target", [0.75, 0.25, 0.0])),
        ([best, ranking], ("target", [0.5, 0.0, 0.5])),
        ([ranking, ("ranking", [2, 1, 0])], ("target", [0.0, 0.0, 1.0])),
        ([best, none], best),
        ([best, none, none], none),
        ([("target", [0.2, 0.8, 0.0]), best], ("target", pytest.approx([0.6, 0.4, 0.0]))),
    ]:
        assert merge_votes(answers, 3) == wanted


def test_pairs_say_what_pairs_can(file_store):
    import_rows(file_store, ROWS)
    pairs, report = to_pairs(export_rows(file_store))
    by_row = {}
    for pair in pairs:
        by_row.setdefault(pair["comparison_id"], []).append((pair["chosen"], pair["rejected"]))
    first, second, _ = TEXTS["completions"]
    assert by_row[1] == [("bad", first), ("bad", second)]
    assert by_row[2] == [(second, first), (second, "bad"), (first, "bad")]
    assert by_row[4] == [("bad", first), ("bad", second)]
    assert set(by_row) == {1, 2, 4, 7} and report == (8, 2, 1)


def test_a_loop_reads_what_is_new(file_store):
    ids = import_rows(file_store, [{"prompt": f"p{i}", "completions": ["a", "b"]} for i in range(3)], overlap=2)
    assert rows_since(file_store) == ([], [], 0)
    first = file_store.submit("ann", ids[0], "best", 0)
    rows, withdrawn, cursor = rows_since(file_store)
    assert ([row["comparison_id"] for row in rows], withdrawn, cursor) == ([ids[0]], [], first.id)
    assert rows_since(file_store, cursor) == ([], [], cursor)
    file_store.submit("bob", ids[0], "best", 1)
    file_store.submit("bob", ids[1], "skip")
    rows, withdrawn, cursor = rows_since(file_store, cursor)
    assert [row["target"] for row in rows] == [[0.5, 0.5]] and withdrawn == [ids[1]]
    file_store.undo("ann", first.id)
    rows, _, cursor = rows_since(file_store, cursor)
    assert [(row["best"], row["num_labels"]) for row in rows] == [(1, 1)]
    file_store.undo("bob", file_store.labels_of("bob")[-1].id)
    assert rows_since(file_store, cursor)[:2] == ([], [ids[0]])


def test_what_is_exported_trains(file_store, tmp_path):
    """Unchanged: the dataset, the JSONL and the pairs, text and messages, with all the columns that come along."""
    import_rows(file_store, ROWS)
    dataset = to_dataset(export_rows(file_store))
    _, report = check_preferences(dataset)
    assert (report.num_rows, report.num_incomparable, report.num_rankings, report.num_ties) == (7, 1, 1, 2)
    losses = [train(tmp_path / "model", dataset)]
    losses.append(train(tmp_path / "model", load_rows(str(write_rows(dataset, tmp_path / "rows.jsonl")))))
    losses.append(train(tmp_path / "model", to_dataset(to_pairs(export_rows(file_store))[0])))
    import_rows(file_store, MESSAGES, pool="messages")
    losses.append(train(tmp_path / "model", to_dataset(export_rows(file_store, pool="messages", votes="single"))))
    assert all(0 < loss < 5 for loss in losses) and losses[0] == losses[1]


def test_a_file_is_whole_or_not_there(file_store, tmp_path, monkeypatch):
    import_rows(file_store, PAIRS)
    lines = write_rows(export_rows(file_store), tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["w1 ", "w2 "]
    path = write_rows(export_rows(file_store), tmp_path / "rows.parquet")
    before = path.read_bytes()

    def fail(self, name, **kwargs):
        open(name, "w").write("half")
        raise OSError("disk full")

    monkeypatch.setattr(Dataset, "to_parquet", fail)
    with pytest.raises(OSError, match="disk full"):
        write_rows(export_rows(file_store), path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="`path`"):
        write_rows(export_rows(file_store), tmp_path / "rows.csv")


def test_a_file_that_is_not_there_is_named_as_given(file_store, tmp_path):
    with pytest.raises(ValueError, match="^`rows` is '.*nothing.jsonl', and there is no such file") as caught:
        import_rows(file_store, tmp_path / "nothing.jsonl")
    assert "dataset_name" not in str(caught.value)


def test_the_way_that_the_docs_show(tmp_path, monkeypatch):
    """The blocks of docs/labels.md around the page, with an annotator in the place of the page."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[2] / "docs" / "labels.md").read_text(encoding="utf-8")
    page = text.partition("## The page")[2]
    (row,) = re.findall(r"`(\{.*?\})` in `rows.jsonl`", page)
    Path("rows.jsonl").write_text(row + "\n")
    before, after = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(before, names)
    with LabelStore("labels.db", create=False) as store:
        store.submit("ann", store.claim("ann", pool="first").comparison_id, "best", 1)
    exec(after, names)
    (pair,) = names["pairs"]
    assert (pair["chosen"], pair["rejected"]) == ("A pear.", "An apple.") and names["report"].pairs == 1
    assert core(load_rows("labels.jsonl")) == core(names["rows"])
