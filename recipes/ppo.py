# /// script
# dependencies = ["rlhf-ext"]
# ///

"""
PPO against a reward model, a reward adapter on the policy's own base, Python functions, or several of these.

Rows need a `prompt`; every further column reaches the reward functions. On a CPU, with tiny models of your own:

```bash
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/ppo.py --config recipes/ppo_tiny.yaml \
    --model_name_or_path POLICY --reward_model_path REWARD_MODEL --dataset_name PROMPTS.jsonl --output_dir runs/ppo
```

With LoRA (`--use_peft true`) and a reward adapter of the same base, `--reward_adapter_path FOLDER` keeps policy,
reference, reward and critic on one base. A Python reward has TRL's signature and is named by where it stands, as in
`--reward_funcs my_rewards:brevity`. `--cut_at`, `--clip_scores` and `--missing_eos_penalty` treat the reward model's
score; `--probe_funcs` are logged and never paid. `--reward_model_path` may be a reward ensemble: the mean of its
members is paid, their spread is a probe, and the critic starts from `--critic_model_path`, such as a member. Any flag
of `PPOConfig` and `trl.ModelConfig` goes on the line or into the YAML.
"""

import functools
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from rlhf_ext import PPOConfig, PPOTrainer
from rlhf_ext.data.arguments import PromptArguments as ScriptArguments
from rlhf_ext.data.arguments import load_splits
from rlhf_ext.data.functions import import_function
from rlhf_ext.data.loading import require_columns
from rlhf_ext.data.prompts import check_tokenizer
from rlhf_ext.data.strict_parser import StrictParser
from rlhf_ext.data.summary import drop_long_prompts, report_summaries, summarize_prompts
from rlhf_ext.models.ensembles import is_reward_ensemble, load_reward_ensemble
from rlhf_ext.models.hub import check_model_name
from rlhf_ext.models.scoring import treated_score
from rlhf_ext.pipelines.environment import plan_or_none
from rlhf_ext.trainers.memory_callback import MemoryCallback


def reward_of(name: str) -> Callable | str:
    """A Python function for `module:function`, else the name of a reward model."""
    return import_function(name) if ":" in name else name


def main(script_args: ScriptArguments, training_args: PPOConfig, model_args: ModelConfig) -> None:
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    check_model_name(model_args.model_name_or_path, "model_name_or_path", model_args.model_revision)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **source)
    check_tokenizer(tokenizer)

    # Data: load, validate, summarise
    with training_args.main_process_first(desc="loading the data"):
        train_dataset, eval_dataset = load_splits(
            script_args, wants_eval=training_args.eval_strategy != "no", seed=training_args.data_seed or 0
        )
    splits = {"train": train_dataset} if eval_dataset is None else {"train": train_dataset, "eval": eval_dataset}
    for name, rows in splits.items():
        require_columns(rows, ["prompt"], what=f"the {name} rows")
        splits[name], dropped = drop_long_prompts(rows, tokenizer, script_args.max_prompt_length)
        if dropped and training_args.should_log:
            print(f"{name}: dropped {dropped} prompts of more than {script_args.max_prompt_length} tokens", flush=True)
    train_dataset, eval_dataset = splits["train"], splits.get("eval")
    summaries = {"train": summarize_prompts(train_dataset, tokenizer, other=eval_dataset)}
    if eval_dataset is not None:
        summaries["eval"] = summarize_prompts(eval_dataset, tokenizer, other=train_dataset)
    if training_args.should_save:
        report_summaries(training_args.output_dir, **summaries)

    # Build and train
    treat = functools.partial(
        treated_score,
        normalize=script_args.normalize_scores,
        cut_at=script_args.cut_at,
        cut_min_index=script_args.cut_min_index,
        cut_missing_score=script_args.cut_missing_score,
        clip=script_args.clip_scores,
        missing_eos_penalty=script_args.missing_eos_penalty,
    )
    adapter = script_args.reward_adapter_path
    reward, doubt = script_args.reward_model_path, []
    if is_reward_ensemble(reward):
        trust = training_args.trust_remote_code
        ensemble = load_reward_ensemble(reward, policy_processing_class=tokenizer, trust_remote_code=trust)
        reward, doubt = ensemble.mean, [ensemble.spread]
    rewards = [treat(reward)] if reward else []
    rewards += [import_function(name) for name in script_args.reward_funcs or []]
    longest = max(summary.prompt_tokens["max"] for summary in summaries.values())
    plan = plan_or_none(script_args, training_args, model_args, longest)
    memory = MemoryCallback(training_args.device, plan)  # before the models, which it measures
    trainer = PPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=[memory],
        critic_model=script_args.critic_model_path,
        reward_adapter=treat(adapter) if adapter else None,
        token_reward_funcs=[reward_of(name) for name in script_args.token_reward_funcs or []],
        probe_funcs=[*doubt, *(reward_of(name) for name in script_args.probe_funcs or [])],
    )
    memory.watch(trainer)
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)

    # Save, evaluate, card
    trainer.save_model(training_args.output_dir)
    if eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card(Path(training_args.output_dir).name, dataset_name=script_args.dataset_name)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main(*StrictParser((ScriptArguments, PPOConfig, ModelConfig)).parse_args_and_config())
