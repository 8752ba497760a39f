"""config.json and generation_config.json: read in every spelling, written so that every reader understands them."""

from pathlib import Path

from hf_llama3.errors import UserError, quoted
from hf_llama3.files.json import read_json, to_json
from hf_llama3.files.schema import check
from hf_llama3.presets import llama3_scaling
from hf_llama3.remote_code import AUTO_MAP

from ..weights import HEADS, LANGUAGE_MODEL
from .schema import CONFIG, CONFIG_REQUIRED, GEOMETRY, ID, ROPE, ROPE_VALUE, check_ids

UPSTREAM_ROPE_THETA = 10000.0  # default of `model_type: llama` (`LlamaConfig.default_theta`)
KNOWN_TYPES = {"llama": "Llama", "llama3": "Llama3"}  # prefixes of class names
OTHER_TYPES = {"mllama": "a vision model", "llama4": "Llama 4", "llama4_text": "Llama 4"}
PASSED_ON = {  # written as found, or else as in every Llama
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "use_cache": True,
}
LLAMA3_SCALING = tuple(llama3_scaling(8.0))[1:]  # its keys, without the type
PACKED = "hf_llama3"  # `quant_method` in the configuration of a folder that `hf-llama3 pack` made
ORIGINAL = "original_max_position_embeddings"
LABEL_KEYS = ("id2label", "label2id", "problem_type")  # of a classifier
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys that are written anew, from the values above and the target.
WRITTEN_ANEW = ("architectures", "model_type", "auto_map", "quantization_config", "torch_dtype")
WRITTEN_ANEW += (*GEOMETRY, *PASSED_ON, *TOKEN_IDS, "tie_word_embeddings")
WRITTEN_ANEW += ("rope_parameters", "rope_theta", "rope_scaling")


# Defaults of transformers 5.23 and of this package's class.
UNSAID = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2},
    "llama3": {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "bos_token_id": 128000, "eos_token_id": 128001},
}


def read_config(path: Path, inferred: list[str] | None = None) -> dict:
    """Read a config.json of type llama or llama3 into the one spelling that this package uses.

    A missing or contradictory value is read as transformers reads it, and noted in `inferred`.

    Returns:
        Every key of `GEOMETRY`, `TOKEN_IDS` and `PASSED_ON`, `rope_parameters` and `tie_word_embeddings`; for another
        model than a language model also `architectures` and those of `LABEL_KEYS` that it has.

    Raises:
        UserError: a key is missing, malformed or contradictory, or the file describes another kind of model.
    """
    raw = read_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in KNOWN_TYPES:
        meaning = f" ({OTHER_TYPES[kind]})" if isinstance(kind, str) and kind in OTHER_TYPES else ""
        remedy = f"; transformers itself loads others: AutoModelForCausalLM.from_pretrained('{path.parent}')"
        if kind is None:
            remedy = '; if the model is a Llama, add "model_type": "llama"'
        raise UserError(
            f"`model_type` in {path} must be one of {sorted(KNOWN_TYPES)}, got {quoted(kind)}{meaning}{remedy}"
        )
    if raw.get("quantization_config"):
        how = "packed" if is_packed(raw) else "quantised"
        raise UserError(f"{path} describes {how} weights (`quantization_config`); take the original ones")
    if raw.get("hidden_act", PASSED_ON["hidden_act"]) != PASSED_ON["hidden_act"]:
        raise UserError(f"`hidden_act` in {path} must be 'silu' as in every Llama, got {quoted(raw['hidden_act'])}")

    inferred = [] if inferred is None else inferred
    add_unsaid(raw, path, inferred)
    check(raw, CONFIG, path, CONFIG_REQUIRED)
    config = {key: raw.get(key) for key in GEOMETRY}
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    if config["head_dim"] is None:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if not config["head_dim"]:
        sizes = f"{config['hidden_size']} and {config['num_attention_heads']}"
        raise UserError(f"{path}: `hidden_size` must be at least `num_attention_heads`, got {sizes}")
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        heads = f"{config['num_attention_heads']} and {config['num_key_value_heads']}"
        raise UserError(f"{path}: `num_attention_heads` must be a multiple of `num_key_value_heads`, got {heads}")
    if config["head_dim"] % 2:
        reason = "since RoPE turns pairs of channels"
        raise UserError(f"`head_dim` in {path} must be even, {reason}, got {config['head_dim']}")

    config["rope_parameters"] = read_rope(raw, path, inferred)
    config["tie_word_embeddings"] = bool(raw.get("tie_word_embeddings", False))
    config |= {key: read_token_id(key, raw.get(key), path, inferred) for key in TOKEN_IDS}
    check_ids(config, config["vocab_size"], path)
    if head_of(raw) != LANGUAGE_MODEL:
        config |= {key: raw[key] for key in ("architectures", *LABEL_KEYS) if raw.get(key) is not None}
        check_labels(config, path)
    return config | {key: usual if raw.get(key) is None else raw[key] for key, usual in PASSED_ON.items()}


def add_unsaid(raw: dict, path: Path, inferred: list[str]):
    """Give the keys that a configuration leaves out the values that transformers takes."""
    for key, value in UNSAID.get(raw.get("model_type"), {}).items():
        if key not in raw or (raw[key] is None and key == "max_position_embeddings"):
            raw[key] = value
            inferred.append(f"`{key}` {value:g}: {path.name} does not say it, and transformers takes that")


def read_token_id(key: str, value, path: Path, inferred: list[str]) -> int | list[int] | None:
    """Return an id or None; `eos_token_id` may be a list."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    usable = all(ID.takes(token_id) or (token_id == -1 and key == "pad_token_id") for token_id in ids)
    if not usable or (len(ids) > 1 and key != "eos_token_id"):
        several = " or a list of them" if key == "eos_token_id" else ""
        raise UserError(f"`{key}` in {path} must be an id{several}, got {quoted(value)}; write there which is meant")
    if not isinstance(value, list) or (ids and key == "eos_token_id"):
        return value
    inferred.append(f"`{key}` {ids[0] if ids else 'none'}: {path.name} has a list of {len(ids)}")
    return ids[0] if ids else None


def head_of(config: dict) -> str:
    """Return the head, one of `HEADS`, of the class that a configuration names; a language model's by default."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    return next((head for head in HEADS for start in KNOWN_TYPES.values() if name == start + head), LANGUAGE_MODEL)


def check_labels(config: dict, path: Path):
    labels = config.get("id2label", {})
    if not isinstance(labels, dict) or not all(isinstance(label, str | int) for label in labels.values()):
        raise UserError(f"`id2label` in {path} must map numbers to labels, got {quoted(labels)}")


def read_more_config(path: Path) -> dict:
    """Return the rest of a config.json: its type under `dtype`, and every key that no conversion uses."""
    raw = read_json(path)
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    more = {key: value for key, value in raw.items() if key not in WRITTEN_ANEW and key != "dtype"}
    return more | ({"dtype": dtype} if isinstance(dtype, str) else {})


def is_packed(raw: dict) -> bool:
    """Tell whether a config.json is that of a folder which `hf-llama3 pack` made."""
    quantization = raw.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == PACKED


def read_rope(raw: dict, path: Path, inferred: list[str]) -> dict:
    """Return RoPE's parameters: `rope_theta` and `rope_scaling` of version 4, or `rope_parameters` of version 5.

    Contradictions are resolved as in transformers 5.23 (`convert_rope_params_to_dict`).
    """
    older, newer = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    rope = older or newer
    if not isinstance(rope, dict):
        raise UserError(f"`rope_parameters` in {path} must be a JSON object, got {quoted(rope)}")
    if older and isinstance(newer, dict) and any(older.get(key, value) != value for key, value in newer.items()):
        inferred.append("RoPE: `rope_scaling`, which transformers takes, and not `rope_parameters`, which differs")
    rope = dict(rope)
    theta, outer = rope.pop("rope_theta", None) or raw.get("rope_theta"), raw.get("rope_theta")
    if outer is not None and outer != theta:
        inferred.append(f"RoPE theta {quoted(theta)}: the inner one, which transformers takes, and not {quoted(outer)}")
    if theta is None and raw["model_type"] == "llama":
        theta = UPSTREAM_ROPE_THETA
    rope_type = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    if rope_type == "default" and rope:
        keys = ", ".join(f"`{key}`" for key in sorted(rope))
        inferred.append(f"RoPE is not scaled: no `rope_type` says how, so that transformers does not look at {keys}")
        rope = {}
    context = raw.get(ORIGINAL, rope.get(ORIGINAL, raw["max_position_embeddings"]))
    if rope_type == "llama3" and context != rope.get(ORIGINAL):
        inferred.append(f"`{ORIGINAL}` {quoted(context)}: as transformers takes it")
        rope[ORIGINAL] = context
    needed = dict.fromkeys(LLAMA3_SCALING) if rope_type == "llama3" else {}
    for key, value in (needed | {"rope_theta": theta, "rope_type": rope_type} | rope).items():
        rule = ROPE.get(key, ROPE_VALUE)
        if not rule.takes(value) and (value is not None or key in (*needed, "rope_theta")):
            raise UserError(f"`{key}` of the RoPE in {path} must be {rule.words}, got {quoted(value)}")
    if needed and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        factors = f"{rope['low_freq_factor']} and {rope['high_freq_factor']}"
        raise UserError(f"`low_freq_factor` of the RoPE in {path} must be below `high_freq_factor`, got {factors}")
    return {"rope_theta": float(theta), "rope_type": rope_type} | rope


def portable_config(config: dict, dtype: str, written_as: str, more: dict | None = None) -> dict:
    """Spell a configuration so that transformers 4 and 5 and the engines that read config.json agree on it.

    `more` is the result of `read_more_config`; its `dtype` is ignored.

    Version 4 knows only `rope_theta`, `rope_scaling` and `torch_dtype`, and silently uses a theta of 10000 without
    them; version 5 reads both spellings.
    """
    rope = config["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": [KNOWN_TYPES[written_as] + head_of(config)],
        "model_type": written_as,
        **({"auto_map": AUTO_MAP} if written_as == "llama3" else {}),
        **{key: config[key] for key in (*GEOMETRY, *TOKEN_IDS, "tie_word_embeddings")},
        **{key: config.get(key, usual) for key, usual in PASSED_ON.items()},
        **{key: config[key] for key in LABEL_KEYS if key in config},
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "dtype": dtype,
        "torch_dtype": dtype,
        **{key: value for key, value in (more or {}).items() if key != "dtype"},
    }


def published_generation(config: dict) -> dict:
    """Return the generation_config.json that was published with every Llama 3."""
    ids = {key: config[key] for key in TOKEN_IDS if config[key] is not None}
    return ids | {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


def make_portable(folder: Path, generation: dict | None = None):
    """Rewrite the config.json that `save_pretrained` wrote for this package's model, so that every tool reads it.

    Args:
        generation: the model's generation_config.json, if it is not the usual one.
    """
    path = folder / "config.json"
    dtype = read_json(path).get("dtype") or "float32"
    path.write_bytes(to_json(portable_config(read_config(path), dtype, "llama")))
    generation = published_generation(read_config(path)) if generation is None else generation
    (folder / "generation_config.json").write_bytes(to_json(generation))
