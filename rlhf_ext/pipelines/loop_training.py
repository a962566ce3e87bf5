"""The fourth and fifth step of a round: a reward model on all labels so far, and PPO against it."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import TrainingArguments
from trl import get_peft_config, get_quantization_config

from ..data.functions import import_function
from ..data.jsonl import read_jsonl
from ..data.loading import holdout_by_prompt
from ..feedback.exchange import export_rows, to_dataset
from ..models.ensembles import is_reward_ensemble, load_reward_ensemble
from ..models.generation import Samples
from ..models.score_wrappers import treated_score
from ..trainers.ppo_config import PPOConfig
from ..trainers.ppo_trainer import PPOTrainer
from ..trainers.reward_config import PreferenceRewardConfig
from .finished_runs import has_checkpoint
from .loop_policies import loading
from .loop_run import ROWS_FILE, SFT, LoopRun, write_jsonl
from .reward_builder import RewardBuilder
from .reward_ensemble import train_reward_ensemble
from .reward_evaluation import score_rows
from .reward_normalization import normalize_after, normalize_before, prompt_text


def train_reward(run: LoopRun, round_: int, folder: Path) -> dict[str, Any]:
    """Train on the labels of this and all earlier rounds: one model, or an ensemble."""
    rows = _labels_so_far(run, round_, folder)
    args = reward_config(run, folder, run.seed(round_, "reward"))
    if run.args.num_members > 1:
        result = train_reward_ensemble(
            run.model_args.model_name_or_path,
            args,
            to_dataset(rows),
            run.tokenizer,
            num_members=run.args.num_members,
            peft_config=_peft_config(run, "SEQ_CLS"),
            quantization_config=get_quantization_config(run.model_args),
        )
        return {
            "rows": len(rows),
            "labels": count_labels(rows),
            "accuracy": result["accuracy_mean"],
            "members": result["members"],
        }
    found = fit_reward(run, run.model_args.model_name_or_path, args, rows, reference_samples_of(run))
    return {**found, "labels": count_labels(rows)}


def _labels_so_far(run: LoopRun, round_: int, folder: Path) -> list[dict[str, Any]]:
    """The labels of this and all earlier rounds as they are now, later ones and corrections among them; kept in
    `rows.jsonl`, so that a run that goes on reads the same."""
    state = PartialState()
    if state.is_main_process and not (folder / ROWS_FILE).exists():
        with run.open_store() as store:
            rows = []
            for number in range(1, round_ + 1):
                if store.progress(pool=run.pool(number)).comparisons:
                    rows += export_rows(store, pool=run.pool(number))
                else:  # a round that was labelled in another store
                    kept = run.rows_of(number, "labels")
                    rows += [{name: value for name, value in row.items() if name != "split"} for row in kept]
            write_jsonl(folder / ROWS_FILE, rows)
    state.wait_for_everyone()
    return read_jsonl(folder / ROWS_FILE)


def count_labels(rows: list[dict[str, Any]]) -> int:
    """Labels that rows of the store were merged of."""
    return sum(row["num_labels"] for row in rows)


def fit_reward(
    run: LoopRun,
    model: str,
    args: PreferenceRewardConfig,
    rows: list[dict[str, Any]],
    samples: Samples | None,
) -> dict[str, Any]:
    """Train one reward model from `model` into `args.output_dir`."""
    dataset, held_out = _split(run, to_dataset(rows))
    quantization = get_quantization_config(run.model_args)
    builder = RewardBuilder(model, args, run.tokenizer, _peft_config(run, "SEQ_CLS"), quantization, builds_one=True)
    folder = Path(args.output_dir)
    trainer = builder.build(folder, args.seed, dataset, held_out)
    scale = run.args.normalize_scores == "scale"
    if samples is not None:
        normalize_before(trainer, samples, scale=scale)
    result = trainer.train(resume_from_checkpoint=has_checkpoint(folder))
    trainer.save_model(str(folder))
    found: dict[str, Any] = {
        "rows": len(rows),
        "held_out_rows": 0 if held_out is None else len(held_out),
        "train_loss": result.metrics["train_loss"],
        "accuracy": None,
    }
    if held_out is not None:
        found |= score_rows(trainer, trainer.eval_dataset).summary()
    if samples is not None:
        found["gain"], found["bias"] = normalize_after(trainer, folder, samples, scale=scale)
    trainer.create_model_card(folder.name.removeprefix("_unfinished_"))
    return found


def train_policy(run: LoopRun, round_: int, folder: Path) -> dict[str, Any]:
    """PPO against the round's reward model."""
    reward = run.step(round_, "reward")
    given: dict[str, Any] = {"reward_funcs": str(reward)}
    if is_reward_ensemble(reward):
        trust = run.args.trust_remote_code
        ensemble = load_reward_ensemble(reward, policy_processing_class=run.tokenizer, trust_remote_code=trust)
        # Its mean is in the unit of the members' validation rows; so is the first member, where the critic starts.
        given = {"reward_funcs": ensemble.mean, "critic_model": str(reward / "member_0")}
        given["probe_funcs"] = [ensemble.spread]
    elif run.model_args.use_peft:
        given = {"reward_adapter": str(reward)}
    else:
        given["critic_model"] = str(reward)
    return run_ppo(run, round_, folder, **given)


def run_ppo(run: LoopRun, round_: int, folder: Path, callbacks: Any = None, **given: Any) -> dict[str, Any]:
    """
    Train and save a policy.

    Args:
        given: rewards and critic, as [`PPOTrainer`] takes them; the score is treated here as the run asks for.
    """
    for name in ("reward_funcs", "reward_adapter"):
        if given.get(name) is not None:
            given[name] = treated_score(given[name], missing_eos_penalty=run.args.missing_eos_penalty)
    probes = [*given.pop("probe_funcs", []), *(import_function(name) for name in probe_names(run))]
    start, goes_on = start_of(run, round_)
    trainer = PPOTrainer(
        model=start,
        args=ppo_config(run, folder, run.seed(round_, "policy")),
        train_dataset=run.prompt_dataset(),
        processing_class=run.tokenizer,
        quantization_config=get_quantization_config(run.model_args),
        peft_config=None if goes_on else _peft_config(run, "CAUSAL_LM"),
        callbacks=callbacks,
        probe_funcs=probes,
        **given,
    )
    trainer.train(resume_from_checkpoint=has_checkpoint(folder))
    trainer.save_model(str(folder))
    trainer.create_model_card(folder.name.removeprefix("_unfinished_"))
    history = [
        {key: value for key, value in entry.items() if isinstance(value, int | float)}
        for entry in trainer.state.log_history
        if "kl" in entry
    ]
    return {"updates": len(history), "history": history, "start": start}


def start_of(run: LoopRun, round_: int) -> tuple[str, bool]:
    """Where PPO of a round starts, and whether that is an adapter to go on with."""
    if run.args.policy_start == SFT or round_ == 1:
        return run.model_args.model_name_or_path, False
    return str(run.step(round_ - 1, "policy")), run.model_args.use_peft


def probe_names(run: LoopRun) -> list[str]:
    """Scores that are looked at and never paid."""
    return list(dict.fromkeys([*run.args.score_funcs, *([run.args.gold_func] if run.args.gold_func else [])]))


def reference_samples_of(run: LoopRun) -> Samples | None:
    """The samples of SFT that scores are put in the unit of: those of the first round; `None` for raw scores."""
    if run.args.normalize_scores == "none":
        return None
    rows = run.rows_of(1, "samples")
    texts = [row["completions"][0] for row in rows]  # the first one is always the policy's, which is SFT
    prompts = [prompt_text(row["prompt"], run.tokenizer) for row in rows]
    return Samples(
        prompts=prompts,
        texts=[text if isinstance(text, str) else text[-1]["content"] for text in texts],
        prompt_ids=[run.tokenizer(prompt)["input_ids"] for prompt in prompts],
        completion_ids=[row["completion_ids"][0] for row in rows],
        truncated=[row["truncated"][0] for row in rows],
    )


def reward_config(run: LoopRun, folder: Path, seed: int, **changes: Any) -> PreferenceRewardConfig:
    """The reward trainer's arguments.

    Raises:
        ValueError: `reward` names an argument that there is none of.
    """
    return _config(run, PreferenceRewardConfig, "reward", folder, seed, changes)


def ppo_config(run: LoopRun, folder: Path, seed: int) -> PPOConfig:
    """PPO's arguments.

    Raises:
        ValueError: `ppo` names an argument that there is none of.
    """
    return _config(run, PPOConfig, "ppo", folder, seed, {})


def free_memory() -> None:
    """Give back what a finished step held, before the next one loads its models."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _config(run: LoopRun, kind: type, name: str, folder: Path, seed: int, changes: dict[str, Any]) -> Any:
    init = {"dtype": run.model_args.dtype or "float32", "attn_implementation": run.model_args.attn_implementation}
    given = {"report_to": "none", "trust_remote_code": run.args.trust_remote_code, **getattr(run.args, name)}
    given = {**given, **changes}
    given["model_init_kwargs"] = {**init, **loading_revision(run), **(given.get("model_init_kwargs") or {})}
    known = {field for field in kind.__dataclass_fields__}
    if odd := sorted(set(given) - known):
        raise ValueError(f"`{name}` names {odd}, which {kind.__name__} does not have. Leave them out.")
    config: TrainingArguments = kind(output_dir=str(folder), seed=seed, **given)
    return config


def loading_revision(run: LoopRun) -> dict[str, str]:
    """The revision of the base, if one was asked for."""
    return {name: value for name, value in loading(run).items() if name == "revision"}


def _peft_config(run: LoopRun, task: str) -> Any:
    return get_peft_config(replace(run.model_args, lora_task_type=task))


def _split(run: LoopRun, rows: Dataset) -> tuple[Dataset, Dataset | None]:
    if run.args.reward_eval_fraction == 0.0:
        return rows, None
    try:
        # A salt of its own: by the salt of `eval_fraction`, the prompts that hash lowest were all held out before.
        kept, held_out = holdout_by_prompt(rows, run.args.reward_eval_fraction, run.seed(0, "reward"))
    except ValueError as error:  # better no accuracy than no run
        print(f"The reward model has no held-out accuracy: of `reward_eval_fraction`, {error}", flush=True)
        return rows, None
    compared = held_out.filter(lambda row: not row.get("incomparable"))
    if len(compared) == 0:
        print(
            f"The reward model has no held-out accuracy: none of the {len(held_out)} rows of `reward_eval_fraction` "
            f"{run.args.reward_eval_fraction} is compared. It trains on all rows.",
            flush=True,
        )
        return rows, None
    return kept, compared
