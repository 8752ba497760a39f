"""Checkpoints by their names on the Hub: what is fetched, from where, and what is said when that fails."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import params, small_tokenizer, write_meta
from client import Client
from command_line import run
from safetensors.torch import load_file, save
from server import READER, WRITER

from hf_llama3.conversion import convert, inspect, verify

HF_TEXTS = {"config.json", "generation_config.json", "provenance.json"}
HF_TEXTS |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model in both formats: Hugging Face's in several files, Meta's in two shards."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_meta(folder / "meta", params(vocab=516), mp=2, tokenizer=small_tokenizer(folder))
    convert(folder / "meta", folder / "hf", max_shard_size="200KB", instruct=True, verify=False)
    return folder


@pytest.fixture(scope="module")
def weights(folders):
    names = {path.name for path in (folders / "hf").glob("*.safetensors")}
    assert len(names) == 2
    return names


def files_of(folder, inside=""):
    return {inside + path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def everything(folders):
    """The files of a repository with all that others put beside a model."""
    beside = ("pytorch_model.bin", "model.gguf", "onnx/model.onnx", "onnx/model.safetensors", "onnx/config.json")
    beside += ("consolidated.safetensors", "README.md", "LICENSE", "USE_POLICY.md", "original/README.md")
    return files_of(folders / "hf") | files_of(folders / "meta", "original/") | dict.fromkeys(beside, b"beside")


def test_convert_fetches_what_it_needs_once(client, hub, folders, everything, weights, tmp_path):
    hub.add("lab/convert", everything)
    client.run("convert", "lab/convert", tmp_path / "meta", "--mp", "2")
    fetched = hub.downloads()
    assert fetched.keys() == HF_TEXTS | {INDEX} | weights
    assert all(size == len(everything[name]) for name, size in fetched.items())
    assert verify(folders / "hf", tmp_path / "meta").ok
    hub.clear()
    client.run("convert", "lab/convert", tmp_path / "again")
    assert hub.downloads() == {} and hub.log


@pytest.mark.parametrize("source", ["lab/both/original", "lab/original-only", "lab/meta-at-root"])
def test_metas_files_alone(source, client, hub, folders, everything, tmp_path):
    inside = "" if source == "lab/meta-at-root" else "original/"
    files = everything if source == "lab/both/original" else files_of(folders / "meta", inside) | {"README.md": b""}
    hub.add(source.removesuffix("/original"), files)
    client.run("convert", source, tmp_path / "hf", "--max-shard-size", "200KB", "--no-verify")
    expected = {inside + name for name in files_of(folders / "meta")}
    assert hub.downloads() == {name: len(files[name]) for name in expected}
    for name in files_of(folders / "hf"):
        if name.startswith("model"):
            assert (tmp_path / "hf" / name).read_bytes() == (folders / "hf" / name).read_bytes()


def test_revision(client, hub, folders, tmp_path):
    hub.add("lab/revisions", {"README.md": b"nothing on the main branch"})
    commit = hub.add("lab/revisions", files_of(folders / "hf"), revision="refs/pr/1")
    for revision in ("refs/pr/1", commit):
        info = json.loads(client.run("inspect", f"lab/revisions@{revision}", "--json").stdout)
        assert info["path"] == f"lab/revisions@{revision}" and info["num_parameters"] > 100_000
    hub.add("lab/revisions", files_of(folders / "meta", "original/"), revision="meta")
    info = json.loads(client.run("inspect", "lab/revisions/original@meta", "--json").stdout)
    assert info["format"] == "meta" and info["num_shards"] == 2


def test_inspect_fetches_headers(client, hub, folders, everything, weights):
    hub.add("lab/inspect", everything)
    info = json.loads(client.run("inspect", "lab/inspect", "--json").stdout)
    assert info == inspect(folders / "hf").to_dict() | {"path": "lab/inspect"}
    fetched = hub.downloads()
    assert fetched.keys() == HF_TEXTS | {INDEX} | weights
    for name in weights:  # huggingface_hub asks for the first 100,001 bytes: most headers are shorter
        assert fetched[name] <= 100_001 < len(everything[name])
    hub.clear()
    placed = client.run("inspect", "lab/inspect", "--device-map", "auto", "--max-memory", '{"cpu": "1GiB"}').stdout
    assert "the whole model" in placed
    assert max(hub.downloads().values()) <= 2 * 100_001  # once to describe, once to plan


def test_headers_that_the_hub_does_not_give(client, hub, folders, weights):
    """An answer that is no header is an error, not a reason to fetch gigabytes."""
    hub.add("lab/no-headers", files_of(folders / "hf"))
    for name in weights:
        hub.fail(500, method="GET", path=name)  # once: the whole file would be given
    assert "the Hub answered 500 to a request for lab/no-headers" in client.refuse("inspect", "lab/no-headers")
    assert all(size < 1000 for name, size in hub.downloads().items() if name in weights)  # the answer 500


def test_a_single_file_of_weights(client, hub, folders, tmp_path):
    convert(folders / "meta", tmp_path / "single", verify=False)
    hub.add("lab/single", tmp_path / "single")
    info = json.loads(client.run("inspect", "lab/single", "--json").stdout)
    assert info == inspect(tmp_path / "single").to_dict() | {"path": "lab/single"}
    assert hub.downloads()["model.safetensors"] == 100_001


def test_pickled_weights_where_there_are_no_others(client, hub, folders, weights, tmp_path):
    tensors = {}
    for file in weights:
        tensors |= load_file(folders / "hf" / file)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    files = {name: content for name, content in files_of(folders / "hf").items() if name not in {INDEX, *weights}}
    hub.add("lab/pickled", files | {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
    client.run("inspect", "lab/pickled")
    client.run("convert", "lab/pickled", tmp_path / "meta")
    assert verify(folders / "hf", tmp_path / "meta").ok


def test_commands_and_classes_by_name(client, hub, folders, everything, tmp_path):
    """All that takes a model takes a name; the tokens and losses are those of the local folder."""
    hub.add("lab/use", everything)
    (tmp_path / "text.txt").write_text("abcd bcd abc " * 40)
    generate = ("abc", "--max-new-tokens", "8", "--json")
    evaluate = ("--text", tmp_path / "text.txt", "--context", "32", "--json")
    for source, local in (("lab/use@main", folders / "hf"), ("lab/use/original", folders / "meta")):
        for command, options in (("generate", generate), ("evaluate", evaluate)):
            ours, theirs = [json.loads(client.run(command, model, *options).stdout) for model in (source, local)]
            if command == "evaluate":
                ours, theirs = ours["loss"], theirs["loss"]
            assert ours == theirs
    assert all(len(everything[name]) == size for name, size in hub.downloads().items())  # once, not for each command
    client.run("chat", "lab/use")
    assert client.run("bench", "lab/use", "--new-tokens", "2", "--prompt-tokens", "4").stdout
    found = client.python(
        "import hf_llama3, torch\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        "models = [AutoModelForCausalLM.from_pretrained('lab/use'), hf_llama3.load_meta('lab/use/original'),\n"
        "          hf_llama3.Llama3ForCausalLM.from_pretrained('lab/use')]\n"
        "ids = AutoTokenizer.from_pretrained('lab/use')('abcd', return_tensors='pt')\n"
        "result = [type(model).__name__ for model in models], AutoConfig.from_pretrained('lab/use').model_type\n"
        "logits = [model(**ids).logits for model in models]\n"
        "result += (all(torch.equal(one, logits[0]) for one in logits), ids['input_ids'].tolist())\n"
    )
    assert found[:3] == [["LlamaForCausalLM", "Llama3ForCausalLM", "Llama3ForCausalLM"], "llama", True]
    assert torch.tensor(found[3]).numel() > 1


def test_a_folder_that_exists_wins(client, hub, folders):
    hub.add("here/model", files_of(folders / "meta", "original/"))
    (client.folder / "here").mkdir()
    os.symlink(folders / "hf", client.folder / "here" / "model")
    assert json.loads(client.run("inspect", "here/model", "--json").stdout)["format"] == "hf"
    for beyond in ("here/model/original", "here/model@main"):
        assert "does not exist; pass the folder of a checkpoint" in client.refuse("inspect", beyond)
    assert not hub.log


def test_a_download_that_is_cut_off_goes_on(client, hub, tmp_path):
    """huggingface_hub writes 10 MiB at a time: what it had of the next ones is asked for again, and no more."""
    write_meta(tmp_path / "large", params(vocab=100_000, layers=1))
    whole, chunk = (tmp_path / "large" / "consolidated.00.pth").stat().st_size, 10 * 2**20
    hub.add("lab/cut", tmp_path / "large")
    hub.drop(chunk + 5000, path="/consolidated.00.pth")
    client.run("convert", "lab/cut", tmp_path / "hf")
    sent = [request.sent for request in hub.log if request.method == "GET" and request.path.endswith(".pth")]
    assert sent == [chunk + 5000, whole - chunk]
    assert verify(tmp_path / "large", tmp_path / "hf").ok


# Name, token, fault, sentence
REFUSALS = {
    "wrong token": ("lab/fine", "hf_wrong_0123", {}, "the Hub does not take your token; log in by `hf auth login`"),
    "a token that is not ASCII": ("lab/fine", "hf_wrongé", {}, "a token that is not ASCII; mend the variable HF_TOKEN"),
    "missing": ("lab/missing", WRITER, {}, "lab/missing is neither a folder here nor a repository on the Hub"),
    "missing, logged out": ("lab/missing", "", {}, "lab/missing is neither a folder here nor a repository on the Hub"),
    "private": ("other/private", WRITER, {}, "other/private is neither a folder here nor a repository on the Hub"),
    "revision": ("lab/fine@v9", WRITER, {}, "lab/fine has no revision 'v9' on the Hub; "),
    "gated": ("lab/gated", READER, {}, "lab/gated is gated; accept its licence on http://127.0.0.1"),
    "gated, logged out": ("lab/gated", "", {}, "lab/gated is gated; accept its licence on http://127.0.0.1"),
    "5xx": ("lab/fine", WRITER, {"status": 503}, "the Hub answered 503 to a request for lab/fine, and not all"),
    "rate limit": (
        *("lab/fine", WRITER, {"status": 429, "Retry_After": "7"}),
        "the Hub gives you no more of lab/fine for now, and not all that is needed is in the cache; "
        "try again in 7 seconds, or log in",
    ),
    "name": ("lab/a--b", WRITER, {}, "lab/a--b is neither a folder here nor a name that the Hub can have; mend it"),
    "no model": ("lab/empty", WRITER, {}, "lab/empty holds no config.json, params.json nor original/params.json on"),
    "no original": ("lab/empty/original", WRITER, {}, "lab/empty holds no original/params.json on the Hub"),
    "no weights": ("lab/bin", WRITER, {}, "lab/bin holds no model.safetensors, model.safetensors.index.json, pytorch_"),
    "an index that leads elsewhere": ("lab/hostile", WRITER, {}, "must name plain files beside it, got '/"),
    "a damaged header": ("lab/damaged", WRITER, {}, "the header of "),
    "another kind": ("lab/other", WRITER, {}, "config.json"),
    "adapter": ("lab/adapter", WRITER, {}, "is an adapter, not a model"),
}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A file that an index names and nothing may write."""
    return tmp_path_factory.mktemp("elsewhere") / "evil.safetensors"


@pytest.fixture(scope="module")
def refusing(hub, folders, elsewhere):
    config = (folders / "hf" / "config.json").read_bytes()
    hub.add("lab/fine", folders / "hf")
    hub.add("lab/gated", folders / "hf", gated=True)
    hub.add("other/private", folders / "hf", private=True)
    hub.add("lab/empty", {"README.md": b"x"})
    hub.add("lab/bin", {"config.json": config, "optimizer.bin": b"x" * 1000})
    safetensors = (folders / "hf" / "model-00001-of-00002.safetensors").read_bytes()
    index = json.dumps({"weight_map": {"model.norm.weight": str(elsewhere)}}).encode()
    hub.add("lab/hostile", {"config.json": config, INDEX: index, str(elsewhere): safetensors})
    hub.add("lab/damaged", {"config.json": config, "model.safetensors": (9).to_bytes(8, "little") + b'{"a": [1}' * 9})
    hub.add("lab/other", {"config.json": b'{"model_type": "mistral"}', "model.safetensors": b"x" * 1000})
    hub.add("lab/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 1000})


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_refusals(case, command, client, hub, refusing, elsewhere, tmp_path):
    name, token, fault, sentence = REFUSALS[case]
    if fault:
        hub.fail(times=99, **fault)
    target = [tmp_path / "out"] if command == "convert" else []
    said = client.refuse(command, name, *target, HF_TOKEN=token)
    assert sentence in said and not list(tmp_path.iterdir())
    if case not in ("an index that leads elsewhere", "a damaged header"):  # all else is known before the weights
        assert not any(name.endswith((".safetensors", ".bin", ".gguf")) for name in hub.downloads())
    assert not elsewhere.exists()


def test_the_command_that_merges_an_adapter_of_the_hub(hub, environment, folders, tmp_path):
    """Its commit in the cache holds no weights, and is no place for a model."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "lab/base"}
    pair = {"A": torch.randn(2, 64), "B": torch.randn(64, 2)}
    weights = save({f"base_model.model.model.layers.0.self_attn.q_proj.lora_{end}.weight": pair[end] for end in pair})
    hub.add("lab/base", folders / "hf")
    hub.add("lab/lora", {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights})
    command = run("inspect", "lab/lora", code=2, **environment).stderr.partition("merge it into its model: ")[2]
    command = command.replace("hf-llama3", shlex.join((sys.executable, "-m", "hf_llama3")))
    beside = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=os.environ | environment | beside)
    convert(folders / "hf", tmp_path / "expected", to="hf", adapter=tmp_path / "lora")
    assert verify(tmp_path / "expected", tmp_path / "lora-merged").ok
    assert not verify(folders / "hf", tmp_path / "lora-merged").ok


def test_gated_once_the_licence_is_accepted(client, hub, folders, refusing):
    hub.users[READER].accepted.add("lab/gated")
    client.run("inspect", "lab/gated", HF_TOKEN=READER)
    hub.users[READER].accepted.clear()
    assert set(hub.downloads()) >= {"config.json", INDEX}


def test_a_connection_that_never_holds(client, hub, folders, tmp_path):
    hub.add("lab/broken", folders / "hf")
    hub.drop(0, times=99, method="GET", path="/config.json")
    said = client.refuse("convert", "lab/broken", tmp_path / "out")
    assert re.match(r"http://127.0.0.1:\d+ cannot be reached for lab/broken \(RemoteProtocolError\)", said)


def test_offline(client, hub, home, folders, everything, tmp_path):
    """What is in the cache is taken from there: told to be offline, or without a connection; the rest is refused."""
    hub.add("lab/cached", everything)
    hub.add("lab/described", folders / "hf")
    client.run("convert", "lab/cached", tmp_path / "meta", "--mp", "2")
    client.run("inspect", "lab/described")
    hub.clear()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    told, cut_off = {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": nowhere}
    for changes, reason in ((told, "HF_HUB_OFFLINE is set"), (cut_off, f"{nowhere} cannot be reached for ")):
        apart = Client(hub.environment(home) | changes, tmp_path)
        info = json.loads(apart.run("inspect", "lab/cached", "--json").stdout)
        assert info["num_parameters"] == inspect(folders / "hf").num_parameters
        apart.run("convert", "lab/cached", "again", "--mp", "2", "--overwrite")
        assert verify(folders / "hf", tmp_path / "again").ok
        for name in ("lab/described", "lab/never"):
            said = apart.refuse("inspect", name)
            assert reason in said and "not all that is needed is in the cache" in said
        apart.close()
    assert not hub.log
