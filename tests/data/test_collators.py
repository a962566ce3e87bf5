"""Ragged candidates become one flat batch, in TRL's order for pairs."""

import pytest
import torch
from trl.trainer.reward_trainer import DataCollatorForPreference

from rlhf_ext.data.collators import DataCollatorForCandidates


def example(*ids, starts=None, target=None, ranking=None, row=0, **kwargs):
    starts = starts or [0] * len(ids)
    return {
        "candidate_ids": list(ids),
        "completion_starts": starts,
        "target": target,
        "ranking": ranking,
        "row": row,
        **kwargs,
    }


def test_pairs_are_laid_out_like_trl():
    pairs = [([1, 2, 3], [4, 5]), ([6, 7], [8])]
    theirs = DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=4)(
        [{"chosen_ids": one, "rejected_ids": two, "margin": 0.5} for one, two in pairs]
    )
    ours = DataCollatorForCandidates(pad_token_id=0, pad_to_multiple_of=4)(
        [example(*pair, target=[1.0, 0.0], margin=0.5) for pair in pairs]
    )
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert ours["candidate_mask"].all()
    assert ours["targets"].tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_ragged_rows_keep_their_places():
    batch = DataCollatorForCandidates(pad_token_id=9)(
        [
            example([1, 2], [3, 4, 5], starts=[1, 2], target=[0.5, 0.5], row=7),
            example([1], [2], [3, 3], ranking=[2, 0, 1], row=3),
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 9], [1, 9, 9], [3, 4, 5], [2, 9, 9], [3, 3, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["completion_mask"].int().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["candidate_mask"].int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["targets"].tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    assert batch["rankings"].tolist() == [[-1, -1, -1], [2, 0, 1]]
    assert batch["rows"].tolist() == [7, 3]
    assert "margin" not in batch


def test_a_margin_that_some_rows_lack_is_refused():
    rows = [example([1], [2], target=[1.0, 0.0], margin=0.5), example([1], [2], target=[1.0, 0.0], margin=None)]
    with pytest.raises(ValueError, match="margin"):
        DataCollatorForCandidates(pad_token_id=0)(rows)
