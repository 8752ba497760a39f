"""Llama 3 from scratch, on a text: tokenizer, data and recipe."""

import importlib

_HOMES = {"Settings": "settings", "TrainingReport": "recipe", "make_settings": "settings", "train": "recipe"}
__all__ = [*_HOMES]


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
