"""GGUF on the Hub: a file by its name, and nothing beside it."""

import json
import shutil

import pytest
from checkpoints import params, small_tokenizer, write_meta
from client import Client
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM

from hf_llama3.conversion import convert, inspect, verify

BESIDE = dict.fromkeys(("README.md", "imatrix.dat", "q4/model-q4_0.gguf", "mmproj.gguf"), b"beside")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as a folder, as GGUF, and as GGUF in three parts."""
    root = tmp_path_factory.mktemp("gguf")
    write_meta(root / "meta", params(vocab=516), tokenizer=small_tokenizer(root))
    convert(root / "meta", root / "hf", verify=False)
    convert(root / "hf", root / "model.gguf", verify=False)
    (root / "split").mkdir()
    write_gguf(root / "split" / "model.gguf", AutoModelForCausalLM.from_pretrained(root / "hf", dtype="auto"), split=8)
    return root


@pytest.fixture(scope="module")
def repository(hub, folder):
    held = {"model.gguf": (folder / "model.gguf").read_bytes()}
    held |= {"q8/model.Q8 (1).gguf": held["model.gguf"] + bytes(32)} | BESIDE
    held |= {f"split/{path.name}": path.read_bytes() for path in (folder / "split").glob("*-of-*")}
    hub.add("lab/gguf", held)
    return held


@pytest.mark.parametrize("file", ["model.gguf", "q8/model.Q8 (1).gguf"])
def test_convert_and_inspect_fetch_that_file_alone(file, client, hub, folder, repository, tmp_path):
    info = json.loads(client.run("inspect", f"lab/gguf/{file}", "--json").stdout)
    assert info["format"] == "gguf" and info["num_parameters"] == inspect(folder / "hf").num_parameters
    assert hub.downloads() == {file: len(repository[file])}
    client.run("convert", f"lab/gguf/{file}", tmp_path / "hf")
    assert hub.downloads() == {file: len(repository[file])}
    assert verify(folder / "hf", tmp_path / "hf").ok
    assert json.loads((tmp_path / "hf" / "provenance.json").read_text())["source"] == f"lab/gguf/{file}"
    client.run("convert", f"lab/gguf/{file}", tmp_path / "again.gguf")
    assert json.loads(client.run("verify", f"lab/gguf/{file}@main", tmp_path / "again.gguf", "--json").stdout)["ok"]


def test_generate_and_load(client, hub, folder, repository):
    generate = ("abc", "--max-new-tokens", "8", "--json")
    ours, theirs = [
        json.loads(client.run("generate", model, *generate).stdout)
        for model in ("lab/gguf/model.gguf", folder / "model.gguf")
    ]
    assert ours == theirs
    loaded = "import hf_llama3\nresult = hf_llama3.load_meta('lab/gguf/model.gguf').num_parameters()"
    assert client.python(loaded) == inspect(folder / "hf").num_parameters


def test_all_parts_of_one_that_is_split(client, hub, repository, folder):
    parts = {name: len(content) for name, content in repository.items() if name.startswith("split/")}
    assert len(parts) == 3
    for part in sorted(parts):
        info = json.loads(client.run("inspect", f"lab/gguf/{part}", "--json").stdout)
        assert info["num_parameters"] == inspect(folder / "hf").num_parameters
    assert hub.downloads() == parts


def test_a_revision(client, hub, folder, repository):
    hub.add("lab/gguf-revision", {"README.md": b"nothing on the main branch"})
    hub.add("lab/gguf-revision", {"a.gguf": repository["model.gguf"]}, revision="v1")
    client.run("inspect", "lab/gguf-revision/a.gguf@v1")
    said = client.refuse("inspect", "lab/gguf-revision/a.gguf")
    assert said.startswith("lab/gguf-revision holds no file a.gguf on the Hub, nor any other of GGUF; mend the name")


def test_a_repository_of_gguf_alone_lists_its_models(client, hub, tmp_path):
    names = [f"m.Q{bits}.gguf" for bits in range(2, 8)] + ["big/m-00001-of-00002.gguf", "big/m-00002-of-00002.gguf"]
    hub.add("lab/gguf-alone", dict.fromkeys(names, b"x"))
    listed = (
        "models in GGUF: big/m-00001-of-00002.gguf, m.Q2.gguf, m.Q3.gguf, m.Q4.gguf, ... (7 of them); name one, as "
    )
    for command in (["inspect", "lab/gguf-alone"], ["convert", "lab/gguf-alone", tmp_path / "hf"]):
        said = client.refuse(*command)
        assert said.strip() == f"lab/gguf-alone holds only {listed}lab/gguf-alone/big/m-00001-of-00002.gguf"
    said = client.refuse("inspect", "lab/gguf-alone/m.Q9.gguf@main")
    assert said.startswith(f"lab/gguf-alone holds no file m.Q9.gguf, but {listed}lab/gguf-alone/big/m-00001-of-00002")
    assert said.strip().endswith("@main")
    config = {"config.json": json.dumps({"model_type": "llama"} | CONFIG).encode()}
    hub.add("lab/gguf-and-config", config | {"m.gguf": b"x"})
    said = client.refuse("convert", "lab/gguf-and-config", tmp_path / "hf")
    assert "holds only models in GGUF: m.gguf; name one, as lab/gguf-and-config/m.gguf" in said
    assert not any(name.endswith(".gguf") for name in hub.downloads())


CONFIG = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "intermediate_size": 192}
CONFIG |= {"vocab_size": 512, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}


@pytest.mark.parametrize(
    "name", ["lab/gguf/../x.gguf", "lab/gguf/*.gguf", "lab/gguf/a/../../x.gguf", "lab/gguf/[m]o.gguf"]
)
def test_no_path_and_no_pattern(name, client, hub, repository):
    client.refuse("inspect", name)
    assert not hub.downloads()


def test_no_stream(client, repository, tmp_path):
    said = client.refuse("convert", "lab/gguf/model.gguf", tmp_path / "hf", "--stream")
    assert (
        "--stream is for a repository of safetensors or of torch.save's files, got lab/gguf/model.gguf; leave" in said
    )


def test_offline_and_a_folder_here(client, hub, home, folder, repository, tmp_path):
    client.run("inspect", "lab/gguf/model.gguf")
    apart = Client(hub.environment(home) | {"HF_HUB_OFFLINE": "1"}, tmp_path)
    apart.run("inspect", "lab/gguf/model.gguf")
    assert "HF_HUB_OFFLINE is set" in apart.refuse("inspect", "lab/gguf-never/model.gguf")
    (tmp_path / "lab" / "gguf").mkdir(parents=True)
    assert "does not exist" in apart.refuse("inspect", "lab/gguf/model.gguf")
    shutil.copy(folder / "model.gguf", tmp_path / "lab" / "gguf")
    assert json.loads(apart.run("inspect", "lab/gguf/model.gguf", "--json").stdout)["path"] == "lab/gguf/model.gguf"
    apart.close()
