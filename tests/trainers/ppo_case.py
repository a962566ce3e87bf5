"""One row of config values: the trainer it builds, one rollout and one loss of it, against plain logits.

Shapes: B rows, C completion tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from rlhf_ext import NLPOConfig, NLPOTrainer, PPOConfig, PPOTrainer
from rlhf_ext.functional.nlpo import unpack_mask
from rlhf_ext.trainers.ppo_checkpoint import is_critic
from rlhf_ext.trainers.ppo_update import StepGuard
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.plain_ppo import Plain, Rows, plain_advantages, plain_loss, plain_rewards
from tests.trainers.ppo_runs import ARGUMENTS, PROMPTS, micro_batches, stir


NOT_FIELDS = ("tuning", "architecture", "batching", "mask_top_p", "reward_weights", "token_rewards")
BATCHING = {"1 x 8": (8, 1, 1), "2 x 4": (4, 2, 2), "2 steps": (4, 2, 1)}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}


def arguments(row, folder):
    size, steps, accumulation = BATCHING[row["batching"]]
    values = {
        **ARGUMENTS,
        "output_dir": str(folder),
        "per_device_train_batch_size": size,
        "steps_per_generation": steps,
        "gradient_accumulation_steps": accumulation,
        **{name: value for name, value in row.items() if name not in NOT_FIELDS},
    }
    if row["reward_weights"] is not None:
        values["reward_weights"] = [row["reward_weights"]]
    if row["adaptive_kl_target"] is not None:
        values["kl_horizon"] = 50  # so that one rollout moves it
    if row["policy_objective"] == "penalty":
        values["penalty_coef"] = 0.7
    if row["mask_top_p"] is None:
        return PPOConfig(**values)
    return NLPOConfig(
        **values, mask_top_p=row["mask_top_p"], **({"mask_min_tokens": 1} if row["mask_top_p"] < 1 else {})
    )


def start_of(row):
    """The policy as it is passed, which is also the reference."""
    policy = tiny_causal_lm(row["architecture"], tiny_tokenizer())
    if row["tuning"] != "adapter":
        return policy
    torch.manual_seed(11)
    return get_peft_model(policy, LoraConfig(**LORA))


def by_token(completion_ids, **kwargs):
    """A reward of every token, by its id and its place."""
    return [[0.1 * (token % 5) - 0.05 * place for place, token in enumerate(ids)] for ids in completion_ids]


def build(row, folder, adapters, dtype=torch.float64):
    tokenizer, kind = tiny_tokenizer(), row["architecture"]
    args = arguments(row, folder)
    shares = row["critic"] in ("adapter", "shared")
    trainer = (NLPOTrainer if isinstance(args, NLPOConfig) else PPOTrainer)(
        start_of(row),
        reward_funcs=None if shares else tiny_reward_model(kind, tokenizer, seed=1),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if row["tuning"] == "lora" else None,
        reward_adapter=adapters(kind) if shares else None,
        token_reward_funcs=by_token if row["token_rewards"] else None,
    )
    others = [trainer.reference, trainer.roles.target, getattr(trainer.reward_funcs[0].reward, "model", None)]
    for model in (trainer.model, *others):
        if model is not None:
            model.to(dtype)
    return trainer


@dataclass
class Case:
    """A row of `ppo_pairs.FACTORS` and the trainer built of it.

    Attributes:
        tolerance (`float`): of the largest entry of what is compared.
    """

    row: dict[str, Any]
    trainer: PPOTrainer
    tolerance: float

    def check(self):
        """Rollout, loss, gradient, and what a step makes of them."""
        trainer, row = self.trainer, self.row
        assert trainer.critic == row["critic"]
        stir(trainer, seed=3)  # away from the reference
        batch, kept, kl_coef = self.sample()
        old = self.check_rollout(batch, kept, kl_coef)
        self.check_kl_coef(old["kl"], kl_coef)
        stir(trainer)  # away from the old policy
        if row["gradient_checkpointing"]:
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        assert trainer.roles.base.is_gradient_checkpointing == row["gradient_checkpointing"]
        parts = list(micro_batches(batch, trainer.args.steps_per_generation))
        for policy_weight in (1.0, 0.0) if row["critic_warmup_rollouts"] else (1.0,):
            # A micro-batch after the warm-up, and one in it.
            trainer._step = int(policy_weight) * 100
            trainer._step_kl = torch.zeros(2)
            read = self.check_loss(parts, old, policy_weight)
        self.check_step(read)
        self.check_penalty_coef(parts, read)

    def close(self, found, expected, name, largest=None):
        """Within the tolerance times the largest entry; of numbers of order 1 that counts as 1 at least."""
        largest = max(1.0, expected.abs().max().item()) if largest is None else largest
        worst = (found.double() - expected).abs().max().item()
        assert worst <= self.tolerance * largest, f"{name}: {worst} off, largest entry {largest}"

    def plain(self, model):
        return Plain(self.row["architecture"], tiny_tokenizer(), model, LORA["lora_alpha"] / LORA["r"])

    def sample(self):
        """A rollout with ragged rows, some of them cut and some ended; what is kept of it; its `kl_coef`."""
        trainer, count = self.trainer, self.row["num_generations"]
        prompts = [prompt for prompt in PROMPTS[: 8 // count] for _ in range(count)]
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        kept, stock = {}, trainer.compute_advantages
        trainer.compute_advantages = lambda batch: kept.update(batch) or stock(batch)
        # A rollout before the one that is looked at moves an adaptive coefficient off its start.
        first = 0 if self.row["adaptive_kl_target"] is None else -1
        for number in range(first, 50):
            torch.manual_seed(number % 50)
            kl_coef = trainer.kl_coef
            batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
            rows = self.rows = Rows(batch, trainer.processing_class.eos_token_id)
            ragged = all(lengths.unique().numel() > 2 for lengths in (rows.mask.sum(1), batch["prompt_mask"].sum(1)))
            if number >= 0 and ragged and rows.cut.any() and not rows.cut.all():
                return batch, kept, kl_coef
        raise AssertionError("no ragged rollout in 50 seeds")

    def read_masks(self, batch):
        """The stored masks, `(C, V)` per row, or `None`; `test_nlpo.py` asks whether they are the right ones."""
        assert ("token_masks" in batch) == (self.row["mask_top_p"] == 0.7)
        if "token_masks" not in batch:
            return None
        masks = unpack_mask(batch["token_masks"], len(tiny_tokenizer()))
        masks = [mask[: len(tokens)] for mask, tokens in zip(masks, self.rows.completions, strict=True)]
        assert not all(mask.all() for mask in masks)
        return masks

    @torch.no_grad()
    def check_rollout(self, batch, kept, kl_coef):
        """Compare what the trainer added to its samples; what the loss is to be taken of."""
        row, args, rows = self.row, self.trainer.args, self.rows
        now, reference = self.plain(self.trainer.model), self.plain(start_of(row)).logits(rows, row["temperature"])
        if row["critic"] in ("adapter", "shared"):
            numbers = now.numbers(rows, "reward_head.weight", adapter="reward")
        else:
            reward = tiny_reward_model(row["architecture"], tiny_tokenizer(), seed=1)
            numbers = self.plain(reward).numbers(rows, "score.weight")
        scores = torch.stack([number[-1] for number in numbers]) * (row["reward_weights"] or 1.0)
        self.masks = self.read_masks(batch)
        by_place = by_token([ids.tolist() for ids in rows.completions]) if row["token_rewards"] else None
        old = plain_rewards(args, row["critic"], rows, now, reference, scores, kl_coef, self.masks, by_place)
        assert torch.equal(kept["mask"], rows.mask)
        assert (row["kl_coef"] > 0) == bool(old["kl"].abs().max() > 1e-2), "the policy has to be off its reference"
        for name in old.keys() - {"old_distributions"}:
            self.close(kept[name], old[name], name)
            assert kept[name].dim() == 1 or not kept[name][~rows.mask].any(), "the parent multiplies by the mask"
        # From here on of the very numbers that the rollout stored, so that roundings do not add up.
        paid = {name: kept[name].double() for name in old.keys() & {"rewards", "values", "bootstrap_values"}}
        advantages, returns = plain_advantages(args, rows.mask, **paid)
        self.close(batch["advantages"], advantages, "advantages")
        self.close(torch.where(rows.mask, batch["returns"], 0.0), returns, "returns")
        stored = {"old_per_token_logps", *(["values"] if row["critic"] != "none" else [])}
        assert batch.keys() & {"old_per_token_logps", "values"} == stored - (
            {"old_per_token_logps"} if row["policy_objective"] == "pg" else set()
        )
        old |= {name: kept[name].double() for name in stored}
        assert all(torch.equal(batch[name], kept[name]) for name in stored & batch.keys())
        return old | {name: batch[name].double() for name in ("advantages", "returns")}

    def check_kl_coef(self, kl, before):
        args = self.trainer.args
        if args.adaptive_kl_target is None:
            assert self.trainer.kl_coef == before == args.kl_coef
            return
        if args.critic_warmup_rollouts:  # a policy that stands still says nothing about the coefficient
            assert self.trainer.kl_coef == before == args.kl_coef
            return
        assert before != args.kl_coef, "the rollout has to have been charged a coefficient that had moved"
        error = min(max(kl.sum(1).mean().item() / args.adaptive_kl_target - 1, -0.2), 0.2)
        expected = before * (1 + error * len(kl) / args.kl_horizon)
        assert self.trainer.kl_coef == pytest.approx(expected, rel=self.tolerance)

    def check_loss(self, parts, old, policy_weight):
        trainer, row, loss = self.trainer, self.row, 0.0
        trainer.model.zero_grad()
        for part in parts:
            part_loss = trainer._compute_loss(trainer.model, part)
            part_loss.backward()
            loss = loss + part_loss.detach()
        now = self.plain(trainer.model)
        expected, read = plain_loss(
            trainer.args, row["critic"], self.rows, now, old, trainer.penalty_coef, policy_weight, self.masks
        )
        expected.backward()
        self.close(loss, expected.detach(), "loss")
        trained = {name: leaf for name, leaf in now.leaves.items() if leaf.requires_grad}
        ours = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        assert ours.keys() == trained.keys()
        for of_critic, moves in ((True, row["critic"] != "none"), (False, policy_weight > 0)):
            proved = {name: leaf.grad for name, leaf in trained.items() if is_critic(name) == of_critic}
            proved = {name: torch.zeros_like(ours[name]) if grad is None else grad for name, grad in proved.items()}
            largest = max((grad.abs().max().item() for grad in proved.values()), default=0.0)
            assert (largest > 1e-3) == moves
            for name, grad in proved.items():
                self.close(ours[name], grad, name, largest=largest)
        return read

    def check_step(self, read):
        """Which gradients an optimizer step applies, and at which learning rate."""
        trainer, row = self.trainer, self.row
        warm_up, stops = row["critic_warmup_rollouts"] > 0, row["target_kl"] is not None
        if stops:
            total, count = trainer._step_kl.tolist()
            assert count == self.rows.mask.sum()
            assert (
                total / count == pytest.approx(read["approx_kl"].item(), rel=1e-5) and total / count > row["target_kl"]
            )
        guards = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StepGuard)]
        assert len(guards) == (stops or warm_up)
        trainer._step += trainer.args.gradient_accumulation_steps
        for guard in guards:
            guard.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
        optimizer = trainer.create_optimizer()
        rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in trainer.model.named_parameters():
            applied = parameter.requires_grad and not stops and not (warm_up and not is_critic(name))
            assert (parameter.grad is not None) == applied, name
            rate = row["critic_learning_rate"] if is_critic(name) else None
            expected = (rate or trainer.args.learning_rate) if parameter.requires_grad else None
            assert rates.get(id(parameter)) == expected, name

    def check_penalty_coef(self, parts, read):
        trainer, target = self.trainer, self.row["penalty_kl_target"]
        if target is None:
            return
        before = trainer.penalty_coef
        trainer._buffered_inputs = parts
        trainer._move_penalty()
        factor = 0.5 if read["kl"] < target / 1.5 else 2.0 if read["kl"] > target * 1.5 else 1.0
        if trainer.args.critic_warmup_rollouts:
            assert trainer.penalty_coef == before
            return
        assert trainer.penalty_coef == before * factor and factor != 1.0
