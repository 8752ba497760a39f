"""The published sizes of Llama 3, as rows: `Llama3Config(**config_of("3.2-1B"))`.

Shapes and scaling were read in llama-models 0.3.0, models/sku_list.py, in the function that `source` names
(https://github.com/meta-llama/llama-models/blob/v0.3.0/models/sku_list.py). Two facts stand elsewhere: the RoPE factor,
which Meta's params.json does not hold, and the tied embeddings, in the config.json of each repository on the Hub.
"""

from typing import NamedTuple

ROPE_THETA = 500000.0
VOCAB_SIZE = 128256  # tokens
ORIGINAL_CONTEXT = 8192  # tokens, before the frequencies were scaled
LONG_CONTEXT = 131072  # tokens


class Preset(NamedTuple):
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_factor: float | None  # None: not scaled
    tie_word_embeddings: bool
    source: str  # function in sku_list.py, repository on the Hub


PRESETS = {
    "3-8B": Preset(4096, 14336, 32, 32, 8, None, False, "llama3_base_models, meta-llama/Meta-Llama-3-8B"),
    "3-70B": Preset(8192, 28672, 80, 64, 8, None, False, "llama3_base_models, meta-llama/Meta-Llama-3-70B"),
    "3.1-8B": Preset(4096, 14336, 32, 32, 8, 8.0, False, "llama3_1_base_models, meta-llama/Llama-3.1-8B"),
    "3.1-70B": Preset(8192, 28672, 80, 64, 8, 8.0, False, "llama3_1_base_models, meta-llama/Llama-3.1-70B"),
    "3.1-405B": Preset(16384, 53248, 126, 128, 8, 8.0, False, "llama3_1_base_models, meta-llama/Llama-3.1-405B"),
    "3.2-1B": Preset(2048, 8192, 16, 32, 8, 32.0, True, "arch_args_1b, meta-llama/Llama-3.2-1B"),
    "3.2-3B": Preset(3072, 8192, 28, 24, 8, 32.0, True, "arch_args_3b, meta-llama/Llama-3.2-3B"),
    "3.3-70B": Preset(
        8192, 28672, 80, 64, 8, 8.0, False, "llama3_3_instruct_models, meta-llama/Llama-3.3-70B-Instruct"
    ),
}


def config_of(name: str) -> dict:
    """Return the keywords that make `Llama3Config` the published model `name`.

    Raises:
        KeyError: listing the names that exist.
    """
    if name not in PRESETS:
        raise KeyError(f"`name` must be one of {sorted(PRESETS)}, got {name!r}")
    preset = PRESETS[name]._asdict()
    factor, _ = preset.pop("rope_factor"), preset.pop("source")
    return preset | {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": LONG_CONTEXT if factor else ORIGINAL_CONTEXT,
        "rope_parameters": {"rope_theta": ROPE_THETA}
        | (llama3_scaling(factor) if factor else {"rope_type": "default"}),
    }


def llama3_scaling(factor: float) -> dict:
    """Return the keys of `rope_parameters` that every scaled Llama 3 shares, with its factor."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    }
