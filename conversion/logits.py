"""Logits of an opened checkpoint in float32, straight from its files, with a few rows of a weight in memory at a time.

Each format is computed by its own convention: Meta's rotation turns neighbouring channels (2i, 2i + 1) of a head,
Hugging Face's (i, i + D/2). So equal logits show that two checkpoints are the same model, independently of our table.
"""

# Shapes: T tokens, H query heads, K key/value heads, D head_dim, E hidden_size

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from hf_llama3.configuration_llama3 import Llama3Config
from hf_llama3.rotary import Llama3RotaryEmbedding, rotate

from .checkpoint import Checkpoint
from .formats.storage import Dtype, row_blocks, to_floats
from .weights import HEADS, Row, sizes

NUM_TOKENS = 32
TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order, over a hundred layers


@torch.no_grad()
def compute_logits(checkpoint: Checkpoint, progress: Callable[[int], None]) -> torch.Tensor:
    """Return the logits (T, vocabulary or labels) of some tokens, at positions spread over the context window.

    `progress` gets the number of bytes of weights read.
    """
    config = checkpoint.config
    ids = [(1 + 7919 * index) % config["vocab_size"] for index in range(NUM_TOKENS)]
    positions = torch.linspace(0, config["max_position_embeddings"] - 1, NUM_TOKENS).long()[None]
    rotary = Llama3RotaryEmbedding(Llama3Config.from_dict(config))
    cos, sin = rotary(torch.zeros(()), positions)  # (1, T, D/2)
    turn = rotate_neighbours if checkpoint.order == "meta" else rotate

    table = {row.hf: row for row in checkpoint.rows}

    def linear(x, name):
        y = multiply(x, checkpoint, table[f"{name}.weight"], progress)
        return y + vector(f"{name}.bias") if f"{name}.bias" in table else y

    def vector(name):
        return to_tensor(checkpoint.tensors[name][0].array[:], checkpoint.tensors[name][0].dtype)

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]) * vector(f"{name}.weight")

    def heads(x):
        return x.unflatten(-1, (-1, config["head_dim"])).transpose(0, 1)[None]  # (1, H or K, T, D)

    x = look_up(checkpoint, checkpoint.rows[0], ids)  # (T, E)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        h = norm(x, f"{layer}.input_layernorm")
        query, key = (turn(heads(linear(h, f"{layer}.self_attn.{one}_proj")), cos, sin) for one in "qk")
        value = heads(linear(h, f"{layer}.self_attn.v_proj"))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + linear(attended[0].transpose(0, 1).flatten(1), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (linear(h, f"{layer}.mlp.{one}_proj") for one in ("gate", "up"))
        x = x + linear(F.silu(gate) * up, f"{layer}.mlp.down_proj")
    head = HEADS[checkpoint.head]
    return linear(norm(x, "model.norm"), head[0].hf.removesuffix(".weight")) if head else norm(x, "model.norm")


def multiply(x: torch.Tensor, checkpoint: Checkpoint, row: Row, progress: Callable[[int], None]) -> torch.Tensor:
    """Multiply `x` (T, in) by a sharded weight (out, in), a few rows at a time; return (T, out)."""
    full, dtype = row.full_shape(sizes(checkpoint.config)), checkpoint.tensors[row.hf][0].dtype
    parts = [part.array for part in checkpoint.cut(row, 0, full[row.split or 0])]
    # Shards along the output are concatenated; shards along the input are summed.
    inputs = x.split([part.shape[1] for part in parts], dim=1) if row.split == 1 else [x] * len(parts)
    results = []
    for taken, part in zip(inputs, parts, strict=True):
        results.append(torch.cat([taken @ to_tensor(part[rows], dtype).T for rows in row_blocks(part)], dim=1))
        progress(part.nbytes)
    return torch.stack(results).sum(0) if row.split == 1 else torch.cat(results, dim=1)


def look_up(checkpoint: Checkpoint, row: Row, ids: list[int]) -> torch.Tensor:
    """Return the embeddings (T, E) of tokens; shards may divide the table's rows or columns."""
    tensors = checkpoint.tensors[row.hf]
    if row.split == 1:
        columns = [to_tensor(tensor.array[ids], tensor.dtype) for tensor in tensors]
        return torch.cat(columns, dim=1)
    height = tensors[0].shape[0]
    return torch.cat([to_tensor(tensors[i // height].array[[i % height]], tensors[0].dtype) for i in ids])


def to_tensor(block: np.ndarray, dtype: Dtype) -> torch.Tensor:
    return torch.from_numpy(np.array(to_floats(np.ascontiguousarray(block), dtype), np.float32))


def rotate_neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x[..., 0::2], x[..., 1::2]  # (1, H, T, D/2)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
