"""`rlhf-ext env`: the stack, the plan of a recipe's YAML, and what ends it with 1."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rlhf_ext import cli
from rlhf_ext.pipelines import environment
from tests.tiny import tiny_causal_lm, tiny_config, tiny_tokenizer


ROOT = Path(__file__).resolve().parents[2]
YAML = ROOT / "recipes" / "ppo_8b_24gb.yaml"


@pytest.fixture
def tiny(tmp_path):
    """The architecture of a tiny model as a `config.json`."""
    tiny_config("llama", tiny_tokenizer(), max_position_embeddings=1024).save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def yaml_with(tmp_path, *lines, without=()):
    """The 8B recipe with other lines in place of the same keys."""
    drop = {line.split(":")[0] for line in lines} | set(without)
    kept = [line for line in YAML.read_text().splitlines() if line.split(":")[0] not in drop]
    (tmp_path / "ppo.yaml").write_text("\n".join([*kept, *lines]))
    return str(tmp_path / "ppo.yaml")


def test_versions_and_devices(capsys):
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    for name in ("python", "torch", "trl", "peft", "bitsandbytes", "rlhf-ext"):
        assert re.search(rf"^{name} +\d", shown, re.MULTILINE), name
    assert "cores" in shown or "cuda:0" in shown


def test_8b_fits_24_gb():
    """The claim of the recipe, on paper: an NF4 base of 5.3 GiB under four roles, well below the card."""
    arguments = environment.read_arguments(str(YAML))
    shape = environment.run_shape(*arguments, model_config=str(ROOT / "docs" / "llama3_8b.json"))
    assert (shape.device, shape.dtype, shape.autocast) == ("cuda", torch.bfloat16, True)
    assert shape.quantization.bnb_4bit_use_double_quant and shape.quantization.bnb_4bit_quant_type == "nf4"
    assert (shape.critic, shape.reference, shape.reward_lora.r) == ("adapter", "base", 16)
    plan = environment.plan_memory(shape)
    # 6.98 G weights in linear layers at 4.127 bits, 1.05 G in embeddings and head, norms in bf16.
    assert plan.parts["base"] == pytest.approx(6_979_321_856 * 4.127 / 8 + 2 * 1_050_939_392, rel=0.001)
    assert plan.parts["adapters, heads"] == 3 * 4 * 41_943_040 + 2 * 4 * 4096
    assert environment.card_bytes(None, str(YAML)) in (24 * 2**30, *cards())
    plan.check_fits(24 * 2**30)
    assert plan.largest in ("base", "prompts", "cache")


def cards():
    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


def test_above_the_card_ends_with_1(tiny, capsys):
    flags = ["env", "--config", str(YAML), "--model_config", tiny]
    assert cli.main([*flags, "--card_gb", "24"]) == 0
    assert "fits" in capsys.readouterr().out
    assert cli.main([*flags, "--card_gb", "0.5"]) == 1
    error = capsys.readouterr().err
    assert "the card has 0.50 GiB. Largest part: reserve, 1.00 GiB; smaller with a larger card" in error


@pytest.mark.parametrize(
    "lines, without, message",
    [
        (["learning_speed: 1"], [], "learning_speed"),
        ([], ["max_prompt_length"], "`max_prompt_length` is not set"),
        (["optim: adafactor"], [], "optim='adafactor' has no known size"),
        (["reward_adapter_path:"], [], "No reward"),
        (["kl_coef: -1"], [], "kl_coef=-1"),
    ],
)
def test_a_yaml_that_cannot_run_is_no_plan(lines, without, message, tmp_path, tiny, capsys):
    config = yaml_with(tmp_path, *lines, without=without)
    assert cli.main(["env", "--config", config, "--model_config", tiny]) == 1
    assert message in capsys.readouterr().err


def test_without_a_hub_the_message_says_what_to_do(capsys):
    assert cli.main(["env", "--config", str(YAML)]) == 1
    assert "--model_config" in capsys.readouterr().err


def test_full_fine_tuning_and_folders(tmp_path, tiny):
    """Without adapters: a copy as reference, a critic and a reward model of the architecture their folder names."""
    other = tmp_path / "reward"
    tiny_config("llama", tiny_tokenizer(), hidden_size=32).save_pretrained(other)
    config = yaml_with(
        tmp_path, f"reward_model_path: {other}", "critic: model", "load_in_4bit: false", "use_peft: false",
        "use_cpu: true", without=["reward_adapter_path"],
    )  # fmt: skip
    shape = environment.run_shape(*environment.read_arguments(config), model_config=tiny)
    assert (shape.lora, shape.quantization, shape.reference, shape.critic) == (None, None, "copy", "model")
    assert (shape.config.hidden_size, shape.critic_config.hidden_size, shape.device) == (16, 32, "cpu")
    assert [c.hidden_size for c in shape.reward_configs] == [32]


def test_a_whole_rollout_is_shared_by_the_processes(tmp_path, tiny, monkeypatch):
    """A YAML may give the rollout of all processes; one process reads the YAML."""
    seen, plan = [], environment.plan_memory
    monkeypatch.setattr(environment, "plan_memory", lambda shape: seen.append(shape.rollout) or plan(shape))
    lines = ["generation_batch_size: 64", "per_device_train_batch_size: 4", "use_cpu: true"]
    config = yaml_with(tmp_path, *lines, without=["steps_per_generation"])
    for processes in (1, 8):
        environment.run_environment(config, tiny, num_processes=processes)
    assert seen == [64, 8]


def test_a_policy_that_starts_from_an_adapter_has_a_reference_adapter(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_causal_lm("llama", tokenizer).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(tmp_path / "sft")
    config = yaml_with(tmp_path, f"model_name_or_path: {tmp_path / 'sft'}", f"reward_adapter_path: {tmp_path / 'sft'}")
    shape = environment.run_shape(*environment.read_arguments(config))
    assert (shape.reference, shape.lora.r, shape.reward_lora.r) == ("adapter", 3, 3)
    assert shape.config.hidden_size == 16


def test_the_shapes_of_llama_3():
    """Ours, by hand, for plans without a hub."""
    eight, seventy = (json.loads((ROOT / "docs" / f"llama3_{n}.json").read_text()) for n in ("8b", "70b"))
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [eight[key] for key in keys] == [4096, 14336, 32, 32, 8]
    assert [seventy[key] for key in keys] == [8192, 28672, 80, 64, 8]
    assert eight["vocab_size"] == seventy["vocab_size"] == 128256


def test_a_configuration_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="`--config` is '.*missing.yaml', and there is no such file"):
        environment.read_arguments(str(tmp_path / "missing.yaml"))
