"""Rows of like length together: every row once, and no split into as many parts has a smaller largest part."""

import itertools
import random

import pytest

from rlhf_ext.functional.batching import length_chunks, split_by_length


def largest(parts, lengths):
    return max(len(part) * max(lengths[row] for row in part) for part in parts)


def all_splits(rows, num_parts):
    for labels in itertools.product(range(num_parts), repeat=rows):
        if len(set(labels)) == num_parts:
            yield [[row for row in range(rows) if labels[row] == part] for part in range(num_parts)]


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4])
def test_no_split_has_a_smaller_largest_part(num_parts):
    generator = random.Random(num_parts)
    for _ in range(12):
        lengths = [generator.randint(1, 12) for _ in range(7)]
        parts = split_by_length(lengths, num_parts)
        assert len(parts) == num_parts and sorted(sum(parts, [])) == list(range(7))
        assert largest(parts, lengths) == min(largest(split, lengths) for split in all_splits(7, num_parts))


def test_equal_rows_are_split_evenly():
    assert sorted(len(part) for part in split_by_length([5] * 8, 4)) == [2, 2, 2, 2]
    assert len(split_by_length([9, 1, 1], 3)) == 3


def test_a_part_has_no_more_rows_than_it_may():
    parts = split_by_length([10] * 3 + [1] * 13, 4, max_rows=8)
    assert len(parts) == 4 and max(len(part) for part in parts) <= 8
    assert max(len(part) for part in split_by_length([10] * 3 + [1] * 13, 4)) == 13
    with pytest.raises(ValueError, match="max_rows"):
        split_by_length([1] * 9, 2, max_rows=4)


def test_chunks_are_as_asked_and_sorted():
    chunks = length_chunks([3, 9, 1, 5, 9], 2)
    assert chunks == [[1, 4], [3, 0], [2]]
    assert length_chunks([], 2) == []


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="num_parts"):
        split_by_length([1, 2], 3)
    with pytest.raises(ValueError, match="num_parts"):
        split_by_length([1, 2], 0)
    with pytest.raises(ValueError, match="size"):
        length_chunks([1], 0)
