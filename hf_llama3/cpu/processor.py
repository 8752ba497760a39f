"""What this processor can do. All code that depends on it asks here; tests replace the answer."""

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

# Instruction sets that decide how fast matrices are multiplied, as `torch.cpu.get_capabilities` calls them
AVX512 = ("avx512_f", "avx512_vnni", "avx512_bf16")
AMX = ("amx_bf16", "amx_int8")
X86 = ("avx2", "fma3", "avx_vnni", "avx_ne_convert", *AVX512, *AMX)
ARM = ("neon", "bf16", "i8mm", "sve")

# oneDNN's limit -> the sets that it still allows (oneDNN, "CPU Dispatcher Control")
WITHIN_LIMIT = {
    "SSE41": (),
    "AVX": (),
    "AVX2": ("avx2", "fma3"),
    "AVX2_VNNI": ("avx2", "fma3", "avx_vnni"),
    "AVX2_VNNI_2": ("avx2", "fma3", "avx_vnni", "avx_ne_convert"),
    "AVX512_CORE": ("avx2", "fma3", "avx512_f"),
    "AVX512_CORE_VNNI": ("avx2", "fma3", "avx512_f", "avx512_vnni"),
    "AVX512_CORE_BF16": ("avx2", "fma3", *AVX512),
    "AVX512_CORE_FP16": ("avx2", "fma3", *AVX512),
}


@dataclass(frozen=True)
class Processor:
    """A processor, and which of its instructions torch and oneDNN may use."""

    name: str
    instructions: tuple[str, ...]
    is_held: bool = False  # to fewer instructions than it has, by environment variables

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether there are instructions for bfloat16 products; without them torch is slower than with float32."""
        return any(name in self.instructions for name in ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"))

    @property
    def multiplies_pairs(self) -> bool:
        """Whether an instruction adds the products of pairs of bfloat16 (AVX512_BF16)."""
        return "avx512_bf16" in self.instructions

    @property
    def has_kernels(self) -> bool:
        """Whether our kernels serve it: they need fused multiply-add and an instruction that widens float16."""
        return {"avx2", "fma3"} <= set(self.instructions) or "neon" in self.instructions

    @property
    def lanes(self) -> int:
        """float32 numbers in a vector of the kernels; on Arm it is two of its short vectors."""
        return 16 if "avx512_f" in self.instructions else 8

    @property
    def registers(self) -> int:
        """Vectors of `lanes` that fit into registers."""
        return 32 if "avx512_f" in self.instructions else 16

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.instructions) or 'no vector instructions known'})"


@functools.cache
def here() -> Processor:
    """Return this machine's processor, within the limits of `ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA`."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
    else:  # an older torch
        known = {"AVX2": ("avx2", "fma3"), "AVX512": ("avx2", "fma3", "avx512_f")}
        found = dict.fromkeys(known.get(capability, ()), True)
    found = has = [name for name in (*X86, *ARM) if found.get(name)]
    if capability in ("AVX2", "DEFAULT"):
        found = [name for name in found if name not in (*AVX512, *AMX)]
    allowed = WITHIN_LIMIT.get(os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper())
    if allowed is not None:
        found = [name for name in found if name in allowed or name in ARM]
    return Processor(name_here(), tuple(found), is_held=found != has)


def name_here() -> str:
    """Return the processor's name as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "unknown processor"


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """Return the number of threads that torch computes with now."""
    import torch

    return torch.get_num_threads()
