"""The frequencies survive every way of moving, casting and loading a model, exact and in float32."""

import pytest
import torch
from parity import GEOMETRY

from hf_llama3 import Llama3Config, Llama3ForCausalLM
from hf_llama3.presets import llama3_scaling

ROPES = {
    "plain": {"rope_type": "default"},
    "factor 8": llama3_scaling(8.0),
    "factor 32": llama3_scaling(32.0),
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
}


@pytest.fixture(params=ROPES)
def config(request):
    return Llama3Config(**GEOMETRY | {"rope_parameters": {"rope_theta": 500000.0} | ROPES[request.param]})


def check(model, config):
    rotary = Llama3ForCausalLM(config).model.rotary_emb
    for name in ("inv_freq", "original_inv_freq"):
        mine = getattr(model.model.rotary_emb, name)
        assert mine.dtype == torch.float32
        assert torch.equal(mine.cpu(), getattr(rotary, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_save_and_load(config, dtype, device_map, tmp_path):
    Llama3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    check(Llama3ForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map=device_map), config)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casting(config, cast):
    model = getattr(Llama3ForCausalLM(config), cast)()
    check(model, config)
    check(model.float(), config)


def test_meta_device_and_to_empty(config):
    with torch.device("meta"):
        model = Llama3ForCausalLM(config)
    assert model.model.rotary_emb.inv_freq.is_meta
    check(model.to_empty(device="cpu"), config)


def test_default_dtype(config):
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Llama3ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    check(model, config)


def test_missing_norm_key_is_initialised(config, tmp_path):
    """A norm that no file holds is ones, not uninitialised memory."""
    model = Llama3ForCausalLM(config)
    weights = {name: weight for name, weight in model.state_dict().items() if name != "model.norm.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    assert torch.equal(Llama3ForCausalLM.from_pretrained(tmp_path).model.norm.weight, torch.ones(64))
