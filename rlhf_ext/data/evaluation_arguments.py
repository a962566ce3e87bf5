"""The flags of the evaluation recipe."""

from dataclasses import dataclass, field

from .arguments import DataArguments


@dataclass
class EvaluationArguments(DataArguments):
    """
    What is evaluated: a reward model on preferences, or a policy on prompts.

    Parameters:
        output_dir (`str`):
            Where `evaluation.json`, `evaluation.md` and `report.html` go.
        reward_model_path (`list[str]`, *optional*):
            Reward models, adapters or ensembles. Alone, the first is evaluated on preferences; with
            `policy_model_path` each scores the samples.
        policy_model_path (`str`, *optional*):
            The policy, a full model or an adapter.
        baseline_model_path (`str`, *optional*):
            Policy to compare with on the same prompts.
        reference_model_path (`str`, *optional*):
            Reference of KL and perplexity.
        reward_funcs (`list[str]`, *optional*):
            Python rewards as `module:function`.
        judge_model_path (`str`, *optional*), constitution (`str`, *optional*):
            Causal language model that is asked which answer is better, in both orders, and the YAML of the principles
            it is asked under.
        source_column (`str`, *optional*):
            Column that names where a row comes from; by default the first there is of `source`, `subset`, `category`.
        three_h (`list[str]`, *optional*):
            `name=part`: rows whose source contains `part` count for `helpful`, `honest`, `harmless` or `traps`,
            besides those known (see docs/measures.md).
        num_samples (`int`, *optional*, defaults to 4), max_new_tokens (`int`, *optional*, defaults to 64), temperature
            (`float`, *optional*, defaults to 1.0):
            Samples per prompt, and how they are drawn.
        encoder (`str`, *optional*):
            Folder or name of a sentence-transformers model for the diversity of meaning.
        insult_words (`list[str]`, *optional*):
            Words that count as insults; a short English list by default.
        batch_size (`int`, *optional*, defaults to 16), seed (`int`, *optional*, defaults to 0), dtype (`str`,
            *optional*, defaults to `"float32"`), trust_remote_code (`bool`, *optional*, defaults to `False`).
    """

    output_dir: str = field(default="", metadata={"help": "Folder of evaluation.json, evaluation.md, report.html."})
    reward_model_path: list[str] | None = field(
        default=None, metadata={"help": "Reward models, adapters or ensembles: evaluated, or scoring the policy."}
    )
    policy_model_path: str | None = field(default=None, metadata={"help": "Policy, a full model or an adapter."})
    baseline_model_path: str | None = field(
        default=None, metadata={"help": "Policy to compare with on the same prompts."}
    )
    reference_model_path: str | None = field(default=None, metadata={"help": "Reference of KL and perplexity."})
    reward_funcs: list[str] | None = field(default=None, metadata={"help": "Python rewards as `module:function`."})
    judge_model_path: str | None = field(
        default=None, metadata={"help": "Causal language model asked which answer is better, in both orders."}
    )
    constitution: str | None = field(default=None, metadata={"help": "YAML of the principles the judge asks under."})
    source_column: str | None = field(
        default=None, metadata={"help": "Column of a row's source; else `source`, `subset` or `category`."}
    )
    three_h: list[str] | None = field(
        default=None, metadata={"help": "`name=part`: sources with `part` count for helpful, honest, harmless, traps."}
    )
    num_samples: int = field(default=4, metadata={"help": "Samples per prompt."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest sample, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples; 0 is greedy."})
    encoder: str | None = field(
        default=None, metadata={"help": "sentence-transformers model for the diversity of meaning."}
    )
    insult_words: list[str] | None = field(default=None, metadata={"help": "Words that count as insults."})
    batch_size: int = field(default=16, metadata={"help": "Rows per forward."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples and of the judge's principles."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of policies, reference and judge."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether checkpoints may run their own code."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("reward_model_path", "reward_funcs", "three_h", "insult_words"):
            if isinstance(getattr(self, name), str):  # a single name in a YAML
                setattr(self, name, [getattr(self, name)])
        if not self.output_dir:
            raise ValueError("`output_dir` is empty; give the folder of the report.")
        for name in ("num_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give 1 or more.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` is {self.temperature}; give 0 (greedy) or more.")
        if self.policy_model_path is None:
            if not self.reward_model_path:
                raise ValueError("Nothing to evaluate: give `reward_model_path`, or `policy_model_path`.")
            if len(self.reward_model_path) > 1:
                raise ValueError(f"`reward_model_path` is {self.reward_model_path}; on preferences give one.")
            idle = ("baseline_model_path", "reference_model_path", "reward_funcs", "judge_model_path", "encoder")
            given = [name for name in idle if getattr(self, name)]
            if given:
                raise ValueError(f"{given} read a policy's samples, but `policy_model_path` is empty. Leave them out.")
        else:
            if self.judge_model_path and not self.baseline_model_path:
                raise ValueError("`judge_model_path` compares two policies; give `baseline_model_path` too.")
            if self.three_h or self.source_column:
                raise ValueError("`three_h` and `source_column` belong to preferences. Leave them out for a policy.")
        if self.constitution and not self.judge_model_path:
            raise ValueError("`constitution` is read by a judge, but `judge_model_path` is empty.")
