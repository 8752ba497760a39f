"""Matrix-vector products that read a weight at the speed of memory: oneDNN's and torch's, on a CPU.

A kernel is made from a plain weight (O, I), keeps it in the order of memory that its routine reads, and maps inputs
(..., I) to outputs (..., O).
"""

# Shapes: O output features, I input features, N rows of an input, G input features that share a scale

import functools

import torch

QUANTIZED_AT_A_TIME = 2**18  # elements of a weight, in float32: few enough to stay in a processor's cache
SPELLED_AT_A_TIME = 512  # output features of an int4 weight: few enough to stay in a processor's caches
INT4_GROUP = 32  # input features per scale: 128 or 64 read less, 32 loses least
INT4_BLOCK = 64  # output features that torch packs together
INT4_LARGEST_BATCH = 32  # rows above which torch's int4 routine, made for few, is slower than to spell out the weight


def can_pack(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN has a routine for weights of this type on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    supported = {torch.float32: lambda: True, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported}
    supported[torch.float16] = torch.ops.mkldnn._is_mkldnn_fp16_supported
    return dtype in supported and supported[dtype]()


class Kernel:
    """What all kernels are: they never change, so that copies of a model share them."""

    is_exact = False  # whether the weight can be had back
    num_bytes: int  # read for a row

    def __deepcopy__(self, memo):
        return self


class DenseKernel(Kernel):
    """The weight as it is, in oneDNN's order: products differ from `F.linear`'s by the order of their sums."""

    is_exact = True

    def __init__(self, weight: torch.Tensor):
        self.shape, self.dtype = weight.shape, weight.dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)
        self.num_bytes = weight.nbytes
        self.multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.multiply(x, self.packed, bias, "none", [], "")

    def to_dense(self) -> torch.Tensor:
        """Return the weight (O, I), bit for bit."""
        return self.packed.to_dense()


class Int8Kernel(Kernel):
    """Weights of 8 bits with a scale per output feature; inputs are rounded to 8 bits with a scale per row."""

    def __init__(self, weight: torch.Tensor):
        self.shape, self.dtype = weight.shape, weight.dtype
        quantized = torch.empty(weight.shape, dtype=torch.int8)
        self.scales = torch.empty(len(weight))  # (O)
        for rows in row_blocks(weight):
            part = weight[rows].detach().to(torch.float32, copy=True)
            scales = part.abs().amax(1).div_(127).clamp_min_(1e-30)
            self.scales[rows] = scales
            quantized[rows] = part.div_(scales[:, None]).round_()
        self.zero_points = torch.zeros(len(weight), dtype=torch.int32)
        self.packed = torch.ops.onednn.qlinear_prepack(quantized, None)
        self.num_bytes = quantized.numel() + 4 * len(weight)
        self.multiply = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.flatten(0, -2)  # (N, I)
        scales = rows.abs().amax(-1, keepdim=True).float().div_(127).clamp_min_(1e-30)  # (N, 1)
        quantized = (rows / scales).round_().to(torch.int8)
        one_scale, dtype = (float(scales), self.dtype) if len(rows) == 1 else (1.0, torch.float32)
        how = (self.packed, self.scales, self.zero_points, None, 1.0, 0, dtype, "none", [], "")
        y = self.multiply(quantized, one_scale, 0, *how)  # (N, O)
        if len(rows) != 1:
            y = y.mul_(scales).to(self.dtype)
        if bias is not None:
            y = y + bias
        return y.view(*x.shape[:-1], self.shape[0])


class Int4Kernel(Kernel):
    """Weights of 4 bits, of which 32 neighbours share a scale and a middle; inputs stay as they are.

    torch's routine multiplies a few rows at the speed of memory, and is slow for many: for those the weight is spelled
    out, some output features at a time, and multiplied as a plain one.
    """

    def __init__(self, weight: torch.Tensor):
        self.shape, self.dtype = weight.shape, weight.dtype
        groups = weight.shape[1] // INT4_GROUP
        self.packed = torch.empty(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8)
        self.scales_and_middles = torch.empty(groups, len(weight), 2, dtype=torch.bfloat16)  # (I / G, O, 2)
        for rows in row_blocks(weight):
            part = weight[rows].detach().to(torch.float32, copy=True).unflatten(1, (groups, INT4_GROUP))
            low, high = part.amin(2, keepdim=True), part.amax(2, keepdim=True)
            scales = ((high - low) / 15).clamp_min(1e-6).bfloat16()
            middles = (low + 8 * scales.float()).bfloat16()  # what level 8 stands for
            levels = part.sub_(middles).div_(scales).add_(8).round_().clamp_(0, 15).flatten(1).int()
            self.packed[rows] = torch._convert_weight_to_int4pack_for_cpu(levels, 1)
            self.scales_and_middles[:, rows] = torch.cat([scales, middles], 2).transpose(0, 1)
        self.num_bytes = self.packed.numel() + 2 * self.scales_and_middles.numel()
        self.multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    @staticmethod
    def takes(weight: torch.Tensor) -> bool:
        """Tell whether the routine takes a weight of this shape."""
        return weight.shape[0] % INT4_BLOCK == 0 and weight.shape[1] % INT4_GROUP == 0

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.flatten(0, -2).bfloat16()  # (N, I)
        if len(rows) <= INT4_LARGEST_BATCH or not has_known_int4_order():
            y = self.multiply(rows, self.packed, INT4_GROUP, self.scales_and_middles)  # (N, O)
        else:
            starts = range(0, self.shape[0], SPELLED_AT_A_TIME)
            y = torch.cat([rows @ self.spell_out(start, start + SPELLED_AT_A_TIME) for start in starts], 1)
        y = y.to(x.dtype) if bias is None else y.to(x.dtype) + bias
        return y.view(*x.shape[:-1], self.shape[0])

    def spell_out(self, start: int, end: int) -> torch.Tensor:
        """Return the output features from `start` to `end`, multiples of 64, as a plain matrix (I, end - start)."""
        levels = read_int4(self.packed[start:end], self.shape[1]).unflatten(1, (-1, INT4_GROUP))  # (B, I / G, G, 64)
        scales_and_middles = self.scales_and_middles[:, start:end].unflatten(1, (-1, INT4_BLOCK))
        scales, middles = scales_and_middles.permute(3, 1, 0, 2).unsqueeze(3).contiguous()  # (B, I / G, 1, 64)
        blocks = torch.addcmul(middles, levels.bfloat16(), scales)
        return blocks.permute(1, 2, 0, 3).reshape(self.shape[1], -1)


def row_blocks(weight: torch.Tensor) -> list[slice]:
    """Cut the output features into slices that stay in a processor's cache while they are quantised."""
    step = max(QUANTIZED_AT_A_TIME // weight.shape[1] // INT4_BLOCK, 1) * INT4_BLOCK
    return [slice(start, start + step) for start in range(0, len(weight), step)]


def read_int4(packed: torch.Tensor, size: int) -> torch.Tensor:
    """Return the levels -8 to 7 of what torch packed, in its order: blocks (B) of all inputs for 64 output features.

    For an input feature and a block there are 32 bytes, each with the levels of an output feature and of the 32nd after
    it (ATen/native/cpu/int4mm_kernel.cpp, for AVX-512).
    """
    pairs = packed.view(-1, size, INT4_BLOCK // 2)
    return torch.stack([pairs & 15, pairs >> 4], 2).view(torch.int8).sub_(8).flatten(2)  # (B, I, 64)


@functools.cache
def has_known_int4_order() -> bool:
    """Tell whether this processor's order is the one that `read_int4` reads: others are multiplied as packed."""
    generator, shape = torch.Generator().manual_seed(0), (2 * INT4_BLOCK, INT4_GROUP)
    levels = torch.randint(16, shape, generator=generator, dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(levels, 1)
    return torch.equal(read_int4(packed, INT4_GROUP).transpose(1, 2).flatten(0, 1) + 8, levels)
