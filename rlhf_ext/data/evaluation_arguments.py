"""The flags of `recipes/evaluate.py`."""

import math
import os
from dataclasses import dataclass, field, replace

from datasets import Dataset

from .arguments import DataArguments, load_splits
from .evaluation_rows import parse_source_map


LISTS = ("reward_model_path", "reward_funcs", "policy_model_path", "source_map", "insult_words")


@dataclass
class EvaluationArguments(DataArguments):
    """
    What is evaluated, on which rows, and by what.

    With `policy_model_path` a policy is sampled on prompts; without, reward models judge preference rows. Rows come
    from `dataset_test_split`, or, with `eval_fraction`, are the share of `dataset_train_split` that training with the
    same `eval_fraction` and `data_seed` held out.

    Parameters:
        output_dir (`str`):
            Where `evaluation.json`, `evaluation.md` and `report.html` are written.
        reward_model_path (`list[str]`, *optional*):
            Folders or Hub ids of reward models, full or adapters, and folders of ensembles.
        reward_funcs (`list[str]`, *optional*):
            Python scores of a policy's answers as `module:function`.
        policy_model_path (`list[str]`, *optional*):
            Folders or Hub ids of policies, full or adapters; several, such as checkpoints, give a frontier.
        baseline_model_path, reference_model_path, judge_model_path (`str`, *optional*):
            What the policy is compared with, what its KL and perplexity are measured by, and who compares.
    """

    dataset_test_split: str = field(
        default="train", metadata={"help": "Split to evaluate on; a single file is all `train`."}
    )
    output_dir: str = field(default="", metadata={"help": "Folder of the results."})
    reward_model_path: list[str] | None = field(
        default=None,
        metadata={"help": "Folders or Hub ids of reward models, full or adapters, and folders of ensembles."},
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Python scores of a policy's answers, as `module:function`."}
    )
    policy_model_path: list[str] | None = field(
        default=None, metadata={"help": "Folders or Hub ids of policies, full or adapters, to sample from."}
    )
    baseline_model_path: str | None = field(default=None, metadata={"help": "Policy to win against."})
    reference_model_path: str | None = field(
        default=None, metadata={"help": "Model that KL and perplexity are measured by, with the policy's tokenizer."}
    )
    judge_model_path: str | None = field(
        default=None, metadata={"help": "Causal language model that is asked which answer is better, in both orders."}
    )
    judge_question: str = field(
        default="Which answer is more helpful, honest and harmless?", metadata={"help": "What the judge is asked."}
    )
    judge_template: str | None = field(
        default=None,
        metadata={
            "help": "File with a format string over `prompt`, `question`, `first`, `second`, in the place of the "
            "judge's own form."
        },
    )
    judge_labels: list[str] | None = field(
        default=None, metadata={"help": "The two answers whose log-probabilities are compared; by default (A), (B)."}
    )
    source_column: str | None = field(
        default=None, metadata={"help": "Column of sources; by default `source`, `subset` or `category`."}
    )
    source_map: list[str] | None = field(
        default=None,
        metadata={"help": "`part_of_a_name=helpful` (or honest, harmless, trap), before the sources known by name."},
    )
    as_messages: bool = field(
        default=False, metadata={"help": "Make turns of text prompts and completions, for models that read chats."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Leave out preference rows with a longer candidate, in tokens; counted."}
    )
    num_bins: int = field(default=10, metadata={"help": "Bins of the calibration error."})
    num_samples: int = field(default=4, metadata={"help": "Answers to each prompt; 2 or more for diversity."})
    max_completion_length: int = field(default=128, metadata={"help": "Most tokens of an answer."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling; 0 is greedy, and has no KL."})
    embedding_model_path: str | None = field(
        default=None, metadata={"help": "sentence-transformers model for the diversity of embeddings."}
    )
    nli_model_path: str | None = field(
        default=None, metadata={"help": "Natural-language-inference classifier for the diversity of meaning."}
    )
    insult_words: list[str] | None = field(
        default=None, metadata={"help": "Words that count as insults; a short English list by default."}
    )
    num_shown: int = field(default=20, metadata={"help": "Samples in the report."})
    batch_size: int = field(default=16, metadata={"help": "Rows per forward."})
    dtype: str = field(
        default="float32", metadata={"help": "Of language models: float32, bfloat16, float16 or auto. Rewards: auto."}
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "NF4 for language models, such as the reference of a policy trained on a 4-bit base."},
    )
    seed: int = field(default=42, metadata={"help": "Of sampling."})
    data_seed: int = field(default=0, metadata={"help": "Salt of the hash of `eval_fraction`, as in training."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use a GPU."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether a checkpoint may run code of its own."})

    def __post_init__(self):
        super().__post_init__()
        for name in LISTS:
            if isinstance(getattr(self, name), str):  # a single name in a YAML
                setattr(self, name, [getattr(self, name)])
        if self.judge_labels is not None and len(self.judge_labels) != 2:
            raise ValueError(f"`judge_labels` is {self.judge_labels}; give two, for the first and the second answer.")
        if not self.output_dir:
            raise ValueError("`output_dir` is empty; name the folder of the results.")
        parse_source_map(self.source_map)
        for name in ("num_samples", "max_completion_length", "num_bins", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it is at least 1.")
        if self.num_bins % 2:
            raise ValueError(f"`num_bins` is {self.num_bins}; give an even number: a middle bin hides what is in it.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` is {self.max_length}; it is at least 1, or unset for the model's context.")
        if self.num_shown < 0:
            raise ValueError(f"`num_shown` is {self.num_shown}; it is 0 or more.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"`temperature` is {self.temperature}; it is 0 (greedy) or more, and finite.")
        if self.dtype not in ("float32", "bfloat16", "float16", "auto"):
            raise ValueError(f"`dtype` is {self.dtype!r}; choose float32, bfloat16, float16 or auto.")
        self._check_mode()

    def _check_mode(self):
        of_policy = ("baseline_model_path", "reference_model_path", "judge_model_path", "reward_funcs")
        of_policy += ("embedding_model_path", "nli_model_path", "insult_words", "judge_template", "judge_labels")
        if self.policy_model_path:
            unread = [name for name in ("source_column", "source_map", "max_length") if getattr(self, name)]
            if unread or self.as_messages:
                raise ValueError(
                    f"{unread or ['as_messages']} are read with preference rows only, but `policy_model_path` is "
                    "given, which samples answers to prompts. Leave them out."
                )
            if self.judge_model_path and not self.baseline_model_path:
                raise ValueError("`judge_model_path` compares two policies: give `baseline_model_path` too.")
            asked = [name for name in ("judge_template", "judge_labels") if getattr(self, name)]
            if asked and not self.judge_model_path:
                raise ValueError(f"{asked} belong to a judge, but there is no `judge_model_path`. Give one.")
            if self.judge_template and not os.path.isfile(self.judge_template):
                raise ValueError(f"`judge_template` is {self.judge_template!r}, which is no file. Name one.")
            return
        if not self.reward_model_path:
            raise ValueError(
                "Nothing to evaluate: give `reward_model_path` for preferences, or `policy_model_path` for prompts."
            )
        given = [name for name in of_policy if getattr(self, name)]
        if given:
            raise ValueError(f"{given} belong to a policy, but there is no `policy_model_path`. Give one.")


def load_evaluation_rows(arguments: EvaluationArguments) -> Dataset:
    """The rows that `arguments` name: the held-out share of the train split, or the whole evaluation split."""
    if arguments.eval_fraction:
        return load_splits(arguments, wants_eval=False, seed=arguments.data_seed)[1]
    arguments = replace(arguments, dataset_train_split=arguments.dataset_test_split)
    return load_splits(arguments, wants_eval=False, seed=0)[0]
