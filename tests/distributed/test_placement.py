"""Layers over devices: accelerate's recipe word for word, the library's, and ours; tokens as on one device."""

import json
import re

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from checkpoints import params, small_tokenizer, write_meta
from command_line import call, refuse
from small import CLASSES, make_model
from transformers import AutoModelForCausalLM

import hf_llama3
from hf_llama3.conversion import convert
from hf_llama3.conversion import inspect as inspect_checkpoint
from hf_llama3.distributed.parallel import device_type

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A directory of Meta's in two shards, of Code Llama's geometry, and the folder converted from it."""
    root = tmp_path_factory.mktemp("models")
    shape = params(vocab=516, layers=6, heads=8, kv_heads=8, rope_theta=1e6)
    write_meta(root / "meta", shape, mp=2, tokenizer=small_tokenizer(root))
    convert(root / "meta", root / "hf")
    return root


def half(model) -> dict:
    return {"cpu": sum(parameter.nbytes for parameter in model.parameters()) // 2}


def tokens(model):
    prompt = torch.randint(3, 512, (2, 9), generator=torch.Generator().manual_seed(1))
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)


def check_whole_layers(device_map):
    """Every entry is a whole layer, or something that is not in one."""
    assert set(device_map.values()) == {"cpu", "disk"}
    assert all(re.fullmatch(r"model\.layers\.\d+", name) for name in device_map if ".layers." in name)


def test_infer_auto_device_map_and_dispatch_model(folders, tmp_path):
    """The recipe by which Code Llama's layers are spread over cards with accelerate."""
    model = AutoModelForCausalLM.from_pretrained(folders / "hf", dtype=torch.bfloat16)
    expected = tokens(model)
    device_map = infer_auto_device_map(
        model, max_memory=half(model), no_split_module_classes=model._no_split_modules, dtype=torch.bfloat16
    )
    check_whole_layers(device_map)
    model = dispatch_model(model, device_map=device_map, offload_dir=str(tmp_path / "offload"))
    assert all(parameter.is_meta for parameter in model.model.layers[-1].parameters())
    assert torch.equal(tokens(model), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_device_map_auto(kind, tied, tmp_path):
    plain = make_model(kind, num_hidden_layers=6, tie_word_embeddings=tied)
    plain.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory=half(plain), offload_folder=tmp_path / "offload"
    )
    check_whole_layers(model.hf_device_map)
    assert torch.equal(tokens(model), tokens(plain))


def test_load_meta_over_devices(folders, tmp_path):
    """Meta's files have no tensors that could be read where they are: the offloaded ones are written anew each time."""
    plain = hf_llama3.load_meta(folders / "meta")
    for seed in (0, 1):
        if seed:  # other weights, the same folder for what is offloaded
            write_meta(tmp_path / "other", params(vocab=516, layers=6, heads=8, kv_heads=8), mp=2, seed=seed)
            plain = hf_llama3.load_meta(tmp_path / "other")
        source = tmp_path / "other" if seed else folders / "meta"
        model = hf_llama3.load_meta(
            source, device_map="auto", max_memory=half(plain), offload_folder=tmp_path / "offload"
        )
        check_whole_layers(model.hf_device_map)
        assert torch.equal(tokens(model), tokens(plain))


def small_memory(folder, share):
    size = inspect_checkpoint(folder).bytes
    return json.dumps({"cpu": int(size * share)})


@pytest.mark.parametrize("share", [0.6, 0.16])  # of the weights; with the less all of them are on disk
@pytest.mark.parametrize("form", ["hf", "meta"])
def test_generate_over_devices(form, share, folders, tmp_path):
    """The same text, a plan that the command shows before, and nothing left in the folder for what is offloaded."""
    model, memory = folders / form, small_memory(folders / form, share)
    arguments = ["generate", model, "abc abc", "--max-new-tokens", 5, "--json"]
    code, plain, _ = call(*arguments)
    offload = tmp_path / "offload"
    options = ["--device-map", "auto", "--max-memory", memory, "--offload-folder", offload]
    assert code == 0 and call(*arguments, *options)[:2] == (0, plain)
    assert list(offload.iterdir()) == []


def test_inspect_shows_the_plan(folders, tmp_path):
    """What `inspect` plans is what loading does; the bytes are those of the weights."""
    path, memory = folders / "hf", small_memory(folders / "hf", 0.6)
    options = ["--device-map", "sequential", "--max-memory", memory]
    placement = json.loads(call("inspect", path, *options, "--json")[1])["placement"]
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", device_map="sequential", max_memory=json.loads(memory), offload_folder=tmp_path
    )
    assert placement["device_map"] == model.hf_device_map
    assert sum(placement["device_bytes"].values()) == inspect_checkpoint(path).bytes
    assert placement["max_memory"] == json.loads(memory)
    check_whole_layers(placement["device_map"])

    _, out, _ = call("inspect", path, *options, "--plot", tmp_path / "plan.png")
    assert re.search(r"model\.layers\.\d to 5 +[\d,]+ bytes on disk", out)
    assert re.search(r"cpu together +[\d,]+ bytes of [\d,]+", out)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_plan_for_another_machine(folders):
    """GPUs that are not here can be planned for, and not be loaded on."""
    memory = json.dumps({"0": "60KiB", "1": "400KiB", "cpu": "1GiB"})
    options = ["--device-map", "sequential", "--max-memory", memory]
    placement = json.loads(call("inspect", folders / "hf", *options, "--json")[1])["placement"]
    assert set(placement["device_bytes"]) >= {"gpu 1", "cpu"}
    if torch.cuda.device_count() < 2:
        assert "this machine has" in refuse("generate", folders / "hf", "a", *options)


def test_too_little_memory_is_said(folders, tmp_path):
    """With the numbers, and before anything is loaded."""
    path, size = folders / "hf", inspect_checkpoint(folders / "hf").bytes
    generate = ["generate", path, "a", "--device-map", "auto"]
    sentence = refuse(*generate, "--max-memory", '{"cpu": "100KiB"}')
    assert f"the model needs {size} bytes, but may take 102400 on cpu" in sentence and "--offload-folder" in sentence
    sentence = refuse(*generate, "--max-memory", '{"cpu": 1000}', "--offload-folder", tmp_path)
    assert re.search(r"a decoder layer needs \d+ bytes, but the model may take 1000 on cpu", sentence)


def test_the_type_that_is_loaded_is_planned(tmp_path):
    """Weights of two bytes, by the folder's configuration loaded as four."""
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}))
    placement = json.loads(call("inspect", tmp_path, "--device-map", "auto", "--json")[1])["placement"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert sum(placement["device_bytes"].values()) == sum(parameter.nbytes for parameter in model.parameters())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"first": "good"}}))
    assert "config.json cannot be loaded (ValueError" in refuse("inspect", tmp_path, "--device-map", "auto")


def test_options_are_checked(folders, tmp_path):
    path = folders / "hf"
    generate = ["generate", path, "a"]
    assert "--device-map must be one of" in refuse(*generate, "--device-map", "best")
    for wrong in ("2GiB", '{"cpu": "infGiB"}', '{"cpu": "much"}', '{"disk": "1GiB"}', "{}", '["cpu"]', '{"cpu": null}'):
        assert "--max-memory must be sizes by device" in refuse(
            *generate, "--device-map", "auto", "--max-memory", wrong
        )
    assert "add --device-map auto" in refuse(*generate, "--max-memory", '{"cpu": "1GiB"}')
    assert "add --device-map auto" in refuse("inspect", path, "--max-memory", '{"cpu": "1GiB"}')
    plot = ["inspect", path, "--device-map", "auto", "--plot"]
    assert "--plot must end in one of" in refuse(*plot, tmp_path / "a.xyz")
    assert "could not be written" in refuse(*plot, tmp_path / "none" / "a.png")
    gaps = ["--device-map", "balanced_low_0", "--max-memory", '{"1": "1GiB", "cpu": "1GiB"}']
    assert "--max-memory must number GPUs from 0, got [1]" in refuse("inspect", path, *gaps)
    (tmp_path / "file").touch()
    sentence = refuse(*generate, "--device-map", "auto", "--offload-folder", tmp_path / "file")
    assert "could not be written" in sentence and "choose another --offload-folder" in sentence


def test_a_build_for_cuda_without_a_gpu(monkeypatch):
    """torch's build for CUDA, which pip brings to any Linux, names a GPU on a machine that has none."""

    def named(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", named)
    assert device_type() == "cpu"
