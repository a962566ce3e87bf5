"""Replayed lower layers: the same outputs and gradients, and a refusal where they would not be."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from rlhf_ext.models.build import load_policy, without_dropout
from rlhf_ext.models.positions import count_positions_from_mask
from rlhf_ext.models.scoring import pool_by_attention_mask
from rlhf_ext.models.trunk_cache import TrunkCache, num_frozen_layers
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer


IDS = torch.tensor([[5, 6, 7, 8, 9, 1], [10, 11, 1, 0, 0, 0], [12, 6, 7, 13, 1, 0]])
RIGHT = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 5 + [0]])
LEFT = RIGHT.flip(1)


def adapted(kind, layers=(2,)):
    torch.manual_seed(0)
    depth = {"n_layer": 3} if kind == "gpt2" else {"num_hidden_layers": 3}
    if kind == "gemma3":
        depth["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]
    model = tiny_reward_model(kind, tiny_tokenizer(), **depth)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = LoraConfig(
        r=4,
        task_type="SEQ_CLS",
        target_modules=["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "v_proj", "down_proj"],
        fan_in_fan_out=kind == "gpt2",
        modules_to_save=["score"],
        layers_to_transform=list(layers),
        layers_pattern="h" if kind == "gpt2" else "layers",
        init_lora_weights=False,
    )
    return pool_by_attention_mask(get_peft_model(model, config)).train()


def run(model, ids, mask):
    model.zero_grad()
    scores = model(input_ids=ids, attention_mask=mask).logits
    scores.sum().backward()
    return scores.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_replay_is_bitwise(kind, padding):
    model = adapted(kind)
    ids, mask = (IDS, RIGHT) if padding == "right" else (IDS.flip(1), LEFT)
    scores, gradients = run(model, ids, mask)
    cache = TrunkCache(model, 2)
    for turn in range(2):
        found, found_gradients = run(model, ids, mask)
        assert torch.equal(found, scores), turn
        assert all(torch.equal(found_gradients[name], gradients[name]) for name in gradients), turn
    assert (cache.num_computed, cache.num_replayed) == (3, 3)
    rows, _ = run(model, ids[1:], mask[1:])  # another batch of the same texts
    torch.testing.assert_close(rows, scores[1:], rtol=1e-5, atol=1e-6)
    assert cache.num_replayed == 5
    for text in cache.texts.values():
        text.zero_()
    assert not torch.allclose(run(model, ids, mask)[0], scores)  # what is replayed is what is stored
    cache.remove()
    assert torch.equal(run(model, ids, mask)[0], scores)


def test_two_adapters_share_the_texts(tmp_path):
    first, second = adapted("llama"), adapted("llama", layers=(1, 2))
    cache = TrunkCache(first, 1)
    run(first, IDS, RIGHT)
    expected, _ = run(second, IDS, RIGHT)
    other = TrunkCache(second, 1, shared=cache)
    other.fill(IDS, RIGHT)  # nothing to compute
    assert (other.num_computed, other.num_replayed) == (0, 3)
    assert torch.equal(run(second, IDS, RIGHT)[0], expected)
    assert (other.num_computed, other.num_replayed) == (0, 6)
    cache.save(tmp_path / "texts.safetensors")
    third = adapted("llama", layers=(1, 2))
    loaded = TrunkCache(third, 1)
    loaded.load(tmp_path / "texts.safetensors")
    assert torch.equal(run(third, IDS, RIGHT)[0], expected) and loaded.num_computed == 0
    with pytest.raises(ValueError, match="another trunk's texts.*layers.*'1', '2'"):
        TrunkCache(adapted("llama"), 2).load(tmp_path / "texts.safetensors")
    moved, other = adapted("llama", layers=(1, 2)), adapted("llama", layers=(1, 2))
    moved.get_base_model().config._name_or_path = "a copy elsewhere"
    TrunkCache(moved, 1).load(tmp_path / "texts.safetensors")
    with torch.no_grad():
        other.get_base_model().model.layers[0].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(ValueError, match="another trunk's texts.*weights"):
        TrunkCache(other, 1).load(tmp_path / "texts.safetensors")
    ahead = TrunkCache(adapted("llama"), 1)
    ahead.fill(IDS, RIGHT)
    assert all(torch.equal(ahead.texts[key], text) for key, text in cache.texts.items())


def test_what_changes_below_is_refused():
    with pytest.raises(ValueError, match=r"parameters of the layers to replay train.*lora"):
        TrunkCache(adapted("llama", layers=(1, 2)), 2)
    frozen = adapted("llama", layers=(1, 2))
    frozen.requires_grad_(False)  # as a model that scores: nothing trains, and adapters may still be switched
    with pytest.raises(ValueError, match="carry adapters"):
        TrunkCache(frozen, 2)
    with pytest.raises(ValueError, match="num_layers.*3 of a trunk of 3"):
        TrunkCache(adapted("llama"), 3)
    model = adapted("gpt2")
    model.base_model.model.transformer.h[0].mlp.dropout.p = 0.1
    with pytest.raises(ValueError, match="dropout"):
        TrunkCache(model, 2)
    model = adapted("gpt2")
    model.base_model.model.transformer.drop.p = 0.5  # before the first layer
    with pytest.raises(ValueError, match="dropout"):
        TrunkCache(model, 2)
    model = adapted("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        TrunkCache(model, 2)


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_8_bit_layers_with_outliers_apart_read_their_neighbours(tmp_path, threshold):
    """bitsandbytes takes a column out of the product where any row of the batch has an outlier."""
    tiny_causal_lm("llama", tiny_tokenizer(), hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    model = load_policy(str(tmp_path), dtype=torch.float32, quantization_config=config)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="8 bits.*llm_int8_threshold") if threshold else nullcontext():
        TrunkCache(model, 1).prove()


def test_checkpointing_computes_a_replayed_layer_no_second_time():
    model = adapted("llama")
    scores, gradients = run(model, IDS, RIGHT)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    cache, calls = TrunkCache(model, 2), []
    model.base_model.model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    for turn in range(2):
        found, found_gradients = run(model, IDS, RIGHT)
        assert torch.equal(found, scores), turn
        assert all(torch.equal(found_gradients[name], gradients[name]) for name in gradients), turn
    assert len(calls) == 1 and cache.num_replayed == 3


def causal(kind):
    torch.manual_seed(0)
    depth = {"n_layer": 3} if kind == "gpt2" else {"num_hidden_layers": 3}
    if kind == "gemma3":
        depth["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]
    model = tiny_causal_lm(kind, tiny_tokenizer(), **depth)
    without_dropout(model)
    config = LoraConfig(
        r=4,
        task_type="CAUSAL_LM",
        target_modules=["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "v_proj", "down_proj"],
        fan_in_fan_out=kind == "gpt2",
        layers_to_transform=[2],
        layers_pattern="h" if kind == "gpt2" else "layers",
        init_lora_weights=False,
    )
    model = get_peft_model(model, config).train()
    count_positions_from_mask(model.get_base_model().base_model)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_a_policy_and_its_reference_share_the_layers_and_generation_passes_by(kind):
    model = causal(kind)
    assert num_frozen_layers(model) == 2
    ids, mask = IDS.flip(1), LEFT

    def run():
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits[mask.bool()].logsumexp(-1).sum().backward()
        with torch.no_grad(), model.disable_adapter():
            reference = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        sampled = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        return logits.detach(), reference, grads, sampled

    plain = run()
    cache = TrunkCache(model, 2)
    for _ in range(2):
        found = run()
        real = mask.bool()
        assert torch.equal(found[0][real], plain[0][real]) and torch.equal(found[1][real], plain[1][real])
        assert all(torch.equal(found[2][name], plain[2][name]) for name in plain[2]) and len(plain[2]) > 0
        assert torch.equal(found[3], plain[3])
    assert (cache.num_computed, cache.num_replayed) == (3, 9)


def test_memory_has_a_limit_and_what_lies_beyond_is_computed():
    model = causal("llama")
    limit = 6 * model.config.hidden_size * 4  # the longest text fits, no other one beside it
    cache = TrunkCache(model, 2, max_bytes=limit)
    expected = model(input_ids=IDS, attention_mask=RIGHT, use_cache=False).logits
    assert len(cache.texts) == 1 and cache.nbytes == limit
    assert torch.equal(model(input_ids=IDS, attention_mask=RIGHT, use_cache=False).logits, expected)
    assert (cache.num_computed, cache.num_replayed) == (6, 0)
    with cache.apart():
        assert not cache.texts
        model(input_ids=IDS[1:2], attention_mask=RIGHT[1:2], use_cache=False)
        assert len(cache.texts) == 1
    assert cache.nbytes == limit


def test_what_stands_before_the_layers_counts_too():
    """Positions that train, or an adapter in the embeddings: the layers above them are not frozen."""
    torch.manual_seed(0)
    options = {"r": 4, "task_type": "CAUSAL_LM", "layers_to_transform": [1], "layers_pattern": "h"}
    plain = LoraConfig(**options, target_modules=["c_attn"], fan_in_fan_out=True)
    assert num_frozen_layers(get_peft_model(tiny_causal_lm("gpt2", tiny_tokenizer()), plain)) == 1
    positions = LoraConfig(**options, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["wpe"])
    model = get_peft_model(tiny_causal_lm("gpt2", tiny_tokenizer()), positions)
    assert num_frozen_layers(model) == 0
    without_dropout(model)
    with pytest.raises(ValueError, match="wpe"):
        TrunkCache(model, 1)


def test_a_proof_leaves_nothing_behind():
    model = causal("llama")
    cache = TrunkCache(model, 2)
    cache.prove()
    assert not cache.texts and (cache.num_computed, cache.num_replayed) == (0, 0)
    cache._lower[-1].forward.forward = lambda hidden, *args, **kwargs: (hidden,)  # a layer that gives a tuple
    with pytest.raises(ValueError, match="cannot be replayed"):
        cache.prove()
    assert "forward" not in vars(cache._lower[0])
