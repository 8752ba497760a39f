"""Weights of 4 bits, multiplied by torch on a CPU."""

# Shapes: O output features, I input features, N rows of an input, G input features that share a scale, B blocks

import functools
from typing import NamedTuple

import torch

from .kernels import Kernel, row_blocks

BLOCK = 64  # output features that torch packs together
GROUP = 32  # input features per scale: 128 or 64 read less, 32 loses least
SPELLED_AT_A_TIME = 2**21  # elements: few enough to stay in a processor's caches
LARGEST_BATCH = 48  # rows above which torch's routine, made for few, is slower than to spell out the weight


class Order(NamedTuple):
    """An order of levels in memory: for each input feature of a block, bytes of two output features' levels."""

    block: int  # output features
    apart: int  # output features from the one in a byte's lower half to the one in its upper half


# ATen/native/cpu/int4mm_kernel.cpp: for AVX-512, in which weights are stored too, for AVX2, and for other processors
STORED = Order(64, 32)
ORDERS = (STORED, Order(32, 16), Order(32, 1))


class Int4Kernel(Kernel):
    """Weights of 4 bits, of which 32 neighbours share a scale and a middle; inputs stay as they are.

    torch's routine multiplies a few rows at the speed of memory, and is slow for many: for those the weight is spelled
    out, some output features at a time, and multiplied as a plain one.
    """

    @staticmethod
    def takes(shape: tuple[int, int]) -> bool:
        """Tell whether the routine takes a weight of this shape."""
        return shape[0] % BLOCK == 0 and shape[1] % GROUP == 0

    @staticmethod
    def describe(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        packed = torch.empty(shape[0], shape[1] // 2, dtype=torch.uint8, device="meta")
        scales = torch.empty(shape[1] // GROUP, shape[0], 2, dtype=torch.bfloat16, device="meta")
        return {"weight_int4": packed, "weight_scale_and_middle": scales}

    @staticmethod
    def encode(weight: torch.Tensor, stored: dict[str, torch.Tensor]):
        packed, scales_and_middles = stored["weight_int4"], stored["weight_scale_and_middle"]  # .., (I / G, O, 2)
        groups = len(scales_and_middles)
        for rows in row_blocks(weight):
            part = weight[rows].to(torch.float32, copy=True).unflatten(1, (groups, GROUP))
            low, high = part.amin(2, keepdim=True), part.amax(2, keepdim=True)
            scales = ((high - low) / 15).clamp_min(1e-6).bfloat16()
            middles = (low + 8 * scales.float()).bfloat16()  # what level 8 stands for
            levels = part.sub_(middles).div_(scales).add_(8).round_().clamp_(0, 15).flatten(1)
            packed[rows] = pack(levels.to(torch.uint8))
            scales_and_middles[:, rows] = torch.cat([scales, middles], 2).transpose(0, 1)

    def take(self, stored: dict[str, torch.Tensor]):
        self.packed, self.scales_and_middles = stored["weight_int4"], stored["weight_scale_and_middle"]
        if order_here() != STORED:
            self.packed = torch._convert_weight_to_int4pack_for_cpu(unpack(self.packed, STORED).T.int(), 1)
        self.num_bytes = self.packed.nbytes + self.scales_and_middles.nbytes
        self.multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows, order = x.flatten(0, -2).bfloat16(), order_here()  # (N, I)
        if len(rows) <= LARGEST_BATCH or order is None:
            y = self.multiply(rows, self.packed, GROUP, self.scales_and_middles)  # (N, O)
        else:
            y = self.multiply_spelled_out(rows, order)
        y = y.to(x.dtype) if bias is None else y.to(x.dtype) + bias
        return y.view(*x.shape[:-1], self.shape[0])

    def multiply_spelled_out(self, rows: torch.Tensor, order: Order) -> torch.Tensor:
        """Multiply rows (N, I) by plain output features, which take turns in one memory: to fill fresh takes longer."""
        out_features, in_features = self.shape
        step = min(max(SPELLED_AT_A_TIME // in_features // BLOCK, 1) * BLOCK, out_features)
        levels = torch.empty(step * in_features, dtype=torch.uint8)
        weight = torch.empty(step * in_features, dtype=torch.bfloat16)
        y = rows.new_empty(len(rows), out_features)
        for start in range(0, out_features, step):
            end = min(start + step, out_features)
            y[:, start:end] = rows @ self.spell_out(start, end, order, levels, weight)
        return y

    def spell_out(self, start: int, end: int, order: Order, levels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the output features from `start` to `end`, multiples of 64, as a plain matrix (I, end - start).

        It lies in the memory of `weight`, its levels in that of `levels`.
        """
        levels = unpack(self.packed[start:end], order, levels).view(torch.int8).sub_(8)
        levels = levels.unflatten(0, (-1, GROUP))  # (I / G, G, O)
        scales, middles = self.scales_and_middles[:, start:end].permute(2, 0, 1).unsqueeze(2).contiguous()
        weight = weight[: levels.numel()].view(levels.shape).copy_(levels)
        return torch.addcmul(middles, weight, scales, out=weight).flatten(0, 1)


def pack(levels: torch.Tensor) -> torch.Tensor:
    """Put levels 0 to 15 (O, I), in uint8, into the order that is stored: (O, I / 2)."""
    pairs = levels.view(-1, 2, STORED.apart, levels.shape[1])
    pairs = (pairs[:, 1] << 4).bitwise_or_(pairs[:, 0])  # (B, 32, I)
    return pairs.transpose(1, 2).reshape(len(levels), -1)


def unpack(packed: torch.Tensor, order: Order, memory: torch.Tensor | None = None) -> torch.Tensor:
    """Return the levels 0 to 15 (I, O), in uint8, of what lies in an order: (O, I / 2)."""
    pairs = packed.view(-1, 2 * packed.shape[1], order.block // 2 // order.apart, order.apart).transpose(0, 1)
    out = memory if memory is None else memory[: 2 * pairs.numel()].view(*pairs.shape[:3], 2, order.apart)
    return torch.stack([pairs & 15, pairs >> 4], 3, out=out).flatten(1)


@functools.cache
def order_here() -> Order | None:
    """Return the order that torch's routine reads on this processor, if it is one of those known."""
    levels = torch.randint(16, (2 * BLOCK, GROUP), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(levels, 1)
    return next((order for order in ORDERS if torch.equal(unpack(packed, order).T.int(), levels)), None)
