"""Tensors that are decoded while they are read, a few rows at a time: quantised ones, and narrowed ones.

llama.cpp's own package `gguf`, an extra, decodes the blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hf_llama3.errors import UserError

from ..dcp.gathered import GatheredArray, GatheredTensor, TensorOver
from ..storage import BY_NAME, Dtype, SourceFile, StoredTensor, to_floats
from .kinds import Kind

AT_A_TIME = 2**17  # elements, as of `cast.Cast`
FLOAT32 = BY_NAME["float32"]


def gguf_package(why: str):
    """Import llama.cpp's package.

    Raises:
        UserError: it is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(f'{why} takes the package gguf; pip install "hf_llama3[gguf]"') from error
    return gguf


@dataclass(frozen=True, eq=False)
class DecodedArray(GatheredArray):
    """The array of a decoded tensor."""

    file: SourceFile
    stored: np.ndarray  # a view of the file, with a row for each row of elements
    decode: Callable[[np.ndarray], np.ndarray]  # returns elements as unsigned integers of their width
    shape: tuple[int, ...]
    dtype: np.dtype
    columns: tuple[int, int] | None = None  # the columns that it is cut to, if any

    def gather(self, start: int, stop: int) -> np.ndarray:
        elements = self.decode(self.file.take(self.stored[start:stop]))
        return elements if self.columns is None else elements[:, slice(*self.columns)]

    def cut(self, rows: slice, columns: slice = slice(None)) -> "DecodedArray":
        stored = self.stored[rows]
        if len(self.shape) == 1:
            return DecodedArray(self.file, stored, self.decode, stored.shape, self.dtype)
        first = self.columns[0] if self.columns else 0
        start, stop, _ = columns.indices(self.shape[1])
        shape = (len(stored), max(stop - start, 0))
        return DecodedArray(self.file, stored, self.decode, shape, self.dtype, (first + start, first + stop))


@dataclass(eq=False)
class BlockTensor(GatheredTensor):
    """Where the blocks of a quantised tensor are; its elements are float32."""

    file: SourceFile
    kind: Kind
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> Dtype:
        return self.kind.dtype

    @property
    def paths(self) -> list[Path]:
        return [self.file.path]

    @cached_property
    def array(self) -> DecodedArray:
        width = self.kind.bytes_of(self.shape[-1:])
        stored = np.ndarray((*self.shape[:-1], width), np.uint8, self.file.bytes, self.offset)
        return DecodedArray(self.file, stored, self.decode, self.shape, np.dtype("<u4"))

    def decode(self, rows: np.ndarray) -> np.ndarray:
        gguf = gguf_package(f"{self.kind.name} in {self.file.path}")
        kind = gguf.GGMLQuantizationType[self.kind.name.upper()]
        with np.errstate(all="ignore"):  # a scale may be anything that a float16 can
            return np.ascontiguousarray(gguf.dequantize(rows, kind), "<f4").view("<u4")


@dataclass(eq=False)
class NarrowedTensor(TensorOver):
    """A float32 tensor, read in a narrower type that holds all its elements exactly."""

    base: StoredTensor
    dtype: Dtype

    @cached_property
    def array(self) -> DecodedArray:
        kind = np.dtype(f"<u{self.dtype.itemsize}")
        return DecodedArray(self.file, self.base.array, self.decode, self.shape, kind)

    def decode(self, bits: np.ndarray) -> np.ndarray:
        return narrow(bits, self.dtype)


def narrow(bits: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Narrow float32 elements to bfloat16 or float16, all as unsigned integers."""
    if dtype.name == "bfloat16":
        return (bits >> 16).astype("<u2")
    with np.errstate(over="ignore"):
        return bits.view("<f4").astype("<f2").view("<u2")


def fits(tensor: StoredTensor, dtype: Dtype) -> bool:
    """Tell whether a narrower type holds every element of a small float32 tensor, to the bit."""
    bits = np.frombuffer(tensor.read(), "<u4")
    return np.array_equal(to_floats(narrow(bits, dtype), dtype).astype("<f4").view("<u4"), bits)


class Widen:
    """Widens elements of at most 32 bits to float32, exactly."""

    to = FLOAT32
    largest_error = 0.0

    def __call__(self, block: np.ndarray, stored: Dtype) -> np.ndarray:
        return np.ascontiguousarray(to_floats(np.ascontiguousarray(block), stored), "<f4").view("<u4")


class Quantise:
    """Quantises elements by llama.cpp's package, and remembers the largest error."""

    def __init__(self, kind: Kind):
        self.to = kind
        self.largest_error = 0.0
        self.gguf = gguf_package(f"--dtype {kind.name}")
        self.number = self.gguf.GGMLQuantizationType(kind.number)

    def __call__(self, block: np.ndarray, stored: Dtype) -> np.ndarray:
        """Return the bytes of the kind for whole blocks of elements, given as unsigned integers of their width."""
        flat = np.ascontiguousarray(block).reshape(-1)
        return np.concatenate([self.round(flat[at : at + AT_A_TIME], stored) for at in range(0, flat.size, AT_A_TIME)])

    def round(self, block: np.ndarray, stored: Dtype) -> np.ndarray:
        before = to_floats(block, stored).astype("<f4", copy=False).reshape(-1, self.to.block)
        if not np.isfinite(before).all():
            raise UserError(f"--dtype {self.to.name} cannot hold {before[~np.isfinite(before)][0]}; choose f32")
        with np.errstate(all="ignore"):  # a scale beyond float16 shows as an infinite error
            made = self.gguf.quantize(before, self.number)
            error = float(np.abs(self.gguf.dequantize(made, self.number) - before).max())
        if not np.isfinite(error):
            largest = np.abs(before).max()
            raise UserError(f"--dtype {self.to.name} cannot hold {largest:g}, which is in the weights; choose bf16")
        self.largest_error = max(self.largest_error, error)
        return made.reshape(-1)


class Recompute:
    """Quantises elements and decodes them again, to compare them with those of a file."""

    to = FLOAT32

    def __init__(self, kind: Kind):
        self.quantise = Quantise(kind)

    def __call__(self, block: np.ndarray, stored: Dtype) -> np.ndarray:
        made, quantise = self.quantise(block, stored), self.quantise
        decoded = quantise.gguf.dequantize(made.reshape(-1, quantise.to.block_bytes), quantise.number)
        return np.ascontiguousarray(decoded, "<f4").view("<u4").reshape(-1)
