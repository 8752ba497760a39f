"""This processor, and the narrower ones that it can stand for: code for them runs here as it would there."""

from hf_llama3.cpu import processor
from hf_llama3.cpu.processor import Processor

HERE = processor.here()
NARROWER = {
    "AVX2": ("avx2", "fma3"),
    "AVX-512": ("avx2", "fma3", "avx512_f"),
    "AVX-512, bfloat16": ("avx2", "fma3", "avx512_f", "avx512_vnni", "avx512_bf16"),
}
PROCESSORS = {"this one": HERE} | {
    name: Processor(name, has, is_held=True) for name, has in NARROWER.items() if set(has) < set(HERE.instructions)
}
