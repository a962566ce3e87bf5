"""Agreement of a store's labels, against numbers counted by hand."""

import pytest

from rlhf_ext.feedback.agreement import agreement, annotators
from rlhf_ext.feedback.store import Candidate, LabelStore, NewComparison


def add(store, count, texts=("a", "b"), flipped=()):
    """Comparisons; those in `flipped` have their candidates in the other order."""
    return store.add(
        NewComparison(f"p{i}", [Candidate(f"{text} {i}") for text in (texts[::-1] if i in flipped else texts)], 9)
        for i in range(count)
    )


@pytest.fixture
def store(tmp_path):
    with LabelStore(tmp_path / "labels.db") as store:
        yield store


def label(store, ids, flipped=(), **answers):
    """`name="0 1 = ? -"`: first, second, tie, incomparable, nothing; a label of a flipped pair is turned with it."""
    for name, row in answers.items():
        for place, (id, mark) in enumerate(zip(ids, row.split(), strict=True)):
            if mark in "01":
                store.submit(name, id, "best", int(mark) ^ (place in flipped), seconds=float(place + 1))
            elif mark != "-":
                store.submit(name, id, "tie" if mark == "=" else "incomparable", seconds=float(place + 1))


def test_pairs(store):
    ids = add(store, 5)
    label(store, ids, ann="0 0 = ? 1", bob="0 1 = ? -")
    found = agreement(store)
    assert set(found) == {"pair"}
    # Four units with two labels: equal, opposite, equal ties, equal refusals.
    assert found["pair"].units == 4
    assert found["pair"].percent == pytest.approx(3 / 4)
    reports = annotators(store)
    assert reports["ann"] == (5, 0, 1, 1, 4, 0.75, 3.0)
    assert reports["bob"] == (4, 0, 1, 1, 4, 0.75, 2.5)


def test_alpha_of_pairs_by_hand(store):
    """Four pairs: two agreements and two of a choice against a tie, for whichever side stands first by checksum."""
    ids = add(store, 4)
    label(store, ids, ann="0 0 1 1", bob="0 = = 1")
    found = agreement(store)["pair"]
    sides = []  # the value that each choice becomes
    for id in ids:
        sums = [candidate.checksum for candidate in store.comparison(id).candidates]
        sides.append(sums[0] < sums[1])
    first = [sides[0], sides[1], not sides[2], not sides[3]]  # whether ann's choice is the first by checksum
    a = 2 * first[0] + first[1] + first[2] + 2 * first[3]
    b = 6 - a
    # Marginals a, 2, b; n = 8. Nominal: alpha = 1 - 7 * 4 / (64 - a^2 - 4 - b^2).
    assert found.alpha_nominal == pytest.approx(1 - 28 / (60 - a * a - b * b))
    assert found.percent == 0.5


@pytest.mark.parametrize("flipped", [(0, 2), (1,), (0, 1, 2, 3)])
def test_the_order_of_candidates_does_not_matter(store, tmp_path, flipped):
    answers = {"ann": "0 1 = 1", "bob": "0 0 1 1", "cy": "1 0 = ?"}
    label(store, add(store, 4), **answers)
    with LabelStore(tmp_path / "flipped.db") as other:
        label(other, add(other, 4, flipped=flipped), flipped=flipped, **answers)
        assert agreement(other) == agreement(store)
        assert annotators(other) == annotators(store)


def test_a_pair_says_the_same_in_every_form(store):
    (id,) = add(store, 1)
    for name, kind, value in [("a", "best", 1), ("b", "ranking", [1, 0]), ("c", "target", [0.2, 0.8])]:
        store.submit(name, id, kind, value)
    assert agreement(store)["pair"].percent == 1.0
    assert agreement(store)["pair"].alpha_nominal is None  # one value: chance would agree as well


def test_more_candidates_and_rankings(store):
    ids = add(store, 2, ("a", "b", "c"))
    for name, order in (("ann", [0, 1, 2]), ("bob", [0, 2, 1])):
        store.submit(name, ids[0], "ranking", order)
    store.submit("ann", ids[1], "best", 0)
    store.submit("bob", ids[1], "tie", [0, 1])
    store.submit("cy", ids[1], "best", 0)
    store.submit("dan", ids[1], "skip")
    found = agreement(store)
    assert set(found) == {"best of 3", "ranking"}
    assert (found["ranking"].units, found["ranking"].percent) == (3, pytest.approx(2 / 3))
    assert (found["best of 3"].units, found["best of 3"].percent) == (1, pytest.approx(1 / 3))
    assert found["ranking"].alpha_ordinal is None
    reports = annotators(store)
    assert reports["dan"] == (0, 1, 0, 0, 0, None, None)
    assert reports["ann"].agreement == pytest.approx((0 + 1 / 2) / 2)


def test_different_questions_are_not_held_against_each_other(store):
    """A ranking of three against a best one, or against "all equal": neither agreement nor the lack of it."""
    ids = add(store, 3, ("a", "b", "c"))
    by_checksum = sorted(range(3), key=lambda place: store.comparison(ids[1]).candidates[place].checksum)
    store.submit("ann", ids[0], "ranking", [2, 0, 1])
    store.submit("bob", ids[0], "best", 2)
    store.submit("ann", ids[1], "ranking", by_checksum)
    store.submit("bob", ids[1], "tie")
    assert [(name, report.shared, report.agreement) for name, report in annotators(store).items()] == [
        ("ann", 0, None),
        ("bob", 0, None),
    ]
    store.submit("ann", ids[2], "best", 1)
    store.submit("bob", ids[2], "best", 1)
    store.submit("cy", ids[2], "ranking", [1, 0, 2])
    reports = annotators(store)
    assert (reports["ann"].shared, reports["ann"].agreement, reports["cy"].agreement) == (1, 1.0, None)


def test_undone_labels_and_other_pools_do_not_count(store):
    ids = add(store, 2)
    label(store, ids, ann="0 0", bob="0 1")
    store.undo("bob", store.labels_of("bob")[0].id)
    assert agreement(store)["pair"].units == 1 and agreement(store)["pair"].percent == 1.0
    assert agreement(store, pool="other") == {} and annotators(store, pool="other") == {}
