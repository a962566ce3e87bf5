"""Ragged groups of candidates as one flat batch of sequences.

Shapes: N rows, K candidates of the widest row, S sequences in all, T tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin
from trl.trainer.utils import pad


@dataclass
class DataCollatorForCandidates(DataCollatorMixin):
    """
    Pads rows of tokenised candidates.

    Sequences are ordered by candidate and then by row: all first candidates, then all second ones. For pairs this is
    the order of TRL's [`~trl.trainer.reward_trainer.DataCollatorForPreference`], so that sums run in the same order.

    Each example has `candidate_ids` (K lists of ids), `completion_starts` (K positions where the completion begins),
    `target` (K numbers or `None`), `ranking` (K indices, best first, or `None`), `row` (its place in the dataset) and
    optionally `margin`.

    The batch holds `input_ids` and `attention_mask` `(S, T)`, padded on the right; `completion_mask (S, T)`, bool;
    `candidate_mask (N, K)`, bool, where a row has a candidate; `targets (N, K)`, 0 in rows with a ranking;
    `rankings (N, K)`, -1 where there is none; `rows (N,)`; and `margin (N,)` if the examples have it.

    Args:
        pad_token_id (`int`):
            Token id to pad with. It is never read, because every mask hides it.
        pad_to_multiple_of (`int`, *optional*):
            If set, T is a multiple of this value.
        return_tensors (`str`, *optional*, defaults to `"pt"`):
            Type of tensor to return. Only `"pt"` is supported.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Pad a list of examples.

        Raises:
            ValueError: if some examples have a margin and others have none.
        """
        sizes = torch.tensor([len(example["candidate_ids"]) for example in examples])
        width = int(sizes.max())
        order = [(k, n) for k in range(width) for n, size in enumerate(sizes) if k < size]
        ids = [torch.tensor(examples[n]["candidate_ids"][k]) for k, n in order]
        starts = torch.tensor([examples[n]["completion_starts"][k] for k, n in order])
        input_ids = self._pad(ids, self.pad_token_id)
        attention_mask = self._pad([torch.ones_like(row) for row in ids], 0)
        after_start = torch.arange(input_ids.shape[1]) >= starts[:, None]
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": after_start & attention_mask.bool(),
            "candidate_mask": torch.arange(width) < sizes[:, None],
            "targets": _rectangle([example["target"] for example in examples], width, 0.0),
            "rankings": _rectangle([example.get("ranking") for example in examples], width, -1),
            "rows": torch.tensor([example["row"] for example in examples]),
        }
        margins = [example.get("margin") for example in examples]
        if any(margin is not None for margin in margins):
            if any(margin is None for margin in margins):
                raise ValueError("`margin` is missing in some rows of a batch. Give every row one, or 0.")
            batch["margin"] = torch.tensor(margins, dtype=torch.float)
        return batch

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad(rows, padding_value=value, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)


def _rectangle(rows: list[list | None], width: int, fill: float | int) -> torch.Tensor:
    return torch.tensor([[*(row or []), *[fill] * (width - len(row or []))] for row in rows])
