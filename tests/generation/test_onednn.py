"""Weights in oneDNN's order: written by us as oneDNN writes them, and read by it where they lie."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_llama3.generation import onednn
from hf_llama3.generation.int8 import Int8Kernel
from hf_llama3.generation.kernels import DenseKernel

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
HAS_ORDER = "avx512_bf16" in CPU
with_order = pytest.mark.skipif(not HAS_ORDER, reason="this processor keeps weights in another order")
SHAPES = [(64, 64), (192, 256), (512, 2048), (2048, 192)]


def draw(shape, dtype):
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def encode(kernel, weight):
    stored = {name: torch.empty_like(part, device="cpu") for name, part in kernel.describe(weight.shape).items()}
    kernel.encode(weight, stored)
    return stored


def image_of(weight):
    image = torch.full(onednn.image_shape(weight.shape, weight.dtype), 1, dtype=weight.dtype)
    for part, rows in zip(image, weight.chunk(len(image)), strict=True):
        onednn.write(part, rows.shape, 0, rows)
    return image


@with_order
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_are_onednns_own(shape, dtype):
    weight = draw(shape, dtype)
    packed, image = onednn.pack(weight), image_of(weight)
    assert torch.equal(onednn.memory(packed), image.view(torch.int8)[0, : onednn.num_bytes(shape, dtype)])
    assert onednn.packed_like(shape, dtype) is not None


@pytest.mark.parametrize("what", ["units", "sums", "size"])
def test_another_order_is_noticed(what, monkeypatch):
    """Then oneDNN packs by itself."""
    shape = (128, 192)
    monkeypatch.setattr(onednn, "KNOWN", {})
    monkeypatch.setattr(onednn, "UNKNOWN", set())
    if what == "size":
        monkeypatch.setattr(onednn, "num_bytes", lambda shape, dtype: 7)
    else:
        arranged = onednn.arrange
        index = ["units", "sums"].index(what)

        def arrange(rows):
            found = list(arranged(rows))
            found[index] = found[index].flip(-1)
            return found

        monkeypatch.setattr(onednn, "arrange", arrange)
    assert onednn.packed_like(shape, torch.int8) is None and (torch.int8, shape) in onednn.UNKNOWN
    assert onednn.packed_like(shape, torch.int8) is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (65, 37), (3, 5), (259, 64)], ids=str)
def test_reading_gives_the_weight(shape, dtype):
    weight = draw(shape, dtype)
    image = image_of(weight)
    assert image[0].nbytes % onednn.PAGE == 0
    assert not image.view(torch.int8)[0, onednn.num_bytes(shape, dtype) :].any()
    assert torch.equal(onednn.read(image[0], shape), weight)


def test_rows_one_block_at_a_time():
    weight = draw((192, 64), torch.int8)
    image = torch.empty(onednn.image_shape(weight.shape, torch.int8), dtype=torch.int8)
    for start in (128, 0, 64):
        onednn.write(image[0], weight.shape, start, weight[start : start + 64])
    assert torch.equal(image, image_of(weight))


@pytest.mark.parametrize(
    ("count", "together"),
    [(64, 64), (2048, 2048), (16384, 16384), (28672, 14336), (128256, 10688), (32000, 16000), (128257, 128257)],
)
def test_parts(count, together):
    """The least number of equal parts of whole blocks with at most 16,384 output features each."""
    assert onednn.rows_together(count) == together


WAYS = {  # in which an image becomes a packed weight -> what brings it about
    "in place": {},
    "not on a page": {"PAGE": 2**60},
    "without torch's interface": {"torch_functions": lambda: None},
    "in an unknown order": {"packed_like": lambda shape, dtype: None},
}


@pytest.mark.parametrize("kernel", [DenseKernel, Int8Kernel])
@pytest.mark.parametrize("at_most", [2**14, 512], ids=["whole", "in parts"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_product(way, at_most, kernel, monkeypatch):
    weight, x = torch.randn(2048, 1088).bfloat16(), torch.randn(3, 1088).bfloat16()  # of 2 MB: begins with a page
    expected = kernel(weight)(x)
    monkeypatch.setattr(onednn, "AT_MOST_ROWS", at_most)
    stored = encode(kernel, weight)
    for name, value in WAYS[way].items():
        monkeypatch.setattr(onednn, name, value)
    made = kernel.from_stored(stored, (2048, 1088), torch.bfloat16)
    assert torch.equal(made(x), expected)
    parts = made.parts if kernel is DenseKernel else [packed for packed, *_ in made.parts]
    assert len(parts) == 2048 // min(at_most, 2048)
    if HAS_ORDER:
        in_image = {torch.ops.mkldnn.data_ptr(part) for part in parts} == {
            part.data_ptr() for part in next(iter(stored.values()))
        }
        assert in_image == (way == "in place")
    if kernel is DenseKernel:
        assert torch.equal(made.to_dense(), weight)


@pytest.mark.parametrize("kernel", [DenseKernel, Int8Kernel])
@pytest.mark.parametrize("shape", [(259, 64), (65, 37), (1, 8)], ids=str)
def test_products_of_odd_shapes(shape, kernel):
    """Padded to blocks, in an order that oneDNN has for some of them and not for others."""
    weight, x = torch.randn(shape).bfloat16(), torch.randn(3, shape[1]).bfloat16()
    expected = x.float() @ weight.float().T
    made = kernel.from_stored(encode(kernel, weight), shape, torch.bfloat16)
    assert (made(x).float() - expected).norm() < 0.02 * expected.norm()
    assert kernel is Int8Kernel or torch.equal(made.to_dense(), weight)


@with_order
def test_an_adopted_image_lives_as_long_as_the_weight():
    weight, x = torch.randn(2048, 1088).bfloat16(), torch.randn(1, 1088).bfloat16()  # of 2 MB: begins with a page
    kernel = DenseKernel.from_stored(encode(DenseKernel, weight), (2048, 1088), torch.bfloat16)
    expected = kernel(x)
    others = [torch.full((2048, 1088), 7.0).bfloat16() for _ in range(20)]  # would take its memory
    assert torch.equal(kernel(x), expected) and len(others) == 20


OLDER = """
import torch
from hf_llama3.generation import onednn
from hf_llama3.generation.int8 import Int8Kernel

torch.manual_seed(0)
weight, x = torch.randn(2048, 1088), torch.randn(3, 1088)
y = Int8Kernel(weight)(x)
error = (y - x @ weight.T).norm() / (x @ weight.T).norm()
assert error < 0.02, error
print((torch.int8, (2048, 1088)) in onednn.UNKNOWN)
"""


@with_order
@pytest.mark.parametrize("isa", ["AVX512_CORE", "AVX2"])
def test_older_processors(isa):
    """With AVX-512 the order is the same; for others oneDNN packs what is in an image in another."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    result = subprocess.run([sys.executable, "-c", OLDER], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"{isa == 'AVX2'}\n"), result.stderr
