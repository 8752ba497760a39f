"""THE table: every tensor of a Llama in Meta's format, in Hugging Face's and in GGUF.

Meta's shards divide a tensor along one dimension (None: each holds all of it). Rows of the query and key projections
are ordered differently, since Meta's rotation pairs the neighbours (2i, 2i + 1) of a head's channels and Hugging
Face's pairs (i, i + D/2). GGUF has Meta's order. Sources: llama-models 0.3.0, models/llama3/model.py (names, and which
dimension each parallel layer divides); transformers 4.46.3, convert_llama_weights_to_hf.py (`permute`); gguf 0.19.0,
constants.py (`TENSOR_NAMES`).
"""

# Shapes: H heads, D head_dim, E hidden_size

from typing import NamedTuple


class Row(NamedTuple):
    meta: str
    hf: str
    gguf: str | None  # None: no place in this format
    shape: tuple[str, ...]  # names of dimensions, see `sizes`
    split: int | None  # the dimension that Meta's shards divide
    rotary: bool = False  # whether the two formats order its rows differently
    bias: str | None = None  # key of a configuration that adds this bias; Meta's format has no place for it

    def full_shape(self, size: dict[str, int]) -> tuple[int, ...]:
        return tuple(size[name] for name in self.shape)


QUERY, KEY, OUT = ("query", "hidden"), ("key_value", "hidden"), ("hidden", "query")
FFN, DOWN = ("ffn", "hidden"), ("hidden", "ffn")


def in_layer(meta: str, hf: str, gguf: str, *facts, **more) -> Row:
    """Return the row of a layer's weight; braces stand for the layer's number."""
    return Row(
        f"layers.{{}}.{meta}.weight", f"model.layers.{{}}.{hf}.weight", f"blk.{{}}.{gguf}.weight", *facts, **more
    )


LAYER_TABLE = (
    in_layer("attention_norm", "input_layernorm", "attn_norm", ("hidden",), None),
    in_layer("attention.wq", "self_attn.q_proj", "attn_q", QUERY, 0, True, "attention_bias"),
    in_layer("attention.wk", "self_attn.k_proj", "attn_k", KEY, 0, True, "attention_bias"),
    in_layer("attention.wv", "self_attn.v_proj", "attn_v", KEY, 0, bias="attention_bias"),
    in_layer("attention.wo", "self_attn.o_proj", "attn_output", OUT, 1, bias="attention_bias"),
    in_layer("ffn_norm", "post_attention_layernorm", "ffn_norm", ("hidden",), None),
    in_layer("feed_forward.w1", "mlp.gate_proj", "ffn_gate", FFN, 0, bias="mlp_bias"),
    in_layer("feed_forward.w3", "mlp.up_proj", "ffn_up", FFN, 0, bias="mlp_bias"),
    in_layer("feed_forward.w2", "mlp.down_proj", "ffn_down", DOWN, 1, bias="mlp_bias"),
)
EMBEDDING = Row("tok_embeddings.weight", "model.embed_tokens.weight", "token_embd.weight", ("vocab", "hidden"), 0)
NORM = Row("norm.weight", "model.norm.weight", "output_norm.weight", ("hidden",), None)
OUTPUT = Row("output.weight", "lm_head.weight", "output.weight", ("vocab", "hidden"), 0)
BIAS_KEYS = ("attention_bias", "mlp_bias")

SCORE = Row("score.weight", "score.weight", None, ("labels", "hidden"), None)
ANSWER = Row("qa_outputs.weight", "qa_outputs.weight", None, ("spans", "hidden"), None)
# Heads, by the end of the class's name; only the first has a place in Meta's format and in GGUF.
LANGUAGE_MODEL = "ForCausalLM"
HEADS = {
    LANGUAGE_MODEL: (OUTPUT,),
    "ForSequenceClassification": (SCORE,),
    "ForTokenClassification": (SCORE, Row("score.bias", "score.bias", None, ("labels",), None)),
    "ForQuestionAnswering": (ANSWER, Row("qa_outputs.bias", "qa_outputs.bias", None, ("spans",), None)),
    "Model": (),
}
BASES = {"ForQuestionAnswering": "transformer.", "Model": ""}  # in their files, for "model."
HEAD_MODULES = {row.hf.split(".")[0] for head in HEADS.values() for row in head}
DEFAULT_LABELS = 2  # transformers' `PreTrainedConfig`, where a configuration does not name them


def rows(num_layers: int, embedding_split: int = 0, biases=(), head: str = LANGUAGE_MODEL) -> list[Row]:
    """Return the table for all layers, in the order in which the model uses its tensors.

    Args:
        embedding_split: 1 for Llama 2 and Code Llama, whose shards divide the embedding's channels.
        biases: the `BIAS_KEYS` that are true.
        head: one of `HEADS`.
    """
    one_layer = [row for weight in LAYER_TABLE for row in (weight, bias_of(weight))[: 1 + (weight.bias in biases)]]
    layers = [
        row._replace(meta=row.meta.format(index), hf=row.hf.format(index), gguf=row.gguf.format(index))
        for index in range(num_layers)
        for row in one_layer
    ]
    return [EMBEDDING._replace(split=embedding_split), *layers, NORM, *HEADS[head]]


def name_in_file(name: str, head: str) -> str:
    """Return the name of a tensor in the files of a Hugging Face model with this head."""
    return BASES.get(head, "model.") + name.removeprefix("model.") if name.startswith("model.") else name


def bias_of(row: Row) -> Row:
    """Return the row of the bias beside a weight."""
    names = {key: getattr(row, key).removesuffix("weight") + "bias" for key in ("meta", "hf", "gguf")}
    return row._replace(**names, shape=row.shape[:1], split=0 if row.split == 0 else None)


def sizes(config: dict) -> dict[str, int]:
    """Return the dimensions that `Row.shape` names, for a Hugging Face configuration."""
    return {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "ffn": config["intermediate_size"],
        "query": config["num_attention_heads"] * config["head_dim"],
        "key_value": config["num_key_value_heads"] * config["head_dim"],
        "labels": len(config.get("id2label") or range(DEFAULT_LABELS)),
        "spans": 2,  # where an answer begins, and where it ends
    }


def interleaved_to_half(weight, head_dim: int):
    """Reorder the rows of a query or key projection, or its bias, from Meta's pairs to Hugging Face's.

    For numpy arrays and torch tensors: (H * D, E) or (H, 2, D/2, E) becomes (H, 2, D/2, E), and (H * D) becomes
    (H, 2, D/2), a view in that order. The number of heads is inferred, so shards and grouped keys need nothing special.
    """
    return weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:][-1:]).swapaxes(1, 2)


def half_to_interleaved(weight, head_dim: int):
    """Undo `interleaved_to_half`: (H * D, E) to (H, D/2, 2, E)."""
    return weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:][-1:]).swapaxes(1, 2)
