"""Adapters go from upstream's Llama to our class and back as they are: same files, same logits."""

import pytest
import torch
from parity import make_pair, same, tokens
from peft import LoraConfig, PeftModel, get_peft_model

from hf_llama3 import Llama3ForCausalLM


def adapt(model):
    """Add adapters that change the model from the start, at PEFT's default targets."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits


@pytest.mark.parametrize("direction", ["to ours", "to upstream"])
def test_adapter_of_the_other_class(direction, tmp_path):
    ours, theirs = make_pair()
    before = logits(ours)
    maker, taker = (theirs, ours) if direction == "to ours" else (ours, theirs)
    made = adapt(maker)
    made.save_pretrained(tmp_path)
    taken = PeftModel.from_pretrained(taker, tmp_path).eval()
    same(logits(taken), logits(made))
    assert not torch.allclose(logits(taken), before, atol=0.1)


def test_adapter_by_the_models_own_method(tmp_path):
    """`load_adapter` of the library, which goes by its own table of names."""
    ours, theirs = make_pair()
    made = adapt(theirs)
    made.save_pretrained(tmp_path)
    ours.load_adapter(str(tmp_path))
    same(logits(ours), logits(made))
    ours.disable_adapters()
    assert not torch.allclose(logits(ours), logits(made), atol=0.1)


def test_merged_model_is_a_plain_one(tmp_path):
    ours, theirs = make_pair()
    names = ours.state_dict().keys()
    merged, expected = adapt(ours).merge_and_unload(), adapt(theirs).merge_and_unload()
    assert type(merged) is Llama3ForCausalLM and merged.state_dict().keys() == names
    merged.save_pretrained(tmp_path)
    same(logits(Llama3ForCausalLM.from_pretrained(tmp_path)), logits(expected))
