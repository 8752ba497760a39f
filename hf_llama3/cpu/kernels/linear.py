"""Weights as products read them: what a weight becomes, and the product that suits so many rows.

A kernel is made from a plain weight (O, I) and maps inputs (..., I) to outputs (..., O).
"""

# Shapes: O output features, I input features, N rows of an input, B blocks of 128 inputs, G groups of a block

import math
import threading
from collections.abc import Callable

import torch
from torch import nn

from hf_llama3.errors import UserError

from .. import processor
from .products import BLOCK, GROUPS, LANES, LEVELS, dequantisation, product
from .quantisation import quantisation

TILE = 4  # rows that are computed together
FEW_ROWS = 32  # up to which our products are the faster ones for exact weights
FEW_PAIRED_ROWS = 16  # the same where the library multiplies bfloat16 by instructions as well
FEW_ROWS_OF_QUANTISED = 8  # up to which weights are read as they are; for more they are dequantised, in parts
DEQUANTISED_AT_A_TIME = 2**21  # elements
MEMORY = threading.local()  # for them
QUANTISED_AT_A_TIME = 2**17  # elements of a weight that has to be padded
SMALL = 2**16  # elements of a weight that one thread multiplies alone
# Of the levels of a lane, as they are masked out; this module may be imported where tensors are made on "meta"
POWERS = torch.tensor([16.0**-k for k in range(LEVELS - 1)] + [1.0], device="cpu")


class Kernel:
    """What all kernels are: a few tensors hold all of one, which can be kept in a file.

    Those of a quantised weight never change, so that copies of a model share them.
    """

    kind: str  # of weights, as `products.product` knows it
    is_exact = False  # whether the weight can be had back
    num_bytes: int  # read for a row

    def __deepcopy__(self, memo):
        return self

    def __init__(self, weight: torch.Tensor):
        stored = {name: torch.empty_like(part, device="cpu") for name, part in self.describe(weight.shape).items()}
        self.encode(weight.detach(), stored)
        self.take(stored, tuple(weight.shape), weight.dtype)

    @classmethod
    def from_stored(cls, stored: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype):
        """Make a kernel of what `encode` made of a weight of this shape, for outputs of a type."""
        kernel = cls.__new__(cls)
        kernel.take(stored, shape, dtype)
        return kernel

    @staticmethod
    def describe(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return the tensors that hold all that is kept of a weight of this shape, without memory (on "meta")."""
        raise NotImplementedError

    @classmethod
    def encode(cls, weight: torch.Tensor, stored: dict[str, torch.Tensor]):
        """Put a plain weight (O, I) into tensors such as `describe` says."""
        raise NotImplementedError

    def take(self, stored: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype):
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


class PlainKernel(Kernel):
    """The weight as it is, and where it is: products differ from `F.linear`'s by the order and the width of sums."""

    is_exact = True

    def __init__(self, weight: torch.Tensor):
        self.take({"weight": weight}, tuple(weight.shape), weight.dtype)

    @staticmethod
    def describe(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {"weight": torch.empty(shape, dtype=torch.bfloat16, device="meta")}

    @classmethod
    def encode(cls, weight: torch.Tensor, stored: dict[str, torch.Tensor]):
        stored["weight"].copy_(weight)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return multiply_plain(rows, self.stored["weight"])


class Int8Kernel(Kernel):
    """Weights of 8 bits, of which 64 share a scale; inputs stay as they are."""

    kind = "int8"

    @staticmethod
    def describe(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        blocks = math.ceil(shape[1] / BLOCK)
        levels = torch.empty(shape[0], blocks * BLOCK, dtype=torch.int8, device="meta")
        scales = torch.empty(shape[0], blocks * GROUPS["int8"], dtype=torch.bfloat16, device="meta")
        return {"weight_int8": levels, "weight_scale": scales}

    @classmethod
    def encode(cls, weight: torch.Tensor, stored: dict[str, torch.Tensor]):
        quantise(cls.kind, weight, stored["weight_int8"], stored["weight_scale"])

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return multiply_quantised(rows, self, self.stored["weight_int8"], self.stored["weight_scale"])


class Int4Kernel(Kernel):
    """Weights of 4 bits, of which 32 share a scale and a minimum, what level 0 stands for; inputs stay as they are."""

    kind = "int4"

    @staticmethod
    def describe(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        blocks = math.ceil(shape[1] / BLOCK)
        levels = torch.empty(shape[0], blocks * BLOCK // 2, dtype=torch.uint8, device="meta")
        scales = torch.empty(shape[0], blocks * GROUPS["int4"], 2, dtype=torch.bfloat16, device="meta")
        return {"weight_int4": levels, "weight_scale_and_minimum": scales}

    @classmethod
    def encode(cls, weight: torch.Tensor, stored: dict[str, torch.Tensor]):
        quantise(cls.kind, weight, stored["weight_int4"], stored["weight_scale_and_minimum"])

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return multiply_quantised(rows, self, self.stored["weight_int4"], self.stored["weight_scale_and_minimum"])


def quantise(kind: str, weight: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor):
    """Write the levels and scales of a weight (O, I), in pieces where its inputs do not fill whole blocks.

    Raises:
        UserError: the weight holds a number that is not finite.
    """
    quantise_here = quantisation(kind, str(weight.dtype).removeprefix("torch."), processor.here())
    padding = -weight.shape[1] % BLOCK
    is_copied = padding > 0 or weight.stride(1) != 1
    step = max(QUANTISED_AT_A_TIME // weight.shape[1], 1) if is_copied else len(weight)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = weight[rows]
        if is_copied:
            part = nn.functional.pad(part, (0, padding)).contiguous()
        places = places_of(weight=part, y=levels[rows], scale=scales[rows])
        quantise_here(parts_for(part.numel()), outputs=len(part), inputs=part.shape[1] // BLOCK, **places)
    if not scales.isfinite().all():
        raise UserError(
            f"weights to quantise must be finite, got NaN or infinity in one of shape {tuple(weight.shape)}"
        )


def multiply_plain(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the products (N, O) of rows (N, I) with a plain weight (O, I)."""
    if weight.stride(1) != 1:
        return nn.functional.linear(rows, weight)
    here, kind = processor.here(), str(weight.dtype).removeprefix("torch.")
    is_fast = kind == "bfloat16" and here.multiplies_bfloat16  # in the library
    if len(rows) <= (FEW_PAIRED_ROWS if is_fast else FEW_ROWS):
        in_pairs = kind == "bfloat16" and here.multiplies_pairs
        return run(here, kind, rows, weight, weight.shape[1], in_pairs).to(rows.dtype)
    if is_fast or kind == "float32":
        return nn.functional.linear(rows, weight)
    return in_parts(rows, len(weight), torch.float32, lambda part, memory: memory.copy_(weight[part]))


def multiply_quantised(rows: torch.Tensor, kernel: Kernel, levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the products (N, O) of rows (N, I) with a quantised weight; for many rows it is dequantised, in parts."""
    here, kind = processor.here(), kernel.kind
    blocks = scales.shape[1] // GROUPS[kind]
    x = in_order_of_levels(rows, kind, blocks)  # (N, B, 8, 16)
    if len(rows) <= FEW_ROWS_OF_QUANTISED:
        sums = x.sum(2, dtype=torch.float32) if kind == "int4" else None  # (N, B, 16)
        in_pairs = rows.dtype is torch.bfloat16 and here.multiplies_pairs
        if in_pairs:
            x = x.view(-1, blocks, 2, LEVELS // 2, LANES).permute(0, 1, 3, 4, 2)
        elif kind == "int4":
            x = x.float() * POWERS[:, None]
        return run(here, kind, x.flatten(1), levels, blocks, in_pairs, scales, sums).to(rows.dtype)
    to = torch.bfloat16 if rows.dtype is torch.bfloat16 and here.multiplies_bfloat16 else torch.float32
    write = dequantisation(kind, str(to).removeprefix("torch."), here)

    def fill(part: slice, memory: torch.Tensor):
        places = places_of(weight=levels[part], scale=scales[part], y=memory)
        write(parts_for(memory.numel()), outputs=len(memory), inputs=blocks, **places)

    return in_parts(x.flatten(1), len(levels), to, fill)


def in_order_of_levels(rows: torch.Tensor, kind: str, blocks: int) -> torch.Tensor:
    """Return rows (N, I) as blocks of levels, (N, B, 8, 16), with zeros behind the last input."""
    if padding := blocks * BLOCK - rows.shape[1]:
        rows = nn.functional.pad(rows, (0, padding))
    if kind == "int8":
        return rows.reshape(-1, blocks, LEVELS, LANES)
    return rows.reshape(-1, blocks, 4, LEVELS, 4).transpose(2, 3).reshape(-1, blocks, LEVELS, LANES)


def in_parts(rows: torch.Tensor, outputs: int, dtype: torch.dtype, fill: Callable) -> torch.Tensor:
    """Return the products of rows with a weight of which `fill` writes some output features at a time, in some type."""
    inputs = rows.shape[1]
    step = max(DEQUANTISED_AT_A_TIME // inputs // TILE, 1) * TILE
    memory, x, y = memory_here(step * inputs, dtype), rows.to(dtype), rows.new_empty(len(rows), outputs)
    for start in range(0, outputs, step):
        part = slice(start, min(start + step, outputs))
        weight = memory[: (part.stop - start) * inputs].view(-1, inputs)
        fill(part, weight)
        y[:, part] = multiply_plain(x, weight)
    return y


def memory_here(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return memory for so many numbers, the same for all calls of a thread: new memory is slow."""
    size = count * dtype.itemsize
    if getattr(MEMORY, "bytes", None) is None or len(MEMORY.bytes) < size:
        MEMORY.bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
    return MEMORY.bytes[:size].view(dtype)


def run(here, kind: str, rows: torch.Tensor, weight: torch.Tensor, inputs: int, in_pairs: bool, *of_groups):
    """Return the products, in float32, by what is compiled for so many rows; `of_groups`: scales, and sums of rows."""
    tiles = max(math.ceil(len(rows) / TILE), 1)
    together = max(math.ceil(len(rows) / tiles), 1)
    x = rows.to(torch.bfloat16 if in_pairs else torch.float32)
    scales, sums = of_groups or (None, None)
    if padding := tiles * together - len(rows):
        x = nn.functional.pad(x, (0, 0, 0, padding))
        sums = sums if sums is None else nn.functional.pad(sums, (0, 0, 0, 0, 0, padding))
    x = x.contiguous()
    y = torch.empty(tiles * together, len(weight), dtype=torch.float32, device="cpu")  # whatever the defaults are
    multiply = product(kind, together, in_pairs, here)
    places = places_of(weight=weight, scale=scales, x=x, sums=sums, y=y)
    multiply(parts_for(weight.numel()), outputs=len(weight), inputs=inputs, row_tiles=tiles, **places)
    return y[: len(rows)]


def places_of(**tensors: torch.Tensor | None) -> dict[str, int]:
    """Return, as machine code takes them, where tensors begin and the bytes from one of their rows to the next."""
    there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    rows = {f"{name}_row": tensor.stride(0) * tensor.element_size() for name, tensor in there.items()}
    return {name: tensor.data_ptr() for name, tensor in there.items()} | rows


def parts_for(elements: int) -> int:
    """Return among how many threads the work on so many elements of a weight is divided."""
    return 1 if elements < SMALL else processor.threads()
