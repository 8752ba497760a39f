"""`optimize(compile=True)`: the tokens of the plain model, compiled once."""

import subprocess
import sys
from unittest import mock

import pytest
import torch
from small import make_model, prompts
from torch._dynamo.utils import counters
from torchrun import ENVIRONMENT
from transformers import DynamicCache, GenerationConfig, StaticCache

import hf_llama3
from hf_llama3.cpu import compiled as compiled_module
from hf_llama3.cpu.compiled import CPU_ROWS, is_worth_it, prepare_static_cache
from hf_llama3.cpu.packing import pack_model

SHAPES = [(1, 7), (2, 9), (1, 30), (4, 50), (3, 300)]


@pytest.fixture(scope="module", autouse=True)
def several_rows():
    """Compile for several rows as well, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_module, "CPU_ROWS", 4)
        yield


@pytest.fixture(scope="module")
def compiled():
    torch._dynamo.reset()
    counters.clear()  # other tests compile too
    return hf_llama3.optimize(make_model(), compile=True)


def test_tokens_without_compiling_again(compiled):
    """One row and several were compiled by `optimize`; lengths, caches and numbers of rows are symbols."""
    plain, graphs = make_model(), counters["stats"]["unique_graphs"]
    assert graphs == 2
    for rows, length in SHAPES:
        how = {"input_ids": prompts(rows, length), "max_new_tokens": 12, "do_sample": False}
        with torch._dynamo.config.patch(error_on_recompile=True):
            ours = compiled.generate(**how)
        assert torch.equal(ours, plain.generate(**how)), (rows, length)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(
    ("mode", "how"),
    [(torch.inference_mode, {}), (torch.no_grad, {"prefill_chunk_size": 8})],
    ids=["inference", "chunks"],
)
def test_other_callers_compile_nothing_again(mode, how, compiled):
    """Callers in inference mode, of prompts made there, and a prompt read in chunks: 8 tokens, 8 and 5."""
    plain = make_model()
    for rows in (1, 2):
        with mode(), torch._dynamo.config.patch(error_on_recompile=True):
            ours = compiled.generate(prompts(rows, 21), max_new_tokens=12, do_sample=False, **how)
        assert torch.equal(ours, plain.generate(prompts(rows, 21), max_new_tokens=12, do_sample=False))
    assert counters["stats"]["unique_graphs"] == 2


@torch.inference_mode()
def test_cache_of_inference_mode(compiled):
    """A caller's own, filled in that mode, in which alone it may be written to."""
    ids, plain = prompts(1, 9), make_model()
    cache = StaticCache(config=compiled.config, max_cache_len=32)
    compiled(ids[:, :5], past_key_values=cache, use_cache=True)
    ours = compiled.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=6, do_sample=False))


def test_the_step_is_compiled(compiled):
    """All but the prompt's pass goes through the operator that compiled code calls."""
    with torch.profiler.profile() as profile:
        compiled.generate(prompts(), max_new_tokens=12, do_sample=False)
    assert sum(event.name == "hf_llama3::kernel_linear" for event in profile.events()) == 11 * 15


@pytest.mark.parametrize(
    ("rows", "how", "is_compiled"),
    [
        (1, {"max_new_tokens": 12}, True),
        (1, {"max_length": 512}, True),
        (1, {"max_new_tokens": 504}, False),
        (1, {"max_length": 513}, False),
        (2, {"max_new_tokens": 12}, False),
        (1, {"max_new_tokens": 12, "num_return_sequences": 2}, False),
    ],
)
def test_what_is_compiled_on_a_cpu(rows, how, is_compiled, compiled, monkeypatch):
    """One short row, however the prompt is given; for others the step that is not compiled is the faster one."""
    monkeypatch.setattr(compiled_module, "CPU_ROWS", CPU_ROWS)
    prompt = prompts(rows, 9)
    for args, more in (((prompt,), {}), ((), {"input_ids": prompt}), ((), {"inputs": prompt})):
        assert is_worth_it(compiled, how | more, *args) is is_compiled
    with mock.patch.object(type(compiled), "generate") as generate:
        compiled.generate(prompt, **how)
    assert ("compile_config" in generate.call_args.kwargs) is is_compiled


@pytest.mark.parametrize(
    ("how", "is_compiled"),
    [
        ({"use_cache": True, "output_hidden_states": False, "num_beams": 1}, True),
        ({"use_cache": False}, False),
        ({"output_hidden_states": True}, False),
        ({"output_attentions": True}, False),
        ({"num_beams": 2}, False),
        ({"past_key_values": DynamicCache()}, False),
    ],
    ids=str,
)
def test_what_is_compiled(how, is_compiled, compiled):
    with mock.patch.object(type(compiled), "generate") as generate:
        compiled.generate(prompts(), max_new_tokens=4, **how)
    assert ("compile_config" in generate.call_args.kwargs) is is_compiled


def test_a_configuration_counts_wherever_it_stands(compiled):
    """By position or by name; what it leaves open is the model's own, and what it holds is left as it was."""
    beams, plain, calls = GenerationConfig(max_new_tokens=4, num_beams=2), GenerationConfig(max_new_tokens=4), []
    with mock.patch.object(type(compiled), "generate", lambda model, **given: calls.append(given)):
        for config in (beams, plain):
            compiled.generate(prompts(), config)
            compiled.generate(prompts(), generation_config=config)
        compiled.generation_config.num_beams = 2
        try:
            compiled.generate(prompts(), plain)
            compiled.generate(prompts(), max_new_tokens=4)
            compiled.generate(prompts(), plain, num_beams=1)
        finally:
            compiled.generation_config.num_beams = None
    found = [one.get("generation_config", GenerationConfig(**one)).compile_config is not None for one in calls]
    assert found == [False, False, True, True, False, False, True]
    assert plain.compile_config is None and plain.cache_implementation is None


def test_a_configuration_is_followed(compiled, caplog):
    config, ids = GenerationConfig(max_new_tokens=7, do_sample=False), prompts()
    assert torch.equal(compiled.generate(ids, config), make_model().generate(ids, config))
    assert not caplog.records


@pytest.mark.parametrize(
    "how",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": make_model(num_hidden_layers=1)},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"num_beams": 2},
        {"do_sample": True},
        {"output_hidden_states": True},
    ],
    ids=lambda how: next(iter(how)),
)
def test_other_ways_to_generate(how, compiled):
    ids = prompts(1, 6).repeat(1, 3)
    outputs = []
    for model in (compiled, make_model()):
        torch.manual_seed(0)
        outputs.append(model.generate(ids, **{"max_new_tokens": 10, "do_sample": False} | how))
    assert torch.equal(*outputs)


def test_caches_double(compiled):
    sizes = []
    for length in (10, 256, 257, 20):
        cache = prepare_static_cache(
            compiled, "static", batch_size=1, max_cache_len=length, prefill_chunk_size=None, model_kwargs={}
        )
        sizes.append(cache.layers[0].max_cache_len)
    assert sizes == [256, 256, 512, 256]


@pytest.fixture
def one_row(monkeypatch):
    """Compile for one row alone, as on a CPU: each graph takes some seconds."""
    monkeypatch.setattr(compiled_module, "CPU_ROWS", 1)


ONE_ROW = {"input_ids": prompts(1), "max_new_tokens": 12, "do_sample": False}


def test_restored(one_row):
    model = hf_llama3.optimize(make_model(num_hidden_layers=1), compile=True)
    hf_llama3.restore(model)
    assert vars(model).keys() == vars(make_model()).keys() | {"_previous_max_cache_length"}


def test_quantized_to_int4(one_row):
    theirs, ours = make_model(num_hidden_layers=1), make_model(num_hidden_layers=1)
    theirs = hf_llama3.optimize(theirs, quantize="int4").generate(**ONE_ROW)
    assert torch.equal(hf_llama3.optimize(ours, quantize="int4", compile=True).generate(**ONE_ROW), theirs)


def test_a_packed_folder(one_row, tmp_path):
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "plain")
    pack_model(tmp_path / "plain", tmp_path / "packed", "int8")
    ours, theirs = (hf_llama3.Llama3ForCausalLM.from_pretrained(tmp_path / "packed") for _ in range(2))
    hf_llama3.optimize(ours, compile=True)
    assert ours.optimization.quantize == "int8" and ours.optimization.compile
    assert torch.equal(ours.generate(**ONE_ROW), theirs.generate(**ONE_ROW))


def test_upstream(one_row):
    ours, theirs = (make_model("upstream", num_hidden_layers=1) for _ in range(2))
    assert torch.equal(hf_llama3.optimize(ours, compile=True).generate(**ONE_ROW), theirs.generate(**ONE_ROW))


COMPILE = """
import hf_llama3
from small import make_model
from torch._dynamo.utils import counters
hf_llama3.optimize(make_model(num_hidden_layers=1), compile=True)
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.long
def test_another_process_finds_the_code_on_disk(tmp_path):
    """One graph is compiled by the first, for one row, and none by the second."""
    environment = ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for printed in ("1 0", "0 1"):
        result = subprocess.run(
            [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
        )
        assert result.stdout.strip() == printed, result.stderr
