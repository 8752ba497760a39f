"""What a linear layer multiplies by: the interface of all kernels, and how their machine code is called.

A kernel is made from a plain weight (O, I) and maps inputs (..., I) to outputs (..., O).
"""

# Shapes: O output features, I input features, N rows of an input

import math
import threading

import torch
from torch import nn

from hf_llama3.errors import UserError

from .. import processor
from .products import product

TILE = 4  # rows that are computed together
SMALL = 2**16  # elements of a weight that one thread multiplies alone
MEMORY = threading.local()  # scratch memory of a thread


class Kernel:
    """The interface of all kernels. A kernel is a few tensors, which can be stored in a file.

    Copies of a model share its kernels, because quantised weights never change.
    """

    kind: str  # of weights: the name that `products.product` knows
    is_exact = False  # whether products use the weight itself
    num_bytes: int  # that the product with one row reads

    def __deepcopy__(self, memo):
        return self

    def __init__(self, weight: torch.Tensor):
        stored = {name: torch.empty_like(part, device="cpu") for name, part in self.layout(weight.shape).items()}
        self.encode(weight.detach(), stored)
        self.keep(stored, tuple(weight.shape), weight.dtype)

    @classmethod
    def from_stored(cls, stored: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype):
        """Make a kernel from the tensors that `encode` has filled for a weight of this shape and type."""
        kernel = cls.__new__(cls)
        kernel.keep(stored, shape, dtype)
        return kernel

    @staticmethod
    def layout(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return the tensors that a weight of this shape is stored in, without memory (on "meta")."""
        raise NotImplementedError

    @classmethod
    def encode(cls, weight: torch.Tensor, stored: dict[str, torch.Tensor]):
        """Write a plain weight (O, I) into the tensors that `layout` describes."""
        raise NotImplementedError

    def keep(self, stored: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype):
        """Keep these tensors, without a copy."""
        self.stored, self.shape, self.dtype = stored, shape, dtype
        self.num_bytes = sum(tensor.nbytes for tensor in stored.values())

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.shape[-1] != self.shape[1] or not x.is_cpu:
            raise UserError(f"inputs must be {self.shape[1]} numbers on the CPU, got {x.shape[-1]} on {x.device}")
        rows = x.reshape(-1, self.shape[1])  # (N, I)
        y = self.multiply(rows).view(*x.shape[:-1], self.shape[0])
        return y if bias is None else y + bias

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the products (N, O) of rows (N, I)."""
        raise NotImplementedError


def multiply_rows(here, kind: str, rows: torch.Tensor, weight: torch.Tensor, inputs: int, in_pairs: bool, *of_groups):
    """Return the products (N, O) in float32, computed by machine code.

    `inputs` counts inputs, of quantised weights blocks; `of_groups` are their scales and, for 4 bits, sums of rows.
    """
    tiles = max(math.ceil(len(rows) / TILE), 1)
    together = max(math.ceil(len(rows) / tiles), 1)
    x = rows.to(torch.bfloat16 if in_pairs else torch.float32)
    scales, sums = of_groups or (None, None)
    if padding := tiles * together - len(rows):
        x = nn.functional.pad(x, (0, 0, 0, padding))
        sums = sums if sums is None else nn.functional.pad(sums, (0, 0, 0, 0, 0, padding))
    x = x.contiguous()
    y = torch.empty(tiles * together, len(weight), dtype=torch.float32, device="cpu")  # whatever torch's defaults are
    multiply = product(kind, together, in_pairs, here)
    places = places_of(weight=weight, scale=scales, x=x, sums=sums, y=y)
    multiply(threads_for(weight.numel()), outputs=len(weight), inputs=inputs, row_tiles=tiles, **places)
    return y[: len(rows)]


def scratch(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return scratch memory for `count` numbers; a thread reuses it, because fresh memory costs page faults."""
    size = count * dtype.itemsize
    if getattr(MEMORY, "bytes", None) is None or len(MEMORY.bytes) < size:
        MEMORY.bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
    return MEMORY.bytes[:size].view(dtype)


def places_of(**tensors: torch.Tensor | None) -> dict[str, int]:
    """Return the arguments that machine code takes for tensors: their addresses, and the bytes between their rows."""
    there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    rows = {f"{name}_row": tensor.stride(0) * tensor.element_size() for name, tensor in there.items()}
    return {name: tensor.data_ptr() for name, tensor in there.items()} | rows


def threads_for(elements: int) -> int:
    """Return the number of threads that share the work on so many elements of a weight."""
    return 1 if elements < SMALL else processor.threads()
