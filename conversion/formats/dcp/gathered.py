"""Tensors whose elements are made when they are read, a few rows at a time: from pieces, from blocks, by a sum."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..storage import SourceFile


class GatheredArray:
    """An array of one or two dimensions whose rows are made when they are read, used as a stored tensor's array is.

    A tuple of slices cuts it without reading; a slice or a list of rows returns their elements. Subclasses have a
    `shape` and a `dtype`, and define `gather` and `cut`.
    """

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index):
        if isinstance(index, tuple):
            return self.cut(*index)
        if isinstance(index, list):
            return np.concatenate([self[row : row + 1] for row in index])
        return self.gather(*index.indices(self.shape[0])[:2])

    def gather(self, start: int, stop: int) -> np.ndarray:
        """Return the elements of rows."""
        raise NotImplementedError

    def cut(self, rows: slice, columns: slice = slice(None)) -> "GatheredArray":
        raise NotImplementedError

    def reshape(self, heads: int, *shape: int) -> "ByHead":
        """Divide the rows among heads, whose number is inferred."""
        return ByHead(self, shape)


class GatheredTensor:
    """The counterpart of `StoredTensor` for a tensor whose elements are made when they are read.

    Subclasses have a `shape`, a `dtype`, the `file` and `paths` that hold it, and a `GatheredArray` as `array`.
    """

    @property
    def nbytes(self) -> int:
        return self.dtype.bytes_of(self.shape)

    def read(self) -> bytes:
        """Return the bytes of a small tensor."""
        return self.array[:].tobytes()


class TensorOver(GatheredTensor):
    """A gathered tensor that reads another one, its `base`, and differs from it in elements alone."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def file(self) -> SourceFile:
        return self.base.file

    @property
    def paths(self) -> list[Path]:
        return self.base.paths


@dataclass(frozen=True, eq=False)
class ByHead:
    """The rows of a gathered array by heads, reordered; a slice of heads returns their elements."""

    base: GatheredArray
    inner: tuple[int, ...]  # of a head, as stored
    swapped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        one, other, *rest = self.inner
        inner = (other, one) if self.swapped else (one, other)
        return (self.base.shape[0] // (one * other), *inner, *rest)

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    def swapaxes(self, one: int, other: int) -> "ByHead":
        assert (one, other) == (1, 2)
        return ByHead(self.base, self.inner, not self.swapped)

    def __getitem__(self, heads: slice):
        start, stop, _ = heads.indices(self.shape[0])
        rows = self.inner[0] * self.inner[1]
        block = self.base[start * rows : stop * rows].reshape(-1, *self.inner)
        return block.swapaxes(1, 2) if self.swapped else block
