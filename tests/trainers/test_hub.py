"""To the Hub and back, with the unmodified client against a server of the tests, in processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load as load_tensors

from rlhf_ext import PPOConfig, PreferenceRewardConfig
from rlhf_ext.models.scoring import load_critic, load_reward_model
from rlhf_ext.trainers.card import hyperparameters, metrics_table, plot_curves, public_name
from tests.hub_server import TOKEN, HubServer


ROOT = Path(__file__).resolve().parents[2]


def run(command: str, folder: Path, url: str, **environment: str) -> dict:
    """`hub_run.py` with a cache of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / f"cache_{command}"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # Xet is a service of its own; without it the client takes LFS
        **environment,
    }
    line = [sys.executable, str(ROOT / "tests/trainers/hub_run.py"), command, str(folder)]
    process = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    return torch.load(folder / f"{command}.pt")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with HubServer() as server:
        server.pushed = run("push", folder, server.url, HF_TOKEN=TOKEN)
        server.requests_of_push = list(server.requests)
        yield server


@pytest.fixture(scope="module")
def loaded(hub, tmp_path_factory):
    return run("load", tmp_path_factory.mktemp("loading"), hub.url)


# What is pushed


def test_every_role_is_there(hub):
    files = hub.files("tester/ppo")
    adapter = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    scalar = adapter | {"reward_config.json"}
    assert adapter | {f"{role}/{name}" for role in ("critic", "reward") for name in scalar} <= set(files)
    assert {"README.md", "training_curves.png"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or name.startswith("_")]
    keys = set(load_tensors(files["adapter_model.safetensors"]))
    assert keys and all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in keys)
    assert not [key for key in keys if "critic" in key or "reward" in key]
    assert [key for key in load_tensors(files["critic/adapter_model.safetensors"]) if key.endswith("score.weight")]
    assert scalar | {"README.md"} <= set(hub.files("tester/reward"))
    full = set(hub.files("tester/full"))
    assert {"model.safetensors", "critic/model.safetensors", "critic/tokenizer.json", "README.md"} <= full
    assert hub.repos["tester/full"].private and not hub.repos["tester/ppo"].private


def test_weights_go_by_lfs_also_in_parts(hub):
    for repo in ("tester/base", "tester/ppo", "tester/full"):
        weights = {name for name in hub.files(repo) if name.endswith(".safetensors")}
        assert weights and weights <= hub.lfs_files(repo)
    paths = [path for _, path in hub.requests_of_push]
    assert any(re.fullmatch(r"/lfs/\w+/part/2", path) for path in paths)
    assert any(path.endswith("/verify") for path in paths)


def test_a_push_in_training_holds_every_role_as_it_was_then(hub):
    """`hub_strategy="every_save"`: the parent copies only the policy from the checkpoint that it pushes."""
    commits = [files for _, files in hub.repos["tester/ppo"].commits]
    first, last = commits[1], commits[-1]
    assert {"adapter_model.safetensors", "critic/adapter_model.safetensors", "reward/reward_config.json"} <= set(first)
    for name in ("adapter_model.safetensors", "critic/adapter_model.safetensors"):
        assert first[name] != last[name], "step 2 is not step 3"
    assert first["reward/adapter_model.safetensors"] == last["reward/adapter_model.safetensors"]


def test_no_secret_and_no_home_is_pushed(hub):
    assert TOKEN in hub.tokens, "the token was used"
    for repo in ("tester/reward", "tester/ppo", "tester/full"):
        for name, content in hub.files(repo).items():
            assert TOKEN.encode() not in content, f"{repo}/{name}"
        card = hub.files(repo)["README.md"].decode()
        assert str(Path.home()) not in card and "/tmp" not in card


# What comes back, in a new process with an empty cache


def test_policy_critic_and_reward_are_equal_bit_by_bit(hub, loaded):
    for pushed, found in zip(hub.pushed["one_base"], loaded["one_base"], strict=True):
        assert torch.equal(pushed, found)
    for pushed, found in zip(hub.pushed["full"], loaded["full"], strict=True):
        assert torch.equal(pushed, found)
    assert torch.equal(hub.pushed["reward"], loaded["reward"])
    assert loaded["keys"] == ["default"]
    critic, reward = loaded["one_base"][1:]
    assert (critic - reward).abs().max() > 1e-3, "the critic has moved"


def test_it_generates_the_same_text(hub, loaded):
    assert loaded["text"] == hub.pushed["text"] and len(loaded["text"].split()) > 3


def test_a_run_starts_from_ids_of_folders_in_a_repository(hub, loaded):
    assert torch.equal(loaded["next"][0], hub.pushed["one_base"][0])
    assert torch.equal(loaded["next"][1], hub.pushed["one_base"][2])
    assert torch.equal(loaded["next_full"][0], hub.pushed["full"][0])
    assert torch.equal(loaded["next_full"][1], hub.pushed["full"][1])


# The card


def test_the_card_says_from_what_and_towards_what(hub):
    card = ModelCard(hub.files("tester/ppo")["README.md"].decode())
    commit = hub.repos["tester/base"].commits[-1][0]
    assert card.data.base_model == "tester/base" and card.data.library_name == "peft" and card.data.datasets is None
    for part in (
        f"| revision of the base | {commit} |",
        "base -> `default`, new: LORA, r 4, lora_alpha 8, on down_proj, ",
        "base -> `critic`",
        "base -> `reward`",
        "rows.jsonl",
        "| train rows | 8 |",
        "GAE (gamma 1.0, lambda 0.95)",
        "from 0.05, led to 6.0 nats per sequence",
        "| `learning_rate` | 0.01 |",
        "| `value_loss` |",
        "(training_curves.png)",
        "rlhf-ext merge --adapter tester/ppo",
        "1707.06347",
    ):
        assert part in card.text, part
    assert "grpo" not in card.text.lower() and "/None)" not in card.text
    assert hub.files("tester/ppo")["training_curves.png"].startswith(b"\x89PNG")
    full = ModelCard(hub.files("tester/full")["README.md"].decode())
    assert full.data.datasets == "tester/prompts" and "the base itself, trained in full" in full.text
    assert "a model of its own; folder `critic/`" in full.text and commit in full.text
    reward = ModelCard(hub.files("tester/reward")["README.md"].decode())
    assert commit in reward.text and "`accuracy`" in reward.text and "load_reward_model" in reward.text
    assert "### Framework versions" in reward.text, "TRL's part of the card"


def test_an_adapter_names_the_commit_of_its_base(hub):
    commit = hub.repos["tester/base"].commits[-1][0]
    for name in ("adapter_config.json", "critic/adapter_config.json", "reward/adapter_config.json"):
        assert f'"revision": "{commit}"' in hub.files("tester/ppo")[name].decode(), name


@pytest.mark.parametrize("config", [PPOConfig, PreferenceRewardConfig])
def test_a_token_among_the_arguments_is_refused_and_not_shown(config, tmp_path):
    """`training_args.bin` is pushed with it."""
    with pytest.raises(ValueError, match="HF_TOKEN") as refused:
        config(str(tmp_path), use_cpu=True, bf16=False, report_to=[], hub_token="hf_secret")
    assert "hf_secret" not in str(refused.value)


def test_hyperparameters_hold_no_house_keeping(tmp_path):
    args = PPOConfig(
        str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        learning_rate=1e-5,
        model_init_kwargs={"token": "hf_secret", "attn_implementation": "eager", "cache_dir": str(tmp_path)},
        log_completions=True,
    )
    shown = hyperparameters(args)
    assert shown["learning_rate"] == 1e-5 and "output_dir" not in shown and "log_completions" not in shown
    assert shown["model_init_kwargs"] == {"attn_implementation": "eager", "cache_dir": f"{tmp_path.name} (local)"}


def test_public_names(tmp_path):
    assert public_name("owner/name") == "owner/name"
    assert public_name(tmp_path) == f"{tmp_path.name} (local)"
    assert public_name("/nowhere/model/") == "model (local)"
    assert public_name("") == public_name(None) == "a model built in memory"


def test_metrics_and_curves(tmp_path):
    logs = [{"step": 1, "kl": 0.5, "a|b": 1.0}, {"step": 2, "kl": 0.25}, {"step": 2, "train_runtime": 3.0}]
    text = metrics_table(logs)
    assert "| `kl` | 0.5 | 0.25 | 2 |" in text and "`a\\|b`" in text and "runtime" not in text
    path = tmp_path / "curves.png"
    assert plot_curves(logs, ["kl", "a|b", "absent"], str(path)) == ["kl"]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plot_curves([], ["kl"], str(tmp_path / "none.png")) == [] and not (tmp_path / "none.png").exists()


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "policy").mkdir()
    with pytest.raises(ValueError, match="has no folder 'critic'"):
        load_critic(tmp_path / "policy")
    with pytest.raises(ValueError, match="no folder here, and 'runs/ppo' could not be read from the Hub"):
        load_reward_model("runs/ppo/critic")
