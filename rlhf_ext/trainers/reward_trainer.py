"""Reward trainer for every kind of preference: rows to scores to loss, and nothing else."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from trl import RewardTrainer
from trl.trainer.utils import get_config_model_id

from ..data.collators import DataCollatorForCandidates
from ..data.preferences import PreferenceReport
from ..functional.candidates import (
    arrange_rewards,
    candidates_loss,
    center_loss,
    preferred_lm_loss,
    preferred_tokens,
)
from ..models.adapters import save_lm_adapter
from ..models.base_quantization import without_cpu_packing
from ..models.checkpoints import CompleteCheckpointMixin
from ..models.hub import known_commit, with_base_revision
from ..models.lm_head import LM_FOLDER, LM_HEAD, keep_lm_head
from ..models.pooling import classifier_of, normalization_of, pool_by_attention_mask
from ..models.reward_checkpoints import plain_dtype, read_head, save_reward_config, set_head
from ..models.sharding import whole_weights
from .evaluation import EvaluationMetricsMixin
from .launch import check_launch, reset_reentrant
from .reward_card import RewardCardMixin
from .reward_config import PreferenceRewardConfig
from .reward_data import PreferenceDataMixin, check_eos
from .reward_model import check_adapter, checkpoint_head, new_head, score_peft_config


logger = get_logger(__name__)


class PreferenceRewardTrainer(
    EvaluationMetricsMixin, CompleteCheckpointMixin, RewardCardMixin, PreferenceDataMixin, RewardTrainer
):
    """
    Trains a reward model on pairs, best-of-K, ties, soft labels and rankings.

    A [`~trl.RewardTrainer`] that takes more rows than pairs, reads the score at the last real token found by the
    attention mask (so that a padding token which is also the end-of-sequence token changes nothing), and keeps the
    head trained, saved and in fp32. With two hard-labelled completions per row the loss is the parent's bit for bit.

    References: Christiano et al. 2017 (https://huggingface.co/papers/1706.03741), Ziegler et al. 2019
    (https://huggingface.co/papers/1909.08593), Stiennon et al. 2020 (https://huggingface.co/papers/2009.01325).

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from rlhf_ext import PreferenceRewardConfig, PreferenceRewardTrainer

    >>> rows = [{"prompt": "2 + 2 =", "completions": [" 4", " 5", " fish"], "best": 0}]
    >>> trainer = PreferenceRewardTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=PreferenceRewardConfig("reward-model"),
    ...     train_dataset=Dataset.from_list(rows),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in the parent. A model id whose checkpoint has no head gets one drawn from N(0, 1/(d+1)), d the hidden
            size (Stiennon et al. 2020, appendix B.1); an instance is taken as it is.
        args ([`PreferenceRewardConfig`], *optional*):
            Configuration.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Defaults to [`DataCollatorForCandidates`]; another one must give the same keys.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            TRL's pairs (text, messages, or tokenised `chosen_ids` and `rejected_ids`), or general rows
            (`rlhf_ext.data.preferences`). Pairs may have a `margin`.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            The same for evaluation.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer; loaded from the model's name by default. It must have an end-of-sequence token.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter. A copy of it is completed: `modules_to_save` gets the head `score`, which is kept out of LoRA, and
            `task_type` becomes `"SEQ_CLS"`.
        compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics and
            quantization_config:
            As in the parent.

    Attributes:
        preference_reports (`dict[str, PreferenceReport]`):
            What became of the rows of each dataset.

    Raises:
        ValueError: before training, for rows, tokenizers, models and options that cannot work.
        FloatingPointError: in training, if a score is not finite, naming the rows.
    """

    _tag_names = ["rlhf_ext", "preference-reward"]
    _name = "PreferenceReward"

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: PreferenceRewardConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = PreferenceRewardConfig(f"{name.split('/')[-1]}-PreferenceReward")
        elif not isinstance(args, PreferenceRewardConfig):
            raise ValueError(f"`args` is a {type(args).__name__}; pass a `PreferenceRewardConfig`.")
        check_launch(args, model)
        if processing_class is not None:
            check_eos(processing_class, args.eos_token)
        if peft_config is not None:
            peft_config = score_peft_config(peft_config)

        # Read before `super().__init__`, which loads the model and prepares the rows in one go.
        if isinstance(model, str):
            options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            revision = options.get("revision")
            config = AutoConfig.from_pretrained(
                model, revision=revision, trust_remote_code=options["trust_remote_code"]
            )
            head = checkpoint_head(model, revision)
            lm_head = read_head(model, revision, LM_HEAD) if args.lm_coef > 0.0 else {}
            self.base_revision = known_commit(model, revision)
            peft_config = with_base_revision(peft_config, model, revision)
        else:
            config, lm_head = model.config, {}
            head = {
                name.split(".")[-1]: parameter.detach().clone()
                for name, parameter in _active_head(classifier_of(model)).named_parameters()
            }
        self._context_length = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.preference_reports: dict[str, PreferenceReport] = {}
        # The parent rounds every trainable parameter of a quantised model to bf16, where adapters freeze at the
        # learning rates of RLHF; what is frozen meanwhile keeps its bits.
        frozen = []
        if isinstance(model, PeftModel):
            frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
            check_adapter(model)
            for parameter in frozen:
                parameter.requires_grad_(False)
        # Under ZeRO-3 the parent would load a model in pieces, and its head could not be set.
        loading = nullcontext() if args.deepspeed_plugin is None else whole_weights()
        try:
            with loading:
                super().__init__(
                    model=model,
                    args=args,
                    data_collator=data_collator,
                    train_dataset=train_dataset,
                    eval_dataset=eval_dataset,
                    processing_class=processing_class,
                    compute_metrics=compute_metrics,
                    callbacks=callbacks,
                    optimizers=optimizers,
                    optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                    preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                    quantization_config=quantization_config,
                    peft_config=peft_config,
                )
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

        reset_reentrant(args)
        if data_collator is None:
            self.data_collator = DataCollatorForCandidates(
                pad_token_id=self.processing_class.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of
            )
        base = without_cpu_packing(classifier_of(self.model))
        if head is None:
            head = new_head(base, args.seed)
        set_head(base.score, head)
        if isinstance(self.model, PeftModel):
            check_adapter(self.model)
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        pool_by_attention_mask(self.model, args.reward_aggregation)
        self.training_gain = normalization_of(self.model)[0]
        if args.lm_coef > 0.0:
            keep_lm_head(base, lm_head, trains=not isinstance(self.model, PeftModel))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """
        The loss of a batch of candidates.

        Does not call `super()`, which splits the scores in two halves and takes the first as chosen: K candidates,
        ties and soft labels have no halves. For hard-labelled pairs the result is the parent's bit for bit, and a test
        compares them. Logs the parent's keys; `accuracy` counts a tie one half. With `lm_coef` the one forward gives
        the log-probabilities of the preferred completions too.
        """
        mode = "train" if self.model.training else "eval"
        candidate_mask, masks = inputs["candidate_mask"], {}
        if self.args.reward_aggregation == "sum":
            masks["completion_mask"] = inputs["completion_mask"]
        if self.args.lm_coef > 0.0:
            labels = (inputs["targets"], inputs["rankings"], candidate_mask)
            masks["lm_mask"] = preferred_tokens(*labels, inputs["completion_mask"])
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, **masks
        )
        scores = outputs.logits.squeeze(-1)
        rewards = arrange_rewards(scores, candidate_mask)
        self._check_finite(rewards.detach(), inputs["rows"])
        loss, metrics = candidates_loss(
            rewards,
            inputs["targets"].to(rewards.dtype),
            inputs["rankings"],
            candidate_mask,
            prediction_noise=self.args.prediction_noise,
            margin=inputs.get("margin"),
        )
        loss = self.args.preference_coef * loss
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * center_loss(rewards)
        if self.args.lm_coef > 0.0:
            lm_loss, lm_metrics = preferred_lm_loss(
                outputs.lm_logps, masks["lm_mask"], num_rows=len(rewards), reduction=self.args.lm_reduction
            )
            loss = loss + self.args.lm_coef * lm_loss
            self._log_lm(mode, lm_loss.detach(), lm_metrics["nll"], masks["lm_mask"])
        self._log_batch(mode, scores.detach(), inputs["attention_mask"], metrics, scores.new_tensor(len(rewards)))
        # The scores alone: `evaluate` would pad and keep whatever else stands here.
        return (loss, SequenceClassifierOutputWithPast(logits=outputs.logits)) if return_outputs else loss

    def _check_finite(self, rewards: torch.Tensor, rows: torch.Tensor) -> None:
        wrong = ~torch.isfinite(rewards).all(dim=1)
        if wrong.any():
            raise FloatingPointError(
                f"Scores of rows {rows[wrong].tolist()} of the preference dataset are not finite at step "
                f"{self.state.global_step}: {rewards[wrong].tolist()}. Look at these rows, lower `learning_rate`, or "
                "train in bf16 or fp32 instead of fp16."
            )

    def _log_batch(
        self,
        mode: str,
        scores: torch.Tensor,
        attention_mask: torch.Tensor,
        metrics: dict[str, torch.Tensor],
        candidate_rows: torch.Tensor,
    ) -> None:
        gather = self.accelerator.gather_for_metrics
        if mode == "eval":
            self._count_eval_rows(self.accelerator.gather(candidate_rows[None]).sum().item())
        if mode == "train":
            self._total_train_tokens += gather(attention_mask.sum()).sum().item() // self._tp_size
        logged = self._metrics[mode]
        logged["num_tokens"] = [self._total_train_tokens]
        # Summaries and not scores are gathered: processes hold different numbers of candidates.
        summary = torch.stack([scores.min(), scores.max(), scores.sum(), scores.new_tensor(float(len(scores)))])
        low, high, total, count = self.accelerator.gather(summary[None]).unbind(dim=1)
        logged["min_reward"].append(low.min().item())
        logged["mean_reward"].append((total.sum() / count.sum()).item())
        logged["max_reward"].append(high.max().item())
        for name in ("accuracy", "margin"):
            logged[name].append(gather(metrics[name]).mean().item())

    def _log_lm(self, mode: str, loss: torch.Tensor, nll: torch.Tensor, mask: torch.Tensor) -> None:
        count = mask.sum()
        losses, sums, counts = self.accelerator.gather(torch.stack([loss, nll * count, count])[None]).unbind(dim=1)
        self._metrics[mode]["lm_loss"].append(losses.mean().item())
        if counts.sum() > 0:
            self._metrics[mode]["nll"].append((sums.sum() / counts.sum()).item())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return  # DeepSpeed calls this on every process, before one of them has made the folder
        dtype = plain_dtype(classifier_of(self.model))
        folder = output_dir or self.args.output_dir
        unit = normalization_of(self.model)
        training = (self.training_gain, self.args.prediction_noise)
        save_reward_config(folder, self.args.reward_aggregation, dtype, unit, training)
        model = self.accelerator.unwrap_model(self.model)
        # Not in checkpoints: `Trainer` takes every folder of an adapter in there for one to load on resuming.
        if self.args.lm_coef > 0.0 and isinstance(model, PeftModel) and not self._aside:
            save_lm_adapter(model, model.active_adapters[0], os.path.join(folder, LM_FOLDER), state_dict)


def _active_head(base: PreTrainedModel) -> nn.Module:
    copies = getattr(base.score, "modules_to_save", None)
    return base.score if copies is None else copies[base.score.active_adapters[0]]
