# /// script
# dependencies = ["rlhf-ext"]
# ///

"""
Supervised fine-tuning: the policy, and the reference, that PPO starts from.

Rows are `prompt` and `completion`, `messages`, or `text`. On a CPU, with a tiny model of your own:

```bash
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft.py --config recipes/sft_tiny.yaml \
    --model_name_or_path MODEL --dataset_name ROWS.jsonl --output_dir runs/sft
```

Any flag of `trl.SFTConfig` and `trl.ModelConfig` goes on the line or into the YAML; the line wins.
"""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from rlhf_ext.data.arguments import DataArguments, load_splits
from rlhf_ext.data.loading import require_columns
from rlhf_ext.data.prompts import set_up_tokenizer
from rlhf_ext.data.strict_parser import StrictParser
from rlhf_ext.data.summary import check_context, report_summaries, summarize_sft
from rlhf_ext.models.hub import check_model_name
from rlhf_ext.trainers.sft_trainer import CompleteSFTTrainer


COLUMNS = (["prompt", "completion"], ["messages"])


def main(script_args: DataArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
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

    # Data: load, validate, summarise
    with training_args.main_process_first(desc="loading the data"):
        train_dataset, eval_dataset = load_splits(
            script_args,
            wants_eval=training_args.eval_strategy != "no",
            seed=training_args.data_seed or 0,
            text_field=training_args.dataset_text_field,
        )
    if "text" in train_dataset.column_names:
        training_args.dataset_text_field = "text"
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **source).get_text_config()
    summaries = {}
    for name, rows, other in (("train", train_dataset, eval_dataset), ("eval", eval_dataset, train_dataset)):
        if rows is None:
            continue
        shapes = [columns for columns in COLUMNS if set(columns) <= set(rows.column_names)]
        require_columns(rows, shapes[0] if shapes else [training_args.dataset_text_field], what=f"the {name} rows")
        if training_args.max_length is None:
            check_context(rows, tokenizer, getattr(config, "max_position_embeddings", None))
        summaries[name] = summarize_sft(rows, tokenizer, other=other, max_length=training_args.max_length)
    if training_args.should_save:
        report_summaries(training_args.output_dir, **summaries)

    # Build and train
    trainer = CompleteSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
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
    main(*StrictParser((DataArguments, SFTConfig, ModelConfig)).parse_args_and_config())
