"""A tensor stored in pieces, in one file or several: gathered a few rows at a time, never whole."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..storage import Dtype, SourceFile, StoredTensor
from .gathered import GatheredArray, GatheredTensor

Band = tuple[int, int, list[np.ndarray]]  # first row, the row after the last, arrays to concatenate by columns


@dataclass(frozen=True, eq=False)
class ChunkedArray(GatheredArray):
    """The array of a tensor in pieces."""

    bands: list[Band]
    shape: tuple[int, ...]
    dtype: np.dtype

    def gather(self, start: int, stop: int) -> np.ndarray:
        pieces = [np.empty((0, *self.shape[1:]), self.dtype)]
        for first, end, arrays in self.bands:
            low, high = max(start, first), min(stop, end)
            if low < high:
                parts = [array[low - first : high - first] for array in arrays]
                pieces.append(np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0])
        return np.concatenate(pieces)

    def cut(self, rows: slice, columns: slice = slice(None)) -> "ChunkedArray":
        start, stop, _ = rows.indices(self.shape[0])
        bands, width = [], self.shape[1:]
        for first, end, arrays in self.bands:
            low, high = max(start, first), min(stop, end)
            if low < high:
                parts = [array[low - first : high - first] for array in arrays]
                bands.append((low - start, high - start, cut_columns(parts, columns) if width else parts))
        width = tuple(len(range(*columns.indices(size))) for size in width)
        return ChunkedArray(bands, (max(stop - start, 0), *width), self.dtype)


def cut_columns(arrays: list[np.ndarray], columns: slice) -> list[np.ndarray]:
    """Return columns of arrays that are side by side."""
    start, stop, _ = columns.indices(sum(array.shape[1] for array in arrays))
    found, at = [], 0
    for array in arrays:
        found.append(array[:, max(start - at, 0) : max(stop - at, 0)])
        at += array.shape[1]
    return [array for array in found if array.shape[1]] or found[:1]


@dataclass(eq=False)
class ChunkedTensor(GatheredTensor):
    """Where the pieces of a tensor are."""

    dtype: Dtype
    shape: tuple[int, ...]
    bands: list[tuple[int, int, list[StoredTensor]]]

    @property
    def pieces(self) -> list[StoredTensor]:
        return [piece for _, _, pieces in self.bands for piece in pieces]

    @property
    def file(self) -> SourceFile:
        """The first of its files."""
        return self.pieces[0].file

    @property
    def paths(self) -> list[Path]:
        return [piece.file.path for piece in self.pieces]

    @cached_property
    def array(self) -> ChunkedArray:
        bands = [(first, end, [piece.array for piece in pieces]) for first, end, pieces in self.bands]
        return ChunkedArray(bands, self.shape, np.dtype(f"<u{self.dtype.itemsize}"))


def lay_out(chunks: dict[tuple[int, ...], StoredTensor], shape: tuple[int, ...]):
    """Arrange pieces, given by their first indices, in bands of rows; None unless they tile the shape."""
    columns = shape[1] if len(shape) == 2 else 1
    bands = {}
    for start, piece in sorted(chunks.items()):
        bands.setdefault((start[0], start[0] + piece.shape[0]), []).append((start[1:] or (0,), piece))
    reached, found = 0, []
    for (first, end), pieces in sorted(bands.items()):
        at = 0
        for (column,), piece in pieces:
            if column != at:
                return None
            at += piece.shape[1] if len(shape) == 2 else 1
        if first != reached or at != columns:
            return None
        reached = end
        found.append((first, end, [piece for _, piece in pieces]))
    return found if reached == shape[0] else None
