"""Dropout on the residual stream: where it falls, to the bit, and that nothing else changes."""

import copy

import torch
from parity import make_pair, tokens
from torch import nn

from hf_llama3.training.dropout import add_residual_dropout

RATE = 0.3


def written_out(model, ids):
    """The forward pass with dropout where it belongs: on the embeddings and on what each block adds."""
    drop = nn.Dropout(RATE)
    states = drop(model.embed_tokens(ids))
    position_embeddings = model.rotary_emb(states, torch.arange(ids.shape[1])[None])
    for layer in model.layers:
        normed = layer.input_layernorm(states)
        states = states + drop(layer.self_attn(normed, position_embeddings=position_embeddings)[0])
        states = states + drop(layer.mlp(layer.post_attention_layernorm(states)))
    return model.norm(states)


def test_equal_to_what_is_written_out():
    model = make_pair()[0].train().model
    torch.manual_seed(3)
    expected = written_out(model, tokens())
    dropped = make_pair()[0].train()
    add_residual_dropout(dropped, RATE)
    for checkpointing in (False, True):
        if checkpointing:
            dropped.gradient_checkpointing_enable()
        torch.manual_seed(3)
        states = dropped.model(tokens(), use_cache=False).last_hidden_state
        assert torch.equal(states, expected)
        dropped.zero_grad()
        states.square().sum().backward()
        gradient = dropped.model.layers[0].mlp.up_proj.weight.grad
        model.zero_grad()
        torch.manual_seed(3)
        written_out(model, tokens()).square().sum().backward()
        assert torch.equal(gradient, model.layers[0].mlp.up_proj.weight.grad)


def test_in_training_alone():
    plain = make_pair()[0]
    dropped = copy.deepcopy(plain)
    add_residual_dropout(dropped, RATE)
    assert torch.equal(dropped(tokens()).logits, plain(tokens()).logits)
    assert dropped.state_dict().keys() == plain.state_dict().keys()
    assert not torch.equal(dropped.train()(tokens()).logits, plain(tokens()).logits)
