"""Bad input raises a ValueError that names the field, the value and the remedy, before anything is trained."""

import json
import os

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from rlhf_ext import PPOConfig, PPOTrainer
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.ppo_runs import PROMPTS


def zero(prompts, completions, **kwargs):
    return [0.0] * len(prompts)


def build(tmp_path, *, model=None, tokenizer=None, rows=None, config=None, **kwargs):
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    args = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 4,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    kwargs.setdefault("train_dataset", Dataset.from_dict({"prompt": PROMPTS} if rows is None else rows))
    return PPOTrainer(
        model=tiny_causal_lm("llama", tiny_tokenizer()) if model is None else model,
        args=PPOConfig(output_dir=str(tmp_path / "out"), **{**args, **(config or {})}),
        processing_class=tokenizer,
        **kwargs,
    )


def refuses(tmp_path, *parts, **kwargs):
    """The constructor raises, and the message holds all `parts`: field, value, remedy."""
    with pytest.raises(ValueError) as raised:
        build(tmp_path, **kwargs)
    for part in parts:
        assert part in str(raised.value)


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


# Rows

LONG = " ".join(["cat"] * 100)

ROWS = {
    "no column": ({"rows": {"text": ["a"]}}, ["train_dataset", "no column 'prompt'", "'text'", "Rename"]),
    "no rows": ({"rows": {"prompt": []}}, ["train_dataset", "no rows", "Check the path"]),
    "empty prompt": (
        {"rows": {"prompt": ["the", "", "cat", ""]}},
        ["train_dataset", "2 empty prompts", "row 1", "Remove these rows"],
    ),
    "blank prompt": ({"rows": {"prompt": ["the", " \n"]}}, ["1 empty prompts", "row 1"]),
    "missing prompt": ({"rows": {"prompt": ["the", None]}}, ["1 empty prompts", "row 1"]),
    "no messages": (
        {"rows": {"prompt": [[{"role": "user", "content": "the"}], []]}},
        ["1 empty prompts", "row 1"],
    ),
    "neither text nor messages": (
        {"rows": {"prompt": [7, 8]}},
        ["train_dataset", "type int at row 0", "Give a string"],
    ),
    "ids instead of text": ({"rows": {"prompt": [[5, 6], [7, 8]]}}, ["type list at row 0", "Give a string"]),
    "reserved column": (
        {"rows": {"prompt": ["a"], "prompt_ids": [[1]]}},
        ["train_dataset", "'prompt_ids'", "Rename"],
    ),
    "reserved column of the parent": ({"rows": {"prompt": ["a"], "trainer_state": [1]}}, ["'trainer_state'"]),
    "too long": (
        {"rows": {"prompt": ["the", LONG]}, "config": {"max_completion_length": 29}},
        ["1 rows", "row 1 has 100 prompt tokens", "context of 128", "max_completion_length=29", "lower"],
    ),
    "messages too long": (
        {
            "rows": {"prompt": [[{"role": "user", "content": LONG}]]},
            "config": {"max_completion_length": 26},
        },
        ["row 0 has 103 prompt tokens", "max_completion_length=26"],
    ),
    "fewer than a rollout": (
        {"rows": {"prompt": ["the"] * 7}},
        ["train_dataset has 7 prompts, a rollout takes 8", "nothing would be trained on", "lower"],
    ),
    "evaluation": (
        {"eval_dataset": Dataset.from_dict({"prompt": ["the", ""]})},
        ["eval_dataset has 1 empty prompts, first at row 1"],
    ),
    "one of several evaluations": (
        {"eval_dataset": {"good": Dataset.from_dict({"prompt": ["a"]}), "bad": Dataset.from_dict({"text": ["a"]})}},
        ["eval_dataset['bad']", "no column 'prompt'"],
    ),
    "stream, first row": ({"train_dataset": stream([{"prompt": ""}])}, ["train_dataset has 1 empty prompts"]),
    "stream without a row": ({"train_dataset": stream([])}, ["train_dataset has no rows"]),
    "stream without the column": ({"train_dataset": stream([{"text": "a"}])}, ["train_dataset", "prompt"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(tmp_path, case):
    kwargs, parts = ROWS[case]
    refuses(tmp_path, *parts, reward_funcs=zero, **kwargs)


def test_a_prompt_that_just_fits_is_taken(tmp_path):
    build(tmp_path, rows={"prompt": [LONG] * 8}, config={"max_completion_length": 28}, reward_funcs=zero)


def test_a_stream_without_a_whole_rollout_is_no_success(tmp_path):
    trainer = build(tmp_path, train_dataset=stream([{"prompt": "the"}] * 7), reward_funcs=zero)
    with pytest.raises(ValueError, match="no whole rollout of 8 prompts"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_policy_that_trains_in_16_bits(tmp_path, dtype):
    model = tiny_causal_lm("llama", tiny_tokenizer(), dtype=dtype)
    refuses(tmp_path, "round to nothing", "dtype=torch.float32", "peft_config", model=model, reward_funcs=zero)
    adapters = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["embed_tokens"])
    parts = ["1 parameters of the policy train in", "embed_tokens", "without `modules_to_save`"]
    refuses(tmp_path, *parts, model=model, reward_funcs=zero, peft_config=adapters)


def test_every_row_of_a_map_data_set_is_read_once_before_training(tmp_path):
    """The last row counts too: a crash at step 9000 is what the check is for."""
    rows = {"prompt": ["the cat"] * 500 + [""]}
    refuses(tmp_path, "first at row 500", rows=rows, reward_funcs=zero)


# Tokenizer and roles


def test_tokenizer_without_an_end(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    refuses(tmp_path, "eos_token=None", "Set `tokenizer.eos_token`", tokenizer=tokenizer, reward_funcs=zero)


def test_reward_model_of_another_vocabulary_starts_no_critic(tmp_path):
    """Equal sizes, other words: the ids would be in range and mean something else (pitfall S4)."""
    other = tiny_tokenizer(words=[f"x{i}" for i in range(len(tiny_tokenizer()) - 5)])
    assert len(other) == len(tiny_tokenizer())
    model = tiny_reward_model("llama", other)
    parts = ["reward model", f"({len(other)} entries)", "critic_model", "reward_processing_classes"]
    refuses(tmp_path, *parts, reward_funcs=model, reward_processing_classes=other)
    # As a reward alone it is welcome.
    critic = tiny_reward_model("llama", tiny_tokenizer())
    trainer = build(tmp_path, reward_funcs=model, reward_processing_classes=other, critic_model=critic)
    assert trainer.critic == "model"


def test_critic_model_of_a_smaller_vocabulary(tmp_path):
    small = tiny_tokenizer(words=["a", "b"])
    critic = tiny_reward_model("llama", small)
    size = str(len(tiny_tokenizer()))
    refuses(tmp_path, "critic_model", "vocabulary of 7", size, "Pass", reward_funcs=zero, critic_model=critic)


@pytest.mark.parametrize("loaded", [False, True])
def test_critic_model_of_another_tokenizer_by_its_folder(tmp_path, loaded):
    other = tiny_tokenizer(words=[f"x{i}" for i in range(len(tiny_tokenizer()) - 5)])
    folder = str(tmp_path / "critic")
    critic = tiny_reward_model("llama", other)
    critic.save_pretrained(folder)
    other.save_pretrained(folder)
    if loaded:
        critic = type(critic).from_pretrained(folder)
    refuses(
        tmp_path,
        "critic_model has another tokenizer",
        "pass a `critic_model` with the policy's tokenizer",
        reward_funcs=zero,
        critic_model=critic if loaded else folder,
    )


def frozen():
    return tiny_causal_lm("llama", tiny_tokenizer()).requires_grad_(False)


def adapted(name="default"):
    model = tiny_causal_lm("llama", tiny_tokenizer())
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"), name)


ROLES = {
    "no rewards": ({}, ["reward_funcs is empty", "reward_adapter", "token_reward_funcs"]),
    "an empty list of rewards": ({"reward_funcs": []}, ["reward_funcs is empty"]),
    "reward_adapter without peft_config": (
        {"reward_adapter": "somewhere"},
        ["reward_adapter", "the policy has none", "Give a `peft_config`"],
    ),
    "critic adapter without reward_adapter": (
        {"reward_funcs": zero, "config": {"critic": "adapter"}},
        ["critic='adapter'", "`reward_adapter`", "Pass its folder"],
    ),
    "critic_model that is not read": (
        {
            "reward_funcs": zero,
            "critic_model": "somewhere",
            "config": {"critic": "none", "advantage_estimator": "returns"},
        },
        ["critic_model", "critic='none'", "Set critic='model'"],
    ),
    "several rewards and no critic": (
        {"reward_funcs": [zero, lambda: tiny_reward_model("llama", tiny_tokenizer())]},
        ["2 rewards", "Pass a `critic_model`"],
    ),
    "adapters and nothing to start the critic from": (
        {"reward_funcs": zero, "model": adapted},
        ["critic='model'", "Pass a `critic_model` or a `reward_adapter`"],
    ),
    "two adapters for one policy": (
        {
            "reward_funcs": zero,
            "model": adapted,
            "critic_model": lambda: tiny_reward_model("llama", tiny_tokenizer()),
            "peft_config": LoraConfig(r=2, target_modules="all-linear"),
        },
        ["peft_config", "Pass one of the two"],
    ),
    "adapter of another name": (
        {
            "reward_funcs": zero,
            "model": lambda: adapted("sft"),
            "critic_model": lambda: tiny_reward_model("llama", tiny_tokenizer()),
        },
        ["'sft'", "adapter_name='default'"],
    ),
    "nothing to train": ({"reward_funcs": zero, "model": frozen}, ["No parameter of the policy", "is_trainable=True"]),
    "tokenizers for other rewards": (
        {"reward_funcs": zero, "reward_processing_classes": [None, None]},
        ["reward_processing_classes has 2 entries for 1 reward_funcs", "Give one per"],
    ),
    "quantization of a loaded model": (
        {"reward_funcs": zero, "quantization_config": {"load_in_8bit": True}},
        ["quantization_config", "loaded already"],
    ),
}


@pytest.mark.parametrize("case", ROLES)
def test_roles(tmp_path, case):
    kwargs, parts = ROLES[case]
    # Models are made here, not at import; a plain reward function stays what it is.
    made = {key: value() if callable(value) and value is not zero else value for key, value in kwargs.items()}
    if isinstance(made.get("reward_funcs"), list):
        made["reward_funcs"] = [func if func is zero else func() for func in made["reward_funcs"]]
    refuses(tmp_path, *parts, **made)


def test_critic_with_two_labels(tmp_path):
    critic = tiny_reward_model("llama", tiny_tokenizer())
    critic.score = torch.nn.Linear(16, 2, bias=False)
    critic.config.num_labels = 2
    with pytest.raises(ValueError, match="label"):
        build(tmp_path, reward_funcs=zero, critic_model=critic)


# A reward adapter's folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A good reward adapter: every case below spoils one thing of it."""
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    get_peft_model(tiny_reward_model("llama", tiny_tokenizer()), config).save_pretrained(folder)
    return folder


def spoiled(adapter, folder, *, weights=lambda tensors: tensors, **config):
    os.makedirs(folder)
    with open(adapter / "adapter_config.json", encoding="utf-8") as file:
        saved = json.load(file)
    with open(folder / "adapter_config.json", "w", encoding="utf-8") as file:
        json.dump({**saved, **config}, file)
    tensors = weights(load_file(adapter / "adapter_model.safetensors"))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(folder)


def without_head(tensors):
    return {name: tensor for name, tensor in tensors.items() if "score" not in name}


def with_an_embedding(tensors):
    return {**tensors, "base_model.model.model.embed_tokens.weight": torch.zeros(39, 16)}


def without_a_layer(tensors):
    return {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}


def wider(tensors):
    return {n: torch.cat([t, t], dim=1) if "lora_A" in n else t for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        (without_head, ["head was not saved", "modules_to_save=['score']"]),
        (with_an_embedding, ["embed_tokens", "Save only 'score'"]),
        (without_a_layer, ["does not fit the policy's base", "layers.1", "same base model"]),
        (wider, ["does not fit the policy's base"]),
    ],
)
def test_reward_adapter_folders(tmp_path, adapter, weights, parts):
    folder = spoiled(adapter, tmp_path / "spoiled", weights=weights)
    peft_config = LoraConfig(r=2, target_modules="all-linear")
    refuses(tmp_path, "reward_adapter", folder, *parts, reward_adapter=folder, peft_config=peft_config)


def test_reward_adapter_that_is_no_folder(tmp_path):
    folder = str(tmp_path / "nowhere")
    peft_config = LoraConfig(r=2, target_modules="all-linear")
    parts = ["reward_adapter", folder, "no adapter_config.json", "Pass the folder"]
    refuses(tmp_path, *parts, reward_adapter=folder, peft_config=peft_config)


def test_the_adapter_that_was_spoiled_is_a_good_one(tmp_path, adapter):
    folder = spoiled(adapter, tmp_path / "whole")
    peft_config = LoraConfig(r=2, target_modules="all-linear")
    assert build(tmp_path, reward_adapter=folder, peft_config=peft_config).critic == "adapter"


def test_reentrant_checkpointing(tmp_path, adapter):
    refuses(
        tmp_path,
        "use_reentrant=True",
        "Set it to False",
        reward_adapter=str(adapter),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        config={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    )


# What a reward function returns


def too_few(prompts, completions, **kwargs):
    return [0.0] * (len(prompts) - 1)


def not_a_number(prompts, completions, **kwargs):
    return [float("nan") if row in (2, 5) else 0.0 for row in range(len(prompts))]


def infinite(prompts, completions, **kwargs):
    return [float("inf") if row == 7 else 0.0 for row in range(len(prompts))]


def words(prompts, completions, **kwargs):
    return ["good"] * len(prompts)


def one_number(prompts, completions, **kwargs):
    return 1.0


async def not_a_number_later(prompts, completions, **kwargs):
    return not_a_number(prompts, completions)


@pytest.mark.parametrize(
    ("reward", "parts"),
    [
        (too_few, ["'too_few'", "7 rewards for 8 completions", "one per"]),
        (not_a_number, ["'not_a_number'", "rows [2, 5]", "nan", "None where it does not apply"]),
        (infinite, ["'infinite'", "rows [7]", "inf"]),
        (words, ["'words'", "'good'", "finite numbers"]),
        (one_number, ["'one_number'", "float", "list of 8 numbers"]),
        (not_a_number_later, ["'not_a_number_later'", "rows [2, 5]"]),
    ],
)
def test_rewards_at_their_first_call(tmp_path, reward, parts):
    trainer = build(tmp_path, reward_funcs=reward)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(ValueError) as raised:
        trainer.train()
    for part in parts:
        assert part in str(raised.value)
    assert trainer.state.global_step == 0
    assert all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True))


# Runs


def test_no_training_data(tmp_path):
    with pytest.raises(ValueError, match="train_dataset"):
        build(tmp_path, reward_funcs=zero, train_dataset=None)
