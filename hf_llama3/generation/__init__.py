"""Text from a model: loading by what lies in a folder, generating fast, talking, measuring."""

import importlib

_HOMES = {
    "Completion": "text",
    "generate_text": "text",
    "load_model": "loading",
    "optimize": "optimization",
    "restore": "optimization",
    "pack_model": "packing",
    "chat": "conversation",
    "bench": "speed",
    "evaluate": "evaluation",
}
__all__ = [*_HOMES]


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
