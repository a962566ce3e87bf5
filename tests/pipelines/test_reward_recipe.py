"""The loops by the flags of `recipes/reward.py`, and an ensemble as the reward of PPO."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import ModelConfig, TrlParser

from rlhf_ext import PPOConfig, PPOTrainer, PreferenceRewardConfig
from rlhf_ext.data.reward_arguments import RewardArguments
from rlhf_ext.models.ensembles import load_reward_ensemble
from rlhf_ext.models.scoring import load_reward_model, saved_normalization
from tests.tiny import tiny_causal_lm, tiny_tokenizer


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
LORA = ["--use_peft", "true", "--lora_task_type", "SEQ_CLS", "--lora_target_modules", "all-linear", "--lora_r", "4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_causal_lm("llama", tiny_tokenizer()).save_pretrained(folder / "sft")
    tiny_tokenizer().save_pretrained(folder / "sft")
    rows = [{"prompt": f"w{i} ", "chosen": "good w1", "rejected": f"bad w{i}"} for i in range(20)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": row["prompt"]}) for row in rows))
    return folder


def run(world, output, *flags):
    line = ["--config", str(RECIPES / "reward_tiny.yaml"), "--max_steps", "2", "--save_strategy", "no"]
    line += ["--model_name_or_path", f"{world}/sft", "--dataset_name", f"{world}/pairs.jsonl"]
    line += ["--output_dir", str(output), *flags]
    parser = TrlParser((RewardArguments, PreferenceRewardConfig, ModelConfig))
    runpy.run_path(str(RECIPES / "reward.py"))["main"](*parser.parse_args_and_config(line))


@pytest.fixture(scope="module")
def ensemble(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("ensemble")
    normalize = ["--normalize_prompts", f"{world}/prompts.jsonl", "--reference_model_path", f"{world}/sft"]
    run(world, output, "--num_members", "2", *normalize, "--normalize_max_length", "4", *LORA)
    return output


def test_seeds_by_flags(world, tmp_path):
    run(world, tmp_path, "--num_seeds", "2")
    report = json.loads((tmp_path / "seeds.json").read_text())
    assert {seed["seed"] for seed in report["seeds"]} == {42, 43}
    load_reward_model(tmp_path / "best")


def test_one_model_in_the_unit_of_answers(world, tmp_path):
    answers = [{"prompt": f"w{i} ", "completion": "good w2"} for i in range(4)]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    flags = ["--normalize_prompts", f"{tmp_path}/answers.jsonl", "--normalize_shift_only", "true"]
    run(world, tmp_path / "out", *flags)
    gain, bias = saved_normalization(str(tmp_path / "out"))
    assert gain == 1.0 and bias != 0.0
    ids = torch.tensor([tiny_tokenizer()(f"w{i} good w2 <eos>")["input_ids"] for i in range(4)])
    with torch.no_grad():
        assert load_reward_model(tmp_path / "out")(input_ids=ids).logits.mean().item() == pytest.approx(0, abs=1e-5)


def test_an_ensemble_is_paid_by_its_mean_and_watched_by_its_spread(world, ensemble, tmp_path):
    assert json.loads((ensemble / "ensemble.json").read_text())["normalized_over"] == "reference"
    found = load_reward_ensemble(ensemble)
    options = {
        "model": f"{world}/sft",
        "args": PPOConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=4,
            max_completion_length=4,
            max_steps=1,
            logging_steps=1,
        ),
        "train_dataset": Dataset.from_list([{"prompt": f"w{i} "} for i in range(8)]),
    }
    with pytest.raises(ValueError, match="cannot start from 2 rewards.*member of the ensemble"):
        PPOTrainer(**options, reward_funcs=found.mean)
    trainer = PPOTrainer(
        **options, reward_funcs=found.mean, probe_funcs=found.spread, critic_model=f"{ensemble}/member_0"
    )
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert log["probe/ensemble_spread/mean"] > 0
    assert log["rewards/ensemble/mean"] == pytest.approx(log["reward"], abs=1e-5)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"num_members": 2, "num_seeds": 2}, "num_members.*2.*num_seeds.*2.*one of them"),
        ({"num_members": 0}, "num_members.*0.*1 or more"),
        ({"reference_model_path": "sft"}, "reference_model_path.*sft.*normalize_prompts.*empty"),
        ({"keep_seeds": True}, "keep_seeds.*num_seeds.*1"),
    ],
)
def test_flags_that_nothing_reads_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        RewardArguments(dataset_name="rows.jsonl", **flags)
