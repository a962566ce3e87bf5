"""One process of `speed.py` that trains with TRL 1.12's PPO; runs in an environment of its own.

    python benchmarks/speed_trl112.py SETTINGS.json OUTPUT.json

LoRA goes on the policy alone, by the trainer's own `peft_config`; the reference is then the policy without it. Critic
and reward model are whole models, and the whole critic is trained; with `critic_lora` it is passed with adapters.
"""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from speed_meter import Meter, forget_peak, release, resident, trained_parameters
from speed_world import Run, checksum, prompts_of, random_policy, random_reward, read_run, tokenizer_of
from trl.experimental.ppo import PPOConfig, PPOTrainer


def build(run: Run, folder: Path, tokenizer: Any) -> tuple[PPOTrainer, Meter, float]:
    policy, reward = random_policy(run), random_reward(run)
    weights = checksum(policy)
    rows = prompts_of(run, tokenizer).map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]})
    critic = copy.deepcopy(reward)
    if run.critic_lora:
        critic = get_peft_model(critic, run.lora(critic.config, "SEQ_CLS"))
    lora = run.lora(policy.config, "CAUSAL_LM") if run.adapted_layers else None
    args = PPOConfig(
        output_dir=str(folder),
        seed=run.seed,
        per_device_train_batch_size=run.micro_batch,
        gradient_accumulation_steps=run.episodes // run.micro_batch,
        num_mini_batches=1,
        num_ppo_epochs=run.epochs,
        local_rollout_forward_batch_size=run.rollout_batch,
        total_episodes=run.episodes * (run.iterations + 1),
        num_sample_generations=0,
        response_length=run.completion[1],
        stop_token=None,  # nothing ends a completion, and none is fined for it
        missing_eos_penalty=None,
        temperature=1.0,
        kl_coef=0.05,
        learning_rate=3e-6,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **run.options,
    )
    meter = Meter(steps=1)
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=critic,
        train_dataset=rows.remove_columns("prompt"),
        peft_config=lora,
        callbacks=[meter],
    )
    base = trainer.model.policy.get_base_model() if lora else trainer.model.policy
    meter.watch(run, base, trainer.model)
    return trainer, meter, weights


def train(run: Run, *given: Any) -> dict[str, Any]:
    np.random.seed(run.seed)
    trainer, meter, weights = build(run, *given)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    found = {"checksum": weights, "trained": trained_parameters(trainer.model), "optimizer": type(optimizer).__name__}
    return {**found, **meter.result()}


def main() -> None:
    run, output = read_run()
    torch.set_num_threads(run.threads)
    with tempfile.TemporaryDirectory() as name:
        tiny = run.tiny()
        train(tiny, Path(name) / "tiny", tokenizer_of(tiny))
        tokenizer = tokenizer_of(run)
        release()
        baseline = resident()
        forget_peak()
        found = train(run, Path(name) / "run", tokenizer)
        found |= {"baseline": baseline, "peak": resident("VmHWM") - baseline}
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
