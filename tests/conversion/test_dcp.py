"""Folders of torch.distributed.checkpoint, against torch's own writer and reader."""

import json
import pickle
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import SMALL_VOCAB, hf_model, meta_tensors, params, small_tokenizer, write_meta
from command_line import refuse, run
from forked import torchrun
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llama3.conversion import convert, inspect, verify
from hf_llama3.conversion.formats import dcp as ours
from hf_llama3.conversion.load import load_checkpoint
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")  # one process saves and loads alone


def plain_folder(tmp_path, **options):
    hf_model(**options).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def saved(tmp_path, state, plain):
    """A folder of torch's own writer, with the plain one's configuration beside it."""
    dcp.save(state, checkpoint_id=tmp_path / "dcp")
    shutil.copy(plain / "config.json", tmp_path / "dcp")
    return tmp_path / "dcp"


def weights(**options):
    return {name: tensor.clone() for name, tensor in hf_model(**options).state_dict().items()}


# Reading


@pytest.mark.parametrize("nested", [{}, {"model": None}, {"app": {"model": None}}], ids=["flat", "model", "app"])
def test_a_model_that_one_process_saved(nested, tmp_path):
    plain, state = plain_folder(tmp_path), weights()
    for key in reversed([*nested, *nested.get("app", {})]):
        state = {key: state}
    folder = saved(tmp_path, state | {"optimizer": {"state": {"a": torch.zeros(2)}}, "epoch": 3}, plain)
    info = inspect(folder)
    assert info.format == "hf" and not info.loads_as_is
    assert "weights of torch.distributed.checkpoint in 1 file" in info.inferred
    assert "1 tensors of the state of training left out" in info.inferred
    assert verify(plain, folder, logits=True).ok
    assert convert(folder, tmp_path / "hf").target_format == "hf"
    theirs, written = load_file(plain / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert theirs.keys() == written.keys() and all(torch.equal(theirs[name], written[name]) for name in theirs)


@pytest.mark.parametrize(("kind", "count"), [("rows", 3), ("grid", 4)])
def test_a_model_whose_pieces_many_processes_saved(kind, count, tmp_path):
    """Three processes divide 64 and 16 rows unevenly, within heads; four divide rows and columns."""
    plain = plain_folder(tmp_path, kv_heads=2)
    done = torchrun(Path(__file__).parent / "dcp_save.py", kind, tmp_path / "dcp", count=count)
    assert done.returncode == 0, done.stderr
    shutil.copy(plain / "config.json", tmp_path / "dcp")
    folder = tmp_path / "dcp"
    assert len(list(folder.glob("*.distcp"))) == count
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.files) == count
    assert verify(plain, folder, logits=True).ok
    for to, mp in (("hf", None), ("meta", 1), ("meta", 2)):
        target = tmp_path / f"{to}{mp}"
        assert convert(folder, target, to=to, mp=mp).verification.ok
        assert verify(target, plain).ok
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        loaded, theirs = load_checkpoint(checkpoint), AutoModelForCausalLM.from_pretrained(plain)
        assert torch.equal(loaded(ids).logits, theirs(ids).logits)


def test_metas_names_as_torchtitan_saves_them(tmp_path):
    write_meta(tmp_path / "meta", params())
    tensors = meta_tensors(params()) | {"freqs_cis": torch.zeros(4, dtype=torch.complex64)}
    tensors.pop("freqs_cis")
    dcp.save(tensors, checkpoint_id=tmp_path / "dcp")
    shutil.copy(tmp_path / "meta" / "params.json", tmp_path / "dcp")
    assert inspect(tmp_path / "dcp").format == "meta"
    assert verify(tmp_path / "meta", tmp_path / "dcp", logits=True).ok
    convert(tmp_path / "meta", tmp_path / "hf")
    (tmp_path / "dcp" / "params.json").unlink()
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "dcp")
    assert inspect(tmp_path / "dcp").format == "hf"
    assert verify(tmp_path / "hf", tmp_path / "dcp", logits=True).ok


def test_inside_a_checkpoint_of_accelerate(tmp_path):
    plain = plain_folder(tmp_path)
    dcp.save({"model": weights()}, checkpoint_id=tmp_path / "checkpoint-10" / "pytorch_model_fsdp_0")
    shutil.copy(plain / "config.json", tmp_path / "checkpoint-10")
    assert verify(plain, tmp_path / "checkpoint-10").ok
    assert inspect(tmp_path / "checkpoint-10").files == ["pytorch_model_fsdp_0/__0_0.distcp"]


# Writing


@pytest.mark.parametrize("size", ["5GB", "60KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_torch_loads_what_is_written(size, tied, tmp_path):
    plain = plain_folder(tmp_path, tied=tied)
    convert(plain, tmp_path / "meta")
    report = convert(tmp_path / "meta", tmp_path / "dcp", to="dcp", max_shard_size=size)
    assert report.verification.ok and report.target_format == "dcp"
    assert (len(list((tmp_path / "dcp").glob("*.distcp"))) > 1) is (size == "60KB")
    model = hf_model(tied=tied, seed=1)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    assert all(torch.equal(state[name], tensor) for name, tensor in hf_model(tied=tied).state_dict().items())
    assert verify(plain, tmp_path / "dcp").ok
    assert convert(tmp_path / "dcp", tmp_path / "again").verification.ok
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == convert_to_hf(tmp_path)


def convert_to_hf(tmp_path) -> bytes:
    convert(tmp_path / "meta", tmp_path / "hf")
    return (tmp_path / "hf" / "model.safetensors").read_bytes()


def test_torchtitan_starts_from_what_is_written(tmp_path):
    tensors = write_meta(tmp_path / "meta", params(), mp=2)
    convert(tmp_path / "meta", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "dcp", to="dcp", model_type="torchtitan", dtype="float32")
    state = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in tensors.items()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in tensors.items())
    assert convert(tmp_path / "dcp", tmp_path / "back", to="meta", dtype="bfloat16").verification.ok
    assert verify(tmp_path / "meta", tmp_path / "back").ok


def test_the_way_of_a_user(tmp_path):
    write_meta(tmp_path / "meta", params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(tmp_path))
    run("convert", tmp_path / "meta", tmp_path / "dcp", "--to", "dcp")
    run("inspect", tmp_path / "dcp")
    run("verify", tmp_path / "meta", tmp_path / "dcp", "--logits")
    found = json.loads(run("generate", tmp_path / "dcp", "abc", "--max-new-tokens", "3", "--json").stdout)
    same = json.loads(run("generate", tmp_path / "meta", "abc", "--max-new-tokens", "3", "--json").stdout)
    assert found == same and AutoTokenizer.from_pretrained(tmp_path / "dcp") is not None
    assert "makes of it" in refuse("push", tmp_path / "dcp", "me/model", "--license", "mit", "--dry-run")
    assert "'torchtitan' with --to dcp" in refuse("convert", tmp_path / "dcp", tmp_path / "x", "--as", "torchtitan")
    assert "--mp divides" in refuse("convert", tmp_path / "meta", tmp_path / "x", "--to", "dcp", "--mp", "2")
    plain = plain_folder(tmp_path, attention_bias=True)
    wanted = "convert", plain, tmp_path / "x", "--to", "dcp"
    assert "has biases in its projections" in refuse(*wanted, "--as", "torchtitan")
    run(*wanted)


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    plain = plain_folder(tmp_path)
    monkeypatch.setattr(import_module("hf_llama3.conversion.convert"), "sync", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(plain, tmp_path / "dcp", to="dcp", max_shard_size="60KB")
    assert not (tmp_path / "dcp").exists()
    monkeypatch.undo()
    report = convert(plain, tmp_path / "dcp", to="dcp", max_shard_size="60KB")
    assert report.verification.ok and len(report.resumed) > 1


# Damaged and hostile


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path, {"model": weights()}, plain_folder(tmp_path))


def test_without_a_configuration(folder):
    (folder / "config.json").unlink()
    sentence = refuse("convert", folder, f"{folder}-out")
    assert "is of torch.distributed.checkpoint, without a configuration; put that of the model" in sentence
    assert f"cp MODEL/config.json MODEL/tokenizer* {folder}/" in sentence


def change(folder, edit):
    """Write the list of tensors again after `edit` has changed it."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def first(metadata):
    return metadata.storage_data[next(index for index in metadata.storage_data if "q_proj" in index.fqn)]


NAME = "model.model.layers.0.self_attn.q_proj.weight"
EDITS = {
    "a file elsewhere": (
        lambda m: setattr(first(m), "relative_path", "../a.distcp"),
        "must name plain files beside it",
    ),
    "no such file": (lambda m: setattr(first(m), "relative_path", "__9_0.distcp"), "lacks __9_0.distcp, which its"),
    "beyond the file": (lambda m: setattr(first(m), "offset", 2**40), "is truncated at"),
    "another place": (lambda m: setattr(first(m), "offset", 0), "must hold a tensor of|readable PyTorch"),
    "a negative offset": (lambda m: setattr(first(m), "offset", -1), "no readable list of tensors"),
    "compressed": (
        lambda m: setattr(first(m), "transform_descriptors", ["zstd"]),
        "are transformed .*without extensions",
    ),
    "no place": (lambda m: m.storage_data.pop(next(iter(m.storage_data))), "does not say where a piece"),
    "no list of places": (lambda m: setattr(m, "storage_data", None), "no readable list of tensors"),
    "another shape": (
        lambda m: setattr(m.state_dict_metadata[NAME], "size", torch.Size([64, 128])),
        "do not make a tensor of",
    ),
    "no pieces": (lambda m: m.state_dict_metadata[NAME].chunks.clear(), "no readable list|do not make"),
    "another type": (
        lambda m: setattr(m.state_dict_metadata[NAME].properties, "dtype", torch.float16),
        "must hold a tensor of float16",
    ),
}


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_a_list_that_lies(edit, message, folder):
    change(folder, edit)
    with pytest.raises(UserError, match=message):
        inspect(folder)


class Harm:
    def __reduce__(self):
        return print, ("code ran",)


def test_no_pickle_runs(folder, capsys):
    change(folder, lambda metadata: setattr(metadata, "planner_data", Harm()))
    capsys.readouterr()
    with pytest.raises(
        UserError, match=r"asks to run builtins.print, which no checkpoint needs; do not trust this file"
    ):
        inspect(folder)
    assert "code ran" not in capsys.readouterr().out


def test_every_byte_may_be_wrong(folder):
    content = (folder / ".metadata").read_bytes()
    for at in range(0, len(content), max(len(content) // 300, 1)):
        damaged = bytearray(content)
        damaged[at] ^= 0x55
        (folder / ".metadata").write_bytes(damaged)
        try:
            inspect(folder)
        except UserError as error:
            assert "\n" not in str(error)
    for length in (0, 1, 100, len(content) - 1):
        (folder / ".metadata").write_bytes(content[:length])
        with pytest.raises(UserError, match="no readable list of tensors"):
            inspect(folder)


def test_pieces_that_are_named_without_end(folder):
    """One list of pieces under many names would be walked for ever."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    told = next(iter(metadata.state_dict_metadata.values()))
    told.chunks = told.chunks * 2000
    metadata.state_dict_metadata = {str(number): told for number in range(2000)}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="its tensors have more pieces than it has bytes"):
        inspect(folder)


def test_nothing_is_gathered_whole():
    """A row is gathered from the pieces that hold it, and from no other."""
    import numpy as np

    from hf_llama3.conversion.formats.dcp.chunks import ChunkedArray

    whole = np.arange(6 * 5, dtype="<u4").reshape(6, 5)
    bands = [(0, 2, [whole[:2, :3], whole[:2, 3:]]), (2, 6, [whole[2:]])]
    array = ChunkedArray(bands, whole.shape, whole.dtype)
    assert np.array_equal(array[1:4], whole[1:4]) and np.array_equal(array[[5, 0]], whole[[5, 0]])
    cut = array[(slice(None), slice(2, 4))]
    assert cut.shape == (6, 2) and np.array_equal(cut[:], whole[:, 2:4])
    assert np.array_equal(array[(slice(1, 5),)][1:3], whole[2:4])
    for head in ((3, 2), (1, 3)):  # one head over both bands, then two
        by_head, theirs = (one.reshape(-1, *head, 5).swapaxes(1, 2) for one in (array, whole))
        assert by_head.shape == theirs.shape and np.array_equal(by_head[:], theirs)
    assert ours.SUFFIX == ".distcp"
