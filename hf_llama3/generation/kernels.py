"""Matrix-vector products that read a weight at the speed of memory, on a CPU: what all have in common, and oneDNN's.

A kernel is made from a plain weight (O, I), keeps it in the order of memory that its routine reads, and maps inputs
(..., I) to outputs (..., O).
"""

# Shapes: O output features, I input features

import ctypes
import sys

import torch

from . import onednn

POPULATE_READ = 22  # MADV_POPULATE_READ; a kernel before Linux 5.14 refuses, and nothing is lost
QUANTIZED_AT_A_TIME = 2**17  # elements of a weight, in float32: few enough to stay in a processor's cache


def can_pack(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN has a routine for weights of this type on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    supported = {torch.float32: lambda: True, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported}
    supported[torch.float16] = torch.ops.mkldnn._is_mkldnn_fp16_supported
    return dtype in supported and supported[dtype]()


class Kernel:
    """What all kernels are: a few tensors hold all of one, which can be kept in a file.

    They never change, so that copies of a model share them.
    """

    is_exact = False  # whether the weight can be had back
    num_bytes: int  # read for a row

    def __deepcopy__(self, memo):
        return self

    def __init__(self, weight: torch.Tensor):
        self.shape, self.dtype = tuple(weight.shape), weight.dtype
        stored = {name: torch.empty_like(part, device="cpu") for name, part in self.describe(self.shape).items()}
        self.encode(weight.detach(), stored)
        self.take(stored)

    @classmethod
    def from_stored(cls, stored: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype):
        """Make a kernel of what `encode` made of a weight of this shape, for outputs of a type."""
        kernel = cls.__new__(cls)
        kernel.shape, kernel.dtype = shape, dtype
        for tensor in stored.values():
            map_all(tensor)
        kernel.take(stored)
        return kernel

    @staticmethod
    def describe(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return the tensors that hold all that is kept of a weight of this shape, without memory (on "meta")."""
        raise NotImplementedError

    @staticmethod
    def encode(weight: torch.Tensor, stored: dict[str, torch.Tensor]):
        """Put a plain weight (O, I) into tensors such as `describe` says."""
        raise NotImplementedError

    def take(self, stored: dict[str, torch.Tensor]):
        """Keep these tensors as the routine reads them, without a copy where that can be."""
        raise NotImplementedError


class DenseKernel(Kernel):
    """The weight as it is, in oneDNN's order: products differ from `F.linear`'s by the order of their sums."""

    is_exact = True

    def __init__(self, weight: torch.Tensor):
        self.shape, self.dtype = tuple(weight.shape), weight.dtype
        self.use([onednn.pack(weight.detach().contiguous())])

    @staticmethod
    def describe(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        image = torch.empty(onednn.image_shape(shape, torch.bfloat16), dtype=torch.bfloat16, device="meta")
        return {"weight_bfloat16": image}

    @staticmethod
    def encode(weight: torch.Tensor, stored: dict[str, torch.Tensor]):
        image = stored["weight_bfloat16"]
        for part, of_weight in zip(image, weight.chunk(len(image)), strict=True):
            onednn.write(part, of_weight.shape, 0, of_weight)

    def take(self, stored: dict[str, torch.Tensor]):
        self.use(onednn.take(stored["weight_bfloat16"], self.shape))

    def use(self, parts: list[torch.Tensor]):
        self.parts = parts
        self.num_bytes = self.shape[0] * self.shape[1] * self.dtype.itemsize
        self.multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if len(self.parts) == 1:
            return self.multiply(x, self.parts[0], bias, "none", [], "")
        y = torch.cat([self.multiply(x, part, None, "none", [], "") for part in self.parts], -1)
        return y if bias is None else y + bias

    def to_dense(self) -> torch.Tensor:
        """Return the weight (O, I), bit for bit."""
        return torch.cat([part.to_dense() for part in self.parts])


def map_all(tensor: torch.Tensor):
    """Have the system map all pages of a tensor that lies in a file, at once rather than each when it is read."""
    if sys.platform == "linux":
        start = tensor.data_ptr() // onednn.PAGE * onednn.PAGE
        size = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), POPULATE_READ)


def row_blocks(weight: torch.Tensor) -> list[slice]:
    """Cut the output features into slices that stay in a processor's cache while they are quantised."""
    step = max(QUANTIZED_AT_A_TIME // weight.shape[1] // onednn.BLOCK, 1) * onednn.BLOCK
    return [slice(start, start + step) for start in range(0, len(weight), step)]
