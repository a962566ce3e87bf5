"""What makes PPO fast changes no number of it: replayed layers, dense rows, micro-batches by length."""

from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from rlhf_ext.functional.batching import split_by_length
from rlhf_ext.models import fused_blocks, fused_head, fused_lora
from rlhf_ext.models.build import load_policy
from rlhf_ext.trainers import ppo_trainer, ppo_trunk
from rlhf_ext.trainers.ppo_batches import balance
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.test_ppo_quantised import QUANTISED
from tests.trainers.test_ppo_roles import PROMPTS, build, rollout


UPPER = {"llama": "layers", "gpt2": "h", "gemma3": "layers", "nf4": "layers"}
SIZES = {"nf4": {"hidden_size": 64, "intermediate_size": 128}}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def upper_lora(kind, **kwargs):
    return LoraConfig(
        r=4,
        target_modules=["c_attn", "c_fc"] if kind == "gpt2" else TARGETS,
        task_type="CAUSAL_LM",
        layers_to_transform=[1],
        layers_pattern=UPPER[kind],
        fan_in_fan_out=kind == "gpt2",
        **kwargs,
    )


def family(kind):
    return "llama" if kind == "nf4" else kind


@pytest.fixture(scope="module")
def reward_adapters(tmp_path_factory):
    """A reward adapter on the top layer of each kind of base, and the base."""
    from peft import get_peft_model

    folders = {}
    for kind in UPPER:
        folder = tmp_path_factory.mktemp(kind)
        model = tiny_reward_model(family(kind), tiny_tokenizer(), seed=0, **SIZES.get(kind, {}))
        torch.manual_seed(5)
        config = upper_lora(kind, modules_to_save=["score"], init_lora_weights=False)
        config.task_type = "SEQ_CLS"
        get_peft_model(model, config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        folders[kind] = str(folder)
    return folders


def trained(tmp_path, kind, reward_adapters, seed=0, resume=None, **config):
    policy = tiny_causal_lm(family(kind), tiny_tokenizer(), **SIZES.get(kind, {}))
    if kind == "nf4":
        policy.save_pretrained(tmp_path / "base")
        policy = load_policy(str(tmp_path / "base"), dtype=torch.float32, quantization_config=QUANTISED[kind]())
    torch.manual_seed(seed)
    trainer = build(
        tmp_path,
        policy,
        kind=family(kind),
        peft_config=upper_lora(kind),
        reward_adapter=reward_adapters[kind],
        config={"num_iterations": 2, "max_steps": 4, "eval_strategy": "no", **config},
    )
    trainer.train(resume_from_checkpoint=resume)
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return trainer, weights


def check_same_training(found, expected):
    """Two runs, each a trainer and its weights."""
    assert expected[1] and found[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-5, atol=1e-6, msg=name)
    for one, other in zip(found[0].state.log_history, expected[0].state.log_history, strict=True):
        for key in ("loss", "kl", "policy/ratio", "value_loss", "scores/mean", "entropy", "grad_norm"):
            if key in other:
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("kind", UPPER)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_over_replayed_layers_is_training(tmp_path, kind, reward_adapters, checkpointing):
    config = {"gradient_checkpointing": checkpointing}
    plain, weights = trained(tmp_path, kind, reward_adapters, trunk_cache_gib=0, **config)
    assert plain.trunk is None
    found, replayed = trained(tmp_path, kind, reward_adapters, **config)
    assert found.trunk.num_computed == 8 * 2, "each text of the two rollouts once"
    assert found.trunk.num_replayed == 8 * 2 * (3 + 2 * 2), "three more passes of the rollout, two of each epoch"
    check_same_training((found, replayed), (plain, weights))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("part, kind", [("adapters", "llama"), ("adapters", "nf4"), ("blocks", "llama")])
def test_training_with_fused_modules_is_training(tmp_path, monkeypatch, reward_adapters, part, kind, checkpointing):
    update = fused_lora._Beside if kind == "nf4" else fused_lora._Update
    forms, name = {
        "adapters": ([update], "fuse_lora_updates"),
        "blocks": ([fused_blocks._Norm, fused_blocks._Gate], "fuse_blocks"),
    }[part]
    calls = []
    for form in forms:
        monkeypatch.setattr(form, "apply", lambda *args, f=form, apply=form.apply: calls.append(f) or apply(*args))
    config = {"trunk_cache_gib": 0, "gradient_checkpointing": checkpointing}
    fused, found = trained(tmp_path, kind, reward_adapters, **config)
    kinds = {"adapters": LoraLayer, "blocks": (LlamaRMSNorm, LlamaMLP)}[part]
    layers = [module for module in fused.model.modules() if isinstance(module, kinds)]
    assert layers and all("forward" in vars(layer) for layer in layers), "those of every role"
    assert set(calls) == set(forms)
    monkeypatch.setattr(ppo_trunk, name, lambda model: 0)
    calls.clear()
    stock, expected = trained(tmp_path, kind, reward_adapters, **config)
    assert not calls
    check_same_training((fused, found), (stock, expected))


@pytest.mark.parametrize("full", [False, True])
def test_training_with_the_tiled_head_is_training(tmp_path, monkeypatch, reward_adapters, full):
    """The head is frozen under adapters, and trains without."""

    def run():
        if not full:
            return trained(tmp_path, "llama", reward_adapters, trunk_cache_gib=0)
        config = {"num_iterations": 2, "max_steps": 4, "learning_rate": 1e-3}
        trainer = build(tmp_path, reward_funcs=tiny_reward_model("llama", tiny_tokenizer()), config=config)
        trainer.train()
        return trainer, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    tiles = []
    token_logps = fused_head.token_logps
    monkeypatch.setattr(fused_head, "token_logps", lambda *a, **kw: tiles.append(1) or token_logps(*a, **kw))
    tiled = run()
    assert tiles
    tiles.clear()
    monkeypatch.setattr(ppo_trainer, "tile_fused_head", lambda *args, **kwargs: None)
    stock = run()
    assert not tiles
    check_same_training(tiled, stock)


def test_an_evaluation_leaves_no_texts_and_takes_none_away(tmp_path, reward_adapters):
    trainer, _ = trained(tmp_path, "llama", reward_adapters)
    before = dict(trainer.trunk.texts)
    assert before
    computed = trainer.trunk.num_computed
    trainer.evaluate(Dataset.from_dict({"prompt": [f"{prompt} the mat" for prompt in PROMPTS]}))
    assert trainer.trunk.num_computed == computed + 8, "each text of the evaluation once"
    assert trainer.trunk.texts.keys() == before.keys()


def test_outside_of_its_steps_the_layers_are_computed(tmp_path, reward_adapters):
    trainer, _ = trained(tmp_path, "llama", reward_adapters)
    computed, replayed = trainer.trunk.num_computed, trainer.trunk.num_replayed
    ids = torch.tensor([[5, 6, 7]])
    trainer.model(input_ids=ids, use_cache=False)
    assert (trainer.trunk.num_computed, trainer.trunk.num_replayed) == (computed, replayed)
    assert not trainer.trunk.enabled


def test_prompts_of_one_length_are_sampled(tmp_path):
    """`generate` hands on no attention mask where it hides nothing."""
    rows = Dataset.from_dict({"prompt": ["one length"] * 8})
    trainer = build(tmp_path, rows=rows, reward_funcs=tiny_reward_model("llama", tiny_tokenizer()))
    trainer.train()
    trainer.evaluate(rows)


def test_a_family_whose_layers_cannot_be_replayed_trains_without(tmp_path, monkeypatch):
    """Falcon's layers give tuples."""
    said = []
    monkeypatch.setattr(ppo_trunk.logger, "warning", said.append)
    tokenizer = tiny_tokenizer()
    config = FalconConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, eos_token_id=1
    )
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4, target_modules=["query_key_value"], task_type="CAUSAL_LM", layers_to_transform=[1], layers_pattern="h"
    )
    trainer = build(
        tmp_path,
        FalconForCausalLM(config),
        peft_config=lora,
        reward_funcs=tiny_reward_model("llama", tokenizer),
        config={"trunk_cache_gib": 1.0, "max_steps": 1},
    )
    assert trainer.trunk is None and "cannot be replayed" in said[0]
    trainer.train()


def test_a_resumed_run_replays_the_layers_of_its_rollout(tmp_path, reward_adapters):
    """Step 3 is the second epoch of the second rollout."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    _, whole = trained(tmp_path, "llama", reward_adapters, **options)
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    resumed, weights = trained(tmp_path, "llama", reward_adapters, resume=checkpoint, **options)
    assert resumed.trunk.num_computed == 0 and resumed.trunk.num_replayed > 0
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "config, layers, words",
    [({"trunk_cache_gib": 1.0}, [0, 1], "lowest layer"), ({"trunk_cache_gib": 0.0}, [1], None)],
)
def test_where_it_is_off_the_reason_is_said(tmp_path, monkeypatch, config, layers, words):
    said = []
    monkeypatch.setattr(ppo_trunk.logger, "warning", said.append)
    lora = upper_lora("llama")
    lora.layers_to_transform = layers
    trainer = build(
        tmp_path, peft_config=lora, reward_funcs=tiny_reward_model("llama", tiny_tokenizer()), config=config
    )
    assert trainer.trunk is None
    assert [words in line for line in said] == ([True] if words else [])


def test_micro_batches_by_length_have_the_gradient_of_the_others(tmp_path, monkeypatch):
    found = []
    for balanced in (False, True):
        trainer = build(
            tmp_path,
            reward_funcs=tiny_reward_model("llama", tiny_tokenizer()),
            config={
                "per_device_train_batch_size": 2,
                "steps_per_generation": 4,
                "gradient_accumulation_steps": 4,
                "max_steps": 2,
                "num_iterations": 2,
                "max_grad_norm": 0.0,
                "skip_padding": balanced,
            },
        )
        monkeypatch.setattr(trainer, "_sampling", nullcontext)  # another order of random numbers, other texts
        rows = []
        compute = trainer._compute_loss

        def counted(model, inputs, compute=compute, rows=rows):
            rows.append(len(inputs["prompt_ids"]))
            return compute(model, inputs)

        trainer._compute_loss = counted
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        found.append((rows, history, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}))
    (equal, plain_history, plain), (rows, history, weights) = found
    assert equal == [2] * 8 and sum(rows) == 16 and len(rows) == 8 and rows != equal
    for name in plain:
        torch.testing.assert_close(weights[name], plain[name], rtol=1e-5, atol=1e-6, msg=name)
    for one, other in zip(history, plain_history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6)


def test_several_processes_keep_the_rows_of_each_micro_batch(tmp_path):
    trainer = build(tmp_path, reward_funcs=tiny_reward_model("llama", tiny_tokenizer()))
    batch = rollout(trainer)
    parts = [{k: v[i : i + 2] if v is not None and v.dim() else v for k, v in batch.items()} for i in (0, 2, 4, 6)]
    balanced = balance(parts, 4, ratio=1)
    assert [len(part["prompt_ids"]) for part in balanced] == [2, 2, 2, 2]
    lengths = [(part["prompt_mask"].sum(1) + part["completion_mask"].sum(1)).tolist() for part in balanced]
    assert sum(lengths, []) == sorted(sum(lengths, []), reverse=True)


def test_rows_stay_in_their_step_and_whole(tmp_path):
    trainer = build(tmp_path, reward_funcs=tiny_reward_model("llama", tiny_tokenizer()))
    batch = rollout(trainer)
    parts = [{k: v[i : i + 2] if v is not None and v.dim() else v for k, v in batch.items()} for i in (0, 2, 4, 6)]
    balanced = balance(parts, 2)
    for step in (0, 1):
        before, after = parts[2 * step : 2 * step + 2], balanced[2 * step : 2 * step + 2]
        lengths = [
            int(p + c)
            for b in before
            for p, c in zip(b["prompt_mask"].sum(1), b["completion_mask"].sum(1), strict=True)
        ]
        places = split_by_length(lengths, 2, 4)
        for name in ("prompt_ids", "completion_ids", "advantages", "returns", "values"):
            rows = torch.cat([b[name] for b in before])
            for part, found in zip(places, after, strict=True):
                assert torch.equal(found[name], rows[part]), name
        assert torch.equal(after[0]["num_items_in_batch"], before[0]["num_items_in_batch"])
