# /// script
# dependencies = ["rlhf-ext"]
# ///

"""
A reward model from preferences: pairs, ties, soft labels, best of K, rankings.

Rows are TRL's `prompt`, `chosen`, `rejected`, or `prompt`, `completions` and one of `target`, `best`, `ranking`. On a
CPU, with a tiny model of your own:

```bash
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/reward.py --config recipes/reward_tiny.yaml \
    --model_name_or_path MODEL --dataset_name ROWS.jsonl --output_dir runs/reward
```

With LoRA (`--use_peft true --lora_task_type SEQ_CLS`) the output is an adapter with its head, which `recipes/ppo.py`
takes as `--reward_adapter_path`. `--lm_coef 0.1 --lm_reduction mean` adds the language-modelling term (Askell et al.
2021). `--num_members 3` trains an ensemble, `--num_seeds 3` keeps the best of three seeds, and `--normalize_prompts
PROMPTS.jsonl --reference_model_path SFT` puts scores in the unit of the reference. Any flag of
`PreferenceRewardConfig` and `trl.ModelConfig` goes on the line or into the YAML.
"""

import json
from pathlib import Path

from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from rlhf_ext import PreferenceRewardConfig, PreferenceRewardTrainer
from rlhf_ext.data.arguments import load_splits
from rlhf_ext.data.prompts import set_up_tokenizer
from rlhf_ext.data.reward_arguments import RewardArguments
from rlhf_ext.data.strict_parser import StrictParser
from rlhf_ext.data.summary import report_summaries, summarize_preferences
from rlhf_ext.models.hub import check_model_name
from rlhf_ext.pipelines.best_of_seeds import train_best_of_seeds
from rlhf_ext.pipelines.reward_ensemble import train_reward_ensemble
from rlhf_ext.pipelines.reward_normalization import load_samples, normalize_after, normalize_before


def main(script_args: RewardArguments, training_args: PreferenceRewardConfig, model_args: ModelConfig) -> None:
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    check_model_name(model_args.model_name_or_path, "model_name_or_path", model_args.model_revision)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **source)
    set_up_tokenizer(tokenizer, training_args.eos_token, training_args.chat_template_path)

    # Data: load and summarise; the trainer validates every row before its first step
    with training_args.main_process_first(desc="loading the data"):
        train_dataset, eval_dataset = load_splits(
            script_args, wants_eval=training_args.eval_strategy != "no", seed=training_args.data_seed or 0
        )
    limit = training_args.max_length
    summaries = {"train": summarize_preferences(train_dataset, tokenizer, other=eval_dataset, max_length=limit)}
    if eval_dataset is not None:
        summaries["eval"] = summarize_preferences(eval_dataset, tokenizer, other=train_dataset, max_length=limit)
    if training_args.should_save:
        report_summaries(training_args.output_dir, **summaries)

    samples = load_samples(
        script_args.normalize_prompts,
        script_args.reference_model_path,
        tokenizer,
        max_new_tokens=script_args.normalize_max_length,
        temperature=script_args.normalize_temperature,
        seed=training_args.seed,
        device=training_args.device,
        dtype=model_args.dtype or "float32",
        trust_remote_code=training_args.trust_remote_code,
    )
    scale = not script_args.normalize_shift_only
    build = {
        "model": model_args.model_name_or_path,
        "args": training_args,
        "train_dataset": train_dataset,
        "processing_class": tokenizer,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }

    # Several models: an ensemble, or the best of several seeds
    loop = {"samples": samples, "scale": scale}
    if script_args.num_members > 1:
        report = train_reward_ensemble(**build, **loop, num_members=script_args.num_members)
    elif script_args.num_seeds > 1:
        seeds = {"num_seeds": script_args.num_seeds, "keep_seeds": script_args.keep_seeds}
        report = train_best_of_seeds(**build, **loop, **seeds, eval_dataset=eval_dataset)
    if max(script_args.num_members, script_args.num_seeds) > 1:
        if training_args.should_log:
            print(json.dumps(report, indent=1), flush=True)
        return

    # One model: build and train
    trainer = PreferenceRewardTrainer(**build, eval_dataset=eval_dataset)
    if samples is not None:
        normalize_before(trainer, samples, scale=scale)
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)

    # Save, evaluate, card
    trainer.save_model(training_args.output_dir)
    if eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if samples is not None:  # last, because the loss is that of the unit it was trained in
        normalize_after(trainer, training_args.output_dir, samples, scale=scale)
    trainer.create_model_card(Path(training_args.output_dir).name, dataset_name=script_args.dataset_name)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main(*StrictParser((RewardArguments, PreferenceRewardConfig, ModelConfig)).parse_args_and_config())
