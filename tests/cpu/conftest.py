"""Tests that take `on` run on this processor, and again as on the narrower ones that it can stand for."""

import pytest

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


@pytest.fixture(params=PROCESSORS)
def on(request, monkeypatch):
    monkeypatch.setattr(processor, "here", lambda: PROCESSORS[request.param])
