"""A model that is converted from the Hub file by file: the same files, no second copy, and no work lost."""

import json
import re
import shutil

import pytest
from checkpoints import hf_model, params, small_tokenizer, write_meta
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_llama3.conversion import convert, verify
from hf_llama3.errors import UserError

# Tells what lies beside the target while each file is read, and may end the run or shrink the disk.
WATCHED = """
from collections import namedtuple
from pathlib import Path
from unittest import mock
from hf_llama3.conversion import convert, streaming

target, seen = Path({target!r}), []

def watch(plan, file, folder, verify, write=streaming.write_from):
    seen.append(sorted(path.name for path in folder.rglob("*.safetensors") if ".fetched" in path.parts))
    if file == {stop!r}:
        raise KeyboardInterrupt
    return write(plan, file, folder, verify)

usage = namedtuple("usage", "total used free")
with mock.patch.object(streaming, "write_from", watch), mock.patch.object(
    streaming.shutil, "disk_usage", lambda place: usage(10**9, 0, {free})
):
    try:
        report = convert({source!r}, target, {to!r}, stream={stream!r}).to_dict()
    except KeyboardInterrupt:
        report = None
result = [report, seen]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model in three files with a tokenizer."""
    folder = tmp_path_factory.mktemp("streamed")
    write_meta(folder / "meta", params(vocab=516, layers=8), mp=2, tokenizer=small_tokenizer(folder))
    convert(folder / "meta", folder / "hf", max_shard_size="340KB", instruct=True, verify=False)
    assert len(list((folder / "hf").glob("*.safetensors"))) == 3
    return folder / "hf"


def write_adapter(folder, model):
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype="auto"), settings).save_pretrained(folder)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


HEADER = 100_001  # bytes that the library asks for to read the headers, at most


def weights_of(hub):
    return {name: size for name, size in hub.downloads().items() if name.endswith(".safetensors")}


def sizes_of(model):
    return {path.name: path.stat().st_size for path in model.glob("*.safetensors")}


@pytest.mark.parametrize(
    "options",
    [("--to", "meta", "--mp", "2"), ("--to", "hf", "--max-shard-size", "200KB"), ("--to", "dcp"), ("--dtype", "f16")],
)
def test_the_same_files(options, client, hub, model, tmp_path):
    """To the byte, hashes and provenance as well; each file of weights is fetched once."""
    name = f"lab/streamed-{options[1]}"
    hub.add(name, files_of(model))
    client.run("convert", name, tmp_path / "streamed", *options, "--stream")
    sizes = sizes_of(model)
    assert weights_of(hub) == {file: size + min(size, HEADER) for file, size in sizes.items()}
    hub.clear()
    client.run("convert", name, tmp_path / "whole", *options)
    assert weights_of(hub) == sizes  # no headers where there is room; the first had left none in the cache
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", [None, "bf16", "f16", "f32", "q8_0", "q4_0"])
def test_into_gguf(kind, client, hub, model, tmp_path):
    """To the byte as from a folder of that name."""
    hub.add("lab/streamed-gguf", files_of(model))
    local, options = tmp_path / "streamed-gguf", ("--to", "gguf", *(("--dtype", kind) if kind else ()))
    shutil.copytree(model, local)
    client.run("convert", "lab/streamed-gguf", tmp_path / "streamed.gguf", *options, "--stream")
    client.run("convert", local, tmp_path / "local.gguf", *options)
    assert (tmp_path / "streamed.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"streamed-gguf", "streamed.gguf", "local.gguf"}


def test_into_gguf_where_the_disk_has_no_room(client, hub, model, tmp_path):
    """Nobody has to ask, and an interrupted run is gone on with."""
    convert(model, tmp_path / "hf", to="hf", max_shard_size="200KB", verify=False)
    hub.add("lab/streamed-gguf-full", files_of(tmp_path / "hf"))
    shards, target = sorted(sizes_of(tmp_path / "hf")), tmp_path / "model.gguf"
    request = {"source": "lab/streamed-gguf-full", "target": str(target), "to": "gguf", "stream": None}
    request["free"] = 2 * sum(sizes_of(tmp_path / "hf").values()) - 1
    assert client.python(WATCHED.format(**request, stop=shards[2]))[0] is None and not target.exists()
    report, seen = client.python(WATCHED.format(**request, stop=None))
    assert seen == [[shard] for shard in shards[2:]] and report["resumed"] == shards[:2]
    assert any("one file after another" in note for note in report["notes"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model.gguf"] and verify(model, target).ok


@pytest.mark.parametrize("change", ["dtype", "adapter"])
def test_what_another_command_left_is_written_again(change, client, hub, model, tmp_path):
    """Files are as long with float16 as with bfloat16, and with an adapter as without: what they hold differs."""
    name, target, shards = f"lab/streamed-{change}", tmp_path / "made.gguf", sorted(sizes_of(model))
    hub.add(name, files_of(model))
    request = {"source": name, "target": str(target), "to": "gguf", "stream": True, "free": 10**9}
    more, options = 'dtype="f16"', ("--dtype", "bf16")
    if change == "adapter":
        write_adapter(tmp_path / "adapter", model)
        more, options = 'dtype="bf16"', ("--dtype", "bf16", "--adapter", tmp_path / "adapter")
    source = WATCHED.format(**request, stop=shards[2]).replace("stream=True", f"stream=True, {more}")
    assert client.python(source)[0] is None
    client.run("convert", name, target, *options, "--stream")
    local = tmp_path / name.removeprefix("lab/")
    shutil.copytree(model, local)
    client.run("convert", local, tmp_path / "local.gguf", *options)
    assert target.read_bytes() == (tmp_path / "local.gguf").read_bytes()


def test_the_hub_is_asked_for_sizes_once_or_not_at_all(client, hub, model, tmp_path):
    """Not where the disk has room for all parameters in float32, twice, nor where all files are in the cache."""
    nbytes = sum(sizes_of(model).values())
    counts = {}
    for way, stream, free in (("told", False, 10**9), ("ample", None, 10**9), ("enough", None, 2 * nbytes + 10**5)):
        hub.add(f"lab/streamed-{way}", files_of(model))
        for turn in ("first", "second"):
            hub.clear()
            request = {"source": f"lab/streamed-{way}", "target": str(tmp_path / f"{way}-{turn}"), "to": "hf"}
            report, seen = client.python(WATCHED.format(**request, stop=None, stream=stream, free=free))
            assert report and seen == []
            counts[way, turn] = len([request for request in hub.log if "/tree/" in request.path])
    library = counts["told", "first"]  # its own lists of files
    assert [counts[way, "first"] - library for way in ("told", "ample", "enough")] == [0, 0, 1]
    assert not any(counts[way, "second"] for way in ("told", "ample", "enough"))


def test_no_more_than_one_file_of_the_source_is_there(client, hub, model, tmp_path):
    """Where the disk has no room for all of it, nobody has to ask; what an interrupted run wrote stays."""
    hub.add("lab/streamed-interrupted", files_of(model))
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    request = {"source": "lab/streamed-interrupted", "target": str(tmp_path / "hf"), "to": "hf", "stream": None}
    request["free"] = 2 * sum(path.stat().st_size for path in model.glob("*.safetensors")) - 1
    report, seen = client.python(WATCHED.format(**request, stop=shards[1]))
    assert report is None and seen == [[shards[0]], [shards[1]]] and not (tmp_path / "hf").exists()
    hub.clear()
    report, seen = client.python(WATCHED.format(**request, stop=None))
    assert seen == [[shards[1]], [shards[2]]] and report["resumed"] == [shards[0]]
    assert hub.downloads()[shards[0]] <= HEADER and report["verification"]["ok"]
    assert any(
        "are fetched one file after another, " in note and "in the Hub's cache" in note for note in report["notes"]
    )
    convert(model, tmp_path / "local", to="hf", verify=False)
    name = "model.safetensors"
    assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert not list((tmp_path / "hf").glob(".*"))


def test_room_for_all(client, hub, model, tmp_path):
    hub.add("lab/streamed-roomy", files_of(model))
    request = {"source": "lab/streamed-roomy", "target": str(tmp_path / "meta"), "to": "meta", "stream": None}
    report, seen = client.python(WATCHED.format(**request, stop=None, free=10**9))
    assert seen == [] and report["verification"]["ok"]


@pytest.mark.parametrize("fault", ["answer", "connection"])
def test_faults(fault, client, hub, model, tmp_path):
    name, shards = f"lab/streamed-{fault}", sorted(path.name for path in model.glob("*.safetensors"))
    hub.add(name, files_of(model))
    command = ("convert", name, tmp_path / "meta", "--to", "meta", "--stream")
    if fault == "answer":
        hub.fail(403, times=99, method="GET", path=shards[1])
        assert "the Hub answered 403 to a request for lab/streamed-answer" in client.refuse(*command)
        hub.faults.clear()
        hub.clear()
    else:
        hub.drop(110_000, times=2, path=shards[1])  # more than the headers, which come first
    client.run(*command)
    convert(model, tmp_path / "local", to="meta", verify=False)
    assert (tmp_path / "meta" / "consolidated.00.pth").read_bytes() == (
        tmp_path / "local" / "consolidated.00.pth"
    ).read_bytes()


def test_a_dry_run_says_what_each_way_takes(client, hub, model, tmp_path):
    hub.add("lab/streamed-dry", files_of(model))
    answer = client.run(
        "convert", "lab/streamed-dry", tmp_path / "meta", "--to", "meta", "--stream", "--dry-run", "--json"
    )
    sizes = [path.stat().st_size for path in model.glob("*.safetensors")]
    (note,) = [note for note in json.loads(answer.stdout)["notes"] if "one file after another" in note]
    at_once, whole = (int(re.search(words, note)[1]) for words in (r"(\d+) bytes of them", r"would take (\d+) in"))
    assert abs(at_once - 2 * max(sizes)) < 1000 and abs(whole - sum(sizes)) < 1000  # but for a line in the headers
    assert max(weights_of(hub).values()) <= HEADER and not (tmp_path / "meta").exists()


def test_what_cannot_be_read_file_by_file(client, hub, model, tmp_path):
    with pytest.raises(UserError, match=r"--stream is for a repository on the Hub, got .*; leave it out"):
        convert(model, tmp_path / "meta", stream=True)
    hub.add("lab/streamed-pickled", {"config.json": (model / "config.json").read_bytes(), "pytorch_model.bin": b""})
    sentence = client.refuse("convert", "lab/streamed-pickled", tmp_path / "meta", "--stream")
    assert "cannot be read file by file, since pytorch_model.bin is no zip of torch.save's; leave out --s" in sentence


@pytest.mark.parametrize("head", ["equal", "other", "other at its end", "elsewhere"])
def test_a_head_beside_the_embedding_that_it_is_tied_to(head, client, hub, tmp_path):
    """Their beginnings are compared for the plan, and all of both once the file is there."""
    hf_model(tied=True, vocab_size=2048).save_pretrained(tmp_path / "tied")
    path = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(path)
    weight = tensors["model.embed_tokens.weight"].clone()
    weight[{"other": slice(None), "other at its end": slice(-1, None)}.get(head, slice(0))] += 1
    if head == "elsewhere":
        parts = {"model-1.safetensors": tensors, "model-2.safetensors": {"lm_head.weight": weight}}
        path.unlink()
        index = {name: file for file, held in parts.items() for name in held}
        (tmp_path / "tied" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        parts = {"model.safetensors": tensors | {"lm_head.weight": weight}}
    for file, held in parts.items():
        save_file(held, tmp_path / "tied" / file, metadata={"format": "pt"})
    name = f"lab/streamed-tied-{head.replace(' ', '-')}"
    hub.add(name, files_of(tmp_path / "tied"))
    command = ("convert", name, tmp_path / "streamed", "--to", "meta", "--stream")
    if head == "elsewhere":
        said = client.refuse(*command)
        assert f"{name} stores a head in another file than the embedding that it is tied to" in said
        assert "add --no-stream, and make room for all of it" in said
    elif head == "other at its end":
        said = client.refuse(*command)
        assert "model.safetensors of lab/streamed-tied-other-at-its-end differs from the parts of it that" in said
    else:
        client.run(*command)
        client.run("convert", name, tmp_path / "whole", "--to", "meta", "--no-stream")
        assert files_of(tmp_path / "streamed") == files_of(tmp_path / "whole")
