"""Which rows of a rollout go through the models together: by length and by padded tokens, not by count alone.

The rows of an optimizer step stay the same, and so does its gradient up to rounding; only the micro-batches in which
it is gathered change.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..functional.batching import length_chunks, split_by_length
from ..models.live_sampling import only_live_rows
from .launch import may_cut_weights


Batch = dict[str, torch.Tensor | None]

MOST_ROWS = 2
"""Rows of a micro-batch at most, in times of its even share: what is kept per row is wide, however short its text."""


class BatchesMixin:
    """The part of [`PPOTrainer`] that orders rows by length."""

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._buffered_inputs is not before and self.args.skip_padding:
            # Several processes gather numbers of every row in every micro-batch, so each has to have as many.
            ratio = MOST_ROWS if self.accelerator.num_processes == 1 else 1
            self._buffered_inputs = balance(self._buffered_inputs, self.args.gradient_accumulation_steps, ratio)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _sampling(self) -> AbstractContextManager[None]:
        """A context in which `generate` reads a prompt once and drops ended rows, if each process may do so alone."""
        masked = getattr(self, "masks", False)  # NLPO's processor keeps a cache of all rows
        if not self.args.skip_padding or masked or may_cut_weights(self):
            return nullcontext()
        return only_live_rows(self.roles.model)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if batch_size is None or batch_size >= len(input_ids) or not self.args.skip_padding:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
            )
        order, back = by_length(attention_mask)
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            model, input_ids[order], attention_mask[order], logits_to_keep, batch_size, **kwargs
        )
        if self._hidden is not None:
            self._hidden = self._hidden[back]
        return logps[back], None if entropies is None else entropies[back], aux_loss


def by_length(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a `(B, T)` mask, the longest first, and the way back."""
    order = torch.tensor(sum(length_chunks(mask.sum(dim=1).tolist(), len(mask)), []), device=mask.device)
    return order, order.argsort()


def balance(batches: list[Batch], group: int, ratio: int = MOST_ROWS) -> list[Batch]:
    """
    Split the rows of every `group` micro-batches, one optimizer step, anew into as many of like size in tokens.

    Args:
        batches (`list[dict]`):
            Micro-batches of a rollout: tensors with rows of `prompt_mask` and `completion_mask`, scalars, `None`.
        group (`int`):
            Micro-batches of an optimizer step.
        ratio (`int`, *optional*, defaults to `2`):
            Rows of a micro-batch at most, in times of its even share; with 1 all have as many as before.

    Returns:
        `list[dict]`: as many micro-batches, of different numbers of rows.
    """
    balanced: list[Batch] = []
    for start in range(0, len(batches), group):
        step = batches[start : start + group]
        rows = {name: _joined([batch[name] for batch in step]) for name in step[0]}
        lengths = (rows["prompt_mask"].sum(dim=1) + rows["completion_mask"].sum(dim=1)).tolist()
        for part in split_by_length(lengths, len(step), ratio * -(-len(lengths) // len(step))):
            balanced.append({name: value[part] if _has_rows(value) else value for name, value in rows.items()})
    return balanced


def _has_rows(value: torch.Tensor | None) -> bool:
    return value is not None and value.dim() > 0


def _joined(values: list[torch.Tensor | None]) -> torch.Tensor | None:
    return torch.cat(values) if _has_rows(values[0]) else values[0]
