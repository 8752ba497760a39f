"""`generate` of an optimised model attends by our attention, and the model is otherwise what it was."""

import pytest
import torch
from small import CLASSES, make_model, prompts
from transformers import GPT2Config, GPT2LMHeadModel

import hf_llama3
from hf_llama3.cpu import decode_attention as module

# Heads of 32 channels, which every processor's vectors fill
WIDE = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 32}
HOW = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def calls(monkeypatch):
    """Count the tokens that are attended to."""
    calls, plain = [], module.decode_attention
    monkeypatch.setattr(module, "decode_attention", lambda *args: calls.append(args[1].shape[2]) or plain(*args))
    return calls


def padded():
    ids = prompts(3, 12)
    mask = (torch.arange(12) >= torch.tensor([[0], [4], [9]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("kind", CLASSES)
def test_same_tokens(kind, kv_heads, dtype, calls):
    plain, model = (make_model(kind, dtype, **WIDE, num_key_value_heads=kv_heads) for _ in range(2))
    hf_llama3.optimize(model)
    for inputs in ({"input_ids": prompts(1)}, padded()):
        theirs, ours = (
            one.generate(**inputs, **HOW, output_logits=True, return_dict_in_generate=True) for one in (plain, model)
        )
        start = inputs["input_ids"].shape[1]
        assert calls == [start + step for step in range(1, 12) for _ in range(2)]  # two layers
        if dtype is torch.float32:
            assert torch.equal(ours.sequences, theirs.sequences)
        its, made = (one.logits[1] for one in (theirs, ours))  # of the first step
        torch.testing.assert_close(made, its, rtol=0, atol=1e-4 if dtype is torch.float32 else 0.1)
        calls.clear()


def test_the_configuration_stays_what_it_is(calls, tmp_path):
    model = make_model(**WIDE)
    before = model.config.to_dict()
    hf_llama3.optimize(model)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    model.generate(prompts(1), **HOW)
    assert set(seen) == {module.NAME} and calls
    assert model.config._attn_implementation == "sdpa" and model.config.to_dict() == before
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(prompts(1), max_new_tokens=-1)
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert module.NAME not in (tmp_path / "config.json").read_text()
    assert "generate" in model.__dict__
    calls.clear()
    hf_llama3.restore(model).generate(prompts(1), **HOW)
    assert "generate" not in model.__dict__ and not calls


def test_other_implementations_are_kept(calls):
    model = hf_llama3.optimize(make_model(**WIDE, attn_implementation="eager"))
    made = model.generate(prompts(1), **HOW, output_attentions=True, return_dict_in_generate=True)
    assert made.attentions[1][0].shape == (1, 8, 1, 10) and not calls
    model.set_attn_implementation("sdpa")
    assert torch.equal(model.generate(prompts(1), **HOW), made.sequences) and calls


def test_models_without_the_interface(monkeypatch):
    class Own(GPT2LMHeadModel):
        _supports_attention_backend = False

    model = hf_llama3.optimize(Own(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=512)))
    assert "generate" not in model.__dict__
    assert model.generate(prompts(1), attention_mask=torch.ones_like(prompts(1)), pad_token_id=0, **HOW).shape == (
        1,
        21,
    )
