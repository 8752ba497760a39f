"""What the library offers around a model works with these classes: compilation, checkpointing, caches, offloading."""

import pytest
import torch
from parity import GEOMETRY, make_pair, same, tokens
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedCache  # noqa: F401  (its back ends are optional)

from hf_llama3 import Llama3Config, Llama3ForCausalLM


def test_compiles_as_one_graph():
    """`fullgraph=True` raises where Dynamo has to leave the graph."""
    ours, _ = make_pair()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with torch.no_grad():
        same(compiled(tokens()).logits, ours(tokens()).logits)
    loss = torch.compile(ours, fullgraph=True, backend="aot_eager")(tokens(), labels=tokens()).loss
    torch.testing.assert_close(loss, ours(tokens(), labels=tokens()).loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    ours, _ = make_pair()
    gradients = []
    for checkpointing in (False, True):
        ours.zero_grad()
        ours.train()
        if checkpointing:
            ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        calls = count_calls(ours.model.layers[0].mlp)
        ours(tokens(), labels=tokens()).loss.backward()
        assert calls["count"] == (2 if checkpointing else 1)  # the layer runs again in the backward pass
        gradients.append({name: weight.grad.clone() for name, weight in ours.named_parameters()})
    for name, gradient in gradients[0].items():
        same(gradient, gradients[1][name])


def count_calls(module):
    calls = {"count": 0}

    def count(*unused):
        calls["count"] += 1

    module.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("make", [lambda c: DynamicCache(config=c), lambda c: StaticCache(config=c, max_cache_len=64)])
def test_caches_give_the_same_tokens(make):
    ours, _ = make_pair()
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    expected = ours.generate(tokens(length=24), use_cache=False, **settings)
    same(ours.generate(tokens(length=24), past_key_values=make(ours.config), **settings), expected)


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_named_cache_implementations(implementation):
    ours, _ = make_pair()
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    expected = ours.generate(tokens(length=24), **settings)
    same(ours.generate(tokens(length=24), cache_implementation=implementation, **settings), expected)


def test_device_map_splits_no_layer(tmp_path):
    ours, _ = make_pair()
    ours.save_pretrained(tmp_path)
    limit = {"cpu": "300KB"}  # less than the model: the rest goes to disk
    split = Llama3ForCausalLM.from_pretrained(
        tmp_path, device_map="auto", max_memory=limit, offload_folder=tmp_path / "offload"
    )
    places = set(split.hf_device_map.values())
    assert places == {"cpu", "disk"}, split.hf_device_map
    assert all(name.count(".") <= 2 for name in split.hf_device_map), split.hf_device_map
    with torch.no_grad():
        same(split(tokens()).logits, ours(tokens()).logits)


def test_dropout_only_in_training():
    config = Llama3Config(**GEOMETRY, attention_dropout=0.5, attn_implementation="eager")
    model = Llama3ForCausalLM(config).eval()
    same(model(tokens()).logits, model(tokens()).logits)
    model.train()
    assert not torch.equal(model(tokens()).logits, model(tokens()).logits)


def test_exactly_one_of_ids_and_embeddings():
    ours, _ = make_pair()
    embeddings = ours.get_input_embeddings()(tokens())
    same(ours(inputs_embeds=embeddings).logits, ours(tokens()).logits)
    for inputs in ({}, {"input_ids": tokens(), "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            ours(**inputs)
