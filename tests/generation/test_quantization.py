"""Weights of 8 and 4 bits: how far from the plain ones, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import CLASSES, logits, make_model, prompts
from torch import nn

import hf_llama3
from hf_llama3.errors import UserError
from hf_llama3.generation import int4
from hf_llama3.generation.int4 import Int4Kernel
from hf_llama3.generation.int8 import Int8Kernel
from hf_llama3.generation.kernels import DenseKernel
from hf_llama3.generation.packed import PackedLinear
from hf_llama3.generation.speed import weight_bytes

# Of a product of normal numbers: a rounding step over the root of 12, where the largest number of a scale is 3 or so
ERRORS = {DenseKernel: 1e-6, Int8Kernel: 0.013, Int4Kernel: 0.09}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 3), (60,), (0,)], ids=str)
@pytest.mark.parametrize("kernel", ERRORS)
def test_products(kernel, rows, dtype):
    torch.manual_seed(0)
    weight, x, bias = torch.randn(192, 256).to(dtype), torch.randn(*rows, 256).to(dtype), torch.randn(192).to(dtype)
    weight[7] *= 100  # each output feature has a scale of its own
    x[..., 1:, :] *= 100  # and so has each row
    theirs, ours = nn.functional.linear(x.double(), weight.double()), kernel(weight)
    usual = x.double().norm(dim=-1, keepdim=True) * weight.double().norm(dim=-1) / 16  # size of a product
    bound = ERRORS[kernel] + (4e-3 if dtype is torch.bfloat16 else 0)
    for made, expected in ((ours(x), theirs), (ours(x, bias), theirs + bias)):
        assert made.shape == expected.shape and made.dtype is dtype
        errors = (made.double() - expected) / usual
        assert (errors.square().mean(-1).sqrt() <= bound).all() and (errors.abs() < 6 * bound).all()


def test_zeros():
    for kernel in (Int8Kernel, Int4Kernel):
        weight = torch.randn(64, 64)
        weight[3] = 0
        y = kernel(weight)(torch.cat([torch.zeros(1, 64), torch.randn(1, 64)]))
        assert torch.isfinite(y).all() and y[0].abs().max() == 0 and y[1, 3] == 0


@pytest.mark.parametrize("shape", [(64, 32), (192, 256), (8256, 512)], ids=str)
def test_int4_for_few_rows_and_for_many(shape, monkeypatch):
    """Both routes multiply by the same weight; the second adds in another order."""
    kernel, order = Int4Kernel(torch.randn(shape)), int4.order_here()
    assert order is not None
    spelled_out = kernel.multiply_spelled_out(torch.eye(shape[1]).bfloat16(), order)
    assert torch.equal(kernel(torch.eye(shape[1])[:8]), spelled_out[:8].float())
    x = torch.randn(60, shape[1]).bfloat16()
    many = kernel(x)
    monkeypatch.setattr(int4, "order_here", lambda: None)
    torch.testing.assert_close(many, kernel(x), rtol=0, atol=0.01 * float(many.abs().max()))


INT4 = """
import torch
from hf_llama3.generation.int4 import STORED, Int4Kernel, order_here, pack, unpack

torch.manual_seed(0)
weight, x = torch.randn(192, 64).bfloat16(), torch.randn(60, 64).bfloat16()
levels = torch.randint(16, (192, 64)).to(torch.uint8)
assert torch.equal(unpack(pack(levels), STORED).T, levels)
stored = {name: torch.empty_like(part, device="cpu") for name, part in Int4Kernel.describe((192, 64)).items()}
Int4Kernel.encode(weight, stored)
scales, middles = (part.T.repeat_interleave(32, 1).float() for part in stored["weight_scale_and_middle"].unbind(2))
plain = (unpack(stored["weight_int4"], STORED).T.float() - 8) * scales + middles
kernel = Int4Kernel.from_stored(stored, (192, 64), torch.bfloat16)
for rows in (x[:1], x):
    torch.testing.assert_close(kernel(rows).float(), rows.float() @ plain.T, rtol=0.01, atol=0.05)
print(torch.backends.cpu.get_cpu_capability(), *order_here())
"""


@pytest.mark.parametrize("capability", ["avx512", "avx2", "default"])
def test_int4_on_processors(capability):
    """What is stored is the same for all; torch's routine has an order of its own on each, of which none is unknown."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run([sys.executable, "-c", INT4], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kind, block, apart = result.stdout.split()
    assert (int(block), int(apart)) == {"AVX512": (64, 32), "AVX2": (32, 16), "DEFAULT": (32, 1)}[kind]


def test_bytes():
    """What a step reads: int8 with a scale in float32 for each output feature."""
    linears = 2 * (128 * (128 + 2 * 64 + 128 + 3 * 192)) + 512 * 128
    features = 2 * (128 + 2 * 64 + 128 + 2 * 192 + 128) + 512
    assert weight_bytes(make_model()) == weight_bytes(hf_llama3.optimize(make_model())) == 4 * linears
    assert weight_bytes(hf_llama3.optimize(make_model(), quantize="int8")) == linears + 4 * features


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("kind", CLASSES)
def test_model(kind, quantize):
    model = make_model(kind, dtype=torch.bfloat16)
    theirs = logits(model)
    hf_llama3.optimize(model, quantize=quantize)
    kinds = {type(module.kernel) for module in model.modules() if type(module) is PackedLinear}
    assert kinds == ({Int8Kernel} if quantize == "int8" else {Int8Kernel, Int4Kernel})
    assert type(model.lm_head.kernel) is Int8Kernel and sum(type(m) is nn.Linear for m in model.modules()) == 0
    ours = logits(model)
    bound = {"int8": 0.05, "int4": 0.35}[quantize]
    assert 1e-3 < (ours - theirs).norm() / theirs.norm() < bound
    tokens = model.generate(prompts(), max_new_tokens=10, do_sample=False)
    alone = model.generate(prompts()[:1], max_new_tokens=10, do_sample=False)
    assert torch.equal(tokens[:1], alone)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weights_are_gone(quantize, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    model = hf_llama3.Llama3ForCausalLM.from_pretrained(tmp_path / "model")
    hf_llama3.optimize(model, quantize=quantize)
    for act in (
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: model.push_to_hub("somebody/model"),
        lambda: model.state_dict(),
    ):
        with pytest.raises(
            UserError, match=f"quantised to {quantize} has no plain weights to save; copy .*model instead"
        ):
            act()
    with pytest.raises(UserError, match=f"quantised to {quantize} cannot be restored; load .*model again"):
        hf_llama3.restore(model)
    with pytest.raises(UserError, match="a quantised weight cannot be read"):
        model.model.layers[0].mlp.up_proj.weight + 0
    with pytest.raises(UserError, match="an optimised model cannot be trained"):
        model.train()
    assert not (tmp_path / "saved").exists()
    assert model.num_parameters() == hf_llama3.Llama3ForCausalLM.from_pretrained(tmp_path / "model").num_parameters()


def test_shapes_that_int4_does_not_take():
    """80 rows are not a multiple of 64: such layers get 8 bits."""
    model = hf_llama3.optimize(make_model(num_attention_heads=5, num_key_value_heads=5, head_dim=16), quantize="int4")
    assert type(model.model.layers[0].self_attn.q_proj.kernel) is Int8Kernel
    assert torch.isfinite(logits(model)).all()


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PACK = """
import mmap
import torch
import transformers
import hf_llama3
from hf_llama3.generation.int8 import Int8Kernel
from hf_llama3.generation.kernels import DenseKernel

def in_huge_pages():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))

weight, kernels = torch.ones(8192, 5120, dtype=torch.bfloat16), []  # more than malloc takes from memory it has
for kernel in (DenseKernel, Int8Kernel):
    before = in_huge_pages()
    kernels.append(kernel(weight).parts[0] if kernel is DenseKernel else kernel(weight).parts[0][0])
    share = (in_huge_pages() - before) / torch.ops.mkldnn._nbytes(kernels[-1])
    print(share, torch.ops.mkldnn.data_ptr(kernels[-1]) % mmap.PAGESIZE)
"""


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(), reason="huge pages are not on request here"
)
@pytest.mark.parametrize("asked", [None, "1", "0"])
def test_huge_pages(asked):
    """Packed weights begin where a page does, in huge pages, unless the environment forbids it."""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"THP_MEM_ALLOC_ENABLE": asked} if asked else {}
    result = subprocess.run([sys.executable, "-c", PACK], env=environment, capture_output=True, text=True, check=False)
    found = [tuple(map(float, line.split())) for line in result.stdout.splitlines()]
    assert len(found) == 2, result.stderr
    for share, offset in found:
        assert (share == 0 and offset) if asked == "0" else (share > 0.8 and not offset)
