"""params.json and config.json: the same model in two spellings, each with something that the other lacks.

A configuration is the dictionary that `hf.read_config` returns, so that nothing here needs transformers. What
params.json has no place for is kept in a file beside it, see `sidecar.py`.
"""

from pathlib import Path

from hf_llama3.errors import UserError, quoted
from hf_llama3.files.json import read_json
from hf_llama3.files.schema import check
from hf_llama3.presets import LONG_CONTEXT, ORIGINAL_CONTEXT, PRESETS, ROPE_THETA, VOCAB_SIZE, llama3_scaling

from ..weights import BIAS_KEYS, LANGUAGE_MODEL
from .hf import head_of
from .schema import PARAMS, PARAMS_REQUIRED
from .sidecar import SIDECAR

LLAMA2_ROPE_THETA = 10000.0  # default of params.json (llama-models 0.3.0, Llama 2's `ModelArgs`)
CODE_LLAMA_ROPE_THETA = 1e6
UNKNOWN_VERSION = "unknown"
LLAMA2_VOCABULARIES = (32000, 32016)  # Llama 2, and Code Llama with its infilling tokens

REFUSED = {  # what each describes, and the remedy
    "quantization_args": ("quantised weights", "take the same model in bfloat16"),
    "lora_args": ("weights with LoRA adapters beside them", "take the same model in bfloat16"),
    "vision_model": ("a vision model", "take one that reads text alone"),
    "vision_chunk_size": ("a vision model", "take one that reads text alone"),
    "moe_args": ("a mixture of experts (Llama 4)", "take a model of Llama 3"),
}
# (multiple_of, ffn_dim_multiplier) of the released models; they are tried first.
RELEASED_MULTIPLIERS = ((256, 1.5), (256, None), (4096, 1.3), (1024, 1.3), (4096, 1.2))


def params_to_config(
    params: dict, path: Path, vocab_size: int, given_factor: float | None = None, kept_factor: float | None = None
) -> tuple[dict, list[str]]:
    """Return the configuration for a params.json.

    Args:
        vocab_size: the embedding's rows, since Llama 2's file says -1.
        given_factor, kept_factor: the RoPE factor from the user and from the sidecar.

    Returns:
        The configuration, without token ids and tying, and sentences about what was inferred.

    Raises:
        UserError: keys contradict each other, or a flag is needed; the sentence names them.
    """
    if params.get("vocab_size", -1) not in (-1, vocab_size):
        raise UserError(f"{path} says vocab_size {params['vocab_size']}, but the embedding has {vocab_size} rows")
    heads, dim = params["n_heads"], params["dim"]
    kv_heads = params.get("n_kv_heads") or heads
    if heads % kv_heads or dim % heads:
        chain = "`dim` must be a multiple of `n_heads`, and that of `n_kv_heads`"
        raise UserError(f"{path}: {chain}, got {dim}, {heads} and {kv_heads}")
    inferred = []
    scaled = is_scaled(params, path, given_factor, inferred)
    theta = float(params.get("rope_theta", LLAMA2_ROPE_THETA))
    if "rope_theta" not in params and (scaled or vocab_size == VOCAB_SIZE):
        theta = ROPE_THETA  # default of Llama 3's own reader (llama-models 0.3.0, models/llama3/args.py)
        inferred.append(f"RoPE theta {theta:,.0f}: {path.name} does not say it, and Llama 3's reader takes that")
    if scaled:
        factor, why = infer_rope_factor(params, path, given_factor, kept_factor)
        inferred.append(f"RoPE factor {factor:g}: {why}")
        rope, context = {"rope_theta": theta} | llama3_scaling(factor), LONG_CONTEXT
    elif given_factor is not None and not (given_factor == 1 and "use_scaled_rope" not in params):
        raise UserError(f"{path} does not scale RoPE (`use_scaled_rope`); leave out --rope-factor {given_factor:g}")
    else:
        rope = {"rope_theta": theta, "rope_type": "default"}
        context = {ROPE_THETA: ORIGINAL_CONTEXT, CODE_LLAMA_ROPE_THETA: 16384}.get(theta, 4096)
    config = {
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": feed_forward_size(dim, params.get("multiple_of", 256), params.get("ffn_dim_multiplier")),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim // heads,
        "max_position_embeddings": context,
        "rms_norm_eps": float(params["norm_eps"]),
        "rope_parameters": rope,
    }
    return config, inferred


def read_params(path: Path) -> dict:
    """Read params.json.

    Raises:
        UserError: a key is missing or malformed, or shows that this is no Llama 3 text model.
    """
    params = {key: value for key, value in read_json(path).items() if value is not None}
    for key, (meaning, remedy) in REFUSED.items():
        if params.get(key) not in (None, -1, {}):
            raise UserError(f"{path} describes {meaning} (`{key}`); {remedy}")
    for key in PARAMS_REQUIRED:
        if key not in params:
            raise UserError(f"{path} lacks `{key}`; it is not the params.json of a Llama")
    check(params, PARAMS, path)
    if unknown := sorted(params.keys() - PARAMS.keys() - REFUSED.keys()):
        remedy = "remove what does not change the model"
        raise UserError(f"{path} holds {quoted(unknown)}, which no Llama of Meta's has; {remedy}")
    return params


class MissingFlag(UserError):
    """No file says a value; the message names the flag that does."""


def is_scaled(params: dict, path: Path, given: float | None, inferred: list[str]) -> bool:
    """Tell whether RoPE is scaled; add to `inferred` what a contradiction was taken for.

    Raises:
        MissingFlag: there is a factor but no switch.
    """
    factor = params.get("rope_scaling_factor", 1)
    if "use_scaled_rope" in params or factor == 1:
        if not params.get("use_scaled_rope") and factor != 1:
            inferred.append(f"RoPE is not scaled: says `use_scaled_rope`, in spite of `rope_scaling_factor` {factor:g}")
        return params.get("use_scaled_rope", False)
    if given is None:
        raise MissingFlag(
            f"{path} says `rope_scaling_factor` {factor:g} but not `use_scaled_rope`; add --rope-factor {factor:g} if "
            "RoPE is scaled, or --rope-factor 1 if it is not"
        )
    inferred.append(f"RoPE is {'' if given != 1 else 'not '}scaled: given by --rope-factor")
    return given != 1


def infer_rope_factor(params: dict, path: Path, given: float | None, kept: float | None) -> tuple[float, str]:
    """Infer the factor, which `use_scaled_rope` leaves out: 8 in Meta's code for 3.1 and 3.3, but 32 for 3.2."""
    if given is not None:
        return float(given), "given by --rope-factor"
    if kept is not None:
        return float(kept), f"says {SIDECAR}"
    if params.get("rope_scaling_factor") is not None:
        return float(params["rope_scaling_factor"]), "says params.json"
    shape = (params["dim"], params["n_layers"], params["n_heads"])
    for name, preset in PRESETS.items():
        if preset.rope_factor and shape == (preset.hidden_size, preset.num_hidden_layers, preset.num_attention_heads):
            return preset.rope_factor, f"the shape is that of Llama {name}"
    raise MissingFlag(
        f"{path} says `use_scaled_rope` but not the factor, and {shape[1]} layers of {shape[0]} are no released model; "
        "add --rope-factor (8 in Llama 3.1 and 3.3, 32 in Llama 3.2)"
    )


def feed_forward_size(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Compute the feed-forward's width as in llama-models 0.3.0, models/llama3/model.py, `FeedForward`."""
    size = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        size = int(ffn_dim_multiplier * size)
    return multiple_of * -(-size // multiple_of)


def find_multiplier(dim: int, size: int) -> tuple[int, float | None]:
    """Find `multiple_of` and `ffn_dim_multiplier` from which `feed_forward_size` gives `size`.

    Raises:
        UserError: there is none.
    """
    largest = size & -size  # the largest power of two that divides it
    candidates = [*RELEASED_MULTIPLIERS, (largest, None)]
    base = feed_forward_size(dim, 1, None)
    candidates += [(step, round(size / base, digits)) for digits in range(1, 8) for step in (256, largest, 1)]
    candidates += [(1, (size + 0.5) / base)]
    for multiple_of, multiplier in candidates:
        if feed_forward_size(dim, multiple_of, multiplier) == size:
            return multiple_of, multiplier
    raise UserError(f"no `multiple_of` and `ffn_dim_multiplier` give a feed-forward of {size} for a width of {dim}")


def config_to_params(config: dict, path: Path, kv_heads: int) -> dict:
    """Return the params.json of a configuration, with the keys of Meta's `ModelArgs` only and `kv_heads` as written.

    Raises:
        UserError: the model has something that Meta's format has no place for.
    """
    heads, hidden, rope = config["num_attention_heads"], config["hidden_size"], config["rope_parameters"]
    stays = "; --to hf keeps it"
    if config["head_dim"] * heads != hidden:
        got = f"got {config['head_dim']} x {heads} and {hidden}"
        rule = "`head_dim` x `num_attention_heads` = `hidden_size`"
        raise UserError(
            f"{path}: Meta's format needs {rule}, since params.json has no key for `head_dim`, {got}{stays}"
        )
    if biased := [key for key in BIAS_KEYS if config.get(key)]:
        place = "Meta's layers have weights alone, and params.json no key for"
        raise UserError(f"{path} has biases in its projections: {place} `{biased[0]}`{stays}")
    if (head := head_of(config)) != LANGUAGE_MODEL:
        raise UserError(f"{path} ends with a head {head}: Meta's format has a place for output.weight alone{stays}")
    scaled = rope["rope_type"] != "default"
    if scaled and {**rope, "factor": 0, "rope_theta": 0} != {**llama3_scaling(0), "rope_theta": 0}:
        raise UserError(
            f"{path}: Meta's format knows plain RoPE and Llama 3.1's scaling of 8192 tokens, got {rope}{stays}"
        )
    multiple_of, multiplier = find_multiplier(hidden, config["intermediate_size"])
    params = {
        "dim": hidden,
        "n_layers": config["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "vocab_size": config["vocab_size"],
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "use_scaled_rope": scaled or None,  # Llama 3.0's files and readers do not know the key
    }
    return {key: value for key, value in params.items() if value is not None}


def infer_version(config: dict, family: str | None, given: str | None, path: Path) -> tuple[str, str]:
    """Infer the version of Llama, and why: it decides special tokens and how shards divide the embedding.

    Without evidence it is "unknown", and shards are divided as Llama 3's.

    Args:
        family: "2" or "3" from the tokenizer, "other" for another model's tokenizer.
        given: the version from the user.

    Raises:
        UserError: user and tokenizer contradict each other.
    """
    if given is not None:
        if family in ("2", "3") and given[0] != family:
            raise UserError(f"the tokenizer of {path} is Llama {family}'s; leave out --llama-version {given}")
        return given, "given by --llama-version"
    rope, vocab_size = config["rope_parameters"], config["vocab_size"]
    if family == "2":
        return "2", "the tokenizer is a sentencepiece model"
    if family is None and vocab_size in LLAMA2_VOCABULARIES:
        return "2", f"the vocabulary has {vocab_size} tokens"
    if rope["rope_type"] == "llama3":
        return ("3.2" if rope["factor"] == 32 else "3.1"), f"the RoPE factor is {rope['factor']:g}"
    if family == "3":
        return "3.0", "the tokenizer is Llama 3's, and RoPE is not scaled"
    if vocab_size == VOCAB_SIZE:
        return "3.0", f"the vocabulary has {vocab_size} tokens, and RoPE is not scaled"
    if family is None and rope["rope_theta"] == ROPE_THETA:
        return "3.0", f"RoPE has a theta of {ROPE_THETA:g} and is not scaled"
    return UNKNOWN_VERSION, "neither tokenizer, vocabulary nor RoPE is a released Llama's"
