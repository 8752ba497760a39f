"""Tensors on disk: where their bytes lie, in which type, and how they get from file to file.

A conversion computes nothing: it moves elements. They are read through memory maps as unsigned integers of their width,
so neither torch nor a copy of the model is needed; runs that need no rearranging are moved by the kernel.
"""

import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

BLOCK_BYTES = 16 * 2**20  # how much of a tensor is rearranged at a time


class Dtype(NamedTuple):
    name: str  # torch's
    safetensors: str
    storage: str  # torch's storage class, which stands in .pth files
    itemsize: int  # bytes per element


DTYPES = (
    Dtype("float64", "F64", "DoubleStorage", 8),
    Dtype("float32", "F32", "FloatStorage", 4),
    Dtype("float16", "F16", "HalfStorage", 2),
    Dtype("bfloat16", "BF16", "BFloat16Storage", 2),
)
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES}
BY_STORAGE = {dtype.storage: dtype for dtype in DTYPES}


@dataclass(eq=False)
class SourceFile:
    """A file that tensors are read from, mapped when the first of them is."""

    path: Path

    @cached_property
    def bytes(self):
        return np.memmap(self.path, dtype=np.uint8, mode="c")  # private: who writes into a view, changes no file


@dataclass(eq=False)
class StoredTensor:
    """Say where a tensor's elements lie in a file; nothing is read until `array` is."""

    file: SourceFile
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file to the first element
    strides: tuple[int, ...] | None = None  # elements from one index to the next; None: contiguous

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def array(self):
        """The elements as unsigned integers of their width: a view of the file, not a copy."""
        strides = None if self.strides is None else [step * self.dtype.itemsize for step in self.strides]
        return np.ndarray(self.shape, f"<u{self.dtype.itemsize}", self.file.bytes, self.offset, strides)


@dataclass(eq=False)
class Part:
    """A view of a stored tensor, cut or rearranged, on its way into another file."""

    file: SourceFile
    array: np.ndarray

    @property
    def is_run(self):
        """Whether the elements lie in the file as they are wanted: one after another."""
        return self.array.flags.c_contiguous and np.may_share_memory(self.array, self.file.bytes)

    @property
    def offset(self):
        return self.array.__array_interface__["data"][0] - self.file.bytes.__array_interface__["data"][0]


@dataclass(eq=False)
class Assembly:
    """A tensor to be written: parts laid end to end along an axis."""

    dtype: Dtype
    shape: tuple[int, ...]
    parts: list[Part] = field(repr=False)
    axis: int = 0

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self):
        """Return all elements as one array: a private view of the file if they lie there as they are wanted."""
        if len(self.parts) == 1 and self.parts[0].is_run:
            return self.parts[0].array.reshape(self.shape)
        if self.axis == 0:
            return np.concatenate([part.array.reshape(-1) for part in self.parts]).reshape(self.shape)
        return np.concatenate([part.array for part in self.parts], axis=self.axis)

    def blocks(self):
        """Yield the tensor's elements from first to last, in contiguous arrays of about `BLOCK_BYTES`."""
        if self.axis == 0:
            for part in self.parts:
                for rows in row_blocks(part.array):
                    yield np.ascontiguousarray(part.array[rows])
        else:
            for rows in row_blocks(self.parts[0].array, width=self.nbytes // max(self.shape[0], 1)):
                yield np.concatenate([part.array[rows] for part in self.parts], axis=self.axis)

    def write(self, out: BinaryIO, offset: int, progress=lambda count: None):
        """Write the elements into `out`, opened unbuffered, at `offset`; `progress` is told of bytes when done."""
        if self.axis == 0 and all(part.is_run for part in self.parts):
            for part in self.parts:
                copy_range(part.file, part.offset, out, offset, part.array.nbytes, progress)
                offset += part.array.nbytes
            return
        for block in self.blocks():
            write_all(out, block, offset)
            offset += block.nbytes
            progress(block.nbytes)


def row_blocks(array, width=None):
    """Cut the first axis into slices of about `BLOCK_BYTES`; `width` is a row's bytes where `array` is part of it."""
    rows = array.shape[0]
    width = width or max(array.nbytes // max(rows, 1), 1)
    step = max(BLOCK_BYTES // width, 1)
    return [slice(start, start + step) for start in range(0, rows, step)]


def copy_range(source: SourceFile, source_offset: int, out: BinaryIO, offset: int, count: int, progress):
    """Move bytes from file to file in the kernel, or through memory where the kernel cannot."""
    with open(source.path, "rb", buffering=0) as file:
        while count:
            step = min(count, 4 * BLOCK_BYTES)
            try:
                moved = os.copy_file_range(file.fileno(), out.fileno(), step, source_offset, offset)
            except (AttributeError, OSError):  # another system, another file system; a full disk is met again below
                moved = 0
            if not moved:
                moved = write_all(out, source.bytes[source_offset : source_offset + step], offset)
            source_offset, offset, count = source_offset + moved, offset + moved, count - moved
            progress(moved)


def write_all(out: BinaryIO, block, offset: int) -> int:
    """Write a whole array at `offset`, however little the system takes at a time."""
    view = memoryview(block).cast("B")
    out.seek(offset)
    done = 0
    while done < len(view):
        done += out.write(view[done:])
    return done
