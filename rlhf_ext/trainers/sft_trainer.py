"""Supervised fine-tuning: what TRL's trainer lacks for what comes after it."""

import copy
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from ..models.base_quantization import save_base_quantization
from ..models.checkpoints import CompleteCheckpointMixin
from .hub import is_repo_id


class CompleteSFTTrainer(CompleteCheckpointMixin, SFTTrainer):
    """
    TRL's trainer, with checkpoints that are complete or absent, and no loss on the end of a text that was cut.

    The parent ends every completion. Of rows whose column `truncated` is true the end has no label, or the model would
    learn to stop in the middle of a sentence. Beside an adapter stands how its base was quantised, without which it
    would be loaded, and merged, on another base. A card names no path of this machine.
    """

    def create_model_card(self, model_name: str | None = None, dataset_name: Any = None, tags: Any = None) -> None:
        named = isinstance(dataset_name, str) and is_repo_id(dataset_name)
        super().create_model_card(model_name=model_name, dataset_name=dataset_name if named else None, tags=tags)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if self.args.should_save and isinstance(model, PeftModel):
            save_base_quantization(model.get_base_model(), output_dir or self.args.output_dir)

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        args: SFTConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Dataset:
        if "truncated" not in dataset.column_names:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        whole = copy.copy(args)
        if packing:
            whole.max_length = None  # packing cuts, after the ends are found
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        dataset = dataset.map(
            _unlabel_end, fn_kwargs={"tokenizer": processing_class}, remove_columns=["truncated"], desc="Open ends"
        )
        if packing:  # what has ids and labels is packed as it is
            dataset = super()._prepare_dataset(dataset, processing_class, args, True, None, dataset_name)
        return dataset


def _unlabel_end(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Takes the label off the tokens that close a text, and off blanks that a chat template writes around them."""
    ids, labels = row["input_ids"], list(row["labels"])
    if row["truncated"]:
        closers, end = set(tokenizer.all_special_ids), len(ids)
        while end and (ids[end - 1] in closers or not tokenizer.decode(ids[end - 1]).strip()):
            end -= 1
        # Where `max_length` took the end away there is none to be taken off.
        if closers & set(ids[end:]):
            labels[end:] = [-100] * (len(ids) - end)
    return {"labels": labels}
