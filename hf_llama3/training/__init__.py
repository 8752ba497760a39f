"""Llama 3 from scratch, on a text: tokenizer, data and recipe."""

from hf_llama3.lazy import on_use

_HOMES = {"Settings": "settings", "TrainingReport": "recipe", "make_settings": "settings", "train": "recipe"}
__all__ = [*_HOMES]
__getattr__ = on_use(__name__, _HOMES)
