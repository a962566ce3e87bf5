"""What the card of a PPO run says: from what, on what, towards what, and how each role is loaded."""

from typing import Any

from peft import PeftModel

from ..models.base_quantization import quantization_of
from ..models.roles import POLICY, REWARD
from .card import public_name, table
from .hub import HubMixin, describe_adapter


_LOAD_POLICY = """\
from transformers import AutoTokenizer
from {package} import {loader}

repo = "{repo}"
policy = {loader}.from_pretrained(repo{options})
tokenizer = AutoTokenizer.from_pretrained(repo)
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(policy.generate(**inputs, max_new_tokens=32)[0]))"""

_LOAD_CRITIC = """\
from rlhf_ext.models.scoring import load_critic, token_scores

critic = load_critic(repo)  # the folder `critic/`
values = token_scores(critic, inputs["input_ids"], inputs["attention_mask"])  # after every token"""

_LOAD_REWARD = """\
from rlhf_ext.models.scoring import load_reward_model

reward_model = load_reward_model(repo, subfolder="reward")
score = reward_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits"""

_OBJECTIVES = {
    "clip": "PPO-Clip, min(r A, clip(r, 1 - {epsilon}, 1 + {epsilon_high}) A) per token",
    "pg": "policy gradient, A log pi per token, without a ratio",
    "penalty": "PPO-Penalty, r A - {penalty_coef} KL(old || new) per token",
}
_KL = {
    "k1": "(log pi - log ref)",
    "k2": "(log pi - log ref)^2 / 2",
    "k3": "(ref / pi - 1 + log pi - log ref)",
}
_ESTIMATORS = {
    "gae": "GAE (gamma {gamma}, lambda {gae_lambda})",
    "returns": "discounted returns (gamma {gamma}) minus the value where there is a critic",
    "leave_one_out": "summed reward minus the mean of the other completions of the prompt",
}


def _as_code(settings: dict[str, Any]) -> str:
    shown = {name: value for name, value in settings.items() if name.startswith(("load_in_", "bnb_4bit_")) and value}
    return "BitsAndBytesConfig(" + ", ".join(f"{name}={value!r}" for name, value in shown.items()) + ")"


class PPOCardMixin(HubMixin):
    """The part of [`PPOTrainer`] that fills its card.

    Attributes:
        policy_source (`str` or `None`):
            Name that the policy was loaded by, if it was.
    """

    policy_source: str | None = None

    _curves = (
        "reward",
        "rlhf_reward",
        "kl",
        "entropy",
        "value_loss",
        "value/explained_variance",
        "policy/approx_kl",
        "completions/mean_length",
    )

    def _card_facts(self, repo: str, dataset_name: str | None) -> list[tuple[str, str]]:
        base, args = public_name(self._base_name()), self.args
        intro = (
            f"A policy on `{base}`, trained by {self._name} with a per-token KL reward. Written by `rlhf_ext`, a "
            "toolkit on [TRL](https://github.com/huggingface/trl)."
        )
        rewards = zip(self.reward_func_names, args.reward_weights or [1.0] * len(self.reward_func_names), strict=True)
        scores = [f"{weight:g} x `{public_name(name)}`" for name, weight in rewards if name != "no_score"]
        target = args.adaptive_kl_target
        kl = f"{args.kl_coef}, fixed" if target is None else f"from {args.kl_coef}, led to {target} nats per sequence"
        numbers = {name: getattr(args, name) for name in ("epsilon", "epsilon_high", "gamma", "gae_lambda")}
        if numbers["epsilon_high"] is None:
            numbers["epsilon_high"] = args.epsilon
        numbers["penalty_coef"] = f"{args.penalty_coef:g}"
        if args.penalty_kl_target is not None:
            numbers["penalty_coef"] = f"(from {args.penalty_coef:g}, led to a KL of {args.penalty_kl_target:g})"
        objective = [
            ("policy_objective", f"`{args.policy_objective}`: {_OBJECTIVES[args.policy_objective].format(**numbers)}"),
            (
                "advantage_estimator",
                f"`{args.advantage_estimator}`: {_ESTIMATORS[args.advantage_estimator].format(**numbers)}"
                + (", whitened over the rollout" if args.whiten_advantages else ""),
            ),
            ("rewards", ", ".join([*scores, *(f"`{public_name(f.__name__)}` per token" for f in self.token_rewards)])),
            ("kl_coef", f"{kl}: minus kl_coef {_KL[args.kl_estimator]} on every token"),
            ("critic", f"`{self.critic}`" + (f", vf_coef {args.vf_coef}, epsilon_value {args.epsilon_value}")),
            (
                "rollout",
                f"{args.generation_batch_size} completions of at most {args.max_completion_length} tokens at "
                f"temperature {args.temperature}, {args.num_iterations} epochs",
            ),
        ]
        if self.critic == "none":
            objective = [row for row in objective if row[0] != "critic"] + [("critic", "`none`")]
        return [
            ("What it is", intro),
            ("How to load it", self._loading(repo)),
            ("Base and adapters", table(["", ""], [*self._base_rows(), *self._role_rows()])),
            ("Data", table(["", ""], self._data_rows(dataset_name))),
            ("Objective", table(["", ""], objective)),
        ]

    def _role_rows(self) -> list[tuple[str, str]]:
        model, critic = self._policy_or_classifier(), self.critic
        if not isinstance(model, PeftModel):
            rows = [("policy", "the base itself, trained in full")]
            if self.reference is not None:
                rows.append(("reference", "the base as it was"))
        else:
            continued = self.roles.reference_adapter is not None
            start = f", which went on from the adapter `{public_name(self.policy_source)}`" if continued else ", new"
            stack = "base -> `default`" + start
            rows = [("policy", f"{stack}: {describe_adapter(model, POLICY)}")]
            start = "base -> `ref`, the adapter `default` as it was at the start" if continued else "the bare base"
            rows += [("reference", start)] if self.args.kl_coef > 0 else []
        where = {
            "adapter": "base -> `critic`, an adapter that started as the reward's, with its head; folder `critic/`",
            "shared": "base -> `reward` with a head of its own; folder `critic/`",
            "model": "a model of its own; folder `critic/`",
            "none": "none",
        }
        rows.append(("critic", where[critic]))
        if isinstance(model, PeftModel) and REWARD in model.peft_config:
            rows.append(
                (
                    "reward model",
                    f"base -> `reward` with its head, frozen: {describe_adapter(model, REWARD)}; `reward/`",
                )
            )
        return rows

    def _loading(self, repo: str) -> str:
        is_peft = isinstance(self._policy_or_classifier(), PeftModel)
        loader = ("peft", "AutoPeftModelForCausalLM") if is_peft else ("transformers", "AutoModelForCausalLM")
        settings = quantization_of(self.roles.base.config) if is_peft else None
        options = f", quantization_config={_as_code(settings)}" if settings else ""
        policy = _LOAD_POLICY.format(package=loader[0], loader=loader[1], repo=repo, options=options, prompt="The")
        parts = ["from transformers import BitsAndBytesConfig\n" * bool(settings) + policy]
        if self.critic != "none":
            parts.append(_LOAD_CRITIC)
        if is_peft and REWARD in self.roles.model.peft_config:
            parts.append(_LOAD_REWARD)
        text = "\n\n".join(f"```python\n{part}\n```" for part in parts)
        if is_peft:
            flag = " --dequantize" if settings else ""
            text += f"\n\nAs one model without adapters: `rlhf-ext merge --adapter {repo} --output_dir merged{flag}`."
        return text
