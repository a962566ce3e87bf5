"""Preference rows: every label becomes one form, and what cannot be a label is refused by row, field and value."""

import pytest
from datasets import Dataset

from rlhf_ext.data.preferences import check_columns, normalize_preferences


def normalize(*rows):
    names = {name for row in rows for name in row}
    return normalize_preferences(Dataset.from_list([{name: row.get(name) for name in names} for row in rows]))


GENERAL = {"prompt": "p ", "completions": ["a", "b", "c"]}


def test_pairs_become_general_rows():
    dataset, report = normalize({"prompt": "p ", "chosen": "a", "rejected": "b"})
    assert dataset[0] == {"prompt": "p ", "completions": ["a", "b"], "target": [1.0, 0.0], "ranking": None, "row": 0}
    assert report.num_rows == 1 and report.max_candidates == 2
    implicit, _ = normalize({"chosen": "p a", "rejected": "p b"})
    assert "prompt" not in implicit.column_names
    messages = [{"role": "assistant", "content": "a"}]
    dataset, _ = normalize({"prompt": [{"role": "user", "content": "q"}], "chosen": messages, "rejected": messages})
    assert dataset[0]["completions"] == [messages, messages]


def test_labels_become_one_form_and_are_counted():
    dataset, report = normalize(
        {**GENERAL, "best": 2},
        {**GENERAL, "target": [0.5, 0.5, 0.0]},
        {**GENERAL, "ranking": [2, 0, 1]},
        {**GENERAL, "target": [0.2, 0.7, 0.1]},
        {**GENERAL, "incomparable": True},
        {**GENERAL, "incomparable": True, "target": [0.9, 0.9, 0.9]},
        {**GENERAL, "incomparable": False, "target": [0.0, 1.0, 0.0]},
    )
    assert list(dataset["target"]) == [
        [0.0, 0.0, 1.0],
        [0.5, 0.5, 0.0],
        None,
        [0.2, 0.7, 0.1],
        [0.0, 1.0, 0.0],
    ]
    assert list(dataset["ranking"]) == [None, None, [2, 0, 1], None, None]
    assert list(dataset["row"]) == [0, 1, 2, 3, 6]
    counts = (report.num_rows, report.num_incomparable, report.num_ties, report.num_soft, report.num_rankings)
    assert counts == (7, 2, 1, 1, 1)
    assert "2 incomparable" in str(report)


def test_normalizing_twice_changes_nothing():
    once, _ = normalize({**GENERAL, "best": 1}, {**GENERAL, "ranking": [0, 1, 2]})
    twice, _ = normalize_preferences(once)
    assert list(twice) == list(once)


def test_streams_give_the_same_rows():
    rows = [{**GENERAL, "best": 2, "incomparable": False}, {**GENERAL, "best": None, "incomparable": True}]
    expected, _ = normalize(*rows)
    stream, report = normalize_preferences(Dataset.from_list(rows).to_iterable_dataset())
    assert [{**row} for row in stream] == [expected[0]]
    assert report.num_rows == 0


@pytest.mark.parametrize(
    "row, words",
    [
        ({**GENERAL, "target": [0.5, 0.4, 0.0]}, r"`target` is \[0.5, 0.4, 0.0\].*sum to 1.*Divide"),
        ({**GENERAL, "target": [1.5, -0.5, 0.0]}, r"`target` is \[1.5, -0.5, 0.0\].*from 0 to 1"),
        ({**GENERAL, "target": [float("nan"), 1.0, 0.0]}, r"`target` is \[nan"),
        ({**GENERAL, "target": [1.0, 0.0]}, "`target`.*3 numbers"),
        ({**GENERAL, "best": 3}, "`best` is 3.*0 to 2.*Count from 0"),
        ({**GENERAL, "best": -1}, "`best` is -1"),
        ({**GENERAL, "ranking": [0, 1]}, r"`ranking` is \[0, 1\].*every index"),
        ({**GENERAL, "ranking": [0, 1, 1]}, r"`ranking` is \[0, 1, 1\]"),
        ({**GENERAL, "best": None}, "`target/best/ranking`.*exactly one.*incomparable"),
        ({**GENERAL, "best": 1, "ranking": [0, 1, 2]}, "exactly one of them"),
        ({"prompt": "p", "completions": ["a"], "best": 0}, r"`completions` is \['a'\].*two or more.*Drop"),
        ({"prompt": "p", "completions": [], "best": 0}, r"`completions` is \[\]"),
        ({"prompt": "p", "completions": None, "best": 0}, "`completions` is None"),
        ({"completions": ["a", ""], "best": 0}, r"`completions\[1\]` is ''.*non-empty"),
        ({"prompt": "p", "completions": ["", ""], "best": 0}, r"`completions` is \['', ''\].*at least one"),
        ({"prompt": None, "completions": ["a", "b"], "best": 0}, "`prompt` is None"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "`chosen` is ''.*column is empty.*Fill it in"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "`rejected` is None"),
        (
            {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"},
            "text or messages like the rest",
        ),
    ],
)
def test_wrong_rows_are_named(row, words):
    with pytest.raises(ValueError, match=f"Row 0.*{words}"):
        normalize(row)


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"prompt"}, "'prompt'.*needs `chosen` and `rejected`"),
        ({"prompt", "chosen"}, "no column .*rejected"),
        ({"completions"}, "none of .*target.*best.*ranking"),
        ({"completions", "chosen", "rejected", "best"}, "both"),
        ({"chosen", "rejected", "target"}, r"completions=\[a, b\]"),
    ],
)
def test_wrong_columns_are_named(columns, words):
    with pytest.raises(ValueError, match=words):
        check_columns(columns)


def test_datasets_without_a_row_to_train_on_are_refused():
    with pytest.raises(ValueError, match="0 rows"):
        normalize_preferences(Dataset.from_dict({"chosen": [], "rejected": []}))
    with pytest.raises(ValueError, match="All 1 rows.*incomparable"):
        normalize({**GENERAL, "best": 0, "incomparable": True})


def test_an_empty_answer_to_a_prompt_is_kept():
    rows, report = normalize({"prompt": "p", "completions": ["a", ""], "target": [1.0, 0.0]})
    assert rows[0]["completions"] == ["a", ""]
    assert report.num_empty == 1
