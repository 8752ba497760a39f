"""The types of elements and of metadata in a GGUF file, by their numbers.

Source: llama.cpp, ggml/include/ggml.h (`ggml_type`) and gguf.h (`gguf_type`); gguf 0.19.0, constants.py.
"""

import math
from typing import NamedTuple

import numpy as np

from ..storage import BY_NAME, Dtype


class Kind(NamedTuple):
    """How elements are stored; quantised ones in blocks that share a scale."""

    name: str
    number: int
    block: int  # elements
    block_bytes: int
    exact: str | None = None  # type of the elements, if they are not quantised

    @property
    def dtype(self) -> Dtype:
        """The type that its elements are read in."""
        return BY_NAME[self.exact or "float32"]

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.block * self.block_bytes


KINDS = (
    Kind("f32", 0, 1, 4, "float32"),
    Kind("f16", 1, 1, 2, "float16"),
    Kind("bf16", 30, 1, 2, "bfloat16"),
    Kind("f64", 28, 1, 8, "float64"),
    Kind("q4_0", 2, 32, 18),
    Kind("q4_1", 3, 32, 20),
    Kind("q5_0", 6, 32, 22),
    Kind("q5_1", 7, 32, 24),
    Kind("q8_0", 8, 32, 34),
    Kind("q2_k", 10, 256, 84),
    Kind("q3_k", 11, 256, 110),
    Kind("q4_k", 12, 256, 144),
    Kind("q5_k", 13, 256, 176),
    Kind("q6_k", 14, 256, 210),
    Kind("iq4_nl", 20, 32, 18),
)
BY_NUMBER = {kind.number: kind for kind in KINDS}
BY_KIND = {kind.name: kind for kind in KINDS}
EXACT = {kind.exact: kind for kind in KINDS if kind.exact}
# Kinds that the gguf package can make, so that a file's blocks can be compared with its source, quantised again.
RECOMPUTED = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
# Value of `--dtype` -> number of `general.file_type`, the type of most tensors
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q4_0": 2, "q8_0": 7}

# Types of metadata
SCALARS = {  # number -> numpy's type
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
UINT16, UINT32, INT32, FLOAT32, FLAG, TEXT, ARRAY = 2, 4, 5, 6, 7, 8, 9
