"""Rows that have ended leave the batch: the same greedy texts as `generate`, the same distribution."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, MixtralConfig, RecurrentGemmaConfig, RwkvConfig
from transformers.cache_utils import DynamicLayer

from rlhf_ext.models import live_sampling
from rlhf_ext.models.generation import sample_completions
from rlhf_ext.models.growing_cache import cache_of
from rlhf_ext.models.live_sampling import _can_be_cut, draw, only_live_rows
from tests.tiny import tiny_causal_lm, tiny_tokenizer


PROMPTS = [f"w{i} " * (1 + i % 5) + "the cat" for i in range(12)]


def setting(kind):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    model = tiny_causal_lm(kind, tokenizer).eval()
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    return model, tokenizer, {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def config(tokenizer, eos, **kwargs):
    return GenerationConfig(max_new_tokens=24, pad_token_id=tokenizer.pad_token_id, eos_token_id=eos, **kwargs)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("adapter", [False, True])
def test_greedy_texts_are_those_of_generate(kind, adapter):
    model, tokenizer, batch = setting(kind)
    if adapter:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    free = model.generate(**batch, generation_config=config(tokenizer, None))[:, batch["input_ids"].size(1) :]
    # Ends that come at different places, and not in every row.
    counts = torch.bincount(free.flatten(), minlength=len(tokenizer))
    eos = [token for token in range(len(tokenizer)) if 0 < counts[token] <= 12][:6]
    expected = model.generate(**batch, generation_config=config(tokenizer, eos))
    sizes = []
    hook = model.get_input_embeddings().register_forward_hook(lambda m, a, out: sizes.append(len(out)))
    with only_live_rows(model):
        found = model.generate(**batch, generation_config=config(tokenizer, eos))
    hook.remove()
    assert torch.equal(found, expected)
    assert sizes[0] == len(PROMPTS) and sizes[-1] < len(PROMPTS), "rows have left the batch"
    again = model.generate(**batch, generation_config=config(tokenizer, eos))
    assert torch.equal(again, expected), "after the block it is the old one"


@pytest.mark.parametrize("kind", ["rwkv", "recurrent_gemma"])
def test_families_that_return_no_cache(kind):
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    if kind == "rwkv":
        settings = RwkvConfig(**sizes, attention_hidden_size=16, context_length=64)
    else:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        settings = RecurrentGemmaConfig(**sizes, **heads, lru_width=16, attention_window_size=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings).eval()
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10], [5, 6, 7]])}
    expected = model.generate(**batch, generation_config=config(tokenizer, None))
    with only_live_rows(model):
        assert torch.equal(model.generate(**batch, generation_config=config(tokenizer, None)), expected)


def test_rows_are_drawn_alike_some_at_a_time_and_all_at_once(monkeypatch):
    scores = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 3
    found = []
    for rows in (7, 3, 1):
        monkeypatch.setattr(live_sampling, "DRAWN", 50 * rows)
        torch.manual_seed(1)
        found.append([draw(scores) for _ in range(20)])
    for some in found[1:]:
        assert torch.equal(torch.stack(some), torch.stack(found[0]))
    assert torch.stack(found[0]).float().var(dim=0).min() > 0, "each draw is another"


def test_draws_follow_the_distribution_and_nothing_forbidden_is_drawn():
    torch.manual_seed(0)
    scores = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf, 2.0, -1.0, -torch.inf]])
    number = 200_000
    tokens = draw(scores.expand(number, -1))
    counts = torch.bincount(tokens, minlength=7).double()
    expected = scores[0].softmax(-1).double() * number
    allowed = expected > 0
    assert not counts[~allowed].any()
    chi_square = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = .001


def test_logits_that_are_not_finite_raise():
    with pytest.raises(ValueError, match="not finite"):
        draw(torch.full((2, 5), torch.nan))


def test_a_cache_with_other_states_is_not_cut():
    model, _, batch = setting("llama")
    cache = cache_of(model(**batch, use_cache=True))
    assert _can_be_cut(cache)
    cache.layers[0] = type("Recurrent", (DynamicLayer,), {})()
    assert not _can_be_cut(cache) and not _can_be_cut(object())
    assert cache_of((torch.zeros(1),), given=cache) is cache


def test_a_generate_of_the_callers_own_is_put_back():
    model, tokenizer, batch = setting("llama")
    own = functools.partial(model.generate, use_cache=True)
    model.generate = own
    with only_live_rows(model):
        model.generate(**batch, generation_config=config(tokenizer, None))
    assert model.generate is own


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_samples_of_one_prompt_share_what_is_read_of_it(kind):
    model, tokenizer, batch = setting(kind)
    order = torch.tensor([3, 0, 3, 3, 5, 0, 11, 5])
    batch = {name: tensor[order] for name, tensor in batch.items()}
    expected = model.generate(**batch, generation_config=config(tokenizer, None))
    sizes = []
    hook = model.get_input_embeddings().register_forward_hook(lambda m, a, out: sizes.append(tuple(out.shape[:2])))
    with only_live_rows(model):
        found = model.generate(**batch, generation_config=config(tokenizer, None))
    hook.remove()
    assert torch.equal(found, expected)
    assert sizes[0] == (4, batch["input_ids"].size(1)) and sizes[1][0] > 4, "read once, then decoded each by itself"


def test_samples_are_read_once_outside_a_trainer_too():
    model, tokenizer, batch = setting("llama")
    rows = []
    hook = model.get_input_embeddings().register_forward_hook(lambda m, a, out: rows.append(out.shape[:2].numel()))
    sampling = {"num_samples": 4, "max_new_tokens": 8, "temperature": 0.0}
    found = sample_completions(model, tokenizer, PROMPTS, **sampling)
    hook.remove()
    assert rows[0] == batch["input_ids"].numel()
    once = sample_completions(model, tokenizer, PROMPTS, **{**sampling, "num_samples": 1})
    assert found.completion_ids == [row for row in once.completion_ids for _ in range(4)]


def test_experts_that_balance_their_load_are_sampled():
    """SFT leaves `output_router_logits` in the configuration; its loss reads the mask of a whole text."""
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    settings = MixtralConfig(vocab_size=len(tokenizer), **sizes, **heads, output_router_logits=True)
    model = AutoModelForCausalLM.from_config(settings).eval()
    for prompts in (["the cat"], PROMPTS):
        found = sample_completions(model, tokenizer, prompts, num_samples=4, max_new_tokens=5, temperature=0.0)
        alone = [sample_completions(model, tokenizer, [p], max_new_tokens=5, temperature=0.0) for p in prompts]
        assert found.completion_ids == [one.completion_ids[0] for one in alone for _ in range(4)]


def test_prompts_that_differ_in_their_padding_alone_are_two():
    """A padding token within a text is read; the same one in front of a text is not."""
    model, tokenizer, _ = setting("llama")
    ids = torch.tensor([[tokenizer.pad_token_id, 7, 8, 9]] * 3)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    read = []
    hook = model.get_input_embeddings().register_forward_hook(lambda m, a, out: read.append(len(out)))
    with only_live_rows(model):
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config(tokenizer, None))
    hook.remove()
    expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=config(tokenizer, None))
    assert read[0] == 2 and torch.equal(found, expected)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_copies_of_a_prompt_are_drawn_apart():
    model, tokenizer, batch = setting("llama")
    batch = {name: tensor[:1].expand(64, -1) for name, tensor in batch.items()}
    torch.manual_seed(0)
    with only_live_rows(model):
        out = model.generate(**batch, generation_config=config(tokenizer, None, do_sample=True, top_k=0, top_p=1.0))
    assert len({tuple(row) for row in out.tolist()}) > 50  # some end at once


def test_first_tokens_and_lengths_are_sampled_as_by_generate():
    """The share of rows that have ended after each step, of 600 each way: two samples, each within its noise."""
    model, tokenizer, batch = setting("llama")
    batch = {name: tensor[:1].expand(600, -1) for name, tensor in batch.items()}
    eos = [4, 9, 12, 20, 33]
    ended = []
    for live in (False, True):
        torch.manual_seed(3)
        sampling = config(tokenizer, eos, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        if live:
            with only_live_rows(model):
                out = model.generate(**batch, generation_config=sampling)
        else:
            out = model.generate(**batch, generation_config=sampling)
        new = out[:, batch["input_ids"].size(1) :]
        ends = torch.isin(new, torch.tensor(eos)).int().cumsum(1).clamp(max=1).double().mean(0)
        ended.append(torch.nn.functional.pad(ends, (0, 24 - len(ends)), value=ends[-1].item()))
    largest = (ended[0] - ended[1]).abs().max().item()
    assert largest < 1.95 * (2 / 600) ** 0.5  # Kolmogorov-Smirnov, p = .001
    assert 0.2 < ended[1][5] < 0.95
