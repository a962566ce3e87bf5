"""What a PPO rollout and its loss have to be, from plain logits and `rlhf_ext.functional` alone.

Weights are read off a trainer by name into float64, adapters are put into the matrices by hand, and an ordinary model
reads every row alone, without padding. Nothing of the trainer, of PEFT or of the roles takes part.

Shapes: B rows, C completion tokens, V vocabulary.
"""

import math

import torch
from torch.func import functional_call

from rlhf_ext.functional import (
    compute_gae,
    discounted_returns,
    entropy_loss,
    estimate_kl,
    leave_one_out_advantages,
    masked_mean,
    masked_whiten,
    policy_gradient_loss,
    ppo_clip_loss,
    ppo_penalty_loss,
    shape_rewards,
    value_loss,
)
from tests.tiny import tiny_causal_lm, tiny_reward_model


def pad(rows, fill=math.nan):
    """Rows of different lengths, right-padded by `fill`: `functional` must not read it."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


class Rows:
    """Prompts and completions without their padding, and whether the completion was cut by length."""

    def __init__(self, batch, eos):
        pairs = [(batch[f"{part}_ids"], batch[f"{part}_mask"].bool()) for part in ("prompt", "completion")]
        self.prompts, self.completions = ([i[m] for i, m in zip(*pair, strict=True)] for pair in pairs)
        self.mask = pad([torch.ones(len(row), dtype=torch.bool) for row in self.completions], False)
        self.cut = torch.tensor([eos not in row.tolist() for row in self.completions])

    def __iter__(self):
        return zip(self.prompts, self.completions, strict=True)


class Plain:
    """A model of `kind` in float64, with weights of a trainer as leaves.

    Args:
        kind (`str`), tokenizer: of the tiny models.
        model (`nn.Module`): whose parameters are read, under their names.
        scale (`float`): alpha / r of every adapter.
    """

    def __init__(self, kind, tokenizer, model, scale):
        self.lm = tiny_causal_lm(kind, tokenizer, dtype=torch.float64)
        self.classifier = tiny_reward_model(kind, tokenizer, dtype=torch.float64)
        self.scale, self.transposed = scale, kind == "gpt2"  # Conv1D keeps its matrix the other way round
        self.leaves = {
            name: parameter.detach().double().clone().requires_grad_(parameter.requires_grad)
            for name, parameter in model.named_parameters()
        }

    def weights(self, module, adapter=None, prefix=""):
        """What the parameters of `module` are under `adapter`, by the module's own names."""
        found = {}
        for name, _ in module.named_parameters():
            full = f"base_model.model.{prefix}{name}"
            stem = full.rpartition(".")[0]
            if prefix + name in self.leaves:
                found[name] = self.leaves[prefix + name]
            elif full in self.leaves:
                found[name] = self.leaves[full]
            else:
                found[name] = self.leaves[full.replace(stem, f"{stem}.base_layer")]
                if adapter is not None and name.endswith(".weight"):
                    a, b = (self.leaves[f"{stem}.lora_{part}.{adapter}.weight"] for part in "AB")
                    change = self.scale * b @ a
                    found[name] = found[name] + (change.T if self.transposed else change)
        return found

    def logits(self, rows, temperature, adapter="default"):
        """`(C, V)` log-probabilities of every row, of the distributions that its tokens were drawn from."""
        weights = self.weights(self.lm, adapter)
        found = []
        for prompt, completion in rows:
            ids = torch.cat([prompt, completion])[None]
            logits = functional_call(self.lm, weights, kwargs={"input_ids": ids}).logits[0]
            found.append((logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1))
        return found

    def numbers(self, rows, head, adapter=None):
        """A scalar head on every token of prompt and completion: of the submodule `critic`, or of an adapter."""
        is_model = head.startswith("critic.")
        module = (self.classifier if is_model else self.lm).base_model
        weights = self.weights(module, adapter, f"{'critic.' * is_model}{module.base_model_prefix}.")
        matrix = next(leaf for name, leaf in self.leaves.items() if name.endswith(head))
        found = []
        for row in rows:
            output = functional_call(module, weights, kwargs={"input_ids": torch.cat(row)[None]})
            found.append(output.last_hidden_state[0] @ matrix[0])
        return found


def before(numbers, rows):
    """`(B, C)`, one position before each token."""
    return pad([row[len(prompt) - 1 : -1] for row, (prompt, _) in zip(numbers, rows, strict=True)])


def drawn(distributions, rows):
    """`(B, C)` log-probability of the tokens that were drawn."""
    return pad([row.gather(-1, tokens[:, None])[:, 0] for row, (_, tokens) in zip(distributions, rows, strict=True)])


def under_mask(distributions, allowed):
    """The same distributions on the allowed tokens; `allowed` holds `(C, V)` per row, or is `None`."""
    if allowed is None:
        return distributions
    return [
        torch.where(keep, row, -torch.inf).log_softmax(-1) for row, keep in zip(distributions, allowed, strict=True)
    ]


def plain_values(now, rows, critic):
    """Numbers of the critic on every token of every row."""
    if critic == "model":
        return now.numbers(rows, "critic.score.weight")
    if critic == "shared":
        return now.numbers(rows, "critic_head.weight", adapter="reward")
    return now.numbers(rows, "critic_head.weight", adapter="critic")


def plain_rewards(args, critic, rows, now, reference, scores, kl_coef, allowed=None, token_rewards=None):
    """What the trainer adds to what it sampled, `(B, C)` each; `scores (B,)` are weighted."""
    if token_rewards is not None:
        token_rewards = pad([torch.tensor(row, dtype=torch.float64) for row in token_rewards])
    mask, found = rows.mask, {"scores": scores}
    raw = now.logits(rows, args.temperature)
    logps = drawn(raw, rows)
    found["old_distributions"] = under_mask(raw, allowed)
    found["old_per_token_logps"] = drawn(found["old_distributions"], rows)
    charged = found["kl"] = torch.zeros(mask.shape, dtype=torch.float64)
    if args.kl_coef > 0:
        rho = drawn(reference, rows)
        found["kl"] = estimate_kl(logps, rho, estimator="k1")
        charged = estimate_kl(logps, rho, estimator=args.kl_estimator)
    found["rewards"] = shape_rewards(scores, charged, mask, kl_coef=kl_coef, token_rewards=token_rewards)
    if args.whiten_rewards:
        found["rewards"] = masked_whiten(found["rewards"], mask, shift_mean=False)
    if critic != "none":
        numbers = plain_values(now, rows, critic)
        found["values"] = before(numbers, rows)
        if args.bootstrap_truncated:
            found["bootstrap_values"] = torch.where(rows.cut, torch.stack([row[-1] for row in numbers]), 0.0)
    by_token = ("old_per_token_logps", "kl", "rewards", "values")
    return {name: torch.where(mask, x, 0.0) if name in by_token else x for name, x in found.items()}


def plain_advantages(args, mask, rewards, values=None, bootstrap_values=None):
    """Advantages and returns of what was paid, `(B, C)` each."""
    if args.advantage_estimator == "gae":
        advantages, returns = compute_gae(
            rewards,
            values,
            mask,
            gamma=args.gamma,
            gae_lambda=args.gae_lambda,
            bootstrap_values=bootstrap_values,
        )
    elif args.advantage_estimator == "leave_one_out":
        returns = rewards.sum(1, keepdim=True).expand(mask.shape)
        advantages = leave_one_out_advantages(rewards.sum(1), group_size=args.num_generations)
        advantages = advantages[:, None].expand(mask.shape)
    else:
        returns = discounted_returns(rewards, mask, gamma=args.gamma)
        baseline = 0.0 if values is None else values
        advantages = returns - (masked_mean(returns, mask) if args.baseline == "batch_mean" else baseline)
    if args.whiten_advantages:
        advantages = masked_whiten(advantages, mask, shift_mean=True)
    return torch.where(mask, advantages, 0.0), torch.where(mask, returns, 0.0)


def plain_loss(args, critic, rows, now, old, penalty_coef, policy_weight=1.0, allowed=None):
    """Loss of a whole rollout, over the mean number of tokens per optimizer step, and what else is read off it."""
    mask = rows.mask
    distributions = under_mask(now.logits(rows, args.temperature), allowed)
    logps = drawn(distributions, rows)
    kept = {"reduction": "sum"}
    read = {}
    if args.policy_objective == "pg":
        policy, _ = policy_gradient_loss(logps, old["advantages"], mask, **kept)
    elif args.policy_objective == "penalty":
        pairs = zip(old["old_distributions"], distributions, strict=True)
        kl = pad([(then.exp() * (then - row)).sum(-1) for then, row in pairs])
        read["kl"] = kl[mask].mean().detach()
        policy, _ = ppo_penalty_loss(
            logps, old["old_per_token_logps"], old["advantages"], kl, mask, penalty_coef=penalty_coef, **kept
        )
    else:
        policy, _ = ppo_clip_loss(
            logps,
            old["old_per_token_logps"],
            old["advantages"],
            mask,
            epsilon=args.epsilon,
            epsilon_high=args.epsilon_high,
            delta=args.delta,
            **kept,
        )
    entropy = pad([-(row.exp() * torch.where(row.isinf(), 0.0, row)).sum(-1) for row in distributions])
    bonus, _ = entropy_loss(entropy, mask, **kept)
    loss = policy_weight * (policy + args.entropy_bonus_coef * bonus)
    if critic != "none":
        values = before(plain_values(now, rows, critic), rows)
        critic_loss, _ = value_loss(
            values, old["values"], old["returns"], mask, epsilon_value=args.epsilon_value, **kept
        )
        loss = loss + args.vf_coef * critic_loss
    log_ratio = (logps - old["old_per_token_logps"])[mask].detach()
    read["approx_kl"] = (log_ratio.expm1() - log_ratio).mean()
    steps = args.steps_per_generation / args.gradient_accumulation_steps
    return loss / (mask.sum() / steps), read
