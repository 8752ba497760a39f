"""Weights of 8 and of 4 bits: read as they are for few rows, dequantised a part at a time for many."""

# Shapes: O output features, I input features, N rows of an input, B blocks of 128 inputs

import math

import torch
from torch import nn

from hf_llama3.errors import UserError

from .. import processor
from .exact import multiply_in_parts
from .kernel import Kernel, multiply_rows, places_of, threads_for
from .products import BLOCK, GROUPS, LANES, LEVELS, dequantisation
from .quantisation import quantisation

FEW_ROWS = 8  # up to which weights are read as they are; for more they are dequantised
QUANTISED_AT_A_TIME = 2**17  # elements of a weight that has to be padded
# Level k of a lane is masked out at its place, as 16 ** k times its value; "cpu", for default devices may be set
POWERS = torch.tensor([16.0**-k for k in range(LEVELS - 1)] + [1.0], device="cpu")


class QuantisedKernel(Kernel):
    """Levels, and scales of groups of inputs. The inputs are not rounded."""

    names: tuple[str, str]  # of the tensors that hold levels and scales

    @classmethod
    def encode(cls, weight: torch.Tensor, stored: dict[str, torch.Tensor]):
        quantise(cls.kind, weight, *(stored[name] for name in cls.names))

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return multiply_quantised(rows, self.kind, *(self.stored[name] for name in self.names))


class Int8Kernel(QuantisedKernel):
    """Weights of 8 bits; 64 inputs of an output feature share a scale."""

    kind, names = "int8", ("weight_int8", "weight_scale")

    @staticmethod
    def layout(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        blocks = math.ceil(shape[1] / BLOCK)
        levels = torch.empty(shape[0], blocks * BLOCK, dtype=torch.int8, device="meta")
        scales = torch.empty(shape[0], blocks * GROUPS["int8"], dtype=torch.bfloat16, device="meta")
        return dict(zip(Int8Kernel.names, (levels, scales), strict=True))


class Int4Kernel(QuantisedKernel):
    """Weights of 4 bits; 32 inputs of an output feature share a scale and a minimum, the value of level 0."""

    kind, names = "int4", ("weight_int4", "weight_scale_and_minimum")

    @staticmethod
    def layout(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        blocks = math.ceil(shape[1] / BLOCK)
        levels = torch.empty(shape[0], blocks * BLOCK // 2, dtype=torch.uint8, device="meta")
        scales = torch.empty(shape[0], blocks * GROUPS["int4"], 2, dtype=torch.bfloat16, device="meta")
        return dict(zip(Int4Kernel.names, (levels, scales), strict=True))


def quantise(kind: str, weight: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor):
    """Write the levels and scales of a weight (O, I); one whose inputs do not fill whole blocks is padded in parts.

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
        quantise_here(threads_for(part.numel()), outputs=len(part), inputs=part.shape[1] // BLOCK, **places)
    if not scales.isfinite().all():
        raise UserError(
            f"weights to quantise must be finite, got NaN or infinity in one of shape {tuple(weight.shape)}"
        )


def multiply_quantised(rows: torch.Tensor, kind: str, levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the products (N, O) of rows (N, I) with a quantised weight."""
    here = processor.here()
    blocks = scales.shape[1] // GROUPS[kind]
    x = in_order_of_levels(rows, kind, blocks)  # (N, B, 8, 16)
    if len(rows) <= FEW_ROWS:
        sums = x.sum(2, dtype=torch.float32) if kind == "int4" else None  # (N, B, 16)
        in_pairs = rows.dtype is torch.bfloat16 and here.multiplies_pairs
        if in_pairs:
            x = x.view(-1, blocks, 2, LEVELS // 2, LANES).permute(0, 1, 3, 4, 2)
        elif kind == "int4":
            x = x.float() * POWERS[:, None]
        return multiply_rows(here, kind, x.flatten(1), levels, blocks, in_pairs, scales, sums).to(rows.dtype)
    to = torch.bfloat16 if rows.dtype is torch.bfloat16 and here.multiplies_bfloat16 else torch.float32
    write = dequantisation(kind, str(to).removeprefix("torch."), here)

    def fill(part: slice, memory: torch.Tensor):
        places = places_of(weight=levels[part], scale=scales[part], y=memory)
        write(threads_for(memory.numel()), outputs=len(memory), inputs=blocks, **places)

    return multiply_in_parts(x.flatten(1), len(levels), to, fill)


def in_order_of_levels(rows: torch.Tensor, kind: str, blocks: int) -> torch.Tensor:
    """Return rows (N, I) in the order of a quantised weight's levels, (N, B, 8, 16), padded with zeros."""
    if padding := blocks * BLOCK - rows.shape[1]:
        rows = nn.functional.pad(rows, (0, padding))
    if kind == "int8":
        return rows.reshape(-1, blocks, LEVELS, LANES)
    return rows.reshape(-1, blocks, 4, LEVELS, 4).transpose(2, 3).reshape(-1, blocks, LEVELS, LANES)
