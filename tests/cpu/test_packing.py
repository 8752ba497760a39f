"""Packed folders: what `hf-llama3 pack` writes, and that loading it is what `optimize` does, without the work."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import refuse, run
from safetensors.torch import load_file, save_file
from small import CLASSES, logits, make_model, prompts
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_llama3
from hf_llama3.cpu import packing, processor
from hf_llama3.cpu.kernels.exact import ExactKernel
from hf_llama3.cpu.kernels.int8_int4 import Int4Kernel, Int8Kernel
from hf_llama3.cpu.linear import KernelLinear
from hf_llama3.cpu.processor import Processor
from hf_llama3.cpu.quantizer import PackedConfig
from hf_llama3.distributed.parallel import Group
from hf_llama3.errors import UserError
from hf_llama3.text.loading import load_model
from hf_llama3.training.tokenizer import character_tokenizer

QUANTIZE = [None, "int8", "int4"]
TEXT = "".join(map(chr, range(32, 32 + 500)))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request, tmp_path_factory):
    """A plain folder of a model in bfloat16 that has a tokenizer."""
    folder = tmp_path_factory.mktemp("packing") / "plain"
    make_model(dtype=torch.bfloat16, tie_word_embeddings=request.param).save_pretrained(folder)
    for name, content in character_tokenizer([TEXT], 512).files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module", params=QUANTIZE)
def packed(request, source):
    """The quantisation, and a folder of it."""
    target = source.with_name(str(request.param))
    run("pack", source, target, *(["--quantize", request.param] if request.param else []))
    return request.param, target


tied_only = pytest.mark.parametrize("source", [True], ids=["tied"], indirect=True)
int8_only = pytest.mark.parametrize("packed", ["int8"], indirect=True)


def load(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **how)


def test_it_is_what_optimize_makes(source, packed):
    quantize, folder = packed
    made, loaded = hf_llama3.optimize(load(source), quantize=quantize), load(folder)
    assert torch.equal(logits(loaded), logits(made))
    assert torch.equal(loaded.generate(prompts(), max_new_tokens=10), made.generate(prompts(), max_new_tokens=10))
    kernels = [[type(m.kernel) for m in model.modules() if type(m) is KernelLinear] for model in (made, loaded)]
    assert kernels[0] == kernels[1] and len(kernels[1]) == 15
    assert {None: ExactKernel, "int8": Int8Kernel, "int4": Int4Kernel}[quantize] in kernels[1]
    assert loaded.optimization.quantize == quantize and not loaded.training
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in made.named_parameters()]
    assert loaded.num_parameters() == made.num_parameters() and not list(loaded.buffers(recurse=False))
    with pytest.raises(UserError, match="an optimised model cannot be trained"):
        loaded.train()


def test_exact_weights_can_be_had_back(source, packed, tmp_path):
    quantize, folder = packed
    model, plain = load(folder), load(source)
    if quantize:
        with pytest.raises(UserError, match=f"quantised to {quantize} has no plain weights to save; copy {folder}"):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    restored = hf_llama3.restore(model)
    for other in (restored, load(tmp_path / "saved")):
        expected, found = plain.state_dict(), other.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(parameter.requires_grad for parameter in restored.parameters())
    restored.train()(input_ids=prompts(), labels=prompts()).loss.backward()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what lies in files")
def test_weights_stay_in_the_file(packed):
    """What a kernel reads are pages of the file."""
    _, folder = packed
    model = load(folder)
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(folder / "model.safetensors")):
            ranges.append([int(address, 16) for address in line.split()[0].split("-")])
    for module in (module for module in model.modules() if type(module) is KernelLinear):
        addresses = [tensor.data_ptr() for tensor in module.kernel.stored.values()]
        assert all(any(start <= address < end for start, end in ranges) for address in addresses)


def test_an_exact_folder_is_as_large_as_the_plain_one(source, tmp_path):
    """A head that shares the embedding is not written beside it."""
    report = packing.pack_model(source, tmp_path / "packed")
    assert report.bytes < (source / "model.safetensors").stat().st_size + 40 * packing.PAGE


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_several_files(quantize, source, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "DEFAULT_SHARD_SIZE", "100KB")
    report = packing.pack_model(source, tmp_path / "packed", quantize)
    files = sorted((tmp_path / "packed").glob("model-*.safetensors"))
    assert len(files) > 2 and report.bytes == sum(path.stat().st_size for path in files)
    assert report.files == {path.name: path.stat().st_size for path in (tmp_path / "packed").iterdir()}
    assert torch.equal(logits(load(tmp_path / "packed")), logits(hf_llama3.optimize(load(source), quantize=quantize)))


def test_from_metas_format(source, packed, tmp_path):
    """The same bytes, whichever format the weights come from."""
    quantize, folder = packed
    run("convert", source, tmp_path / "meta", "--no-verify")
    packing.pack_model(tmp_path / "meta", tmp_path / "packed", quantize)
    one = (tmp_path / "packed" / "model.safetensors").read_bytes()
    assert one == (folder / "model.safetensors").read_bytes()


def test_float32_is_quantised(tmp_path):
    make_model().save_pretrained(tmp_path / "plain")
    packing.pack_model(tmp_path / "plain", tmp_path / "packed", "int8")
    made = hf_llama3.optimize(load(tmp_path / "plain"), quantize="int8")
    assert torch.equal(logits(load(tmp_path / "packed")), logits(made))


def test_other_classes(source, packed):
    """The model without a head, and one with a head that the folder does not hold."""
    quantize, folder = packed
    plain = hf_llama3.optimize(AutoModel.from_pretrained(source, dtype="auto"), quantize=quantize)
    loaded = AutoModel.from_pretrained(folder, dtype="auto")
    ids = prompts()
    assert torch.equal(loaded(ids).last_hidden_state, plain(ids).last_hidden_state)
    upstream, _ = CLASSES["upstream"]
    assert torch.equal(logits(upstream.from_pretrained(folder, dtype="auto")), logits(load(folder)))
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", num_labels=64)
    assert classifier(ids).logits.shape == (2, 64)


@tied_only
def test_command_line(source, packed):
    quantize, folder = packed
    how = ["--quantize", quantize] if quantize else ["--optimize"]
    expected = run("generate", source, "abc", "--max-new-tokens", 20, *how).stdout
    assert run("generate", folder, "abc", "--max-new-tokens", 20).stdout == expected
    assert run("generate", folder, "abc", "--max-new-tokens", 20, *how).stdout == expected
    text = source.with_name("text.txt")
    text.write_text("abcdefgh" * 20)
    report = json.loads(run("evaluate", folder, "--text", text, "--json").stdout)
    assert report["quantize"] == quantize
    assert json.loads(run("bench", folder, "--new-tokens", 2, "--json").stdout)


@tied_only
def test_report(source, tmp_path):
    report = json.loads(run("pack", source, tmp_path / "packed", "--quantize", "int4", "--json").stdout)
    assert report["weights"] == "int4" and report["target"] == str(tmp_path / "packed")
    assert report["files"].keys() == {path.name for path in (tmp_path / "packed").iterdir()}
    table = run("pack", source, tmp_path / "packed", "--overwrite").stdout
    assert "weights" in table and "Wrote:\n" in table and "  tokenizer_config.json " in table
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["weights"] == "bfloat16"


@tied_only
def test_refused(source, packed, tmp_path):
    quantize, folder = packed
    other = "int4" if quantize == "int8" else "int8"
    make_model().save_pretrained(tmp_path / "float32")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    for arguments, message in (
        (["pack", source, folder], "already exists; choose another target or add --overwrite"),
        (["pack", source, tmp_path / "taken", "--overwrite"], "is no checkpoint, so it is not overwritten"),
        (["pack", source, source / "inside"], "must be apart"),
        (["pack", source, tmp_path / "x", "--quantize", "fp8"], "--quantize must be one of .*, got 'fp8'"),
        (["pack", tmp_path / "float32", tmp_path / "x"], "must be bfloat16, got float32; convert --dtype, or add"),
        (["pack", folder, tmp_path / "x"], "describes packed weights .*; take the original ones"),
        (["convert", folder, tmp_path / "x"], "describes packed weights"),
        (["inspect", folder], "describes packed weights"),
        (["generate", folder, "abc", "--rope-factor", 8], "--rope-factor is for Meta's format"),
        (["card", folder, "--license", "mit"], "describes packed weights"),
    ):
        assert re.search(message, refuse(*arguments)), arguments
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["file"] and not (tmp_path / "x").exists()
    if quantize:
        assert f"quantised to {quantize} cannot become {other}" in refuse("generate", folder, "a", "--quantize", other)
    else:
        assert "packed weights are bfloat16, got dtype float32" in refuse("generate", folder, "a", "--dtype", "float32")
    for device_map in ("meta", {"": "meta"}):
        with pytest.raises(UserError, match=r"a packed folder is for a CPU, got device_map \['meta'\]"):
            load(folder, device_map=device_map)
    load(folder, device_map="cpu")
    with pytest.raises(UserError, match="--parallel tensor divides plain weights; name the plain folder"):
        load_model(str(folder), group=Group("tensor"))
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=PackedConfig("int8"))


def damage(folder, target, change):
    """Copy a packed folder with its tensors, by name, changed."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


@tied_only
@pytest.mark.parametrize("what", ["missing", "shape", "type"])
def test_damaged(what, packed, tmp_path):
    quantize, folder = packed
    if quantize is None:
        return  # weights that are exact are those of a plain folder
    name = f"model.layers.1.mlp.up_proj.weight_{quantize}"

    def change(tensors):
        if what == "missing":
            del tensors[name.removesuffix(quantize) + "scale" + ("_and_minimum" if quantize == "int4" else "")]
        elif what == "shape":
            tensors[name] = tensors[name][:, :-32].contiguous()
        else:
            tensors[name] = tensors[name].to(torch.float32)

    damage(folder, tmp_path / "damaged", change)
    message = refuse("generate", tmp_path / "damaged", "abc")
    assert re.search(r"model.layers.1.mlp.up_proj.weight_\S+ of a packed folder must be .*; pack it again", message)
    assert ("got None" in message) == (what == "missing")


def test_order_in_the_file_does_not_matter(source, packed, tmp_path):
    """As `safetensors` itself writes a file, where a weight begins anywhere."""
    _, folder = packed
    damage(folder, tmp_path / "other", lambda tensors: None)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()
    assert torch.equal(logits(load(tmp_path / "other")), logits(load(folder)))


@tied_only
@int8_only
def test_where_the_package_is_unknown(packed):
    """Loading ends with an error; a model of random weights would be worse."""
    _, folder = packed
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "model type `llama3`" in result.stderr


@tied_only
def test_an_interrupted_run_leaves_nothing_that_loads(source, tmp_path, monkeypatch):
    target = tmp_path / "packed"
    with monkeypatch.context() as patch:
        patch.setattr(packing, "DEFAULT_SHARD_SIZE", "100KB")
        patch.setattr(packing, "small_files", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            packing.pack_model(source, target)
    assert not target.exists()
    refuse("generate", tmp_path / "packed.partial", "abc")
    packing.pack_model(source, target, "int8")
    assert torch.equal(logits(load(target)), logits(hf_llama3.optimize(load(source), quantize="int8")))
    assert [path.name for path in tmp_path.iterdir()] == ["packed"] and not list(target.glob("model-*"))


@tied_only
@int8_only
def test_processor_without_a_kernel(packed, monkeypatch):
    _, folder = packed
    monkeypatch.setattr(processor, "here", lambda: Processor("Old Chip", ()))
    with pytest.raises(UserError, match="packed weights need a processor with AVX2 and FMA, or NEON, got Old Chip"):
        load(folder)


@tied_only
def test_folders_of_the_first_format(packed, tmp_path):
    """Their weights lay as one kind of processor reads them; the folder's configuration says nothing of a format."""
    _, folder = packed
    shutil.copytree(folder, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["format"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    message = "packed folders must have format 2, got 1; run hf-llama3 pack again"
    assert message in refuse("generate", tmp_path / "old", "abc")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "old")
