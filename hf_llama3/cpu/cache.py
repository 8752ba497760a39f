"""A key/value cache for `model.generate` that grows in place, where the library copies it at every step."""

# Shapes: B rows, K key/value heads, S tokens so far, T new tokens, D channels of a head

import functools

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

SPARE_TOKENS, SPARE_SHARE = 256, 8  # tokens of room, or an eighth of the cache if that is more


class GrowingLayer(DynamicLayer):
    """The keys and values (B, K, S, D) of a layer, as views of memory that has room for more."""

    key_memory = value_memory = None  # (B, K, S + room, D)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append (B, K, T, D) and return all keys and all values (B, K, S + T, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.key_memory, self.keys = append(self.key_memory, self.keys, key_states)
        self.value_memory, self.values = append(self.value_memory, self.values, value_states)
        return self.keys, self.values


def append(memory: torch.Tensor | None, seen: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Append `new` to `seen`, in place if `memory` holds `seen` and has room; return the memory and the result."""
    start = seen.shape[-2] if seen.numel() else 0
    end = start + new.shape[-2]
    if memory is None or not starts_with(memory, seen) or end > memory.shape[-2]:
        memory = new.new_empty(*new.shape[:-2], end + max(SPARE_TOKENS, end // SPARE_SHARE), new.shape[-1])
        if start:
            memory[..., :start, :] = seen
    memory[..., start:end, :] = new
    return memory, memory[..., :end, :]


def starts_with(memory: torch.Tensor, seen: torch.Tensor) -> bool:
    """Tell whether `seen` is a view of the memory's beginning, and the memory can be written now."""
    may_write = torch.is_inference_mode_enabled() or not memory.is_inference()
    is_start = (memory.data_ptr(), memory.stride()) == (seen.data_ptr(), seen.stride())
    return may_write and is_start and memory.shape[:-2] == seen.shape[:-2]


def grow_caches(model: PreTrainedModel):
    """Make the caches that `model.generate` creates grow in place."""
    model._prepare_cache_for_generation = functools.partial(prepare_cache, model)


def prepare_cache(model: PreTrainedModel, generation_config, model_kwargs: dict, *args, **kwargs):
    """Replace the library's method: a plain cache gets growing layers; all other caches are left alone."""
    given = model_kwargs.get("past_key_values")
    result = type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    cache = model_kwargs.get("past_key_values")
    if cache is not given and type(cache) is DynamicCache:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        if cache.layer_class_to_replicate is DynamicLayer:  # a cache that makes its layers when they are first written
            cache.layer_class_to_replicate = GrowingLayer
    return result
