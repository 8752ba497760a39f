"""Models of 8 and 4 bits: how far from the plain ones, and what is refused. (Products: `tests/cpu`.)"""

import pytest
import torch
from small import CLASSES, logits, make_model, prompts
from torch import nn

import hf_llama3
from hf_llama3.cpu import processor
from hf_llama3.cpu.kernels.int8_int4 import Int4Kernel, Int8Kernel
from hf_llama3.cpu.linear import KernelLinear
from hf_llama3.cpu.processor import Processor
from hf_llama3.errors import UserError
from hf_llama3.measure.bench import weight_bytes


def test_bytes():
    """What a step reads: of int8 a scale in bfloat16 for 64 inputs, of int4 scale and minimum for 32; blocks of 128."""
    size = {"hidden_size": 256, "intermediate_size": 384}
    layers, head = 2 * (256 * (256 + 2 * 128 + 256 + 3 * 384)), 512 * 256
    assert (
        weight_bytes(make_model(**size)) == weight_bytes(hf_llama3.optimize(make_model(**size))) == 4 * (layers + head)
    )
    assert weight_bytes(hf_llama3.optimize(make_model(**size), quantize="int8")) == (layers + head) * (1 + 2 / 64)
    int4 = weight_bytes(hf_llama3.optimize(make_model(**size), quantize="int4"))
    assert int4 == layers * (1 / 2 + 4 / 32) + head * (1 + 2 / 64)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("kind", CLASSES)
def test_model(kind, quantize):
    model = make_model(kind, dtype=torch.bfloat16)
    theirs = logits(model)
    hf_llama3.optimize(model, quantize=quantize)
    kinds = {type(module.kernel) for module in model.modules() if type(module) is KernelLinear}
    assert kinds == ({Int8Kernel} if quantize == "int8" else {Int8Kernel, Int4Kernel})
    assert type(model.lm_head.kernel) is Int8Kernel and sum(type(m) is nn.Linear for m in model.modules()) == 0
    ours = logits(model)
    bound = {"int8": 0.05, "int4": 0.35}[quantize]
    assert 1e-3 < (ours - theirs).norm() / theirs.norm() < bound
    tokens = model.generate(prompts(), max_new_tokens=10, do_sample=False)
    alone = model.generate(prompts()[:1], max_new_tokens=10, do_sample=False)
    assert torch.equal(tokens[:1], alone)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weights_are_gone(quantize, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    model = hf_llama3.Llama3ForCausalLM.from_pretrained(tmp_path / "model")
    hf_llama3.optimize(model, quantize=quantize)
    for act in (
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: model.push_to_hub("somebody/model"),
        lambda: model.state_dict(),
    ):
        with pytest.raises(
            UserError, match=f"quantised to {quantize} has no plain weights to save; copy .*model instead"
        ):
            act()
    with pytest.raises(UserError, match=f"quantised to {quantize} cannot be restored; load .*model again"):
        hf_llama3.restore(model)
    with pytest.raises(UserError, match="a quantised weight cannot be read"):
        model.model.layers[0].mlp.up_proj.weight + 0
    with pytest.raises(UserError, match="an optimised model cannot be trained"):
        model.train()
    assert not (tmp_path / "saved").exists()
    assert model.num_parameters() == hf_llama3.Llama3ForCausalLM.from_pretrained(tmp_path / "model").num_parameters()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_any_shape(quantize):
    """Sizes that are no multiples of a block's, and biases."""
    model = make_model(num_attention_heads=5, num_key_value_heads=5, head_dim=18, attention_bias=True)
    theirs = logits(model)
    hf_llama3.optimize(model, quantize=quantize)
    assert type(model.model.layers[0].self_attn.q_proj.kernel) is {"int8": Int8Kernel, "int4": Int4Kernel}[quantize]
    assert (logits(model) - theirs).norm() / theirs.norm() < {"int8": 0.05, "int4": 0.35}[quantize]


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_who_asks_gets_it_or_an_error(quantize, monkeypatch):
    """Never the plain model with a warning."""
    with pytest.raises(UserError, match=r"must be float32, float16 or bfloat16, got torch.float64; cast the model"):
        hf_llama3.optimize(make_model(dtype=torch.float64), quantize=quantize)
    model, expected = make_model(), logits(make_model())
    monkeypatch.setattr(processor, "here", lambda: Processor("Old Chip", ()))
    with pytest.raises(UserError, match=r"needs a processor with AVX2 and FMA, or NEON, got Old Chip .*; leave it out"):
        hf_llama3.optimize(model, quantize=quantize)
    assert torch.equal(logits(model), expected)
