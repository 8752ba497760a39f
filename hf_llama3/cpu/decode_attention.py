"""Attention of `generate`'s decode steps by our machine code, through the library's attention interface.

What it does not serve (prompts, gradients, compiled code, other types and masks) goes to the library's "sdpa".
"""

# Shapes: B rows, H query heads, K key/value heads, T query tokens, S keys, D channels of a head

import functools

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kernels.attention import decode_attention, is_served

NAME = "hf_llama3_decoding"
UNSERVED = ("softcap", "position_bias", "cache")  # what "sdpa" may be given besides


def use_decode_attention(model: PreTrainedModel):
    """Let `model.generate` attend by `attend` where it would use the library's "sdpa"."""
    if not getattr(model, "_supports_attention_backend", False):
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.generate = functools.partial(generate, model)


def generate(model: PreTrainedModel, *args, **kwargs):
    """Replace `model.generate`; outside of this call the configuration still names the library's attention."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa":
        return type(model).generate(model, *args, **kwargs)
    config._attn_implementation = NAME
    try:
        return type(model).generate(model, *args, **kwargs)
    finally:
        config._attn_implementation = "sdpa"


def attend(module: nn.Module, queries, keys, values, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attend with queries (B, H, T, D) to keys and values (B, K, S, D); return (B, T, H, D) and no weights."""
    is_plain = not dropout and all(kwargs.get(name) is None for name in UNSERVED)
    if not torch.compiler.is_compiling() and is_plain and is_served(queries, keys, values, attention_mask):
        return decode_attention(queries, keys, values, attention_mask, scaling), None
    options = {"dropout": dropout, "scaling": scaling} | kwargs
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, queries, keys, values, attention_mask, **options)
