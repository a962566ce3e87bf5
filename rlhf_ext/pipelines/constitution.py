"""Constitutional AI whole (Bai et al. 2022, https://huggingface.co/papers/2212.08073): harmlessness without labels of
people for it.

Answers, revisions, fine-tuning, AI-labelled pairs, reward model, PPO, measurement: each step has a folder, which is
whole or absent, so that a run that was killed goes on from the last finished step.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from trl import ModelConfig, get_quantization_config

from ..data.constitution_arguments import ConstitutionArguments
from ..data.loading import load_rows, require_columns
from ..feedback.constitution import DEFAULT_CONSTITUTION, load_constitution
from ..models.hub import check_model_name, find_file
from .constitution_checks import check_contexts, check_held_out
from .constitution_evaluation import NAMES, measure_policies
from .constitution_report import write_constitution_report
from .constitution_texts import ROWS, TRANSCRIPTS, Loading, as_prompt, write_labels, write_responses, write_revisions
from .constitution_toy import ToySettings, build_toy
from .constitution_training import (
    Training,
    build_configs,
    check_text,
    helpful_pairs,
    helpful_rows,
    train_policy,
    train_reward,
    train_sft,
)
from .evaluation_checks import check_policy_files
from .evaluation_policy import check_sampling
from .evaluation_scorers import function_scorer
from .finished_runs import alone_in, arguments_that_matter, digest_of, run_once
from .policy_checks import check_policy_dtype


def run_constitution(args: ConstitutionArguments, model_args: ModelConfig) -> dict[str, Any]:
    """
    Run all steps that are not finished, and write `report.html` after each of them.

    Returns:
        `dict`: what each step recorded, by its name; of the toy world `toy` too.

    Raises:
        ValueError: several processes, a wrong option, file or trainer's argument (all before the first step), or a
            finished step of other settings in `output_dir`.
    """
    state = PartialState(cpu=args.use_cpu)
    if state.num_processes > 1:
        raise ValueError(
            f"{state.num_processes} processes were started; Constitutional AI runs in one (--num_processes 1)."
        )
    with alone_in(args.output_dir):
        return _whole_run(args, model_args, state.device)


def _whole_run(args: ConstitutionArguments, model_args: ModelConfig, device: torch.device) -> dict[str, Any]:
    if args.toy == bool(model_args.model_name_or_path):
        raise ValueError(
            f"`model_name_or_path` is {model_args.model_name_or_path!r} and `toy` is {args.toy}: give the helpful "
            "policy, or let the toy world build it."
        )
    configs = build_configs(args, model_args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    toy = None
    if args.toy:
        toy = build_toy(folder / "toy", _toy_settings(args), args.seed, args.use_cpu)
        model_args.model_name_or_path = toy["model_name_or_path"]
        for name, value in toy["options"].items():
            setattr(args, name, value)
    of_toy = {} if toy is None else {"toy": toy["judge"]}
    run = _Run(args, model_args, Training(args, model_args, configs), device, of_toy)
    found = run.all_steps()
    run.report()  # once more: a run that is finished may have lost its page, or be shown with another `num_shown`
    return {**found, **of_toy}


def _toy_settings(args: ConstitutionArguments) -> ToySettings:
    if unknown := sorted(set(args.toy_settings) - set(ToySettings.__dataclass_fields__)):
        raise ValueError(f"`toy_settings` has {unknown}; choose of {sorted(ToySettings.__dataclass_fields__)}.")
    return ToySettings(**args.toy_settings)


class _Run:
    """Inputs of a run, checked, and its steps."""

    def __init__(
        self,
        args: ConstitutionArguments,
        model_args: ModelConfig,
        training: Training,
        device: torch.device,
        of_toy: dict[str, Any],
    ):
        self.args, self.model_args, self.training, self.of_toy = args, model_args, training, of_toy
        self.folder, self.helper = Path(args.output_dir), model_args.model_name_or_path
        self.revision = model_args.model_revision
        check_model_name(self.helper, "model_name_or_path", self.revision)
        if find_file(self.helper, "adapter_config.json", self.revision) is not None:
            raise ValueError(
                f"`model_name_or_path` {self.helper!r} is an adapter, on which the run would put others. Merge it "
                "into its base first (`rlhf-ext merge`)."
            )
        check_policy_dtype(model_args, args.trust_remote_code)
        context = check_policy_files(self.helper, "model_name_or_path", args.trust_remote_code, self.revision)
        contexts = {
            name: check_policy_files(getattr(args, name), name, args.trust_remote_code)
            if getattr(args, name)
            else context
            for name in ("judge_model_path", "reviser_model_path")
        }
        self.judge = args.judge_model_path or self.helper
        self.reviser = args.reviser_model_path or self.helper
        self.principles = load_constitution(args.constitution or DEFAULT_CONSTITUTION)
        for name in ("num_rounds", "principles_per_pair"):
            if getattr(args, name) > len(self.principles):
                raise ValueError(
                    f"`{name}` is {getattr(args, name)}, but the constitution has {len(self.principles)} principles, "
                    "and none is drawn twice. Lower it, or write more."
                )
        self.red_team = read_prompts(args.red_team_prompts, "red_team_prompts")
        self.test = read_prompts(args.test_prompts, "test_prompts")
        helpful = read_prompts(args.helpful_prompts, "helpful_prompts") if args.helpful_prompts else []
        self.prompts = [*self.red_team, *helpful]
        # Every policy of the run has the helpful one's tokenizer and context, so that this holds for all of them.
        tokenizer = training.tokenizer(self.helper)
        sources = {"red_team_prompts": self.red_team, "test_prompts": self.test, "helpful_prompts": helpful}
        for name, prompts in sources.items():
            rows = Dataset.from_list([{"prompt": as_prompt(prompt, args.as_messages)} for prompt in prompts])
            if prompts:
                check_sampling(tokenizer, rows, args.max_completion_length, context, f"helpful, `{name}`")
        ppo = training.configs["ppo"]
        rollout = ppo.generation_batch_size // ppo.num_generations
        if len(self.prompts) < rollout:
            raise ValueError(
                f"`red_team_prompts` and `helpful_prompts` have {len(self.prompts)} prompts, a rollout of PPO takes "
                f"{rollout}: it would train on nothing. Give more prompts, or lower the batch in `ppo`."
            )
        read_by_judge = training.tokenizer(self.judge), contexts["judge_model_path"]
        read_by_reviser = training.tokenizer(self.reviser), contexts["reviser_model_path"]
        check_contexts(args, self.principles, self.red_team, read_by_judge, read_by_reviser)
        # Read to be checked now, and to know what a finished step was made of.
        self.rows, self.pairs = digest_of(helpful_rows(args)), digest_of(helpful_pairs(args))
        for name in args.reward_funcs or []:
            function_scorer(name, [])
        self.loading = Loading(
            device,
            dtype=model_args.dtype or "float32",
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
            quantization=get_quantization_config(model_args),
        )
        self.found: dict[str, Any] = {}
        check_held_out(args, self.red_team, helpful, self.test)

    def all_steps(self) -> dict[str, Any]:
        args, loading, at = self.args, self.loading, self.folder
        red_team, sft, reward = self.red_team, str(at / "sft"), str(at / "reward")
        # A step starts from a model, which may be the helpful one, so at a revision of its own.
        of_judge, of_reviser = (self.revision if path == self.helper else None for path in (self.judge, self.reviser))
        sampling = self._settings("max_completion_length", "temperature", "as_messages")
        peft = {name: value for name, value in vars(self.model_args).items() if name.startswith(("lora", "use_"))}
        models = {"dtype": loading.dtype, "quantization": str(loading.quantization), **peft}
        helper = {"model": self.helper, "revision": self.revision, **models}

        self._step(
            "responses",
            {**helper, **sampling, "prompts": digest_of(red_team)},
            lambda aside: write_responses(aside, args, loading, self.helper, red_team, self.revision),
        )
        principles = [vars(principle) for principle in self.principles]
        self._step(
            "revisions",
            {"reviser": self.reviser, **sampling, **self._settings("num_rounds"), "principles": digest_of(principles)},
            lambda aside: write_revisions(
                aside, args, loading, self.reviser, self.principles, at / "responses" / ROWS, of_reviser
            ),
        )
        self._step(
            "sft",
            {**helper, "arguments": arguments_that_matter(self.training.configs["sft"]), "helpful": self.rows},
            lambda aside: train_sft(aside, self.training, self.helper, at / "revisions" / TRANSCRIPTS),
        )
        asked = self._settings("principles_per_pair", "chain_of_thought", "max_thought_tokens")
        self._step(
            "labels",
            {"judge": self.judge, **sampling, **asked, "principles": digest_of(principles)},
            lambda aside: write_labels(aside, args, loading, sft, self.judge, self.principles, red_team, of_judge),
        )
        # With adapters the base stays, and every role is an adapter on it.
        start = self.helper if self.model_args.use_peft else sft
        self._step(
            "reward",
            {**models, "arguments": arguments_that_matter(self.training.configs["reward"]), "helpful": self.pairs},
            lambda aside: train_reward(aside, self.training, start, at / "labels" / ROWS),
        )
        self._step(
            "policy",
            {
                "arguments": arguments_that_matter(self.training.configs["ppo"]),
                "prompts": digest_of(self.prompts),
                **self._settings("missing_eos_penalty"),
            },
            lambda aside: train_policy(aside, self.training, sft, reward, self.prompts),
        )
        paths = dict(zip(NAMES, (self.helper, sft, str(at / "policy")), strict=True))
        self._step(
            "evaluation",
            {**sampling, **self._settings("num_samples", "reward_funcs"), "prompts": digest_of(self.test)},
            lambda aside: measure_policies(aside, args, loading, paths, reward, self.test, self.revision),
        )
        return self.found

    def _settings(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self.args, name) for name in names}

    def _step(self, name: str, settings: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> None:
        """A step that is done once, from what the steps before it recorded."""
        print(f"{len(self.found) + 1}/7 {name}", flush=True)
        settings = {**settings, "seed": self.args.seed, "before": digest_of([self.found])}
        is_finished = (self.folder / name).exists()
        self.found[name] = run_once(self.folder / name, settings, work)
        if not is_finished:
            self.report()

    def report(self) -> None:
        """The page of what is finished, so that a run that was killed has one."""
        write_constitution_report(self.folder, {**self.found, **self.of_toy}, self.args.num_shown, NAMES)


def read_prompts(source: str, name: str) -> list[str]:
    """
    The prompts of a data set.

    Raises:
        ValueError: no column `prompt`, no row, or a prompt that is no text.
    """
    rows = load_rows(source)
    require_columns(rows, ["prompt"], what=f"`{name}`")
    if not len(rows):
        raise ValueError(f"`{name}` {source!r} has no rows.")
    prompts = rows["prompt"][:]
    for place, prompt in enumerate(prompts):
        check_text(prompt, name, place)
    return list(dict.fromkeys(prompts))
