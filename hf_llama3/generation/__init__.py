"""Text from a model: loading by what lies in a folder, generating fast, talking, measuring."""

from hf_llama3.lazy import on_use

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
__getattr__ = on_use(__name__, _HOMES)
