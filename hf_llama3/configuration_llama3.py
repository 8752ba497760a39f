"""Configuration of a Llama 3 model: every number that fixes its shape and its arithmetic.

The defaults are those of Meta-Llama-3-8B. Llama 2 and Code Llama are the same architecture with other numbers:
multi-head attention up to 13B (`num_key_value_heads=None`), `rope_theta` 10000 or 1e6, 32000 or 32016 tokens.
"""

import copy
import difflib
import warnings

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, LlamaConfig, PreTrainedConfig

from .rotary import check_rope

# Keywords that the library or older configurations use and that are no fields of their own.
LIBRARY_KEYWORDS = {
    *("attn_implementation", "auto_map", "classifier_dropout", "experts_implementation", "hidden_dropout"),
    *("partial_rotary_factor", "per_layer_config", "pretraining_tp", "quantization_config", "residual_dropout"),
    *("rope_scaling", "rope_theta", "tokenizer_class", "torch_dtype", *vars(GenerationConfig())),
}


@strict
class Llama3Config(PreTrainedConfig):
    """Hold the shape and the arithmetic of a Llama 3 model; tensors are named as in `modeling_llama3.py`.

    Raises:
        ValueError, huggingface_hub.errors.StrictDataclassError: values contradict each other or have another type.
    """

    model_type = "llama3"
    auto_map = {}  # TRL reads it of every class that is not transformers' own
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 500000.0
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 128256  # rows of the embedding
    hidden_size: int = 4096  # channels of the residual stream
    intermediate_size: int = 14336  # channels of the feed-forward block
    num_hidden_layers: int = 32  # decoder layers
    num_attention_heads: int = 32  # query heads per layer
    num_key_value_heads: int | None = 8  # each shared by as many query heads; None: one per query head
    head_dim: int | None = None  # channels per head, even; None: hidden_size / num_attention_heads
    hidden_act: str = "silu"  # activation of the feed-forward gate, a name in `transformers.activations.ACT2FN`
    max_position_embeddings: int = 8192  # context window, in tokens
    rms_norm_eps: float = 1e-5  # added to the mean square before its root is taken
    # `rope_theta` (base of the rotary wavelengths), `rope_type` ("default", "llama3" or any other that the library
    # offers) and that type's keys: see `rotary.py`. The older `rope_theta` and `rope_scaling` are understood as well.
    rope_parameters: dict | None = None
    attention_bias: bool = False  # of the four attention projections
    attention_dropout: float | int = 0.0  # probability of dropping an attention weight in training
    mlp_bias: bool = False  # of the three feed-forward projections
    tie_word_embeddings: bool = False  # whether the output head is the embedding matrix itself (Llama 3.2 1B and 3B)
    initializer_range: float = 0.02  # standard deviation of freshly drawn weights
    use_cache: bool = True  # whether the model keeps keys and values by default
    pad_token_id: int | None = None  # fills a batch's shorter texts
    bos_token_id: int | None = 128000  # begins a text
    eos_token_id: int | list[int] | None = 128001  # ends a text; of a list, each does

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self._require_multiple("hidden_size", "num_attention_heads")
            self.head_dim = self.hidden_size // self.num_attention_heads
        newer, older = self.rope_parameters or {}, kwargs.pop("rope_scaling", None)  # which knew no theta
        theta = {"rope_theta": newer["rope_theta"]} if "rope_theta" in newer else {}
        self.rope_parameters = theta | (older or newer)  # a copy: the library writes into it
        check_rope(self.rope_parameters)

        for name in sorted(kwargs.keys() - LIBRARY_KEYWORDS):
            if not name.startswith("_") and not hasattr(type(self), name):
                nearest = difflib.get_close_matches(name, [*type(self).__annotations__, "rope_theta"], n=1)
                hint = f"; did you mean `{nearest[0]}`?" if nearest else ""
                warnings.warn(f"`{name}` is not a field of Llama3Config and has no effect{hint}", stacklevel=2)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Check what no single field can; `@strict` calls this after `__init__`."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}")
        self._require_multiple("num_attention_heads", "num_key_value_heads")
        if self.head_dim <= 0 or self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even, since RoPE turns pairs of channels, got {self.head_dim}")

    def to_dict(self):
        fields = super().to_dict()
        if self._auto_class is None:
            fields.pop("auto_map", None)  # it points to code that only `register_for_auto_class` has saved alongside
        return fields

    def _require_multiple(self, name, divisor_name):
        value, divisor = getattr(self, name), getattr(self, divisor_name)
        if divisor <= 0 or value % divisor:
            raise ValueError(f"`{name}` must be a multiple of `{divisor_name}`, got {value} and {divisor}")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return super().from_dict(from_upstream(config_dict), **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return from_upstream(config_dict), unused


def from_upstream(config_dict: dict) -> dict:
    """Translate the configuration of a `model_type: llama` checkpoint: what it leaves out has *upstream's* defaults."""
    if config_dict.get("model_type") != LlamaConfig.model_type:
        return config_dict
    given, own = copy.deepcopy(config_dict), {"model_type": Llama3Config.model_type}  # the library writes into it
    if given.get("head_dim") is not None:  # theirs refuses heads that do not divide the hidden size all the same
        heads = given.get("num_attention_heads") or LlamaConfig.num_attention_heads
        own |= {"num_attention_heads": heads, "num_key_value_heads": given.get("num_key_value_heads") or heads}
        given["num_attention_heads"] = 1
    return LlamaConfig.from_dict(given).to_dict() | own
