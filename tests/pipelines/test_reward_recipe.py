"""The loops by the flags of `recipes/reward.py`, and an ensemble as the reward of PPO."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import ModelConfig, TrlParser

from rlhf_ext import PPOConfig, PPOTrainer, PreferenceRewardConfig
from rlhf_ext.data.evaluation_arguments import EvaluationArguments
from rlhf_ext.data.reward_arguments import RewardArguments
from rlhf_ext.functional.pairs import calibration
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
    mixed = [
        {"prompt": f"w{i} ", "chosen": f"w{i * 3 % 24} w{i % 5}", "rejected": f"w{i * 7 % 23} bad" + " w2" * (i % 3)}
        for i in range(24)
    ]
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, mixed)))
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


def evaluated(output, *flags):
    line = ["--use_cpu", "true", "--output_dir", str(output), "--batch_size", "4", *flags]
    runpy.run_path(str(RECIPES / "evaluate.py"))["main"](
        *TrlParser((EvaluationArguments,)).parse_args_and_config(line)
    )
    return json.loads((output / "evaluation.json").read_text()), (output / "evaluation.md").read_text()


def test_an_ensemble_is_evaluated_as_its_mean_and_as_its_members(world, ensemble, tmp_path):
    """Its members' lines are those of the members alone; an adapter that is not switched, or a gain that is forgotten,
    turns this red."""
    members = [f"{ensemble}/member_{i}" for i in range(2)]
    flags = ["--reward_model_path", str(ensemble), *members, "--dataset_name", f"{world}/mixed.jsonl"]
    found, markdown = evaluated(tmp_path / "rewards", *flags)
    whole, *alone = found["reward_models"]
    lines = whole["ensemble"]["members"]
    assert list(lines) == ["member_0", "member_1"]
    for single in alone:
        line = dict(lines[single["model"]])
        assert line.pop("ece") == pytest.approx(single["calibration"]["ece"], abs=1e-4)
        assert line == pytest.approx(single["overall"], abs=1e-4)
    assert lines["member_0"]["length_slope"] != pytest.approx(lines["member_1"]["length_slope"], abs=1e-3)
    # The noise that a member's loss allowed for is its own
    copied = tmp_path / "noisy"
    shutil.copytree(ensemble, copied)
    saved = json.loads((copied / "member_1" / "reward_config.json").read_text())
    (copied / "member_1" / "reward_config.json").write_text(json.dumps({**saved, "prediction_noise": 0.3}))
    assert [member.log_odds[1] for member in load_reward_ensemble(copied).members] == [0.0, 0.3]
    # By hand from the members' own scores and units
    scores, chances, rows = [], [], [json.loads(row) for row in (world / "mixed.jsonl").read_text().splitlines()]
    for path in members:
        model, tokenizer = load_reward_model(path), tiny_tokenizer()
        ids = [[tokenizer(row["prompt"] + row[side] + " <eos>")["input_ids"] for side in ("chosen", "rejected")]
               for row in rows]  # fmt: skip
        with torch.no_grad():
            scores.append([[model(input_ids=torch.tensor([i])).logits.item() for i in pair] for pair in ids])
        factor = json.loads((Path(path) / "reward_config.json").read_text()).get("training_gain", 1.0)
        factor /= saved_normalization(path)[0]
        chances.append(torch.tensor([factor * (a - b) for a, b in scores[-1]], dtype=torch.float64).sigmoid())
    scores = torch.tensor(scores, dtype=torch.float64)
    gaps = scores[..., 0] - scores[..., 1]
    assert whole["overall"]["accuracy"] == pytest.approx((gaps.mean(0) > 0).double().mean().item())
    assert whole["ensemble"]["spread_mean"] == pytest.approx(scores.std(0, correction=0).mean().item(), abs=1e-4)
    assert whole["ensemble"]["gap_spread_mean"] == pytest.approx(gaps.std(0, correction=0).mean().item(), abs=1e-4)
    wrong = gaps.mean(0) < 0
    assert whole["ensemble"]["errors"] == int(wrong.sum()) and 0 < wrong.sum() < len(rows)
    wins = (gaps.std(0, correction=0)[wrong][:, None] > gaps.std(0, correction=0)[~wrong]).double().mean().item()
    assert whole["ensemble"]["spread_auroc"] == pytest.approx(wins, abs=1e-6)
    mean = (chances[0] + chances[1]) / 2
    assert whole["calibration"]["ece"] == pytest.approx(calibration(mean, torch.ones_like(mean))["ece"], abs=1e-4)
    assert whole["ensemble"]["normalized_over"] == "reference" and "normalised on its own, over reference" in markdown
    assert "mean of the members" in markdown and f"| {int(wrong.sum())} of {len(rows)} |" in markdown


def test_a_policy_is_scored_by_an_ensemble(world, ensemble, tmp_path):
    flags = ["--policy_model_path", f"{world}/sft", "--baseline_model_path", f"{world}/sft"]
    flags += ["--reward_model_path", str(ensemble), f"{ensemble}/member_0", f"{ensemble}/member_1"]
    flags += ["--dataset_name", f"{world}/prompts.jsonl", "--num_samples", "2", "--max_completion_length", "4"]
    found, markdown = evaluated(tmp_path, *flags)
    metrics = found["policies"]["sft"]
    both = [metrics[f"score/member_{i}"] for i in range(2)]
    name = ensemble.name
    assert metrics[f"score/{name}"] == pytest.approx(sum(both) / 2, abs=1e-5) and abs(both[0] - both[1]) > 1e-3
    # Of two, the deviation is half the difference, answer by answer
    assert metrics[f"spread/{name}"] >= abs(both[0] - both[1]) / 2 - 1e-6
    assert f"| spread/{name} |" in markdown and "spread/member_0" not in metrics
    assert found["wins"]["sft"][name]["win_rate"] == 0.5


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
