"""What the card of a reward model says: from what, on which labels, with which loss, and how it is loaded."""

from peft import PeftModel

from ..models.lm_head import LM_FOLDER
from .card import public_name, table
from .hub import HubMixin, describe_adapter


_LOAD = """\
from transformers import AutoTokenizer
from rlhf_ext.models.scoring import load_reward_model

repo = "{repo}"
reward_model = load_reward_model(repo)
tokenizer = AutoTokenizer.from_pretrained(repo)
inputs = tokenizer("The" + tokenizer.eos_token, return_tensors="pt")
score = reward_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits"""


class RewardCardMixin(HubMixin):
    """The part of [`PreferenceRewardTrainer`] that fills its card."""

    _curves = (
        "loss",
        "accuracy",
        "margin",
        "mean_reward",
        "eval_loss",
        "eval_accuracy",
        "eval_margin",
        "nll",
        "eval_nll",
        "learning_rate",
    )

    def _card_facts(self, repo: str, dataset_name: str | None) -> list[tuple[str, str]]:
        model, args = self._policy_or_classifier(), self.args
        base = public_name(self._base_name())
        intro = (
            f"A reward model on `{base}`: one score per text, trained on preferences. Written by `rlhf_ext`, a "
            "toolkit on [TRL](https://github.com/huggingface/trl)."
        )
        stack = [("reward model", "the base itself with a head, trained in full")]
        if isinstance(model, PeftModel):
            stack = [("reward model", f"base -> `default` and a head in fp32: {describe_adapter(model, 'default')}")]
        objective = [
            ("loss", f"{args.preference_coef:g} x cross-entropy of the labels, Bradley-Terry over the candidates"),
            ("reward_aggregation", f"`{args.reward_aggregation}`: how token scores become one score"),
            ("prediction_noise", args.prediction_noise),
        ]
        if args.lm_coef:
            term = f"{args.lm_coef:g} x negative log-likelihood of preferred completions"
            objective.insert(1, ("language-modelling term", f"{term}, {args.lm_reduction} over tokens"))
        reports = [(f"rows of {name!r}", str(report)) for name, report in self.preference_reports.items()]
        loading = f"```python\n{_LOAD.format(repo=repo)}\n```"
        if isinstance(model, PeftModel):
            loading += (
                "\n\nAs `reward_adapter` of `PPOTrainer` it gives reward and critic on the policy's base; as "
                "`reward_funcs` it stands alone."
            )
        if args.lm_coef:
            where = f'AutoPeftModelForCausalLM.from_pretrained(rlhf_ext.models.hub.local_folder(repo, "{LM_FOLDER}"))'
            where = where if isinstance(model, PeftModel) else "AutoModelForCausalLM.from_pretrained(repo)"
            loading += f"\n\nIts language-model half: `{where}`."
        return [
            ("What it is", intro),
            ("How to load it", loading),
            ("Base and adapters", table(["", ""], [*self._base_rows(), *stack])),
            ("Data", table(["", ""], [*self._data_rows(dataset_name), *reports])),
            ("Objective", table(["", ""], objective)),
        ]
