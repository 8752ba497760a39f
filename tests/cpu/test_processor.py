"""What is said of the processor, within the limits that the environment sets; and that nobody else asks about it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch

from hf_llama3.cpu.processor import ARM, X86, Processor, cores, here, threads

ROOT = Path(__file__).parent.parent.parent
ROOMS = ("hf_llama3", "conversion", "model_card")
ASKS = {"hf_llama3/cpu/processor.py"}
QUESTIONS = {
    *("torch.backends.cpu", "torch.backends.mkldnn", "torch.cpu", "torch.get_num_threads"),
    *("os.cpu_count", "os.process_cpu_count", "os.sched_getaffinity", "multiprocessing.cpu_count"),
    *("platform.processor", "platform.machine"),
}
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")

# A processor that has all sets, so that each limit shows on any machine
LOOK = """
import torch
from hf_llama3.cpu import processor
torch.cpu.get_capabilities = lambda: dict.fromkeys((*processor.X86, *processor.ARM), True)
if {all_of_torch}:
    torch.backends.cpu.get_cpu_capability = lambda: "AVX512"
print(*processor.here().instructions)
"""


def instructions_under(**limits):
    """Return what a new process sees."""
    environment = {name: value for name, value in os.environ.items() if name not in LIMITS} | limits
    command = [sys.executable, "-c", LOOK.format(all_of_torch=False)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return set(printed.split())


AVX2 = {"avx2", "fma3"}
VNNI = AVX2 | {"avx512_f", "avx512_vnni"}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("SSE41", set()),
        ("AVX", set()),
        ("AVX2", AVX2),
        ("avx2", AVX2),
        ("AVX2_VNNI", AVX2 | {"avx_vnni"}),
        ("AVX2_VNNI_2", AVX2 | {"avx_vnni", "avx_ne_convert"}),
        ("AVX512_CORE", AVX2 | {"avx512_f"}),
        ("AVX512_CORE_VNNI", VNNI),
        ("AVX512_CORE_BF16", VNNI | {"avx512_bf16"}),
        ("AVX512_CORE_FP16", VNNI | {"avx512_bf16"}),
        ("AVX512_CORE_AMX", set(X86)),
        ("DEFAULT", set(X86)),
    ],
)
def test_limit_of_onednn(limit, expected):
    """Of an ATen that is built for AVX-512 and not held to less."""
    seen = forked.python("-c", LOOK.format(all_of_torch=True), ONEDNN_MAX_CPU_ISA=limit)
    assert set(seen.stdout.split()) == expected | set(ARM), seen.stderr


@pytest.mark.parametrize("limit", ["avx2", "default"])
def test_limit_of_aten(limit):
    """It is torch that reads this one, when it is imported; both limits together are the stricter."""
    seen = instructions_under(ATEN_CPU_CAPABILITY=limit)
    assert seen == AVX2 | {"avx_vnni", "avx_ne_convert"} | set(ARM)
    both = instructions_under(ATEN_CPU_CAPABILITY=limit, ONEDNN_MAX_CPU_ISA="AVX2")
    assert both == AVX2 | set(ARM)


def test_this_one():
    assert here() is here() and here().name and set(here().instructions) <= {*X86, *ARM}
    assert str(here()).startswith(here().name) and 1 <= cores() <= os.cpu_count()
    assert threads() == torch.get_num_threads()


@pytest.mark.parametrize(
    ("instructions", "bfloat16", "pairs", "kernels", "lanes"),
    [
        (("avx2", "fma3", "avx_vnni"), False, False, True, 8),
        (("avx2", "fma3", "avx_ne_convert"), True, False, True, 8),
        (("avx2", "fma3", "avx512_f", "avx512_vnni"), False, False, True, 16),
        (("avx2", "fma3", "avx512_f", "avx512_bf16"), True, True, True, 16),
        (("avx2", "fma3", "avx512_f", "amx_bf16"), True, False, True, 16),
        (("avx2",), False, False, False, 8),
        (("neon",), False, False, True, 8),
        (("neon", "bf16"), True, False, True, 8),
        ((), False, False, False, 8),
    ],
)
def test_what_follows_from_instructions(instructions, bfloat16, pairs, kernels, lanes):
    found = Processor("a processor", instructions)
    assert (found.multiplies_bfloat16, found.multiplies_pairs) == (bfloat16, pairs)
    assert (found.has_kernels, found.lanes) == (kernels, lanes)
    assert str(found) == f"a processor ({', '.join(instructions) or 'no vector instructions known'})"


def questions_in(source):
    """Return what a module asks about the processor, however it imports it."""
    asked = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            asked.add(ast.unparse(node))
        elif isinstance(node, ast.Import):
            asked |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            asked |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return asked & QUESTIONS


def test_only_one_module_asks():
    paths = [path for room in ROOMS for path in sorted((ROOT / room).glob("**/*.py"))]
    asking = {path.relative_to(ROOT).as_posix(): questions_in(path.read_text("utf-8")) for path in paths}
    assert {path for path, questions in asking.items() if questions} == ASKS


@pytest.mark.parametrize(
    "source",
    [
        "x = torch.backends.mkldnn.is_available()",
        "import torch.backends.cpu",
        "from torch.backends import mkldnn",
        "from torch.backends.cpu import get_cpu_capability",
        "def f():\n    from os import cpu_count\n",
        "threads = [torch.get_num_threads() for _ in x]",
    ],
)
def test_each_way_to_ask_is_seen(source):
    assert questions_in(source)


def test_other_questions_are_free():
    source = (
        "from .cpu import processor\nimport os, platform\nplatform.python_version(), torch.backends.mps.is_available()"
    )
    assert not questions_in(source)
