"""A cache with room ahead holds what transformers' own holds, and copies only when the room is used up."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rlhf_ext.models import growing_cache
from rlhf_ext.models.growing_cache import GrowingLayer, grow_ahead
from tests.tiny import tiny_causal_lm, tiny_tokenizer


CHANGES = {
    "nothing": lambda layer: None,
    "rows selected": lambda layer: layer.batch_select_indices(torch.tensor([2, 0])),
    "rows repeated": lambda layer: layer.batch_repeat_interleave(2),
    "columns cropped": lambda layer: layer.crop(-2),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_keys_and_values_are_those_of_transformers(monkeypatch, change):
    monkeypatch.setattr(growing_cache, "ROOM", 3)
    torch.manual_seed(0)
    layers = [GrowingLayer(), DynamicLayer()]
    rows = 3
    for step, columns in enumerate([4, 1, 1, 1, 1, 2, 5, 1]):
        if step == 4:
            for layer in layers:
                CHANGES[change](layer)
            rows = {"rows selected": 2, "rows repeated": 6}.get(change, rows)
        new = torch.randn(2, rows, 2, columns, 8)
        found, expected = (layer.update(*new) for layer in layers)
        assert layers[0].get_seq_length() == layers[1].get_seq_length()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(layers[0].keys, layers[1].keys) and torch.equal(layers[0].values, layers[1].values)


def test_a_step_within_the_room_moves_nothing():
    torch.manual_seed(0)
    layer = GrowingLayer()
    places = [layer.update(*torch.randn(2, 2, 2, 1, 8))[0].data_ptr() for _ in range(2 * growing_cache.ROOM + 2)]
    # The first column, and as many as there is room for.
    assert len(set(places[: growing_cache.ROOM + 1])) == 1
    assert len(set(places)) == 2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_a_model_decodes_with_it(kind):
    """Gemma 3's layers with a window keep their own cache."""
    model = tiny_causal_lm(kind, tiny_tokenizer()).eval()
    torch.manual_seed(0)
    ids = torch.randint(2, 20, (3, 12))
    said = []
    for ahead in (False, True):
        cache = DynamicCache(config=model.config)
        if ahead:
            grow_ahead(cache)
            kinds = {type(layer) for layer in cache.layers}
            assert GrowingLayer in kinds and kinds <= {GrowingLayer, DynamicSlidingWindowLayer}
        with torch.no_grad():
            steps = [model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True).logits]
            steps += [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(5, 12)]
        said.append(torch.cat(steps, dim=1))
    assert torch.equal(said[1], said[0])


def test_a_cache_that_makes_its_layers_later_makes_these():
    cache = DynamicCache()
    grow_ahead(cache)
    cache.update(*torch.randn(2, 1, 2, 3, 8), 0)
    assert type(cache.layers[0]) is GrowingLayer


def test_rows_that_were_cut_leave_the_memory():
    layer = GrowingLayer()
    layer.update(*torch.randn(2, 32, 2, 10, 8))
    layer.batch_select_indices(torch.arange(4))
    held = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    assert {t.untyped_storage().nbytes() for t in held} == {4 * 2 * 10 * 8 * 4}


def test_no_more_columns_are_made_than_there_will_be():
    cache = DynamicCache()
    grow_ahead(cache, longest=9)
    for columns in (4, 1, 1, 1, 1, 1, 1):  # the last is more than was said
        keys, _ = cache.update(*torch.randn(2, 1, 2, columns, 8), 0)
        assert keys.untyped_storage().nbytes() == 2 * max(9, keys.shape[-2]) * 8 * 4
    assert keys.shape[-2] == 10


def test_an_offloaded_cache_stays():
    cache = DynamicCache(config=tiny_causal_lm("llama", tiny_tokenizer()).config)
    cache.offloading = True
    grow_ahead(cache)
    assert {type(layer) for layer in cache.layers} == {DynamicLayer}


def test_filled_layers_and_no_cache_stay():
    cache = DynamicCache()
    cache.update(*torch.randn(2, 1, 2, 3, 8), 0)
    grow_ahead(cache)
    assert type(cache.layers[0]) is DynamicLayer
    grow_ahead(None)
