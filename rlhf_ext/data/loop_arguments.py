"""The flags of the loop: prompts, samples, labels, reward model, policy, again."""

import json
from dataclasses import dataclass, field, fields
from typing import Any

from .arguments import DataArguments


SOURCES = ("policy", "previous", "sft", "references")
LABELLERS = ("people", "simulated", "judge")


def _field(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class LoopArguments(DataArguments):
    """
    What the loop does in each round; `dataset_name` are the prompts (a column `completion` is a reference answer).

    Every field is explained by its help. `reward` and `ppo` are arguments of [`PreferenceRewardConfig`] and
    [`PPOConfig`], as a mapping in the YAML.
    """

    output_dir: str = _field("", "Folder of the run: one folder per round, one per step, manifest.json.")
    seed: int = _field(42, "Seed of every draw; each step has its own, made of this, the round and its name.")
    toy: bool = _field(False, "The toy world: trains its SFT model and writes its prompts; labels come from gold.")
    eval_dataset_name: str | None = _field(
        None, "Held-out prompts of their own, in the place of `eval_fraction` and the test split."
    )
    eval_fraction: float = _field(
        0.05, "Share of the prompts that is held out, by a hash; 0 takes the split `dataset_test_split`."
    )
    max_eval_prompts: int = _field(256, "At most this many held-out prompts are answered in each round.")

    num_rounds: int = _field(4, "Rounds of the loop; may be raised later, the finished rounds stay.")
    labels_per_round: int = _field(256, "Comparisons that are labelled in each round.")
    num_candidates: int = _field(2, "Completions in a comparison.")
    sources: list[str] = _field(
        ["policy", "previous", "sft"],
        "Who writes them: `policy` (the last round's, always among them), `previous` (those before), `sft`, "
        "`references` (column `completion` of the prompts).",
    )
    selection: str = _field("random", "`random`, or `disagreement`: where the last round's ensemble disagrees most.")
    pool_factor: int = _field(2, "Comparisons that are sampled for each one that is selected.")

    labels: str | None = _field(
        None, "`people` (the labelling page), `simulated` (`gold_func`) or `judge`; unset: people, `toy`: simulated."
    )
    store: str | None = _field(None, "Label store, a file or a PostgreSQL URL; `labels.db` of the run if not given.")
    overlap: int = _field(1, "Labels that each comparison wants, from different annotators.")
    label_share: float = _field(1.0, "Share of a round's comparisons that must be labelled before training goes on.")
    wait_for_labels: bool = _field(True, "Wait for people's labels; else stop, and go on when called again.")
    gold_func: str | None = _field(None, "`module:function`: the score that simulated labels follow.")
    label_error_rate: float = _field(0.0, "Share of simulated labels that are drawn at random.")
    label_temperature: float | None = _field(None, "Boltzmann temperature of simulated labels; unset: no noise.")
    label_tie_band: float = _field(0.0, "Gold scores this near count as equal for a simulated labeller.")
    incomparable_rate: float = _field(0.0, "Share of comparisons that a simulated labeller cannot compare.")
    judge_model_path: str | None = _field(None, "The judge: folder or Hub id of a causal language model.")
    constitution: str | None = _field(None, "YAML of the judge's principles; the package's own if not given.")
    principles_per_pair: int = _field(1, "Principles that a pair is judged by; their labels are averaged.")
    chain_of_thought: bool = _field(False, "Let the judge write before it chooses; labels are clamped to 0.4 to 0.6.")

    num_members: int = _field(1, "Reward models of the ensemble, each on its own bootstrap; 1: a single one.")
    reward_eval_fraction: float = _field(0.05, "Share of labelled prompts held out of a single reward model.")
    normalize_scores: str = _field(
        "none", "Unit of the scores: `none`, `shift` (mean 0 over samples of SFT) or `scale` (deviation 1 too)."
    )
    policy_start: str = _field("sft", "PPO of each round starts from `sft` or from the `last` policy, its reference.")
    missing_eos_penalty: float | None = _field(None, "Taken off the score where a completion was cut by length.")
    reward: dict[str, Any] | str | None = _field(None, "Arguments of the reward trainer.")
    ppo: dict[str, Any] | str | None = _field(None, "Arguments of PPO.")

    score_funcs: list[str] = _field([], "`module:function`: scores that are measured and never paid.")
    eval_samples: int = _field(1, "Answers to each held-out prompt.")
    eval_batch_size: int = _field(64, "Rows per forward when sampling and scoring.")

    asynchronous: bool = _field(
        False, "Policy, elicitation and reward fitting as three processes, after the first reward model."
    )
    initial_label_share: float = _field(0.25, "Asynchronous: share of the labels given before the policy starts.")
    refit_labels: int = _field(64, "Asynchronous: new labels after which the reward model is fitted again.")
    refit_steps: int | None = _field(None, "Asynchronous: optimizer steps of a refit; those of `reward` if not given.")

    trust_remote_code: bool = _field(False, "Whether checkpoints may run code of their own.")
    launch_config: str | None = _field(
        None, "accelerate YAML: training steps are launched under it, on several GPUs. Unset: in this process."
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("reward", "ppo"):
            value = getattr(self, name)
            setattr(self, name, json.loads(value) if isinstance(value, str) else dict(value or {}))
        for name in ("sources", "score_funcs"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if not self.output_dir:
            raise ValueError("`output_dir` is empty. Name the folder of the run.")
        self._check_choices()
        for name in (
            *("num_rounds", "labels_per_round", "pool_factor", "overlap", "num_members", "principles_per_pair"),
            *("max_eval_prompts", "eval_samples", "eval_batch_size", "refit_labels"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give 1 or more.")
        if self.num_candidates < 2:
            raise ValueError(f"`num_candidates` is {self.num_candidates}; a comparison needs 2 or more.")
        for name in ("label_share", "initial_label_share"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give a share above 0 and at most 1.")
        self._check_labels()
        self._check_training()

    def _check_choices(self) -> None:
        if self.labels is None:
            self.labels = "simulated" if self.toy else "people"
        for name, known in (
            ("labels", LABELLERS),
            ("selection", ("random", "disagreement")),
            ("policy_start", ("sft", "last")),
            ("normalize_scores", ("none", "shift", "scale")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; choose one of {known}.")
        if odd := [name for name in self.sources if name not in SOURCES]:
            raise ValueError(f"`sources` names {odd}; choose from {SOURCES}.")

    def _check_labels(self) -> None:
        if self.toy:
            if self.labels == "judge":
                raise ValueError("`labels` is 'judge', but `toy` labels by gold. Leave one of them out.")
            self.gold_func = self.gold_func or "rlhf_ext.toyworld.gold:gold_reward"
        if self.labels == "simulated" and not self.gold_func:
            raise ValueError("`labels` is 'simulated', but `gold_func` is empty. Name the score, `module:function`.")
        if self.labels == "judge" and not self.judge_model_path:
            raise ValueError("`labels` is 'judge', but `judge_model_path` is empty. Name the judge.")
        if self.labels == "judge" and self.num_candidates != 2:
            raise ValueError(f"`num_candidates` is {self.num_candidates}, but a judge compares two. Set it to 2.")
        if self.labels == "judge" and self.overlap != 1:
            raise ValueError(f"`overlap` is {self.overlap}, but a judge answers once. Set it to 1.")
        self._refuse_idle(
            self.labels != "simulated",
            "`labels` is not 'simulated'",
            *("label_error_rate", "label_temperature", "label_tie_band", "incomparable_rate"),
        )
        self._refuse_idle(
            self.labels != "judge",
            "`labels` is not 'judge'",
            *("judge_model_path", "constitution", "principles_per_pair", "chain_of_thought"),
        )

    def _check_training(self) -> None:
        self._check_asynchronous()
        if self.selection == "disagreement" and self.num_members < 2:
            raise ValueError(
                f"`selection` is 'disagreement', but `num_members` is {self.num_members}: one model cannot disagree. "
                "Train 2 members or more."
            )
        if self.normalize_scores != "none" and self.num_members > 1:
            raise ValueError(
                f"`normalize_scores` is {self.normalize_scores!r}, but the members of an ensemble are put in the unit "
                "of their own validation rows. Leave it out."
            )
        self._refuse_idle(
            not self.asynchronous, "`asynchronous` is off", "initial_label_share", "refit_labels", "refit_steps"
        )
        # Without a reserve, the labels of a tiny first round may leave nothing to train on.
        if not 0.0 <= self.reward_eval_fraction < 1.0:
            raise ValueError(f"`reward_eval_fraction` is {self.reward_eval_fraction}; give a share in [0, 1).")
        for name, ours in (
            ("reward", ("output_dir", "seed", "push_to_hub", "resume_from_checkpoint")),
            ("ppo", ("output_dir", "seed", "push_to_hub", "resume_from_checkpoint")),
        ):
            if taken := sorted(set(getattr(self, name)) & set(ours)):
                raise ValueError(f"`{name}` sets {taken}, which the loop sets itself. Leave them out.")

    def _check_asynchronous(self) -> None:
        if not self.asynchronous:
            return
        for name, only, why in (
            ("num_rounds", 1, "has one round that never stops labelling"),
            ("launch_config", None, "starts processes of its own"),
            ("selection", "random", "asks about rollouts as they come"),
            ("num_members", 1, "has one reward model that is fitted again and again"),
            ("policy_start", "sft", "has no policy before its only one, which starts from the SFT model"),
        ):
            if getattr(self, name) != only:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but the asynchronous mode {why}. Set it to {only!r}."
                )
        if int(self.ppo.get("num_generations", 1)) != self.num_candidates:
            raise ValueError(
                f"`ppo` has `num_generations` {self.ppo.get('num_generations', 1)}, but asynchronous comparisons are "
                f"made of one prompt's completions in a rollout. Set it to `num_candidates`, {self.num_candidates}."
            )

    def _refuse_idle(self, idle: bool, why: str, *names: str) -> None:
        defaults = {f.name: f.default for f in fields(self)}
        for name in names:
            if idle and getattr(self, name) != defaults[name]:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but {why}, so nothing reads it. Leave it out.")
