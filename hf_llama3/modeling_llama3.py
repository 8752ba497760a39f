"""Llama 3 as Hugging Face model classes, from the decoder layer up.

The architecture is Meta's (llama-models 0.3.0, models/llama3/model.py); modules and parameters are named as in
upstream's `modeling_llama`, so that every Llama checkpoint, adapter and parallel plan fits as it is.
"""

# Shapes: B batch, T tokens, E hidden_size, V vocab_size

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import Llama3Attention
from .configuration_llama3 import Llama3Config
from .mlp import Llama3MLP
from .norm import Llama3RMSNorm
from .rotary import Llama3RotaryEmbedding


class Llama3DecoderLayer(GradientCheckpointingLayer):
    """Add to the residual stream what attention reads from the tokens, then what the feed-forward makes of each."""

    def __init__(self, config: Llama3Config, layer_idx: int):
        super().__init__()
        self.self_attn = Llama3Attention(config, layer_idx)
        self.mlp = Llama3MLP(config)
        self.input_layernorm = Llama3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Llama3RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Llama3PreTrainedModel(PreTrainedModel):
    """Tell the library what these classes can do and how they may be split, recorded and compiled."""

    config_class = Llama3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Llama3DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Llama3DecoderLayer, "attentions": Llama3Attention}


class Llama3Model(Llama3PreTrainedModel):
    """Embed the tokens, run the decoder layers, normalise: token ids (B, T) to hidden states (B, T, E)."""

    def __init__(self, config: Llama3Config):
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Llama3DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Llama3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Llama3RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Return the last hidden state (B, T, E), the cache, and on request every layer's states and weights.

        Exactly one of `input_ids` (B, T) and `inputs_embeds` (B, T, E) is given. `attention_mask` is (B, S) with zeros
        at padding, or whatever `create_causal_mask` takes; `position_ids` (B, T) default to those after the cache. A
        row in which they start again is read as several texts, but only with `use_cache=False` and without a mask.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of `input_ids` and `inputs_embeds`")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, E)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class Llama3ForCausalLM(Llama3PreTrainedModel, GenerationMixin):
    """Predict the next token: token ids (B, T) to logits (B, T, V)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    skip_logits_in_training = False
    loss_without_logits = None  # (states, head, labels, ...) -> loss, by the package; None with these files alone

    def __init__(self, config: Llama3Config):
        super().__init__(config)
        self.model = Llama3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Return logits and, given `labels` (B, T), the mean cross-entropy of a token given those before it, in nats.

        `labels` are the input ids themselves (the loss shifts them), -100 where a token does not count.
        `logits_to_keep` is how many of the last positions to compute logits for (0: all), or which positions.
        `skip_logits` asks for the loss alone, for which the logits (B, T, V) never stand in memory at once; None means
        as `skip_logits_in_training` says. These six files alone, without their package, return the logits all the same.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = select_positions(outputs.last_hidden_state, logits_to_keep)
        if skip_logits is None:
            skip_logits = self.training and self.skip_logits_in_training
        if labels is not None and skip_logits and self.loss_without_logits is not None:
            logits, loss = None, self.loss_without_logits(hidden_states, self.lm_head, labels, **kwargs)
        else:
            logits, loss = self.lm_head(hidden_states), None
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions)


class Llama3Head(Llama3PreTrainedModel):
    """Have the library's generic heads find their base model: they ask AutoModel, which knows no remote code."""

    def __init__(self, config: Llama3Config):
        if type(config) not in MODEL_MAPPING:
            AutoModel.register(type(config), Llama3Model)
        super().__init__(config)


class Llama3ForSequenceClassification(GenericForSequenceClassification, Llama3Head):
    """Score a whole text by its last token: token ids (B, T) to logits (B, num_labels)."""


class Llama3ForTokenClassification(GenericForTokenClassification, Llama3Head):
    """Score every token: token ids (B, T) to logits (B, T, num_labels)."""


class Llama3ForQuestionAnswering(GenericForQuestionAnswering, Llama3Head):
    """Score every token as the start and as the end of an answer: token ids (B, T) to two logits (B, T)."""

    base_model_prefix = "transformer"  # the name that upstream's question-answering checkpoints carry


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Cut (B, T, E) down to the positions asked for, before the largest matrix multiplication of the model.

    An int: the last ones (0: all). (N): these of every row. (B, N): each row's own. A mask (B, T): its own, as (N, E).
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
