"""GGUF's metadata and config.json: the same model in two spellings.

Llama 3.1's scaling of RoPE is in no key, but in a tensor: the divisor of each frequency.
Sources: gguf 0.19.0, constants.py (`Keys`); llama.cpp, conversion/llama.py (`generate_extra_tensors`).
"""

import math
from pathlib import Path

import numpy as np

from hf_llama3.errors import UserError, quoted
from hf_llama3.files.schema import POSITIVE, Rule, number, optional, text, whole
from hf_llama3.presets import llama3_scaling

from ..weights import LANGUAGE_MODEL
from .hf import LLAMA3_SCALING, ORIGINAL, PASSED_ON, TOKEN_IDS, head_of
from .schema import GEOMETRY

ARCHITECTURE = "llama"
ROPE_FACTORS = "rope_freqs.weight"  # the tensor
SCALING = "rope.scaling.type"
# Key after "llama." -> key of a configuration, and its rule
PLACES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}
NEEDED = tuple(key for key in PLACES if key not in ("attention.head_count_kv", "attention.key_length"))
OTHERS = {
    "vocab_size": whole(),
    "rope.dimension_count": whole(),
    "rope.freq_base": number(1),
    "attention.value_length": whole(),
    "expert_count": Rule("0: a mixture of experts is no Llama 3", lambda value: value == 0),
    "expert_used_count": whole(0),
    SCALING: text(64),
    "rope.scaling.factor": POSITIVE,
    "rope.scaling.finetuned": Rule("a flag", lambda value: type(value) is bool),
    "rope.scaling.original_context_length": whole(0),
}
RULES = {key: GEOMETRY[place] for key, place in PLACES.items()} | OTHERS
TOKENS = {  # key after "tokenizer.ggml." -> key of a configuration
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
}
STOPS = ("eos_token_id", "eom_token_id", "eot_token_id")
DEFAULT_THETA = 10000.0  # llama.cpp, src/llama-model.cpp, `rope_freq_base_train`
CLOSE = 1e-4  # relative error of factors that were computed in float32
ORIGINAL_CONTEXTS = (8192, 2048, 4096, 16384, 32768)  # tried in turn; the released models have the first
SAID_OTHERWISE = ("general.alignment", "general.architecture", "general.type", "general.quantization_version")
SAID_OTHERWISE += ("general.file_type", "general.parameter_count")


def read_metadata(metadata: dict, path: Path) -> dict:
    """Return a Llama's metadata by keys after "llama.", checked.

    Raises:
        UserError: it is another architecture, or a value is missing, malformed, or differs between layers.
    """
    kind, architecture = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if kind != "model" or architecture != ARCHITECTURE:
        got = quoted(architecture) if kind == "model" else f"a file of type {quoted(kind)}"
        raise UserError(f"`general.architecture` in {path} must be {ARCHITECTURE!r}, got {got}; it is another model")
    facts = {}
    for key, rule in RULES.items():
        value = metadata.get(f"{ARCHITECTURE}.{key}")
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # the same for every layer
        if value is None and key not in NEEDED:
            continue
        if not rule.takes(value):
            raise UserError(f"`{ARCHITECTURE}.{key}` in {path} must be {rule.words}, got {quoted(value)}")
        facts[key] = value
    return facts


def facts_to_config(facts: dict, path: Path, vocab_size: int, factors: np.ndarray | None, inferred: list[str]) -> dict:
    """Return the configuration for `read_metadata`'s result, without token ids and tying.

    Args:
        vocab_size: the embedding's rows.
        factors: the divisors of RoPE's frequencies, if the tensor is there.

    Raises:
        UserError: values contradict each other, or are not a Llama's.
    """
    config = {place: facts.get(key) for key, place in PLACES.items()} | {"vocab_size": vocab_size}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if facts.get("vocab_size", vocab_size) != vocab_size:
        raise UserError(f"{path} says vocab_size {facts['vocab_size']}, but the embedding has {vocab_size} rows")
    config["num_key_value_heads"] = config["num_key_value_heads"] or heads
    if config["head_dim"] is None:
        config["head_dim"] = facts.get("rope.dimension_count") or hidden // heads
    head_dim = config["head_dim"]
    for key in ("rope.dimension_count", "attention.value_length"):
        if facts.get(key, head_dim) != head_dim:
            raise UserError(f"`{ARCHITECTURE}.{key}` in {path} must be the heads' width {head_dim}, got {facts[key]}")
    if heads % config["num_key_value_heads"] or not head_dim or head_dim % 2:
        got = f"{heads}, {config['num_key_value_heads']} and {head_dim}"
        rule = "heads must be a multiple of key/value heads, and their width even"
        raise UserError(f"{path}: {rule}, got {got}")
    theta, scaling = float(facts.get("rope.freq_base", DEFAULT_THETA)), facts.get(SCALING, "none")
    rope = {"rope_theta": theta, "rope_type": "default"}
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": float(facts.get("rope.scaling.factor", 1.0))}
    elif scaling != "none":
        raise UserError(f"`{ARCHITECTURE}.{SCALING}` in {path} must be none or linear, got {quoted(scaling)}")
    if factors is not None:
        rope = find_scaling(factors, head_dim, theta, facts, path)
        inferred.append(f"RoPE factor {rope['factor']:g}: the frequencies in {ROPE_FACTORS} are divided so")
        if scaling != "none":
            raise UserError(f"{path} scales RoPE twice, by {ROPE_FACTORS} and `{ARCHITECTURE}.{SCALING}` {scaling!r}")
    return {key: config[key] for key in GEOMETRY} | {"rope_parameters": rope} | PASSED_ON


def find_scaling(factors: np.ndarray, head_dim: int, theta: float, facts: dict, path: Path) -> dict:
    """Find the parameters of Llama 3.1's scaling that give these factors.

    Raises:
        UserError: there is none.
    """
    largest = float(factors.max()) if np.isfinite(factors).all() else math.nan
    told = facts.get("rope.scaling.original_context_length")
    for original in (*([told] if told else []), *ORIGINAL_CONTEXTS, facts["context_length"]):
        rope = {"rope_theta": theta} | llama3_scaling(largest) | {ORIGINAL: original}
        if len(factors) == head_dim // 2 and largest >= 1 and same_factors(rope, head_dim, factors):
            return rope
    raise UserError(
        f"{ROPE_FACTORS} in {path} must hold {head_dim // 2} factors of Llama 3.1's scaling of RoPE, got "
        f"{len(factors)} from {factors.min():g} to {factors.max():g}; config.json has no key for others"
    )


def same_factors(rope: dict, head_dim: int, factors: np.ndarray) -> bool:
    """Tell whether a configuration's RoPE has these factors."""
    return rope["rope_type"] == "llama3" and np.allclose(rope_factors(rope, head_dim), factors, rtol=CLOSE, atol=0)


def rope_factors(rope: dict, head_dim: int) -> np.ndarray:
    """Compute the divisor of each frequency in Llama 3.1's scaling (llama-models 0.3.0, `apply_scaling`)."""
    factor, low, high, original = (rope[key] for key in LLAMA3_SCALING)
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)  # 0: divided by the whole factor
    return (1 / ((1 - smooth) / factor + smooth)).astype("<f4")


def read_token_ids(metadata: dict, vocab_size: int, path: Path) -> dict:
    """Return the token ids of a configuration; of several that end a text, all.

    Raises:
        UserError: one has no row in the embedding.
    """
    found = {}
    for key in (*TOKENS, *STOPS):
        name = f"tokenizer.ggml.{key}"
        value = metadata.get(name)
        if not optional(whole(0, vocab_size - 1)).takes(value):
            raise UserError(f"`{name}` in {path} must be below the {vocab_size} rows of the embedding, got {value!r}")
        found[key] = value
    stops = sorted({found[key] for key in STOPS} - {None})
    ids = {place: found[key] for key, place in TOKENS.items()}
    return ids | {"eos_token_id": stops if len(stops) > 1 else stops[0] if stops else None}


def unused_keys(metadata: dict) -> list[str]:
    """List the keys that no other format has a place for."""
    used = {f"{ARCHITECTURE}.{key}" for key in RULES} | set(SAID_OTHERWISE)
    apart = ("tokenizer.", "split.", "huggingface.")
    return sorted(key for key in metadata if key not in used and not key.startswith(apart))


def config_to_metadata(config: dict, path: Path) -> dict:
    """Return a configuration as the metadata that llama.cpp reads, without the tokenizer's.

    Raises:
        UserError: the model has something that GGUF's Llama has no place for.
    """
    stays = "; --to hf keeps it"
    if (head := head_of(config)) != LANGUAGE_MODEL:
        raise UserError(f"{path} ends with a head {head}: GGUF's Llama has a place for output.weight alone{stays}")
    rope, head_dim = config["rope_parameters"], config["head_dim"]
    if rope["rope_type"] not in ("default", "llama3", "linear"):
        raise UserError(f"{path}: GGUF's Llama is written with plain, linear or Llama 3.1's RoPE, got {rope}{stays}")
    metadata = {key: config[place] for key, place in PLACES.items()}
    metadata |= {"attention.value_length": head_dim, "vocab_size": config["vocab_size"]}
    metadata |= {"rope.dimension_count": head_dim, "rope.freq_base": float(rope["rope_theta"])}
    metadata["attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
    if rope["rope_type"] == "linear":
        metadata |= {SCALING: "linear", "rope.scaling.factor": float(rope["factor"])}
    return {f"{ARCHITECTURE}.{key}": value for key, value in metadata.items()} | token_metadata(config)


def token_metadata(config: dict) -> dict:
    """Return the metadata of begin, end and pad tokens; of several end tokens the last, which ends a turn, is first."""
    bos, eos, pad = (config.get(key) for key in TOKEN_IDS)
    stops = list(reversed(eos)) if isinstance(eos, list) else [eos]
    ids = {"bos_token_id": bos, "padding_token_id": pad if pad is None or pad >= 0 else None}
    ids |= dict(zip(STOPS, stops, strict=False))
    return {f"tokenizer.ggml.{key}": value for key, value in ids.items() if value is not None}
