"""Merge an adapter into a checkpoint while it is converted: each weight as PEFT's `merge_and_unload` leaves it.

The result is bit-equal for a model of the same type: A and B are widened to float32, their product times the scale is
added to the weight in the wider of both types, and the sum is rounded to the weight's type; for an embedding PEFT
rounds the product first. The product is computed in bands of rows that are large enough for torch to sum each row as
in the whole product.
"""

import threading
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from hf_llama3.errors import UserError

from ..checkpoint import Checkpoint
from ..formats.dcp.gathered import GatheredArray, TensorOver
from ..formats.hf import merging_by_peft
from ..formats.storage import Dtype, SourceFile, StoredTensor
from ..weights import EMBEDDING, OUTPUT, half_to_interleaved, interleaved_to_half, sizes
from .files import Pair, left_out, read_adapter

BAND = 1024  # rows of a band, at least
NARROWER = ("float16", "bfloat16")  # than float32, to which PEFT widens an adapter


class Product:
    """Rows of B @ A times the scale; no more than a band is in memory at a time.

    Args:
        turned: whether the product is transposed, as for an embedding.
        head_dim: width of heads if the adapter's rows are in Meta's order, else None.
    """

    def __init__(self, pair: Pair, turned: bool, head_dim: int | None):
        self.pair, self.turned, self.head_dim = pair, turned, head_dim
        self.count = pair.a.shape[1] if turned else pair.b.shape[0]  # of rows
        self.lock, self.held, self.band = threading.Lock(), None, None

    @cached_property
    def factors(self):
        """A and B as torch multiplies them, with B's rows in Hugging Face's order."""
        a, b = load(self.pair.a), load(self.pair.b)
        if self.head_dim is not None:
            b = interleaved_to_half(b, self.head_dim).reshape(b.shape).contiguous()
        return a, b

    def rows(self, start: int, stop: int):
        """Return the rows from `start` to `stop`."""
        import torch

        edges = [*range(0, max(self.count - BAND, 0) + 1, BAND), self.count]
        bands = [(first, end) for first, end in pairwise(edges) if first < stop and end > start]
        return torch.cat([self.make(first, end)[max(start - first, 0) : stop - first] for first, end in bands])

    def make(self, first: int, end: int):
        """Return a band; the last one is kept."""
        with self.lock:
            if self.held != (first, end):
                a, b = self.factors
                made = (b @ a[:, first:end]).T if self.turned else b[first:end] @ a
                self.held, self.band = (first, end), made * self.pair.scale
            return self.band


def load(tensor: StoredTensor):
    import torch

    signed = np.array(tensor.array).view(f"<i{tensor.dtype.itemsize}")  # torch lacks the unsigned types
    loaded = torch.from_numpy(signed).view(getattr(torch, tensor.dtype.name))
    return loaded.float() if tensor.dtype.name in NARROWER else loaded


@dataclass(frozen=True, eq=False)
class MergedArray(GatheredArray):
    """The array of a merged tensor."""

    base: np.ndarray  # or any other array of the weight's rows
    file: SourceFile
    product: Product
    dtype: Dtype
    first: tuple[int, int]  # first row and column of this part of the weight
    head_dim: int | None  # if rows are in Meta's order, else None

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def cut(self, rows: slice, columns: slice = slice(None)) -> "MergedArray":
        starts = [part.indices(size)[0] for part, size in zip((rows, columns), self.shape, strict=True)]
        first = tuple(one + more for one, more in zip(self.first, starts, strict=True))
        return replace(self, base=self.base[rows, columns], first=first)

    def gather(self, start: int, stop: int) -> np.ndarray:
        return self.merge(self.file.take(self.base[start:stop]), start + self.first[0], stop + self.first[0])

    def merge(self, block: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Add the product to rows of the weight as PEFT does."""
        import torch

        unit = self.head_dim or 1  # rows that are reordered together
        low, high = start // unit * unit, -(-stop // unit) * unit
        added = self.product.rows(low, high)
        if self.head_dim:
            added = half_to_interleaved(added, self.head_dim).reshape(added.shape)
        column = self.first[1]
        added = added[start - low : stop - low, column : column + self.shape[1]]
        signed = np.array(block).view(f"<i{self.dtype.itemsize}")
        weight = torch.from_numpy(signed).view(getattr(torch, self.dtype.name))
        weight += added.to(weight.dtype) if self.product.turned else added
        return signed.view(f"<u{self.dtype.itemsize}")


@dataclass(eq=False)
class MergedTensor(TensorOver):
    """Where a weight and its adapter lie."""

    base: StoredTensor  # or one in pieces
    product: Product
    first: tuple[int, int]
    head_dim: int | None

    @property
    def dtype(self) -> Dtype:
        return self.base.dtype

    @property
    def pieces(self) -> list[StoredTensor]:
        return [*getattr(self.base, "pieces", [self.base]), self.product.pair.a, self.product.pair.b]

    @cached_property
    def array(self) -> MergedArray:
        return MergedArray(self.base.array, self.file, self.product, self.dtype, self.first, self.head_dim)


def merge_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return a checkpoint whose weights are merged with an adapter when they are read; its tokenizer is the model's.

    Raises:
        UserError: the adapter belongs to another model, or changes a tied head.
    """
    adapter = read_adapter(folder)
    table = {row.hf: row for row in checkpoint.rows}
    tensors = dict(checkpoint.tensors)
    for name, pair in adapter.pairs.items():
        if name not in table:
            raise UserError(f"{folder} stands beside {name}, which {checkpoint.path} has not; take its own model")
        if checkpoint.tied and name in (EMBEDDING.hf, OUTPUT.hf):
            tied = f"{name}, which is embedding and head of {checkpoint.path} at once"
            raise UserError(f"{folder} changes {tied}; untie them and merge by PEFT: {merging_by_peft(folder)}")
        row, turned = table[name], name == EMBEDDING.hf
        shape = row.full_shape(sizes(checkpoint.config))
        made = (pair.b.shape[0], pair.a.shape[1])[:: -1 if turned else 1]
        if made != shape:
            rule = f"{name} of {checkpoint.path} is {list(shape)}"
            raise UserError(f"{rule}, and {folder} is for {list(made)}; take its own model")
        head_dim = checkpoint.config["head_dim"] if row.rotary else None
        product = Product(pair, turned, head_dim if adapter.order == "meta" else None)
        shards, along = tensors[name], row.split
        steps = [shard.shape[along] * index if along is not None else 0 for index, shard in enumerate(shards)]
        firsts = [(step, 0) if along == 0 else (0, step) for step in steps]
        order = head_dim if checkpoint.order == "meta" else None
        tensors[name] = [
            MergedTensor(shard, product, first, order) for shard, first in zip(shards, firsts, strict=True)
        ]
    scales = sorted({pair.scale for pair in adapter.pairs.values()})
    said = f"merged {folder} into {len(adapter.pairs)} weights, scaled by {', '.join(f'{one:g}' for one in scales[:4])}"
    return replace(checkpoint, tensors=tensors, inferred=[*checkpoint.inferred, said, *left_out(folder)])
