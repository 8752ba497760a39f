"""Tensors in files: where their bytes are, their types, and how they are moved from file to file.

A conversion does not compute, it moves elements: unsigned integers of their width, so that neither torch nor a copy of
the model is needed. Runs of bytes that need no rearranging are copied by the operating system.
"""

import errno
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from hf_llama3.errors import UserError

MOST_READ_IN_VAIN = 4  # read at most so many times what is wanted: columns of a shard lie between others
BLOCK_BYTES = 16 * 2**20  # of a tensor that are moved or rearranged at a time


class Dtype(NamedTuple):
    name: str  # torch's
    safetensors: str
    storage: str  # torch's storage class, as .pth files name it
    itemsize: int  # bytes per element

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.itemsize


DTYPES = (
    Dtype("float64", "F64", "DoubleStorage", 8),
    Dtype("float32", "F32", "FloatStorage", 4),
    Dtype("float16", "F16", "HalfStorage", 2),
    Dtype("bfloat16", "BF16", "BFloat16Storage", 2),
)
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES}
BY_STORAGE = {dtype.storage: dtype for dtype in DTYPES}


class Identity(NamedTuple):
    """What identifies a file and its state: another file, or a write to it, changes this."""

    device: int
    inode: int
    size: int
    written: int  # nanoseconds


def identity(path: Path) -> Identity | None:
    """Return the identity of the file under a name; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(eq=False)
class SourceFile:
    """A file of tensors. Its map only gives places; bytes are read by calls, since a map of a shrunk file is fatal."""

    path: Path
    planned: Identity | None = field(init=False, repr=False)

    def __post_init__(self):
        self.planned = identity(self.path)

    @cached_property
    def bytes(self):
        self.check_unchanged()
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def check_unchanged(self):
        """Check that the file is the one whose list of tensors was read.

        Raises:
            UserError: it was replaced or written to.
        """
        if (now := identity(self.path)) != self.planned or now is None:
            sizes = " and ".join(f"{one.size} bytes" if one else "nothing" for one in (self.planned, now))
            what = f"it was {sizes}" if sizes else ""
            raise UserError(
                f"{self.path} changed while it was read ({what}); run the same again when nothing writes it"
            )

    def read(self, offset: int, count: int) -> bytearray:
        """Return bytes of the file.

        Raises:
            UserError: it was cut short since its list of tensors was read.
        """
        content = bytearray(count)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < count:
                taken = file.readinto(memoryview(content)[done:])
                if not taken:
                    raise UserError(f"{self.path} was cut short while it was read; run the same again with it whole")
                done += taken
        return content

    def take(self, view: np.ndarray) -> np.ndarray:
        """Read the elements of a view of `bytes` into contiguous memory; other arrays are in memory already."""
        if not np.may_share_memory(view, self.bytes):
            return np.ascontiguousarray(view)
        extent = sum((length - 1) * step for length, step in zip(view.shape, view.strides, strict=True)) + view.itemsize
        if not view.size or extent > MOST_READ_IN_VAIN * view.nbytes:
            self.check_unchanged()
            return np.array(view, order="C")
        offset = view.__array_interface__["data"][0] - self.bytes.__array_interface__["data"][0]
        content = self.read(offset, extent)
        return np.ascontiguousarray(np.ndarray(view.shape, view.dtype, content, 0, view.strides))


@dataclass(eq=False)
class StoredTensor:
    """Where a tensor's elements are in a file; nothing is read yet."""

    file: SourceFile
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file to the first element
    strides: tuple[int, ...] | None = None  # strides in elements; None: contiguous

    @property
    def paths(self) -> list[Path]:
        """The files that hold it."""
        return [self.file.path]

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def array(self):
        """The elements as unsigned integers of their width: a read-only view of the file."""
        strides = None if self.strides is None else [step * self.dtype.itemsize for step in self.strides]
        return np.ndarray(self.shape, f"<u{self.dtype.itemsize}", self.file.bytes, self.offset, strides)

    def read(self) -> bytes:
        """Return the bytes of a small tensor, without the read-ahead of a map."""
        if not self.array.flags.c_contiguous:
            return self.array.tobytes()
        return bytes(self.file.read(self.offset, self.nbytes))


@dataclass(eq=False)
class Part:
    """A view of a stored tensor, cut or rearranged for another file."""

    file: SourceFile
    array: np.ndarray

    @property
    def is_run(self):
        """Whether the elements are contiguous in the file, in the wanted order."""
        is_mapped = isinstance(self.array, np.ndarray)  # not gathered from pieces
        return is_mapped and self.array.flags.c_contiguous and np.may_share_memory(self.array, self.file.bytes)

    @property
    def offset(self):
        return self.array.__array_interface__["data"][0] - self.file.bytes.__array_interface__["data"][0]


@dataclass(eq=False)
class Run:
    """Contiguous bytes of a file."""

    file: SourceFile
    offset: int
    nbytes: int

    def read(self, done: int = 0) -> np.ndarray:
        return np.frombuffer(self.file.read(self.offset + done, self.nbytes - done), np.uint8)


@dataclass(eq=False)
class Assembly:
    """A tensor to be written: parts concatenated along an axis, and cast to another type if that is wanted."""

    stored: Dtype
    shape: tuple[int, ...]
    parts: list[Part] = field(repr=False)
    axis: int = 0
    cast: Callable[[np.ndarray, Dtype], np.ndarray] | None = None  # see `cast.Cast`

    @property
    def dtype(self) -> Dtype:
        return self.cast.to if self.cast else self.stored

    @property
    def nbytes(self) -> int:
        return self.dtype.bytes_of(self.shape)

    @property
    def has_whole_blocks(self) -> bool:
        """Whether each part holds whole blocks of a type that is quantised."""
        block = getattr(self.dtype, "block", 1)
        return self.axis == 0 or all(part.array.shape[self.axis] % block == 0 for part in self.parts)

    def whole(self) -> np.ndarray:
        """Return all elements as one writable array.

        If they are contiguous in a file, it is a private view of that, and read when it is used.
        """
        if len(self.parts) == 1 and self.parts[0].is_run and not self.cast:
            part = self.parts[0]
            return np.memmap(part.file.path, f"<u{self.stored.itemsize}", "c", part.offset, self.shape)
        return np.concatenate([block.reshape(-1) for block in self.blocks()]).reshape(self.shape)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the elements from first to last, in memory or mapped."""
        for piece in self._stored_pieces():
            block = piece if isinstance(piece, np.ndarray) else piece.read().view(f"<u{self.stored.itemsize}")
            yield self.cast(block, self.stored) if self.cast else block

    def pieces(self) -> Iterator[Run | np.ndarray]:
        """Yield the elements from first to last, as runs of a file where they are contiguous, else as blocks."""
        return self.blocks() if self.cast else self._stored_pieces()

    def _stored_pieces(self):
        if self.axis != 0:
            for rows in row_blocks(self.parts[0].array, width=math.prod(self.shape[1:]) * self.stored.itemsize):
                yield np.concatenate([part.file.take(part.array[rows]) for part in self.parts], axis=self.axis)
            return
        for part in self.parts:
            if part.is_run:
                for start in range(0, part.array.nbytes, BLOCK_BYTES):
                    yield Run(part.file, part.offset + start, min(BLOCK_BYTES, part.array.nbytes - start))
            else:
                for rows in row_blocks(part.array):
                    yield part.file.take(part.array[rows])

    def write(self, out: BinaryIO, offset: int, progress: Callable[[int], None], with_checksum: bool) -> int:
        """Write the elements into `out`, which is open for reading and writing and unbuffered, at `offset`.

        `progress` gets the number of bytes written. Returns the CRC-32 of the bytes in the file, if it is wanted.
        """
        checksum = 0
        for piece in self.pieces():
            if isinstance(piece, Run):
                copy_run(piece, out, offset)
                written = read_back(out, offset, piece.nbytes) if with_checksum else b""
            else:
                write_all(out, piece, offset)
                written = piece
            if with_checksum:
                checksum = zlib.crc32(written, checksum)
            offset += piece.nbytes
            progress(piece.nbytes)
        return checksum


def to_floats(block: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Return elements, given as unsigned integers of their width, as numbers."""
    if dtype.name == "bfloat16":  # the upper half of a float32
        return (block.astype("<u4") << 16).view("<f4")
    return block.view(f"<f{dtype.itemsize}")


def row_blocks(array: np.ndarray, width: int | None = None) -> list[slice]:
    """Yield slices of the first axis of about `BLOCK_BYTES`; `width` is the bytes of a whole row, if `array` is cut."""
    rows = array.shape[0]
    width = width or max(array.nbytes // max(rows, 1), 1)
    step = max(BLOCK_BYTES // width, 1)
    return [slice(start, start + step) for start in range(0, rows, step)]


def copy_run(run: Run, out: BinaryIO, offset: int):
    """Copy bytes from file to file in the kernel, or through memory where it cannot."""
    done = 0
    with open(run.file.path, "rb", buffering=0) as file:
        while done < run.nbytes:
            try:
                moved = os.copy_file_range(
                    file.fileno(), out.fileno(), run.nbytes - done, run.offset + done, offset + done
                )
            except (AttributeError, OSError):  # another system or file system; a full disk is noticed again below
                moved = 0
            if not moved:
                write_all(out, run.read(done), offset + done)
                return
            done += moved


def write_all(out: BinaryIO, block, offset: int):
    """Write a whole array at `offset`, in as many calls as the system needs."""
    view = memoryview(block).cast("B")
    out.seek(offset)
    done = 0
    while done < len(view):
        done += out.write(view[done:])


def read_back(out: BinaryIO, offset: int, count: int) -> bytes:
    """Read back what was just written, from the page cache."""
    out.seek(offset)
    content = out.read(count)
    while len(content) < count:
        more = out.read(count - len(content))
        if not more:
            raise OSError(errno.EIO, "somebody cut it short")
        content += more
    return content
