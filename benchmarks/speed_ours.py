"""One process of `speed.py` that trains with ours, or, for `generation`, only samples the same rollout.

python benchmarks/speed_ours.py SETTINGS.json OUTPUT.json
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from speed_meter import Meter, forget_peak, release, resident, trained_parameters
from speed_world import Run, checksum, prompts_of, random_policy, random_reward, read_run, tokenizer_of
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, GenerationConfig

from rlhf_ext import PPOConfig, PPOTrainer
from rlhf_ext.models.build import load_policy
from rlhf_ext.models.live_sampling import only_live_rows
from rlhf_ext.models.roles import base_of


def quantization_of(run: Run) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, run.dtype),
        llm_int8_skip_modules=["lm_head", "score"],
    )


def off_the_file(model: Any) -> Any:
    """Copy what is still a view of the mapped checkpoint, whose pages would count as this process's."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
    return model


def policy_of(run: Run, folder: Path) -> Any:
    if not run.nf4:
        return random_policy(run)
    source = run.model
    if source is None:
        source = str(folder / "base")
        random_policy(run).save_pretrained(source)
    quantized = load_policy(source, dtype=getattr(torch, run.dtype), quantization_config=quantization_of(run))
    policy = off_the_file(quantized)
    # Pages of the file and what is quantised from them are the same for PPO and for sampling, and more than either
    # needs afterwards.
    release()
    forget_peak()
    return policy


def save_reward_adapter(run: Run, folder: Path) -> str:
    """A reward adapter on the policy's base, on as many layers as the policy's."""
    if run.model:
        plain = AutoModelForSequenceClassification.from_pretrained(run.model, num_labels=1, dtype=torch.float32)
    else:
        plain = random_reward(run)
    get_peft_model(plain, run.lora(plain.config, "SEQ_CLS")).save_pretrained(folder)
    return str(folder)


def build(run: Run, folder: Path, tokenizer: Any, adapter: str | None) -> tuple[PPOTrainer, Meter, float]:
    policy = policy_of(run, folder)
    weights, parts = checksum(policy), run.episodes // run.micro_batch
    args = PPOConfig(
        output_dir=str(folder),
        seed=run.seed,
        per_device_train_batch_size=run.micro_batch,
        steps_per_generation=parts,
        gradient_accumulation_steps=parts,
        num_iterations=run.epochs,
        max_completion_length=run.completion[1],
        max_steps=run.epochs * (run.iterations + 1),
        logging_steps=run.epochs,
        temperature=1.0,
        kl_coef=0.05,
        learning_rate=3e-6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **run.options,
    )
    rewards = {"reward_adapter": adapter} if adapter else {"reward_funcs": random_reward(run)}
    meter = Meter(steps=run.epochs)
    trainer = PPOTrainer(
        model=policy,
        args=args,
        train_dataset=prompts_of(run, tokenizer),
        processing_class=tokenizer,
        peft_config=run.lora(policy.config, "CAUSAL_LM") if adapter else None,
        callbacks=[meter],
        **rewards,
    )
    meter.watch(run, base_of(trainer.model), trainer.model)
    rollout = trainer._generate_and_score_completions

    def counted(inputs: Any) -> dict[str, Any]:
        batch = rollout(inputs)
        meter.tokens += int(batch["completion_mask"].sum())
        return batch

    trainer._generate_and_score_completions = counted
    return trainer, meter, weights


def train(run: Run, *given: Any) -> dict[str, Any]:
    trainer, meter, weights = build(run, *given)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    found = {"checksum": weights, "trained": trained_parameters(trainer.model), "optimizer": type(optimizer).__name__}
    return {**found, **meter.result()}


@torch.no_grad()
def generate(run: Run, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """The rollout of one iteration with the base alone, sampled as the trainer samples it."""
    policy = policy_of(run, folder).eval()
    tokenizer.padding_side = "left"
    meter = Meter(steps=1)
    meter.watch(run, policy, policy)
    rows = tokenizer(list(prompts_of(run, tokenizer)["prompt"])[: run.episodes], return_tensors="pt", padding=True)
    config = GenerationConfig(max_new_tokens=run.completion[1], do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    with only_live_rows(policy):
        policy.generate(**rows, generation_config=config)
    return {"checksum": checksum(policy), "trained": 0, "optimizer": "none", **meter.result()}


def main() -> None:
    run, output = read_run()
    torch.set_num_threads(run.threads)
    with tempfile.TemporaryDirectory() as name:
        folder, tiny, adapters = Path(name), run.tiny(), [None, None]
        if run.adapted_layers:
            adapters = [save_reward_adapter(r, folder / str(r.layers) / "reward") for r in (tiny, run)]
        # Much is imported on first use, and the tokenizer of a large vocabulary takes 200 MiB: both come before.
        train(tiny, folder / "tiny", tokenizer_of(tiny), adapters[0])
        tokenizer = tokenizer_of(run)
        release()
        baseline = resident()
        forget_peak()
        if run.side == "generation":
            found = generate(run, folder / "run", tokenizer)
        else:
            found = train(run, folder / "run", tokenizer, adapters[1])
        found |= {"baseline": baseline, "peak": resident("VmHWM") - baseline}
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
