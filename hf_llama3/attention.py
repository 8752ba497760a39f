"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) over the library's attention interface.

`attention_forward` is the readable reference; "sdpa", "flex_attention", "flash_attention_2" and whatever else is
registered in `ALL_ATTENTION_FUNCTIONS` take its place by the configuration's `attn_implementation`.
"""

# Shapes: B batch, T query tokens, S key tokens, H query heads, K key/value heads, D head_dim, E hidden_size

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.integrations import use_kernelized_func
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_llama3 import Llama3Config
from .rotary import apply_rotary_pos_emb


@use_kernelized_func(apply_rotary_pos_emb)
class Llama3Attention(nn.Module):
    """Let every token read from itself and those before it, through H queries that share K keys and values."""

    def __init__(self, config: Llama3Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx  # this layer's place in the cache
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the block's output (B, T, E) and, from implementations that have them, the weights (B, H, T, S)."""
        batch_and_tokens = hidden_states.shape[:-1]
        heads = (*batch_and_tokens, -1, self.head_dim)  # inferred, since tensor parallelism leaves fewer heads here
        queries = self.q_proj(hidden_states).view(heads).transpose(1, 2)  # (B, H, T, D)
        keys = self.k_proj(hidden_states).view(heads).transpose(1, 2)  # (B, K, T, D)
        values = self.v_proj(hidden_states).view(heads).transpose(1, 2)  # (B, K, T, D)

        queries, keys = apply_rotary_pos_emb(queries, keys, *position_embeddings)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)  # (B, K, S, D)

        dropout = self.attention_dropout if self.training else 0.0
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attention_forward)
        output, weights = attend(
            self, queries, keys, values, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # (B, T, H, D)
        return self.o_proj(output.reshape(*batch_and_tokens, -1).contiguous()), weights


def attention_forward(
    module: Llama3Attention,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax(q k^T * scaling + mask) v; the mask (B, 1, T, S) is 0 where a key may be seen, else very low."""
    keys = keys.repeat_interleave(module.num_key_value_groups, dim=1)  # (B, H, S, D)
    values = values.repeat_interleave(module.num_key_value_groups, dim=1)  # (B, H, S, D)
    scores = queries @ keys.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ values).transpose(1, 2).contiguous(), weights  # (B, T, H, D)
