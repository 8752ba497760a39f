"""Weights in oneDNN's order of memory, written by ourselves: into memory or a file, which oneDNN then reads in place.

An image is a weight (O, I) in the order of a processor with AVX-512 (bfloat16: AVX512_BF16), in blocks of 64
output features, of which 4 bytes each (two bfloat16, four int8) lie side by side for one input after another. For int8
the negative sum of each output feature follows, which oneDNN multiplies by an input's zero point. Sizes are padded to
whole blocks, and images to whole pages: oneDNN reads a weight that begins where a page does a sixth faster. A large
weight is divided into parts.
"""

# Shapes: O output features, I input features, P parts

import ctypes
import functools
import math
import weakref
from pathlib import Path

import torch
from torch import nn

BLOCK = 64  # output features
UNIT = 4  # bytes of an output feature
PAGE = 4096  # bytes
AT_MOST_ROWS = 2**14  # output features of a part, if a weight can be divided so
OPAQUE_LAYOUT = 3  # of torch's C interface (torch/csrc/inductor/aoti_torch/c/shim.h): memory that oneDNN describes
KNOWN = weakref.WeakValueDictionary()  # (type, shape) -> a packed weight that is its image
UNKNOWN = set()  # (type, shape) of weights that this processor has in another order


def image_shape(shape: tuple[int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Return the shape of the image of a weight (O, I): (P, elements of a part)."""
    rows = rows_together(shape[0])
    size = num_bytes((rows, shape[1]), dtype)
    return shape[0] // rows, math.ceil(size / PAGE) * PAGE // dtype.itemsize


def rows_together(count: int) -> int:
    """Return how many of so many output features a part has: all, or those of the fewest equal parts that are small."""
    fits = (parts for parts in range(1, count // BLOCK + 1) if count % (parts * BLOCK) == 0)
    return next((count // parts for parts in fits if count // parts <= AT_MOST_ROWS), count)


def padded(shape: tuple[int, int], dtype: torch.dtype) -> tuple[int, int]:
    together = UNIT // dtype.itemsize
    return math.ceil(shape[0] / BLOCK) * BLOCK, math.ceil(shape[1] / together) * together


def num_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Return the bytes of a packed weight."""
    out_features, in_features = padded(shape, dtype)
    return out_features * in_features * dtype.itemsize + (4 * out_features if dtype is torch.int8 else 0)


def regions(part: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of a part, or of a packed weight's memory: units (O / 64, units of I, 64) and sums (O or 0)."""
    out_features, in_features = padded(shape, dtype)
    size = out_features * in_features * dtype.itemsize
    numbers = part.view(torch.int8)[: num_bytes(shape, dtype)].view(torch.int32)
    blocks, sums = numbers.split([size // UNIT, len(numbers) - size // UNIT])
    return blocks.view(out_features // BLOCK, -1, BLOCK), sums


def arrange(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `regions` are to hold of output features, in whole blocks or to the last: units and sums."""
    out_features, in_features = padded(rows.shape, rows.dtype)
    if (out_features, in_features) != rows.shape:
        rows = nn.functional.pad(rows, (0, in_features - rows.shape[1], 0, out_features - rows.shape[0]))
    units = rows.contiguous().view(torch.int32).unflatten(0, (-1, BLOCK)).transpose(1, 2)
    if rows.dtype is not torch.int8:
        return units, torch.empty(0, dtype=torch.int32)
    return units, torch._int_mm(rows, torch.ones(in_features, 1, dtype=torch.int8)).neg_().flatten()


def write(part: torch.Tensor, shape: tuple[int, int], start: int, rows: torch.Tensor):
    """Write output features, from a multiple of 64 on, into a part of an image of this shape."""
    part.view(torch.int8)[num_bytes(shape, rows.dtype) :] = 0  # to the end of its last page
    blocks, sums = regions(part, shape, rows.dtype)
    units, of_rows = arrange(rows)
    blocks[start // BLOCK :][: len(units)] = units
    sums[start:][: len(of_rows)] = of_rows


def holds(part: torch.Tensor, shape: tuple[int, int], start: int, rows: torch.Tensor) -> bool:
    """Tell whether a part of an image of this shape is such as `write` would leave it."""
    blocks, sums = regions(part, shape, rows.dtype)
    units, of_rows = arrange(rows)
    return torch.equal(blocks[start // BLOCK :][: len(units)], units) and torch.equal(
        sums[start:][: len(of_rows)], of_rows
    )


def read(part: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return the weight (O, I) that a part was made of."""
    units = regions(part, shape, part.dtype)[0].transpose(1, 2).flatten(0, 1)
    return units.contiguous().view(part.dtype)[: shape[0], : shape[1]].contiguous()


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Have oneDNN pack a plain weight (O, I)."""
    if weight.dtype is torch.int8:
        return torch.ops.onednn.qlinear_prepack(weight, None)
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)


def take(image: torch.Tensor, shape: tuple[int, int]) -> list[torch.Tensor]:
    """Return the parts of an image as packed weights: in place, if this processor has their order, else packed anew."""
    shape = (shape[0] // len(image), shape[1])
    return [take_part(part, shape) for part in image]


def take_part(part: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    like = packed_like(shape, part.dtype)
    if like is None:
        return pack(read(part, shape))
    packed = adopt(part, like) if part.data_ptr() % PAGE == 0 else None
    if packed is None:
        packed = like.clone()
        memory(packed).copy_(part.view(torch.int8)[: num_bytes(shape, part.dtype)])
    KNOWN[part.dtype, shape] = packed
    return packed


def packed_like(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor | None:
    """Return a packed weight of a type and shape if this processor packs it in the order of images, else None.

    That is found by comparison, for every shape: oneDNN chooses an order by sizes too.
    """
    if (dtype, shape) in UNKNOWN:
        return None
    packed = KNOWN.get((dtype, shape))
    if packed is None:
        weight = torch.empty(shape, dtype=dtype)
        starts = (0, (shape[0] - 1) // BLOCK * BLOCK)  # the first block and the last tell
        for start in starts:
            rows = weight[start : start + BLOCK]
            rows.copy_(torch.randint(-127, 128, rows.shape, generator=torch.Generator().manual_seed(start)))
        packed = pack(weight)
        has_size = torch.ops.mkldnn._nbytes(packed) == num_bytes(shape, dtype)
        if not has_size or not all(holds(memory(packed), shape, start, weight[start:][:BLOCK]) for start in starts):
            UNKNOWN.add((dtype, shape))
            return None
    return packed


def memory(packed: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a packed weight as a plain tensor, which must not outlive it."""
    size, address = torch.ops.mkldnn._nbytes(packed), torch.ops.mkldnn.data_ptr(packed)
    return torch.frombuffer((ctypes.c_byte * size).from_address(address), dtype=torch.int8)


def adopt(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor | None:
    """Return a packed weight whose memory is that of a part; None where torch has no such function."""
    functions = torch_functions()
    if functions is None:
        return None
    create, number_of_type, new_capsule = functions
    description = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(like).view(torch.uint8).tolist())
    sizes = (ctypes.c_int64 * like.ndim)(*like.shape)
    handle = ctypes.c_void_p()
    failed = create(
        *(ctypes.c_void_p(part.data_ptr()), ctypes.c_int64(like.ndim), sizes, sizes, ctypes.c_int64(0)),  # no strides
        *(number_of_type[like.dtype], ctypes.c_int32(0), ctypes.c_int32(-1), ctypes.byref(handle)),  # on the CPU
        *(ctypes.c_int32(OPAQUE_LAYOUT), description, ctypes.c_int64(len(description))),
    )
    if failed:
        return None
    packed = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(new_capsule(handle, None, None))
    packed.part = part  # lives as long
    return packed


@functools.cache
def torch_functions():
    """Return what `adopt` needs of torch's C interface, by which its compiled models keep packed weights in a file."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        create = library.aoti_torch_create_tensor_from_blob_v2
        types = {torch.int8: library.aoti_torch_dtype_int8, torch.bfloat16: library.aoti_torch_dtype_bfloat16}
        torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr  # noqa: B018  (is it there?)
    except (OSError, AttributeError):
        return None
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return create, {dtype: ctypes.c_int32(number()) for dtype, number in types.items()}, new_capsule
