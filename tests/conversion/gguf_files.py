"""GGUF files made by llama.cpp's own package, from upstream's classes and without this package's table."""

import gguf
import numpy as np
import torch

NAMES = {  # upstream's, in a layer -> GGUF's
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ROTARY = ("q_proj", "k_proj")


def write_gguf(path, model, kind="BF16", tokenizer=None, factors=None, split=0, more=None):
    """Write upstream's model.

    Args:
        tokenizer: what is put beside it, {key after "tokenizer.": value}.
        factors: of RoPE's frequencies.
        split: tensors in each file, where it is to be divided.
        more: further metadata, (method of the writer's, arguments).
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    ids = {f"ggml.{key}": getattr(config, key) for key in ("bos_token_id", "eos_token_id")}
    for key, value in (tokenizer or {"ggml.model": "none"} | ids).items():
        add(writer, f"tokenizer.{key}", value)
    for method, *arguments in more or ():
        getattr(writer, method)(*arguments)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = permuted(name, tensor.float(), config.head_dim).numpy()
        to = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else kind]
        writer.add_tensor(name_in_gguf(name), stored(values, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_array(key, value)


def permuted(name, tensor, head_dim):
    """As llama.cpp's converter reorders what is rotated: from halves of a head to pairs."""
    if name.split(".")[-2] not in ROTARY:
        return tensor
    heads = tensor.shape[0] // head_dim
    return tensor.reshape(heads, 2, head_dim // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def name_in_gguf(name):
    *module, last = name.split(".")
    if module[:2] == ["model", "layers"]:
        return f"blk.{module[2]}.{NAMES['.'.join(module[3:])]}.{last}"
    return f"{OUTER['.'.join(module)]}.{last}"


def stored(values, kind):
    """Bytes of a kind that the package makes; random blocks of one that it only reads, with scales that are small."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        generator = np.random.default_rng(values.size)
        made = generator.integers(0, 256, (values.shape[0], values.shape[1] // block, size), dtype=np.uint8)
        for place in SCALES[kind.name]:
            made[..., place : place + 2] = np.array([0.01], np.float16).view(np.uint8)
        return made.reshape(values.shape[0], -1)


# Where in a block a scale, or a minimum, of 16 bits lies (llama.cpp, ggml/src/ggml-common.h)
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}


def rope_factors(factor, theta, head_dim, original=8192):
    """As llama.cpp's converter computes them, in float32."""
    found = []
    for frequency in 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)):
        length = 2 * torch.pi / frequency
        if length < original / 4:
            found.append(1.0)
        elif length > original:
            found.append(factor)
        else:
            smooth = (original / length - 1) / 3
            found.append(float(1 / ((1 - smooth) / factor + smooth)))
    return found


def copy_values(path, kind):
    """What llama.cpp's package reads, by upstream's names and in float32; rows that are rotated in GGUF's order."""
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
