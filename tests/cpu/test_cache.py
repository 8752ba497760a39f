"""A cache that grows in place holds what the library's holds, whatever is done to it."""

import copy

import pytest
import torch
from small import CLASSES, make_model, prompts
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import hf_llama3
from hf_llama3.cpu.cache import SPARE_TOKENS, GrowingLayer

HOW = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
CHANGES = {
    "nothing": lambda layer: None,
    "crop": lambda layer: layer.crop(-3),
    "crop of all": lambda layer: layer.crop(-layer.get_seq_length()),
    "other order of rows": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "fewer rows": lambda layer: layer.batch_select_indices(torch.tensor([0, 2])),
    "more rows": lambda layer: layer.batch_repeat_interleave(2),
    "from the start": lambda layer: layer.reset(),
    "the first row": lambda layer: layer.__dict__.update(keys=layer.keys[:1], values=layer.values[:1]),
    "half the tokens": lambda layer: layer.__dict__.update(keys=layer.keys[:, :, ::2], values=layer.values[:, :, ::2]),
    "other values": lambda layer: layer.__dict__.update(keys=doubled(layer.keys), values=doubled(layer.values)),
}  # fmt: skip


def doubled(x):
    """Return another tensor that lies in memory as this one does."""
    return torch.empty_strided(x.shape, x.stride()).copy_(2 * x)


def states(rows, tokens, seed):
    return torch.randn(2, rows, 2, tokens, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("length", [5, 3 * SPARE_TOKENS])
def test_same_as_the_library(length, change):
    ours, theirs, rows = GrowingLayer(), DynamicLayer(), 3
    for seed, size in enumerate((length, 1, 1, 2)):
        for layer in (ours, theirs):
            layer.update(*states(rows, size, seed))
    for layer in (ours, theirs):
        CHANGES[change](layer)
    rows = {"fewer rows": 2, "more rows": 6, "the first row": 1}.get(change, rows)
    for seed, size in enumerate((1, 2, SPARE_TOKENS + length, 1), start=10):
        its, made = [layer.update(*states(rows, size, seed)) for layer in (theirs, ours)]
        assert all(map(torch.equal, made, its)) and made[0] is ours.keys
    assert ours.get_seq_length() == theirs.get_seq_length()


def test_steps_stay_in_place():
    layer = GrowingLayer()
    layer.update(*states(3, 5, 0))
    places = set()
    for seed in range(SPARE_TOKENS):
        places.add(tuple(part.data_ptr() for part in layer.update(*states(3, 1, seed))))
    assert len(places) == 1 and layer.key_memory.shape[2] == layer.keys.shape[2] == 5 + SPARE_TOKENS
    layer.update(*states(3, 1, 0))
    assert layer.keys.data_ptr() not in {key for key, _ in places}


def test_a_copy_goes_its_own_way():
    layer = GrowingLayer()
    layer.update(*states(1, 5, 0))
    other = copy.deepcopy(layer)
    layer.update(*states(1, 1, 1))
    other.update(*states(1, 1, 2))
    for one, seed in ((layer, 1), (other, 2)):
        assert torch.equal(one.keys[:, :, 5:], states(1, 1, seed)[0])


def test_made_in_inference_mode():
    """What was made there cannot be written to elsewhere."""
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*states(1, 5, 0))
    keys, _ = layer.update(*states(1, 1, 1))
    assert torch.equal(keys, torch.cat([states(1, 5, 0)[0], states(1, 1, 1)[0]], 2))


@pytest.mark.parametrize("kind", CLASSES)
def test_caches_of_generate(kind):
    plain, model = make_model(kind), hf_llama3.optimize(make_model(kind))
    theirs, ours = [one.generate(prompts(), **HOW) for one in (plain, model)]
    assert torch.equal(ours.sequences, theirs.sequences)
    for layer, other in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert type(layer) is GrowingLayer and type(other) is DynamicLayer and layer.key_memory is not None
        torch.testing.assert_close(layer.keys, other.keys, rtol=0, atol=1e-4)
    own = DynamicCache(config=model.config)
    assert torch.equal(model.generate(prompts(), past_key_values=own, **HOW).sequences, theirs.sequences)
    assert {type(layer) for layer in own.layers} == {DynamicLayer}
    again = hf_llama3.restore(model).generate(prompts(), **HOW)
    assert {type(layer) for layer in again.past_key_values.layers} == {DynamicLayer}
