"""GGUF, the file format of llama.cpp, ollama and LM Studio: read as data, or laid out.

A file holds metadata, tokenizer and tensors together. Its Llama tensors have names of their own and Meta's order of
rotary rows. Sources: ggml's docs/gguf.md; llama.cpp, ggml/src/gguf.cpp.
"""

from .blocks import Quantise, Recompute, Widen
from .carried import carry
from .file import SPLIT_NAME, SUFFIX, find_models, is_gguf, part_name, require_suffix
from .kinds import BY_KIND, EXACT, FILE_TYPES, RECOMPUTED
from .layout import GgufLayout, split_keys
from .opening import open_gguf

__all__ = [
    "BY_KIND",
    "EXACT",
    "FILE_TYPES",
    "RECOMPUTED",
    "SPLIT_NAME",
    "SUFFIX",
    "GgufLayout",
    "Quantise",
    "Recompute",
    "Widen",
    "carry",
    "find_models",
    "is_gguf",
    "open_gguf",
    "part_name",
    "require_suffix",
    "split_keys",
]
