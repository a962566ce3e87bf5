"""One trainer after another for the loops around reward training, on one base that is loaded once."""

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..models.hub import known_commit, with_base_revision
from ..models.pooling import set_normalization
from ..models.reward_checkpoints import load_classifier, set_head
from ..models.sharding import whole_weights
from ..trainers.reward_config import PreferenceRewardConfig
from ..trainers.reward_model import checkpoint_head, new_head
from ..trainers.reward_trainer import PreferenceRewardTrainer
from .finished_runs import arguments_that_matter


class RewardBuilder:
    """
    Builds trainers that differ in folder, seed and rows only.

    With adapters the frozen base is loaded once (in 4 bits if asked for) and handed on from trainer to trainer. Full
    models are loaded anew, and so is what `lm_coef` or FSDP puts on or around a base.

    Args:
        model (`str`):
            Folder or Hub id of the model that all of them start from.
        args ([`PreferenceRewardConfig`]):
            Configuration of every trainer, but for `output_dir` and `seed`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        peft_config ([`~peft.PeftConfig`], *optional*), quantization_config:
            As for [`PreferenceRewardTrainer`].
        builds_one (`bool`, *optional*, defaults to `False`):
            Whether one trainer is all that is built in this process, which DeepSpeed allows.

    Raises:
        ValueError: `model` is no name, DeepSpeed is on for several trainers, or the run would push each of them to
            one repository.
    """

    def __init__(
        self,
        model: str,
        args: PreferenceRewardConfig,
        processing_class: PreTrainedTokenizerBase,
        peft_config: PeftConfig | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        builds_one: bool = False,
    ):
        if not isinstance(model, str):
            raise ValueError(
                f"`model` is a {type(model).__name__}, but every run of the loop starts from the same weights. Pass "
                "the folder or Hub id of a model."
            )
        if args.push_to_hub:
            raise ValueError(
                "`push_to_hub` is set, but the loop writes several models and a repository holds one. Leave it out, "
                "and upload the folder afterwards."
            )
        if args.deepspeed_plugin is not None and not builds_one:
            raise ValueError(
                "DeepSpeed is on, but accelerate builds one trainer per launch under it. Launch the loop without it "
                "(DDP, with adapters or a quantised base where memory is short)."
            )
        self.model, self.args, self.processing_class = model, args, processing_class
        self.quantization_config = quantization_config
        self.revision = (args.model_init_kwargs or {}).get("revision")
        self.peft_config = with_base_revision(peft_config, model, self.revision)
        self.shares_base = peft_config is not None and args.lm_coef == 0.0 and not args.fsdp
        self._base: PreTrainedModel | None = None
        self._head: dict[str, torch.Tensor] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the trainers have in common and what decides their result."""
        peft = None if self.peft_config is None else self.peft_config.to_dict()
        quantization = None if self.quantization_config is None else self.quantization_config.to_dict()
        arguments = {name: value for name, value in arguments_that_matter(self.args).items() if name != "seed"}
        return {"model": self.model, "peft_config": peft, "quantization_config": quantization, "arguments": arguments}

    def build(
        self, folder: Path, seed: int, train_dataset: Dataset, eval_dataset: Dataset | None
    ) -> PreferenceRewardTrainer:
        """A trainer that writes into `folder`; the head and the adapters are drawn by `seed`."""
        args = copy.copy(self.args)  # not `replace`: building a configuration resets accelerate's state
        # A `data_seed` of the whole loop would give every run the same order of rows.
        args.output_dir, args.seed, args.data_seed = str(folder), seed, None
        name = folder.name.removeprefix("_unfinished_")
        args.run_name = f"{args.run_name or Path(self.args.output_dir).name}-{name}"
        model: str | PreTrainedModel = self.model
        if self.shares_base:
            model, args.model_init_kwargs = self._fresh_base(seed), None
        trainer = PreferenceRewardTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.processing_class,
            quantization_config=None if self.shares_base else self.quantization_config,
            peft_config=self.peft_config,
        )
        trainer.base_revision = known_commit(self.model, self.revision)
        return trainer

    def release(self, trainer: PreferenceRewardTrainer) -> None:
        """Take the base out of a trainer that is done with."""
        if self.shares_base:
            self._base = trainer.model.unload()

    @whole_weights()  # its head is written into, which a piece of ZeRO-3 cannot be
    def _fresh_base(self, seed: int) -> PreTrainedModel:
        if self._base is None:
            options = {"trust_remote_code": self.args.trust_remote_code, **(self.args.model_init_kwargs or {})}
            options.setdefault("dtype", torch.float32)  # as in TRL
            if self.quantization_config is not None:
                options["quantization_config"] = self.quantization_config
            self._base, missing = load_classifier(self.model, **options)
            if foreign := {name for name in missing if not name.startswith("score.")}:
                raise ValueError(f"{self.model!r} has no weights for {sorted(foreign)[:4]}. Give a whole model.")
            self._head = checkpoint_head(self.model, self.revision)
            if self._head == {}:  # no safetensors to look into: what was loaded is the head
                self._head = {name: tensor.clone() for name, tensor in self._base.score.state_dict().items()}
        set_normalization(self._base, 1.0, 0.0)  # of the run before
        set_head(self._base.score, new_head(self._base, seed) if self._head is None else self._head)
        return self._base
