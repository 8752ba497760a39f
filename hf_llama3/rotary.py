"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) with the scaling that Llama 3.1 introduced.

A head's channels form D/2 pairs (i, i + D/2). Pair i is turned by the angle position * inv_freq[i], so the dot product
of a query and a key depends on their distance alone. (Meta's files pair neighbours (2i, 2i + 1) instead; a conversion
reorders the rows of the query and key projections, and every dot product stays what it was.)
"""

# Shapes: B batch, H query heads, K key/value heads, T tokens, D head_dim

import math

import torch
from torch import nn
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)
LLAMA3_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Llama3RotaryEmbedding(nn.Module):
    """Turn positions into the cosines and sines of every pair's angle, once for all layers.

    The frequencies are float32 whatever the model's dtype: in bfloat16 an angle at position 8000 is radians off. The
    attributes' names are those that `PreTrainedModel._init_weights` and `dynamic_rope_update` read.
    """

    def __init__(self, config, device=None):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.original_max_seq_len = config.max_position_embeddings
        self.max_seq_len_cached = config.max_position_embeddings
        inv_freq, self.attention_scaling = self.compute_inverse_frequencies()
        self.register_buffer("inv_freq", inv_freq.to(device), persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.to(device, copy=True), persistent=False)

    @torch.no_grad()
    @dynamic_rope_update  # recomputes `inv_freq` for the types that depend on the sequence's length
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin in the dtype of `x`, each (B, T, D/2), for `position_ids` (B, T)."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device)  # (B, T, D/2), radians
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)

    def compute_inverse_frequencies(self) -> tuple[torch.Tensor, float]:
        """Return the radians per position of every pair, (D/2), and the factor on cos and sin (of most types 1)."""
        if self.rope_type == "default":
            return self.compute_default_rope_parameters(self.config)
        if self.rope_type == "llama3":
            inv_freq, attention_scaling = self.compute_default_rope_parameters(self.config)
            return scale_for_long_context(inv_freq, self.config.rope_parameters), attention_scaling
        return ROPE_INIT_FUNCTIONS[self.rope_type](self.config)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **unused) -> tuple[torch.Tensor, float]:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    def _apply(self, fn, recurse=True):
        # `.to(device)` moves the buffers, but `.half()` must not round them, nor `.to_empty()` leave them empty.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            values = self.compute_inverse_frequencies()[0] if buffer.is_meta else buffer
            self._buffers[name] = values.to(self._buffers[name].device)
        return self


def scale_for_long_context(inv_freq: torch.Tensor, rope: dict) -> torch.Tensor:
    """Slow the pairs that turn too slowly to have completed a turn within the original context (D/2 -> D/2).

    Pairs that make more than `high_freq_factor` turns there stay, those that make fewer than `low_freq_factor` are
    slowed by `factor` (how many times longer the context became), those between interpolated. Source: `apply_scaling`
    (llama-models 0.3.0, models/llama3/model.py), in the order of `transformers.modeling_rope_utils`, to the bit.
    """
    factor, low, high, context = (rope[key] for key in LLAMA3_ROPE_KEYS)
    wavelength = 2 * math.pi / inv_freq  # positions per turn
    share_kept = (context / wavelength - low) / (high - low)
    between = (1 - share_kept) * inv_freq / factor + share_kept * inv_freq
    too_slow = wavelength > context / low
    fast_enough = wavelength < context / high
    return torch.where(too_slow, inv_freq / factor, torch.where(fast_enough, inv_freq, between))


@use_kernel_forward_from_hub("rotary_pos_emb")
def apply_rotary_pos_emb(
    queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries (B, H, T, D) and keys (B, K, T, D); a kernel from the Hub takes these five arguments."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)  # (B, 1, T, D/2)
    return rotate(queries, cos, sin), rotate(keys, cos, sin)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn every pair of channels of `x` (..., D) by the angle whose `cos` and `sin` (..., D/2) are given."""
    first, second = x.chunk(2, dim=-1)  # (..., D/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def check_rope(rope: dict):
    """Raise unless the type exists and Llama 3's scaling is ordered and complete: the library fills gaps by guesses."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"`rope_type` must be one of {ROPE_TYPES}, got {rope_type!r}")
    if rope_type == "llama3":
        if missing := [key for key in LLAMA3_ROPE_KEYS if rope.get(key) is None]:
            raise ValueError(f"`rope_parameters` of type 'llama3' must hold {LLAMA3_ROPE_KEYS}, lacks {missing}")
        factor, low, high, _ = (rope[key] for key in LLAMA3_ROPE_KEYS)
        if not 0 < low < high:
            raise ValueError(f"`low_freq_factor` must lie between 0 and `high_freq_factor`, got {low} and {high}")
        if not factor >= 1:
            raise ValueError(f"`factor` of `rope_parameters` must be at least 1, got {factor}")
