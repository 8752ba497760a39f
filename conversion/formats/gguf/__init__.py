"""GGUF, the one file of llama.cpp, ollama and LM Studio: read as data, and laid out.

Metadata, tokenizer and tensors lie in it together. Its Llama tensors have names of their own and the order of rotary
rows that Meta's have. Sources: ggml's docs/gguf.md; llama.cpp, ggml/src/gguf.cpp.
"""

from .blocks import Quantise, Recompute, Widen
from .carried import carry
from .file import SPLIT_NAME, SUFFIX, is_gguf
from .kinds import BY_KIND, EXACT, FILE_TYPES, RECOMPUTED
from .layout import GgufLayout
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
    "is_gguf",
    "open_gguf",
]
