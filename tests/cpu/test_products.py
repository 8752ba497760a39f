"""Products by kernels, on every path of this processor and of narrower ones, against float64."""

import copy

import pytest
import torch
from torch import nn

from hf_llama3.cpu import processor
from hf_llama3.cpu.kernels import kernel as kernels
from hf_llama3.cpu.kernels.exact import ExactKernel
from hf_llama3.cpu.kernels.int8_int4 import Int4Kernel, Int8Kernel
from hf_llama3.errors import UserError

KERNELS = (ExactKernel, Int8Kernel, Int4Kernel)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (1, 2, 3, 4, 5, 8, 9, 17, 33, 80, 512)  # each side of every limit of the kernels


def dequantised(kernel) -> torch.Tensor:
    """Return in float64 what a kernel's tensors stand for, by the words of `products` and no code of it."""
    outputs, inputs = kernel.shape
    if type(kernel) is ExactKernel:
        return kernel.stored["weight"].double()
    if type(kernel) is Int8Kernel:
        levels, scales = kernel.stored["weight_int8"], kernel.stored["weight_scale"].double()
        table = torch.stack([levels.double(), torch.zeros_like(levels, dtype=torch.float64)])
        minimums = torch.zeros_like(scales)
    else:
        both = kernel.stored["weight_int4"].view(outputs, -1, 16, 4)  # bytes of a lane, two levels each
        by_lane = torch.stack([both & 15, both >> 4], -1).view(outputs, -1, 4, 4, 8)  # 4 groups of 4 lanes
        levels = by_lane.transpose(3, 4).reshape(outputs, -1)
        table = torch.stack([levels.double(), torch.ones_like(levels, dtype=torch.float64)])
        scales, minimums = kernel.stored["weight_scale_and_minimum"].double().unbind(2)
    inputs_of_levels = torch.arange(levels.shape[1])
    if type(kernel) is Int8Kernel:
        group = inputs_of_levels // 128 * 2 + inputs_of_levels % 16 // 8
    else:
        group = inputs_of_levels // 32
    return (table[0] * scales[:, group] + table[1] * minimums[:, group])[:, :inputs]


def check(kernel, x):
    """Compare with the exact product, by the sizes of what is added."""
    weight = dequantised(kernel)
    expected, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    made = kernel(x)
    assert made.dtype is x.dtype and made.shape == expected.shape
    # float32: rounding of sums; others: of the result, and where many rows are multiplied in bfloat16 of the weight
    bound = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[x.dtype]
    torch.testing.assert_close(made.double() / (size + 1e-30), expected / (size + 1e-30), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("shape", [(192, 256), (67, 101), (33, 640), (1, 1), (5, 2049)], ids=str)
def test_shapes_and_rows(shape, kind, dtype, on):
    torch.manual_seed(0)
    kernel = kind(torch.randn(shape).mul(0.05).to(dtype))
    for rows in ROWS:
        check(kernel, torch.randn(rows, shape[1]).to(dtype))


PATTERNS = {
    "ones of 127": (lambda shape: torch.full(shape, 127.0), lambda shape: torch.full(shape, 127.0)),
    "signs in turn": (
        lambda shape: (torch.arange(shape[1]) % 2 * 2.0 - 1).expand(shape) * 127,
        lambda shape: (torch.arange(shape[1]) % 2 * 2.0 - 1).expand(shape) * 127,
    ),
    "outlier channels": (torch.randn, lambda shape: torch.randn(shape) * (1 + 99 * (torch.arange(shape[1]) % 37 == 0))),
    "outlier weights": (lambda shape: torch.randn(shape) * (1 + 99 * (torch.rand(shape) < 0.01)), torch.randn),
    "no weight": (torch.zeros, torch.randn),
    "no input": (torch.randn, torch.zeros),
    "tiny": (lambda shape: torch.randn(shape) * 1e-20, lambda shape: torch.randn(shape) * 1e3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern, kind, dtype, on):
    torch.manual_seed(0)
    make_weight, make_x = PATTERNS[pattern]
    kernel = kind(make_weight((96, 2048)).contiguous().to(dtype))
    for rows in (1, 4, 20, 70):
        check(kernel, make_x((rows, 2048)).to(dtype))


# Of normal numbers, the root of the mean square error: a step over the root of 12
@pytest.mark.parametrize(("kind", "bound"), [(Int8Kernel, 0.007), (Int4Kernel, 0.075)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_how_near_quantised_weights_are(kind, bound, dtype, on):
    torch.manual_seed(0)
    weight = torch.randn(64, 1024).to(dtype)
    error = dequantised(kind(weight)) - weight.double()
    assert bound / 2 < error.square().mean().sqrt() < bound


def test_levels_that_stand_for_weights_exactly(on):
    """Weights that 4 bits can hold come back: those of a q4_1 file, for one."""
    torch.manual_seed(0)
    levels = torch.randint(16, (32, 256))
    levels[:, 0::32], levels[:, 1::32] = 0, 15  # each group has both ends
    weight = levels * 0.0078125 - 0.0625
    assert torch.equal(dequantised(Int4Kernel(weight)).float(), weight)


@pytest.mark.parametrize("kind", [Int8Kernel, Int4Kernel])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_must_be_finite(kind, value, on):
    weight = torch.randn(40, 130)
    weight[37, 129] = value
    with pytest.raises(
        UserError, match=r"weights to quantise must be finite, got NaN or infinity in one of shape \(40, 130\)"
    ):
        kind(weight)


def test_exact_weights_stay_where_they_are():
    weight = nn.Parameter(torch.randn(64, 128))
    kernel, x = ExactKernel(weight), torch.randn(3, 128)
    assert kernel.stored["weight"].data_ptr() == weight.data_ptr() and kernel.num_bytes == weight.nbytes
    with torch.no_grad():
        weight.mul_(2)
    torch.testing.assert_close(kernel(x), x @ weight.T)


@pytest.mark.parametrize("kind", KERNELS)
def test_threads_share_the_work(kind, monkeypatch):
    """Whoever multiplies how much, the sums are the same to the bit."""
    monkeypatch.setattr(kernels, "SMALL", 0)
    torch.manual_seed(0)
    kernel, x = kind(torch.randn(131, 257)), torch.randn(5, 257)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(processor, "threads", lambda threads=threads: threads)
        results.append(kernel(x))
    assert all(torch.equal(result, results[0]) for result in results)


def test_threads_without_torchs_own(monkeypatch):
    """Where torch has no libgomp a pool of Python's threads does the same."""
    from hf_llama3.cpu.kernels import machine_code, products

    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(processor, "threads", lambda: 3)
    monkeypatch.setattr(kernels, "product", products.product.__wrapped__)
    monkeypatch.setattr(machine_code, "openmp", lambda: None)
    kernel, x = ExactKernel(torch.randn(131, 257)), torch.randn(5, 257)
    check(kernel, x)


@pytest.mark.parametrize("kind", KERNELS)
def test_inputs_and_biases(kind):
    weight, bias = torch.randn(48, 64), torch.randn(48)
    kernel = kind(weight)
    plain = dequantised(kernel).float()
    for x in (
        torch.randn(64),
        torch.randn(2, 3, 64),
        torch.randn(64, 5).T,
        torch.randn(0, 64),
        torch.randn(2, 128)[:, ::2],
    ):
        torch.testing.assert_close(kernel(x, bias), nn.functional.linear(x, plain, bias), rtol=1e-4, atol=1e-4)
    transposed = kind(weight.T.contiguous().T)
    torch.testing.assert_close(transposed(x), kernel(x), rtol=1e-5, atol=1e-5)
    assert copy.deepcopy(kernel) is kernel


@pytest.mark.parametrize("kind", KERNELS)
def test_inputs_of_another_size_or_place_are_refused(kind):
    """What is only an address has no size: the second would have become one row."""
    kernel = kind(torch.randn(8, 64))
    for x, got in (
        (torch.randn(3, 65), "65 on cpu"),
        (torch.randn(2, 32), "32 on cpu"),
        (torch.randn(1, 64, device="meta"), "64 on meta"),
    ):
        with pytest.raises(UserError, match=f"inputs must be 64 numbers on the CPU, got {got}"):
            kernel(x)


@pytest.mark.parametrize("kind", KERNELS)
def test_defaults_of_torch_do_not_matter(kind):
    """Meta's code, for one, changes the default type: an output of half the size would be written past its end."""
    kernel, x = kind(torch.randn(48, 200)), torch.randn(3, 200)
    expected = kernel(x)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        made = [kernel(x), kernel(torch.cat([x] * 30))[:3]]
    finally:
        torch.set_default_dtype(default)
        torch.set_default_device(None)
    for one in made:
        assert one.dtype is torch.float32 and one.is_cpu
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("kind", KERNELS)
def test_all_that_is_kept_stands_in_a_few_tensors(kind):
    weight = torch.randn(48, 200).bfloat16()
    stored = {name: torch.empty_like(part, device="cpu") for name, part in kind.layout(weight.shape).items()}
    kind.encode(weight, stored)
    again, x = kind.from_stored(stored, (48, 200), torch.bfloat16), torch.randn(3, 200).bfloat16()
    assert torch.equal(again(x), kind(weight)(x))
    assert again.num_bytes == sum(part.nbytes for part in stored.values())
