"""A conversion runs in a constant amount of memory: under a limit, set by the system, that no model fits in."""

import resource
import subprocess
import sys

import pytest
from test_layouts import sparse_checkpoint

from hf_llama3.conversion.convert import MEMORY_BYTES

MODEL_BYTES = 1_500_000_000
SHAPE = {"num_hidden_layers": 3, "vocab_size": 16384}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three layers in the width of Llama 3 8B."""
    return sparse_checkpoint(tmp_path_factory.mktemp("memory") / "meta", "3-8B", 1, kv_heads=8, **SHAPE)


def limited(*command, limit=MEMORY_BYTES):
    """Run Python with no more private memory than a plan says."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )


def convert(*options):
    result = limited("-m", "hf_llama3", "convert", *options)
    assert result.returncode == 0, result.stderr


LONG = [["--to", "meta", "--mp", "8"], ["--dtype", "float16", "--no-verify"]]


@pytest.mark.parametrize(
    "options", [["--to", "hf"], *(pytest.param(one, marks=pytest.mark.long) for one in LONG)], ids=" ".join
)
def test_memory_is_bounded(options, source, tmp_path):
    assert sum(path.stat().st_size for path in source.glob("*.pth")) > MODEL_BYTES > 2 * MEMORY_BYTES
    convert(source, tmp_path / "target", *options)
    if "hf" in options:
        convert(tmp_path / "target", tmp_path / "back", "--to", "meta", "--no-verify")


@pytest.mark.long
def test_memory_of_distributed_checkpoints_is_bounded(source, tmp_path):
    result = limited("-m", "hf_llama3", "convert", source, tmp_path / "dcp", "--to", "dcp", limit=2 * MEMORY_BYTES)
    assert result.returncode == 0, result.stderr
    convert(tmp_path / "dcp", tmp_path / "hf", "--no-verify")


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
def test_memory_of_gguf_is_bounded(dtype, source, tmp_path):
    """Both ways. Decoded blocks are four times as large and take the most time: one layer of them is enough."""
    if dtype == "q8_0":
        source = sparse_checkpoint(tmp_path / "meta", "3-8B", 1, kv_heads=8, **SHAPE | {"num_hidden_layers": 1})
    convert(source, tmp_path / "model.gguf", "--dtype", dtype, "--no-verify")
    convert(tmp_path / "model.gguf", tmp_path / "hf", "--no-verify")
    assert sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors")) > 2 * MEMORY_BYTES


LOAD = """
import sys, hf_llama3
options = {"device_map": "auto", "max_memory": {"cpu": sys.argv[2]}, "offload_folder": sys.argv[3]}
model = hf_llama3.load_meta(sys.argv[1], **options)
assert set(model.hf_device_map.values()) == {"cpu", "disk"}
"""


@pytest.mark.long
def test_memory_of_a_load_with_offload_is_bounded(source, tmp_path):
    """What goes to disk is never in memory together; the control is a load that needs no disk."""
    result = limited("-c", LOAD, source, "1100MB", tmp_path, limit=MODEL_BYTES)
    assert result.returncode == 0, result.stderr
    assert "allocate" in limited("-c", LOAD, source, "9GB", tmp_path, limit=MODEL_BYTES).stderr


def test_the_limit_holds():
    """The control: as much memory as the model has bytes cannot be had."""
    assert "MemoryError" in limited("-c", f"bytearray({MODEL_BYTES})").stderr


@pytest.mark.long
def test_memory_of_packing_is_bounded(source, tmp_path):
    """With torch and transformers loaded, which take half of this, one weight of 130 MB at a time, in two orders."""
    result = limited("-m", "hf_llama3", "pack", source, tmp_path / "target", limit=1_000_000_000)
    assert result.returncode == 0, result.stderr
