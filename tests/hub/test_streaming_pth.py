"""Files of torch.save that are converted from the Hub one after another: Meta's shards, and pickled weights."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoints import hf_model, params, small_tokenizer, write_meta
from test_streaming import WATCHED, files_of, write_adapter

from hf_llama3.conversion import convert, inspect, verify

SHARD = "consolidated.{:02d}.pth"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Directories of Meta's: as many shards as key/value heads, a tied head, heads that are stored twice, one shard."""
    root = tmp_path_factory.mktemp("metas")
    tokenizer, shape = small_tokenizer(root), params(vocab=4128, dim=128, layers=3)
    write_meta(root / "four", shape, mp=4, tokenizer=tokenizer, ffn=384)
    write_meta(root / "two", shape, mp=2, tokenizer=tokenizer, ffn=384)
    write_meta(root / "tied", shape, mp=2, tokenizer=tokenizer, ffn=384, tied=True)
    write_meta(root / "one", shape, tokenizer=tokenizer, ffn=384)
    convert(root / "four", root / "twice", mp=8, verify=False)
    for folder in root.iterdir():
        if folder.is_dir():
            write_checklist(folder)
    return root


def write_checklist(folder):
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.glob("consolidated.*")}
    (folder / "checklist.chk").write_text("".join(f"{value}  {name}\n" for name, value in sums.items()))


def add(hub, name, folder, inside="original/"):
    hub.add(name, {inside + path: content for path, content in files_of(folder).items()})


def fetched(hub):
    return {name: size for name, size in hub.downloads().items() if name.endswith((".pth", ".bin"))}


TARGETS = {
    "hf": ("--to", "hf", "--max-shard-size", "1MB"),
    "one shard": ("--to", "meta"),
    "eight shards": ("--to", "meta", "--mp", "8"),
    "dcp": ("--to", "dcp", "--max-shard-size", "1MB"),
    "float16": ("--to", "hf", "--dtype", "f16"),
}


KINDS = ("four", "two", "tied", "twice", "one")
PAIRS = [  # all, of which the plain run takes each kind and each target once or twice
    pytest.param(kind, target, marks=() if kind == "twice" or target == "hf" else pytest.mark.long)
    for kind in KINDS
    for target in TARGETS
]


@pytest.mark.parametrize(("kind", "target"), PAIRS)
def test_the_same_files(kind, target, client, hub, folders, tmp_path):
    """To the byte as those of the whole repository, hashes and provenance as well."""
    name = f"lab/{kind}-{target.replace(' ', '-')}"
    add(hub, name, folders / kind)
    client.run("convert", f"{name}/original", tmp_path / "streamed", *TARGETS[target], "--stream")
    sizes = {f"original/{path.name}": path.stat().st_size for path in (folders / kind).glob("*.pth")}
    assert fetched(hub).keys() == sizes.keys()
    assert all(sizes[file] <= size < 2.2 * sizes[file] for file, size in fetched(hub).items())
    client.run("convert", f"{name}/original", tmp_path / "whole", *TARGETS[target], "--no-stream")
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "whole")


def test_into_gguf_in_parts(client, hub, folders, tmp_path):
    add(hub, "lab/four-gguf-parts", folders / "four")
    options = ("--max-shard-size", "500KB", "--dtype", "f16")
    for way in ("stream", "no-stream"):
        client.run("convert", "lab/four-gguf-parts/original", tmp_path / way / "m.gguf", *options, f"--{way}")
    made = files_of(tmp_path / "stream")
    assert made == files_of(tmp_path / "no-stream") and len(made) > 2


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
@pytest.mark.parametrize("source", ["four", "twice"])
def test_into_gguf(source, kind, client, hub, folders, tmp_path):
    name = f"lab/{source}-gguf-{kind}"
    add(hub, name, folders / source)
    client.run("convert", f"{name}/original", tmp_path / "streamed.gguf", "--dtype", kind, "--stream")
    client.run("convert", f"{name}/original", tmp_path / "whole.gguf", "--dtype", kind, "--no-stream")
    assert (tmp_path / "streamed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_one_shard_at_a_time_and_on_after_an_interruption(client, hub, folders, tmp_path):
    add(hub, "lab/interrupted-shards", folders / "four")
    shards = [SHARD.format(number) for number in range(4)]
    request = {"source": "lab/interrupted-shards/original", "target": str(tmp_path / "hf"), "to": "hf", "stream": None}
    request["free"] = 2 * sum(path.stat().st_size for path in (folders / "four").glob("*.pth")) - 1
    source = WATCHED.format(**request, stop=shards[2]).replace("*.safetensors", "*.pth")
    report, seen = client.python(source)
    assert report is None and seen == [[shard] for shard in shards[:3]] and not (tmp_path / "hf").exists()
    hub.clear()
    report, seen = client.python(source.replace(f"file == '{shards[2]}'", "False"))
    assert seen == [[shards[2]], [shards[3]]] and report["resumed"] == shards[:2] and report["verification"]["ok"]
    assert any("one file after another" in note for note in report["notes"])
    assert any("the hashes of its checklist.chk" in note for note in report["notes"])
    assert verify(folders / "four", tmp_path / "hf").ok


KILLED = """
import os
from hf_llama3.conversion import convert, streaming

def die(plan, file, folder, verify, write=streaming.write_from):
    if file == {stop!r}:
        {half}
        os._exit(9)
    return write(plan, file, folder, verify)

streaming.write_from = die
convert({source!r}, {target!r}, to="meta", mp=1, stream=True)
"""


@pytest.mark.parametrize("half", ["pass", "write(plan, file, folder, verify)"], ids=["before", "after"])
def test_killed_at_a_shard(half, client, hub, environment, folders, tmp_path):
    """Before its parts are written, or after that and before the journal says so: they are written again."""
    name = f"lab/killed-{'before' if half == 'pass' else 'after'}"
    add(hub, name, folders / "four")
    command = KILLED.format(source=f"{name}/original", target=str(tmp_path / "meta"), stop=SHARD.format(2), half=half)
    assert subprocess.run([sys.executable, "-c", command], env=os.environ | environment).returncode == 9
    assert not (tmp_path / "meta").exists()
    hub.clear()
    command = ("convert", f"{name}/original", tmp_path / "meta", "--to", "meta", "--stream", "--json")
    report = json.loads(client.run(*command).stdout)
    assert report["resumed"] == [SHARD.format(0), SHARD.format(1)]
    assert hub.downloads()[f"original/{SHARD.format(0)}"] < 0.9 * (folders / "four" / SHARD.format(0)).stat().st_size
    client.run("convert", f"{name}/original", tmp_path / "whole", "--to", "meta", "--no-stream")
    assert files_of(tmp_path / "meta") == files_of(tmp_path / "whole")


SLOW = """
import time
from pathlib import Path
from hf_llama3.conversion import convert
from hf_llama3.conversion.checkpoint import Checkpoint

def slow(call, seconds):
    return lambda *given: time.sleep(seconds) or call(*given)

before = Checkpoint.check_copies, Path.symlink_to
Checkpoint.check_copies, Path.symlink_to = slow(before[0], 0.5), slow(before[1], 1)
try:
    result = convert({source!r}, {target!r}, stream=True).verification.ok
finally:
    Checkpoint.check_copies, Path.symlink_to = before
"""


def test_nothing_reads_a_file_that_is_replaced(client, hub, folders, tmp_path):
    """However long each takes: the sparse file is away while the fetched one comes to its place."""
    add(hub, "lab/slow", folders / "twice")
    assert client.python(SLOW.format(source="lab/slow/original", target=str(tmp_path / "hf")))


def test_parts_of_a_shard_in_folders(client, hub, folders, tmp_path):
    """As copies on the Hub have them; a shard is a folder of files."""
    local = tmp_path / "parts"
    shutil.copytree(folders / "two", local)
    for shard in sorted(local.glob("*.pth")):
        tensors = torch.load(shard)
        shard.unlink()
        (local / shard.stem).mkdir()
        for part in range(3):
            named = {name: tensors[name] for name in sorted(tensors)[part::3]}
            torch.save(named, local / shard.stem / f"consolidated-{part + 1:05d}-of-00003.pth")
    (local / "checklist.chk").unlink()
    add(hub, "lab/shards-in-folders", local)
    client.run("convert", "lab/shards-in-folders/original", tmp_path / "meta", "--to", "meta", "--mp", "4", "--stream")
    assert len(fetched(hub)) == 6 and verify(folders / "two", tmp_path / "meta").ok


@pytest.mark.parametrize("kind", ["four", "twice", "tied", "one"])
def test_inspect_fetches_no_shard(kind, client, hub, folders):
    add(hub, f"lab/inspect-{kind}", folders / kind)
    info = json.loads(client.run("inspect", f"lab/inspect-{kind}/original", "--json").stdout)
    assert info == inspect(folders / kind).to_dict() | {"path": f"lab/inspect-{kind}/original"}
    total = sum(path.stat().st_size for path in (folders / kind).glob("*.pth"))
    assert sum(fetched(hub).values()) < 0.8 * total


def pickled(folder, model, parts):
    """Save a model as transformers did before safetensors, in one file or with an index."""
    folder.mkdir()
    state, names = model.state_dict(), sorted(model.state_dict())
    for settings in (model.config, model.generation_config):
        settings.save_pretrained(folder)
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    files = {name: f"pytorch_model-{index % parts + 1:05d}-of-{parts:05d}.bin" for index, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: state[name].clone() for name in names if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("parts", "tied"), [(1, False), (3, False), (1, True)])
def test_pickled_weights(parts, tied, client, hub, tmp_path):
    """A tied head that shares its storage with the embedding, as well."""
    model = hf_model(tied=tied, vocab_size=2048)
    pickled(tmp_path / "hf", model, parts)
    name = f"lab/pickled-{parts}-{tied}"
    hub.add(name, files_of(tmp_path / "hf"))
    for to in ("meta", "hf"):
        hub.clear()
        client.run("convert", name, tmp_path / f"{to}-streamed", "--to", to, "--stream")
        assert len(fetched(hub)) == parts
    for to in ("meta", "hf"):
        client.run("convert", name, tmp_path / f"{to}-whole", "--to", to, "--no-stream")
        assert files_of(tmp_path / f"{to}-streamed") == files_of(tmp_path / f"{to}-whole")


def test_an_adapter_is_merged_on_the_way(client, hub, folders, tmp_path):
    convert(folders / "four", tmp_path / "hf", verify=False)
    write_adapter(tmp_path / "adapter", tmp_path / "hf")
    add(hub, "lab/shards-merged", folders / "four")
    options = ("--to", "hf", "--adapter", tmp_path / "adapter")
    client.run("convert", "lab/shards-merged/original", tmp_path / "streamed", *options, "--stream")
    client.run("convert", "lab/shards-merged/original", tmp_path / "whole", *options, "--no-stream")
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "whole")
    assert not verify(tmp_path / "hf", tmp_path / "streamed").ok


# Faults


@pytest.mark.parametrize("after", [1000, 200_000])
def test_a_connection_that_is_cut(after, client, hub, folders, tmp_path):
    """In the middle of a list of tensors, or of a shard."""
    add(hub, f"lab/cut-{after}", folders / "two")
    hub.drop(after, times=2, method="GET", path=SHARD.format(1))
    client.run("convert", f"lab/cut-{after}/original", tmp_path / "hf", "--to", "hf", "--stream")
    assert verify(folders / "two", tmp_path / "hf").ok


def test_a_connection_that_never_holds(client, hub, folders, tmp_path):
    add(hub, "lab/never-holds", folders / "two")
    hub.drop(10, times=99, method="GET", path=SHARD.format(1))
    said = client.refuse("convert", "lab/never-holds/original", tmp_path / "hf", "--to", "hf", "--stream")
    assert "cannot be reached for lab/never-holds (RemoteProtocolError)" in said


def test_files_that_lie_elsewhere(client, hub, folders, tmp_path):
    """The Hub sends requests for large files on to a store."""
    add(hub, "lab/elsewhere", folders / "two")
    hub.redirects = True
    client.run("convert", "lab/elsewhere/original", tmp_path / "hf", "--to", "hf", "--stream")
    assert verify(folders / "two", tmp_path / "hf").ok
    sent_on = {request.path for request in hub.log if request.status == 302}
    assert any(path.endswith(SHARD.format(1)) for path in sent_on)


def test_without_parts_all_is_fetched_and_that_is_said(client, hub, folders, tmp_path):
    add(hub, "lab/no-parts", folders / "two")
    hub.serves_parts = False
    command = ("convert", "lab/no-parts/original", tmp_path / "hf", "--to", "hf")
    said = client.refuse(*command, "--stream")
    assert (
        "cannot be read file by file, since the Hub serves no parts of original/consolidated.00.pth; leave out" in said
    )
    free = 2 * sum(path.stat().st_size for path in (folders / "two").glob("*.pth")) - 1
    request = {"source": "lab/no-parts/original", "target": str(tmp_path / "hf"), "to": "hf", "stream": None}
    report, seen = client.python(WATCHED.format(**request, stop=None, free=free))
    assert seen == [] and report["verification"]["ok"]
    reason = "since the Hub serves no parts of original/consolidated.00.pth"
    assert f"the files are not read one after another, {reason}" in report["notes"]


def test_the_old_format_of_torch_save(client, hub, folders, tmp_path):
    local = tmp_path / "old"
    shutil.copytree(folders / "one", local)
    (local / "checklist.chk").unlink()
    path = local / SHARD.format(0)
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    add(hub, "lab/old-format", local)
    command = ("convert", "lab/old-format/original", tmp_path / "hf", "--to", "hf")
    said = client.refuse(*command, "--stream")
    assert "cannot be read file by file, since consolidated.00.pth is no zip of torch.save's; leave out" in said
    client.run(*command)
    assert verify(folders / "one", tmp_path / "hf").ok


def change(folder, number, name, row=0):
    """Change one element of a shard, far from the beginning of its tensor."""
    path = folder / SHARD.format(number)
    tensors = torch.load(path)
    tensors[name].view(-1)[row] += 1.0
    torch.save(tensors, path)


CHANGES = {
    "a vector that differs": ("two", 1, "layers.1.ffn_norm.weight", 5, "must be the same in all shards, which each"),
    "a head stored twice that differs": ("twice", 3, "layers.2.attention.wk.weight", 9, "must hold the same key/value"),
    "a head that is tied at its beginning": (
        "tied",
        1,
        "output.weight",
        -1,
        "differs from the parts of it that the plan",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_only_the_whole_files_show(what, client, hub, folders, tmp_path):
    kind, number, name, row, sentence = CHANGES[what]
    local, repository = tmp_path / "changed", f"lab/changed-{kind}"
    shutil.copytree(folders / kind, local)
    change(local, number, name, row)
    write_checklist(local)
    add(hub, repository, local)
    said = client.refuse("convert", f"{repository}/original", tmp_path / "hf", "--to", "hf", "--stream")
    assert sentence in said and not (tmp_path / "hf").exists()


def test_a_shard_that_its_checklist_denies(client, hub, folders, tmp_path):
    local = tmp_path / "denied"
    shutil.copytree(folders / "two", local)
    change(local, 1, "layers.1.attention.wq.weight", 7)
    add(hub, "lab/denied", local)
    said = client.refuse("convert", "lab/denied/original", tmp_path / "hf", "--to", "hf", "--stream")
    assert "consolidated.01.pth must have the hash" in said and "of checklist.chk, got" in said
