"""Nine classic bugs, built in on purpose: every check of `parity.py` must see every one of them.

A parity test that cannot fail is worth nothing; these are the ones that the field's own tests let pass.
"""

import pytest
import torch
from parity import CHECKS, GEOMETRY, make_pair

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


def test_the_healthy_model_passes():
    """The control: what `make_pair` gives is equal, so the bugs are all that the checks above see."""
    for check in CHECKS:
        check(*make_pair())
    assert GEOMETRY["hidden_size"] // GEOMETRY["num_attention_heads"] == HEAD_DIM
    assert torch.equal(make_pair()[0].lm_head.weight, make_pair()[1].lm_head.weight)
