"""Every recipe runs two steps from its own YAML by the launch line it prints; every YAML is read to the last key."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, LlamaConfig
from trl import ModelConfig, SFTConfig, TrlParser

from rlhf_ext import PPOConfig, PreferenceRewardConfig
from rlhf_ext.data.arguments import DataArguments
from rlhf_ext.data.constitution_arguments import ConstitutionArguments
from rlhf_ext.data.evaluation_arguments import EvaluationArguments
from rlhf_ext.data.loop_arguments import LoopArguments
from rlhf_ext.data.reward_arguments import RewardArguments
from rlhf_ext.pipelines.constitution_training import build_configs
from rlhf_ext.pipelines.loop_run import LoopRun
from rlhf_ext.pipelines.loop_training import ppo_config, reward_config
from rlhf_ext.toyworld.corpus import prompt_rows, sft_rows
from rlhf_ext.toyworld.tiny import build_model, build_tokenizer
from tests.hub_server import TOKEN, HubServer


ROOT = Path(__file__).resolve().parents[1]
YAMLS = sorted((ROOT / "recipes").glob("*.yaml"))
# Flags that the test sets itself, or that a config turns into another form.
REWRITTEN = {"bf16", "report_to"}
CONFIGS = {"sft": SFTConfig, "reward": PreferenceRewardConfig, "ppo": PPOConfig}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy-world model, a reward model of the same shape, and rows for each recipe."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    tokenizer, policy = build_tokenizer(), build_model(build_tokenizer(), "tiny")
    config = LlamaConfig(**{**policy.config.to_dict(), "num_labels": 1})
    reward = AutoModelForSequenceClassification.from_config(config)
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    answers = sft_rows(40, seed=0)
    pairs = [
        {"prompt": row["prompt"], "completions": [row["completion"], other["completion"]], "target": [1.0, 0.0]}
        for row, other in zip(answers, answers[1:], strict=False)
    ]
    for name, rows in (("sft", answers), ("reward", pairs), ("ppo", prompt_rows(40, seed=0))):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def launch(
    recipe: str, config: str, *flags: str, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """The launch line of the YAML's header, with what a test adds."""
    line = [sys.executable, "-m", "accelerate.commands.launch"]
    line += ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), str(ROOT / "recipes" / f"{recipe}.py")]
    line += ["--config", str(ROOT / "recipes" / config), "--max_steps", "2", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", **variables}
    return subprocess.run(line, env=environment, cwd=cwd, capture_output=True, text=True, timeout=600)


def finished(process: subprocess.CompletedProcess, output: Path) -> dict:
    """The metrics of a run that ended well and left what TRL's users look for."""
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    assert (output / "checkpoint-2" / "trainer_state.json").exists()
    assert (output / "tokenizer_config.json").exists()
    assert "train_loss" in json.loads((output / "train_results.json").read_text())
    assert json.loads((output / "data_summary.json").read_text())["train"]["leaked_prompts"] == 0
    assert "100%" in process.stderr  # the progress bar
    return json.loads((output / "all_results.json").read_text())


def test_sft_recipe(world, tmp_path):
    flags = ["--model_name_or_path", f"{world}/policy", "--dataset_name", f"{world}/sft.jsonl"]
    process = launch("sft", "sft_tiny.yaml", *flags, "--output_dir", f"{tmp_path}/out")
    metrics = finished(process, tmp_path / "out")
    assert metrics["eval_loss"] > 0
    assert "SFT" in (tmp_path / "out" / "README.md").read_text()


def test_reward_recipe(world, tmp_path):
    flags = ["--model_name_or_path", f"{world}/policy", "--dataset_name", f"{world}/reward.jsonl"]
    process = launch("reward", "reward_tiny.yaml", *flags, "--output_dir", f"{tmp_path}/out")
    metrics = finished(process, tmp_path / "out")
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 1


def test_ppo_recipe(world, tmp_path):
    (tmp_path / "own_rewards.py").write_text(
        "def brevity(completions, **kwargs):\n    return [-len(text.split()) / 10 for text in completions]\n"
    )
    flags = ["--model_name_or_path", f"{world}/policy", "--dataset_name", f"{world}/ppo.jsonl"]
    flags += ["--reward_model_path", f"{world}/reward", "--reward_funcs", "own_rewards:brevity"]
    flags += ["--critic_model_path", f"{world}/reward", "--probe_funcs", "own_rewards:brevity"]
    flags += ["--cut_at", ".", "--clip_scores", "-5", "5", "--missing_eos_penalty", "0.5"]
    saving = ["--save_steps", "1", "--save_total_limit", "3"]
    saving += ["--output_dir", f"{tmp_path}/out", "--push_to_hub", "true", "--hub_model_id", "tester/recipe"]
    with HubServer() as hub:
        client = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "cache")}
        client |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        process = launch("ppo", "ppo_tiny.yaml", *flags, *saving, cwd=tmp_path, **client)
    metrics = finished(process, tmp_path / "out")
    assert "eval_reward" in metrics and "eval_rewards/brevity/mean" in metrics
    assert metrics["eval_probe/brevity/mean"] == metrics["eval_rewards/brevity/mean"]
    assert "PPO" in (tmp_path / "out" / "README.md").read_text()
    assert "Completion" in process.stdout + process.stderr  # the completions table
    assert list((tmp_path / "out" / "completions").glob("*.parquet"))
    memory = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert memory["measured"].keys() == memory["planned"].keys()
    assert memory["measured"]["gradients"] == memory["planned"]["gradients"] > 0
    assert "memory" in process.stdout and "measured" in process.stdout
    pushed = hub.files("tester/recipe")
    assert {"model.safetensors", "critic/model.safetensors", "training_curves.png"} <= set(pushed)
    assert pushed["README.md"] == (tmp_path / "out" / "README.md").read_bytes()
    # Resumed from the middle of a rollout, the run ends with the same bits.
    flags += ["--resume_from_checkpoint", f"{tmp_path}/out/checkpoint-1"]
    process = launch("ppo", "ppo_tiny.yaml", *flags, "--output_dir", f"{tmp_path}/resumed", cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-6000:]
    for name in ("model.safetensors", "critic/model.safetensors"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def evaluated(output: Path, *flags: str, cwd: Path | None = None) -> tuple[dict, str]:
    """`evaluation.json` and what was printed."""
    line = [sys.executable, "-m", "accelerate.commands.launch"]
    line += ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), str(ROOT / "recipes" / "evaluate.py")]
    line += ["--config", str(ROOT / "recipes" / "evaluate_tiny.yaml"), *flags, "--output_dir", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    process = subprocess.run(line, env=environment, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    assert "100%" in process.stderr  # the progress bar
    for name in ("evaluation.md", "report.html"):
        assert (output / name).stat().st_size > 500
    return json.loads((output / "evaluation.json").read_text()), process.stdout


def test_evaluate_recipe_on_rewardbench_columns(world, tmp_path):
    pairs = [json.loads(line) for line in (world / "reward.jsonl").read_text().splitlines()]
    rows = [
        {"id": i, "subset": ("hep-go", "donotanswer")[i % 2], "prompt": row["prompt"]}
        | {"chosen": row["completions"][0], "rejected": row["completions"][1], "chosen_model": "a"}
        for i, row in enumerate(pairs)
    ]
    (tmp_path / "bench.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--reward_model_path", f"{world}/reward", "--dataset_name", f"{tmp_path}/bench.jsonl"]
    found, printed = evaluated(tmp_path / "out", *flags, "--source_map", "donotanswer=harmless")
    (result,) = found["reward_models"]
    assert result["sources"]["hep-go"]["pairs"] + result["sources"]["donotanswer"]["pairs"] == len(rows)
    assert result["three_h"]["harmless"] == result["sources"]["donotanswer"] and result["unmapped"] == ["hep-go"]
    assert 0 <= result["calibration"]["ece"] <= 1
    assert (tmp_path / "out" / "evaluation.md").read_text() in printed


def test_evaluate_recipe_on_a_policy(world, tmp_path):
    (tmp_path / "own_scores.py").write_text(
        "def brevity(completions, **kwargs):\n    return [-len(text.split()) / 10 for text in completions]\n"
    )
    flags = ["--policy_model_path", f"{world}/policy", "--baseline_model_path", f"{world}/policy"]
    flags += ["--reference_model_path", f"{world}/policy", "--judge_model_path", f"{world}/policy"]
    template = tmp_path / "template.txt"
    template.write_text("{prompt} {first} , {second} the")
    flags += ["--judge_template", str(template), "--judge_labels", "red", "blue"]
    flags += ["--reward_model_path", f"{world}/reward", "--reward_funcs", "own_scores:brevity"]
    flags += ["--insult_words", "fool", "idiot", "moron"]
    found, printed = evaluated(tmp_path / "out", *flags, "--dataset_name", f"{world}/ppo.jsonl", cwd=tmp_path)
    (name,) = found["policies"]
    metrics = found["policies"][name]
    assert abs(metrics["kl"]) < 1e-4 and metrics["perplexity"] > 1
    assert {"score/reward", "score/brevity", "eos_rate", "per_input_ead", "across_input_ead"} <= metrics.keys()
    # The policy is its own baseline, sampled with the same seed.
    assert found["wins"][name]["brevity"]["win_rate"] == 0.5
    assert found["wins"][name]["judge"]["win_rate"] == pytest.approx(0.5, abs=1e-6)
    assert f"| {name} | judge |" in printed


def test_constitution_recipe(tmp_path):
    """The toy run of the shipped YAML at a fraction of its size."""
    sizes = {"model_size": "tiny", "judge_size": "tiny", "policy_rows": 100, "judge_questions": 60, "batch_size": 4}
    sizes |= {"policy_steps": 2, "judge_steps": 2, "reviser_steps": 2, "reviser_answers": 30, "red_team": 8}
    sizes |= {"helpful": 8, "helpful_pairs": 8, "policy_prompts": 8, "test_prompts": 6, "judge_pairs": 8}
    trainers = yaml.safe_load((ROOT / "recipes" / "constitution_tiny.yaml").read_text())
    line = [sys.executable, "-m", "accelerate.commands.launch"]
    line += ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), str(ROOT / "recipes" / "constitution.py")]
    line += ["--config", str(ROOT / "recipes" / "constitution_tiny.yaml"), "--output_dir", f"{tmp_path}/out"]
    line += ["--toy_settings", json.dumps(sizes)]
    for name in ("sft", "reward", "ppo"):
        small = {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0}
        line += [f"--{name}", json.dumps({**trainers[name], **small})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    process = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    assert "rl-cai {'score/reward':" in process.stdout and "7/7 evaluation" in process.stdout
    html = (tmp_path / "out" / "report.html").read_text()
    assert "tests the pipeline, not a judge" in html and "position bias" in html
    for name in ("sft", "reward", "policy"):
        assert (tmp_path / "out" / name / "model.safetensors").exists(), name


def test_iterate_recipe(world, tmp_path):
    """One round of the shipped YAML on a tiny model and prompts of one's own, and its report."""
    trainers = yaml.safe_load((ROOT / "recipes" / "iterate_tiny.yaml").read_text())
    line = [sys.executable, "-m", "accelerate.commands.launch"]
    line += ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), str(ROOT / "recipes" / "iterate.py")]
    line += ["--config", str(ROOT / "recipes" / "iterate_tiny.yaml"), "--output_dir", f"{tmp_path}/out"]
    line += ["--toy", "false", "--model_name_or_path", f"{world}/policy", "--dataset_name", f"{world}/ppo.jsonl"]
    line += ["--labels", "simulated", "--gold_func", "tests.tiny:word_count", "--eval_fraction", "0.2"]
    line += ["--num_rounds", "1", "--labels_per_round", "8", "--incomparable_rate", "0", "--label_tie_band", "0"]
    for name in ("reward", "ppo"):
        small = {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0}
        small |= {"steps_per_generation": 1, "num_iterations": 1} if name == "ppo" else {}
        line += [f"--{name}", json.dumps({**trainers[name], **small})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    process = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    assert "round 1, evaluation" in process.stdout
    assert (tmp_path / "out" / "round_1" / "policy" / "model.safetensors").exists()


@pytest.mark.slow
def test_lora_recipes_share_one_base(world, tmp_path):
    """The reward recipe's adapter goes into the PPO recipe, which puts reward and critic on the policy's base."""
    model = ["--model_name_or_path", f"{world}/policy"]
    flags = [*model, "--dataset_name", f"{world}/reward.jsonl", "--save_strategy", "epoch"]
    process = launch("reward", "reward_gemma270m.yaml", *flags, "--output_dir", f"{tmp_path}/reward")
    finished(process, tmp_path / "reward")
    flags = [*model, "--dataset_name", f"{world}/ppo.jsonl", "--reward_adapter_path", f"{tmp_path}/reward"]
    process = launch("ppo", "ppo_gemma270m.yaml", *flags, "--output_dir", f"{tmp_path}/ppo")
    finished(process, tmp_path / "ppo")
    for name in ("adapter_config.json", "critic/adapter_config.json", "reward/adapter_config.json"):
        assert (tmp_path / "ppo" / name).exists(), name


@pytest.mark.slow
def test_ppo_on_an_ensemble(world, tmp_path):
    """The reward recipe's members go into the PPO recipe: their mean is paid, their spread is watched."""
    model = ["--model_name_or_path", f"{world}/policy"]
    lora = ["--use_peft", "true", "--lora_task_type", "SEQ_CLS", "--lora_target_modules", "all-linear"]
    flags = [*model, *lora, "--num_members", "2", "--dataset_name", f"{world}/reward.jsonl"]
    process = launch("reward", "reward_tiny.yaml", *flags, "--output_dir", f"{tmp_path}/ensemble")
    assert process.returncode == 0, process.stderr[-6000:]
    flags = [*model, "--dataset_name", f"{world}/ppo.jsonl", "--reward_model_path", f"{tmp_path}/ensemble"]
    flags += ["--critic_model_path", f"{tmp_path}/ensemble/member_0", "--normalize_scores", "true"]
    process = launch("ppo", "ppo_tiny.yaml", *flags, "--output_dir", f"{tmp_path}/ppo")
    metrics = finished(process, tmp_path / "ppo")
    assert metrics["eval_probe/ensemble_spread/mean"] > 0
    assert metrics["eval_reward"] == metrics["eval_rewards/ensemble/mean"]


def parse(path: Path):
    """A YAML as its recipe reads it; a key that no dataclass knows raises."""
    kind = path.stem.split("_")[0]
    data_arguments = RewardArguments if kind == "reward" else DataArguments
    if kind == "evaluate":
        return TrlParser((EvaluationArguments,)).parse_args_and_config(
            ["--config", str(path), "--output_dir", "out", "--reward_model_path", "reward"]
        )
    if kind == "ppo":
        namespace: dict = {"__name__": "ppo_recipe"}
        sys.modules.setdefault("ppo_recipe", type(sys)("ppo_recipe"))
        exec(compile((ROOT / "recipes" / "ppo.py").read_text(), "ppo.py", "exec"), namespace)
        data_arguments = namespace["ScriptArguments"]
    if kind == "constitution":
        parser = TrlParser((ConstitutionArguments, ModelConfig))
        named = [] if path.stem.endswith("_tiny") else ["--red_team_prompts", "x", "--test_prompts", "x"]
        named += [] if path.stem.endswith("_tiny") else ["--model_name_or_path", "x"]
        parsed = parser.parse_args_and_config(["--config", str(path), "--output_dir", "out", *named])
        build_configs(*parsed)  # refuses an unknown key of a trainer
        return parsed
    if kind == "iterate":
        parsed = TrlParser((LoopArguments, ModelConfig)).parse_args_and_config(
            ["--config", str(path), "--output_dir", "out"]
        )
        run = LoopRun(*parsed)
        reward_config(run, Path("out"), 0), ppo_config(run, Path("out"), 0)  # refuse an unknown key of a trainer
        return parsed
    parser = TrlParser((data_arguments, CONFIGS[kind], ModelConfig))
    flags = ["--config", str(path), "--output_dir", "out", "--bf16", "false"]
    flags += ["--reward_model_path", "reward"] if kind == "ppo" else []
    return parser.parse_args_and_config(flags)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_key_of_a_yaml_is_known_and_read(path):
    parsed = parse(path)
    for key, value in yaml.safe_load(path.read_text()).items():
        holders = [getattr(arguments, key) for arguments in parsed if hasattr(arguments, key)]
        assert holders, key
        if key not in REWRITTEN:
            # TRL unwraps a list of one module name, which is how a YAML gives a pattern.
            assert holders[0] in (value, value[0] if isinstance(value, list) and len(value) == 1 else value), key


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_yaml_says_what_it_takes(path):
    header = path.read_text().split("\n\n")[0]
    for word in ("Hardware:", "Time:", "Seed:", "accelerate launch --config_file accelerate_configs/", f"{path.name}"):
        assert word in header, word
    config = ROOT / header.split("--config_file ")[1].split()[0]
    assert config.exists()


def test_ziegler_settings():
    """Spec: 512 episodes a rollout, one minibatch, four epochs, 1,000,000 episodes; 4,992 labels in batches of 32."""
    _, ppo, _ = parse(ROOT / "recipes" / "ppo_ziegler_gpt2.yaml")
    assert ppo.generation_batch_size == 512
    assert ppo.num_iterations * ppo.steps_per_generation // ppo.gradient_accumulation_steps == 4
    assert (ppo.max_steps - 4) // 4 * 512 < 1_000_000 <= ppo.max_steps // 4 * 512
    assert (ppo.kl_coef, ppo.adaptive_kl_target, ppo.kl_horizon, ppo.temperature) == (0.15, 6.0, 10000, 0.7)
    data, reward, _ = parse(ROOT / "recipes" / "reward_ziegler_gpt2.yaml")
    assert reward.per_device_train_batch_size * reward.gradient_accumulation_steps == 32 and data.max_rows == 4992


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "evaluate", "constitution", "iterate"])
def test_a_recipe_states_its_dependencies_and_its_launch_line(name):
    text = (ROOT / "recipes" / f"{name}.py").read_text()
    assert text.startswith("# /// script\n# dependencies = [")
    assert f"recipes/{name}.py --config recipes/{name}_tiny.yaml" in text


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    if path.stem.startswith("zero"):
        # Without this key DeepSpeed clips at 1.0 whatever `max_grad_norm` says.
        assert config.deepspeed_config["gradient_clipping"] == "auto"
