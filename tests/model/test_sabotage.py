"""Classic bugs, built in on purpose. Nine are of numbers: every check of `parity.py` must see every one of them. Six
are of control flow, which shows only in what it controls: the checks that are named after that must see them.

A parity test that cannot fail is worth nothing; these are the ones that the field's own tests let pass.
"""

import parity
import pytest
import torch
from parity import CHECKS, GEOMETRY, make_pair, same

from hf_llama3 import modeling_llama3
from hf_llama3.conversion.weights import half_to_interleaved
from hf_llama3.presets import llama3_scaling

PLAIN = {"rope_theta": 500000.0, "rope_type": "default"}
HEAD_DIM = 16


def with_rope(rope):
    def break_model(ours):
        ours.config.rope_parameters = rope
        ours.model.rotary_emb = type(ours.model.rotary_emb)(ours.config)

    return break_model


def wrong_eps(ours):
    for module in ours.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-6


def rows_not_reordered(ours):
    for layer in ours.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            wrong = half_to_interleaved(projection.weight.data, HEAD_DIM)
            projection.weight.data = wrong.reshape(projection.weight.shape).clone()


def heads_out_of_order(ours):
    for layer in ours.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            heads = projection.weight.data.view(-1, HEAD_DIM, projection.weight.shape[1])
            projection.weight.data = heads.flip(0).reshape(projection.weight.shape).clone()


def gate_and_up_swapped(ours):
    for layer in ours.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
        layer.mlp.gate_proj.weight.data, layer.mlp.up_proj.weight.data = (
            layer.mlp.gate_proj.weight.data,
            layer.mlp.up_proj.weight.data,
        )


def norms_swapped(ours):
    for layer in ours.model.layers:
        one, other = layer.input_layernorm.weight.data, layer.post_attention_layernorm.weight.data
        layer.input_layernorm.weight.data, layer.post_attention_layernorm.weight.data = other, one


def wrong_scale(ours):
    for layer in ours.model.layers:
        layer.self_attn.scaling *= 1.1


BUGS = {
    "RoPE scaling forgotten": with_rope(PLAIN),
    "factor 32 for 8": with_rope({"rope_theta": 500000.0} | llama3_scaling(32.0)),
    "theta 10k for 500k": with_rope({"rope_theta": 10000.0} | llama3_scaling(8.0)),
    "eps 1e-6 for 1e-5": wrong_eps,
    "q and k rows not reordered": rows_not_reordered,
    "key/value heads out of order": heads_out_of_order,
    "gate and up swapped": gate_and_up_swapped,
    "the two norms swapped": norms_swapped,
    "attention scale x 1.1": wrong_scale,
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("check", CHECKS)
def test_check_sees_bug(check, bug):
    ours, theirs = make_pair()
    BUGS[bug](ours)
    with pytest.raises(AssertionError):
        check(ours, theirs)


def changed_arguments(original, change):
    """Return a function that has its keyword arguments changed."""

    def call(*args, **kwargs):
        change(kwargs)
        return original(*args, **kwargs)

    return call


def sabotage_mask(patch, ours, change):
    patch.setattr(modeling_llama3, "create_causal_mask", changed_arguments(modeling_llama3.create_causal_mask, change))


def mask_ignored(patch, ours):
    sabotage_mask(patch, ours, lambda given: given.update(attention_mask=None))


def padding_on_the_wrong_side(patch, ours):
    def flip(given):
        if given["attention_mask"] is not None:
            given["attention_mask"] = given["attention_mask"].flip(-1)

    sabotage_mask(patch, ours, flip)


def packed_texts_see_each_other(patch, ours):
    sabotage_mask(patch, ours, lambda given: given.update(position_ids=None))


def position_off_by_one_after_the_cache(patch, ours):
    def shift(given):
        cache = given.get("past_key_values")
        if cache is not None and (past := cache.get_seq_length()) and given.get("position_ids") is None:
            given["position_ids"] = past + 1 + torch.arange(given["input_ids"].shape[1])[None]

    patch.setattr(ours.model, "forward", changed_arguments(ours.model.forward, shift))


def cache_not_appended(patch, ours):
    """Its first layer returns the new keys and values alone once there are others."""
    attention = ours.model.layers[0].self_attn

    def forget(given):
        if given["past_key_values"].get_seq_length(0):
            given["past_key_values"] = None

    patch.setattr(attention, "forward", changed_arguments(attention.forward, forget))


def labels_shifted_twice(patch, ours):
    def shift(given):
        given["labels"] = torch.nn.functional.pad(given["labels"], (0, 1), value=-100)[..., 1:]

    ours.loss_function = changed_arguments(ours.loss_function, shift)


# Bug -> the checks that exist to see it; `generate` gives positions itself.
CONTROL_FLOW = {
    mask_ignored: [parity.check_left_padding],
    padding_on_the_wrong_side: [parity.check_left_padding],
    packed_texts_see_each_other: [parity.check_packed],
    position_off_by_one_after_the_cache: [parity.check_cached_steps, parity.check_static_cache],
    cache_not_appended: [parity.check_cached_steps, parity.check_greedy, parity.check_sampling],
    labels_shifted_twice: [parity.check_loss, parity.check_gradients],
}


@pytest.mark.parametrize(
    ("bug", "check"),
    [(bug, check) for bug, checks in CONTROL_FLOW.items() for check in checks],
    ids=lambda one: one.__name__,
)
def test_check_sees_bug_of_control_flow(bug, check, monkeypatch):
    """That one fails; the logits of a whole text, without padding, are what they were and show none of them."""
    ours, theirs = make_pair()
    expected = theirs(parity.tokens()).logits
    with monkeypatch.context() as patch:
        bug(patch, ours)
        same(ours(parity.tokens()).logits, expected)
        outputs = []

        def compare(one, other):
            outputs.append(one)
            same(one, other)

        patch.setattr(parity, "same", compare)
        with pytest.raises(AssertionError):
            check(ours, theirs)
    assert outputs, "the check fails by its comparison, not before"


def test_the_healthy_model_passes():
    """The control: what `make_pair` gives is equal, so the bugs are all that the checks above see."""
    for check in CHECKS:
        check(*make_pair())
    assert GEOMETRY["hidden_size"] // GEOMETRY["num_attention_heads"] == HEAD_DIM
    assert torch.equal(make_pair()[0].lm_head.weight, make_pair()[1].lm_head.weight)
