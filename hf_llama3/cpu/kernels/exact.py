"""Weights as they are, in float32, float16 or bfloat16: our product for few rows, the library's for many."""

# Shapes: O output features, I input features, N rows of an input

from collections.abc import Callable

import torch
from torch import nn

from .. import processor
from .kernel import TILE, Kernel, multiply_rows, scratch

FEW_ROWS = 32  # up to which our products are faster than the library's
FEW_PAIRED_ROWS = 16  # the same where the library, too, has instructions that multiply bfloat16
ELEMENTS_AT_A_TIME = 2**21  # of a weight that is converted for a product


class ExactKernel(Kernel):
    """The weight itself, not copied. Products differ from `F.linear`'s by the order and the type of sums."""

    is_exact = True

    def __init__(self, weight: torch.Tensor):
        self.keep({"weight": weight}, tuple(weight.shape), weight.dtype)

    @staticmethod
    def layout(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {"weight": torch.empty(shape, dtype=torch.bfloat16, device="meta")}

    @classmethod
    def encode(cls, weight: torch.Tensor, stored: dict[str, torch.Tensor]):
        stored["weight"].copy_(weight)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return multiply_exact(rows, self.stored["weight"])


def multiply_exact(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the products (N, O) of rows (N, I) with a plain weight (O, I)."""
    if weight.stride(1) != 1:
        return nn.functional.linear(rows, weight)
    here, kind = processor.here(), str(weight.dtype).removeprefix("torch.")
    is_fast = kind == "bfloat16" and here.multiplies_bfloat16  # and the library uses that
    if len(rows) <= (FEW_PAIRED_ROWS if is_fast else FEW_ROWS):
        in_pairs = kind == "bfloat16" and here.multiplies_pairs
        return multiply_rows(here, kind, rows, weight, weight.shape[1], in_pairs).to(rows.dtype)
    if is_fast or kind == "float32":
        return nn.functional.linear(rows, weight)
    return multiply_in_parts(rows, len(weight), torch.float32, lambda part, memory: memory.copy_(weight[part]))


def multiply_in_parts(rows: torch.Tensor, outputs: int, dtype: torch.dtype, fill: Callable) -> torch.Tensor:
    """Return the products (N, O) of rows (N, I) with a weight that is written a part at a time.

    `fill(part, memory)` writes the output features of a slice into memory of the type `dtype`.
    """
    inputs = rows.shape[1]
    step = max(ELEMENTS_AT_A_TIME // inputs // TILE, 1) * TILE
    memory, x, y = scratch(step * inputs, dtype), rows.to(dtype), rows.new_empty(len(rows), outputs)
    for start in range(0, outputs, step):
        part = slice(start, min(start + step, outputs))
        weight = memory[: (part.stop - start) * inputs].view(-1, inputs)
        fill(part, weight)
        y[:, part] = multiply_exact(x, weight)
    return y
