"""NLPO: PPO whose policy is renormalised on the tokens that an older policy finds likely."""

import os
import textwrap
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..functional.nlpo import masked_logps, unpack_mask
from ..models.masked_sampling import MaskedGenerate
from ..models.roles import POLICY
from .nlpo_config import NLPOConfig
from .ppo_rollout import before_each_token, token_mask, whole_rows
from .ppo_trainer import PPOTrainer
from .ppo_update import CHUNK_TOKENS


TARGET_FILE = "masking_policy.safetensors"


class NLPOTrainer(PPOTrainer):
    """
    Trainer for natural language policy optimisation (Ramamurthy et al. 2023, Algorithm 1).

    A masking policy, a copy of the policy that is renewed every `mask_refresh_rollouts` rollouts, allows at each step
    the smallest set of tokens with probability `mask_top_p`. Sampling, and both log-probabilities of the ratio, are
    those of the policy renormalised on that set; the KL to the reference is taken of the raw distributions. The masks
    are kept with the rollout, in bits. With `mask_top_p=1.0` it is [`PPOTrainer`] bit for bit.

    Arguments are those of [`PPOTrainer`], with an [`NLPOConfig`]. Special tokens are always allowed.
    """

    _tag_names = ["rlhf_ext", "nlpo"]
    _name = "NLPO"
    _paper = {
        "title": "Is Reinforcement Learning (Not) for Natural Language Processing",
        "id": "2210.01241",
        "citation": textwrap.dedent("""\
            @inproceedings{ramamurthy2023is,
                title        = {{Is Reinforcement Learning (Not) for Natural Language Processing}},
                author       = {Rajkumar Ramamurthy and Prithviraj Ammanabrolu and others},
                booktitle    = {International Conference on Learning Representations},
                year         = 2023,
            }"""),
    }

    def __init__(self, model: Any, reward_funcs: Any = None, args: NLPOConfig | None = None, **kwargs: Any):
        super().__init__(model, reward_funcs, NLPOConfig("nlpo") if args is None else args, **kwargs)
        self._under_mask: dict[str, torch.Tensor] | None = None
        self._masked_generate: MaskedGenerate | None = None
        if self.masks:
            self._check_head("mask_top_p", self.args.mask_top_p)
            special = {*self.eos_token_ids, *self.processing_class.all_special_ids}
            size = self.roles.base.get_output_embeddings().weight.shape[0]
            self._keep_ids = sorted(token for token in special if token < size)
            if self.roles.target is not None:
                self.roles.target.to(self.accelerator.device)

    @property
    def masks(self) -> bool:
        """Whether a masking policy is at work at all."""
        return self.args.mask_top_p < 1.0

    # Sampling

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if not self.masks:
            return super()._generate_and_score_completions(inputs)
        rollout = self._step // (self.args.steps_per_generation * self.num_iterations)
        if self.model.training and rollout > 0 and rollout % self.args.mask_refresh_rollouts == 0:
            self.roles.renew_target()
        model = self.accelerator.unwrap_model(self.model)
        self._masked_generate = MaskedGenerate(
            model,
            self.roles.target_forward,
            top_p=self.args.mask_top_p,
            min_tokens=self.args.mask_min_tokens,
            keep_ids=self._keep_ids,
            temperature=self.temperature,
        )
        model.generate = self._masked_generate
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            del model.generate
            self._masked_generate = None

    def _old_logps(self, batch: dict[str, Any], raw: torch.Tensor, mode: str) -> torch.Tensor:
        if not self.masks:
            return super()._old_logps(batch, raw, mode)
        # Rows are those of the batch; the last columns were sampled after every row had ended, or are padding that
        # the parent added (`pad_to_multiple_of`).
        packed, length = self._masked_generate.packed, batch["completion_ids"].size(1)
        batch["token_masks"] = nn.functional.pad(packed[:, :length], (0, 0, 0, max(0, length - packed.size(1))))
        allowed = unpack_mask(batch["token_masks"][token_mask(batch)], self._vocab_size()).sum(-1).float()
        self._note({"nlpo/allowed_tokens": allowed.mean()}, allowed.numel())
        size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "token_masks")
        parts = zip(*(batch[name].split(size) for name in names), strict=True)
        rows = [self._masked(self.model, dict(zip(names, part, strict=True)))[0] for part in parts]
        return torch.cat(rows)

    # Log-probabilities under the mask

    def _vocab_size(self) -> int:
        return self.roles.base.get_output_embeddings().weight.shape[0]

    def _masked(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, attention_mask = whole_rows(batch)
        hidden = before_each_token(model(input_ids=ids, attention_mask=attention_mask, role=POLICY), batch)
        weight, bias = self._head()
        return masked_logps(
            hidden,
            weight,
            bias,
            batch["completion_ids"],
            batch["token_masks"],
            token_mask(batch),
            temperature=self.temperature,
            chunk_size=CHUNK_TOKENS,
        )

    def compute_policy_loss(self, batch: dict[str, torch.Tensor], model: nn.Module | None = None) -> torch.Tensor:
        self._under_mask = batch if self.masks else None
        try:
            return super().compute_policy_loss(batch, model)
        finally:
            self._under_mask = None

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._under_mask is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        logps, entropy = self._masked(model, self._under_mask)
        self._outputs = SimpleNamespace(log_probs=logps, entropy=entropy)
        return logps, entropy, None

    # The masking policy goes with the checkpoint, whose rollout was sampled under its masks

    def _run_shape(self) -> dict[str, Any]:
        return super()._run_shape() | {name: getattr(self.args, name) for name in ("mask_top_p", "mask_min_tokens")}

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.masks and self.args.should_save:
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.roles.target_weights().items()}
            save_file(tensors, os.path.join(output_dir, TARGET_FILE))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self.masks and checkpoint is not None:
            saved = load_file(os.path.join(checkpoint, TARGET_FILE))
            with torch.no_grad():
                for name, tensor in self.roles.target_weights().items():
                    tensor.copy_(saved[name])
