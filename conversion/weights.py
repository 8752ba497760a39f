"""The table: every tensor of a Llama in Meta's format and in Hugging Face's, and what follows from it both ways.

Meta's shards divide a tensor along one dimension (None: each holds all of it). Rows of the query and key projections
are ordered differently, since Meta's rotation pairs the neighbours (2i, 2i + 1) of a head's channels and Hugging
Face's pairs (i, i + D/2). Sources: llama-models 0.3.0, models/llama3/model.py (names, and which dimension each
parallel layer divides); transformers 4.46.3, convert_llama_weights_to_hf.py (`permute`).
"""

# Shapes: H heads, D head_dim, E hidden_size

from typing import NamedTuple


class Row(NamedTuple):
    meta: str
    hf: str
    shape: tuple[str, ...]  # names of sizes, see `sizes`
    split: int | None  # the dimension that Meta's shards divide
    rotary: bool = False  # whether its rows are ordered by head in the two formats' two ways

    def full_shape(self, size: dict[str, int]) -> tuple[int, ...]:
        return tuple(size[name] for name in self.shape)


LAYER_TABLE = (
    Row("layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight", ("hidden",), None),
    Row("layers.{}.attention.wq.weight", "model.layers.{}.self_attn.q_proj.weight", ("query", "hidden"), 0, True),
    Row("layers.{}.attention.wk.weight", "model.layers.{}.self_attn.k_proj.weight", ("key_value", "hidden"), 0, True),
    Row("layers.{}.attention.wv.weight", "model.layers.{}.self_attn.v_proj.weight", ("key_value", "hidden"), 0),
    Row("layers.{}.attention.wo.weight", "model.layers.{}.self_attn.o_proj.weight", ("hidden", "query"), 1),
    Row("layers.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight", ("hidden",), None),
    Row("layers.{}.feed_forward.w1.weight", "model.layers.{}.mlp.gate_proj.weight", ("ffn", "hidden"), 0),
    Row("layers.{}.feed_forward.w3.weight", "model.layers.{}.mlp.up_proj.weight", ("ffn", "hidden"), 0),
    Row("layers.{}.feed_forward.w2.weight", "model.layers.{}.mlp.down_proj.weight", ("hidden", "ffn"), 1),
)
EMBEDDING = Row("tok_embeddings.weight", "model.embed_tokens.weight", ("vocab", "hidden"), 0)
NORM = Row("norm.weight", "model.norm.weight", ("hidden",), None)
OUTPUT = Row("output.weight", "lm_head.weight", ("vocab", "hidden"), 0)

# What some files carry beside the weights; it is computed from the configuration and not read.
DERIVED = ("rope.freqs", "model.layers.{}.self_attn.rotary_emb.inv_freq")


def rows(num_layers: int, embedding_split: int = 0) -> list[Row]:
    """Expand the table over the layers, in the order in which the model uses its tensors.

    Args:
        embedding_split: 1 for Llama 2 and Code Llama, whose shards divide the embedding's channels.
    """
    layers = [
        row._replace(meta=row.meta.format(index), hf=row.hf.format(index))
        for index in range(num_layers)
        for row in LAYER_TABLE
    ]
    return [EMBEDDING._replace(split=embedding_split), *layers, NORM, OUTPUT]


def sizes(config: dict) -> dict[str, int]:
    """Return what the names in `Row.shape` stand for, given a Hugging Face configuration."""
    return {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "ffn": config["intermediate_size"],
        "query": config["num_attention_heads"] * config["head_dim"],
        "key_value": config["num_key_value_heads"] * config["head_dim"],
    }


def interleaved_to_half(weight, head_dim: int):
    """Reorder the rows of a query or key projection from Meta's pairs to Hugging Face's.

    Takes and gives numpy arrays and torch tensors, (H * D, E) or (H, 2, D/2, E) to (H, 2, D/2, E), the same elements
    in that order; the head count is inferred, so a shard or grouped keys need nothing special. Nothing is copied.
    """
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[-1]).swapaxes(1, 2)


def half_to_interleaved(weight, head_dim: int):
    """Undo `interleaved_to_half`: (H * D, E) to (H, D/2, 2, E)."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[-1]).swapaxes(1, 2)


def without_derived(tensors: dict, num_layers: int) -> dict:
    """Leave out what is computed from the configuration."""
    derived = {name.format(index) for name in DERIVED for index in range(num_layers)}
    return {name: tensor for name, tensor in tensors.items() if name not in derived}
