"""Weights of 8 bits, multiplied by oneDNN on a CPU."""

# Shapes: O output features, I input features, N rows of an input, P parts

import torch

from . import onednn
from .kernels import Kernel, row_blocks


class Int8Kernel(Kernel):
    """Weights of 8 bits with a scale per output feature; inputs are rounded to 8 bits with a scale per row."""

    @staticmethod
    def describe(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        image = torch.empty(onednn.image_shape(shape, torch.int8), dtype=torch.int8, device="meta")
        return {"weight_int8": image, "weight_scale": torch.empty(shape[0], dtype=torch.float32, device="meta")}

    @staticmethod
    def encode(weight: torch.Tensor, stored: dict[str, torch.Tensor]):
        image, scales = stored["weight_int8"], stored["weight_scale"]
        of_parts = zip(image, weight.chunk(len(image)), scales.chunk(len(image)), strict=True)
        for part, of_weight, of_scales in of_parts:
            for rows in row_blocks(of_weight):
                plain = of_weight[rows]
                scale = plain.abs().amax(1).float().div_(127).clamp_min_(1e-30)
                quantized = plain.to(torch.float32, copy=True).div_(scale[:, None]).round_().to(torch.int8)
                onednn.write(part, of_weight.shape, rows.start, quantized)
                of_scales[rows] = scale

    def take(self, stored: dict[str, torch.Tensor]):
        rows, scales = onednn.rows_together(self.shape[0]), stored["weight_scale"]
        zeros = torch.zeros(rows, dtype=torch.int32)
        packed = onednn.take(stored["weight_int8"], self.shape)
        self.parts = [(part, scale, zeros) for part, scale in zip(packed, scales.split(rows), strict=True)]
        self.num_bytes = self.shape[0] * self.shape[1] + scales.nbytes
        self.multiply = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.flatten(0, -2)  # (N, I)
        scales = rows.abs().amax(-1, keepdim=True).float().div_(127).clamp_min_(1e-30)  # (N, 1)
        quantized = (rows / scales).round_().to(torch.int8)
        one_scale, dtype = (float(scales), self.dtype) if len(rows) == 1 else (1.0, torch.float32)
        how = (None, 1.0, 0, dtype, "none", [], "")
        parts = [self.multiply(quantized, one_scale, 0, *part, *how) for part in self.parts]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)  # (N, O)
        if len(rows) != 1:
            y = y.mul_(scales).to(self.dtype)
        if bias is not None:
            y = y + bias
        return y.view(*x.shape[:-1], self.shape[0])
