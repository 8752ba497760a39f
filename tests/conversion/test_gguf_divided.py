"""A model in several GGUF files: written as llama.cpp's gguf-split does, and whole or not there."""

import json
import subprocess
import sys

import gguf
import pytest
from checkpoints import hf_model, params, small_tokenizer, write_meta
from command_line import refuse, run

from hf_llama3.conversion import convert, inspect, verify
from hf_llama3.conversion.formats.storage import BY_NAME, Assembly
from hf_llama3.conversion.plan_gguf import plan_files
from hf_llama3.errors import UserError
from hf_llama3.files import several

SPLIT = {"split.no": 2, "split.count": 2, "split.tensors.count": 5}  # types of gguf-split: UINT16, UINT16, INT32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("divided")
    write_meta(root / "meta", params(vocab=516), tokenizer=small_tokenizer(root))
    convert(root / "meta", root / "hf", verify=False)
    return root / "hf"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def parts(count, stem="model"):
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


@pytest.mark.parametrize("dtype", [None, "q8_0"])
def test_parts_and_their_keys(dtype, folder, tmp_path):
    report = convert(folder, tmp_path / "model.gguf", to="gguf", dtype=dtype, max_shard_size="70KB")
    assert len(report.files) > 2 and names(tmp_path) == sorted(report.files) == parts(len(report.files))
    assert report.verification.ok and report.target == str(tmp_path / names(tmp_path)[0])
    whole = convert(folder, tmp_path / "whole.gguf", to="gguf", dtype=dtype)
    read = [gguf.GGUFReader(tmp_path / name) for name in report.files]
    for number, reader in enumerate(read):
        found = {key: reader.fields[key].contents() for key in SPLIT}
        assert found == {"split.no": number, "split.count": len(read), "split.tensors.count": whole.tensors}
        assert {key: int(reader.fields[key].types[0]) for key in SPLIT} == SPLIT
        assert all(
            sum(int(tensor.n_bytes) for tensor in reader.tensors) <= 70_000 or len(reader.tensors) == 1 for _ in [0]
        )
        own = {key for key in reader.fields if not key.startswith("GGUF.")}
        assert (own == SPLIT.keys()) == (number > 0)
    single = gguf.GGUFReader(tmp_path / "whole.gguf")
    assert [tensor.name for reader in read for tensor in reader.tensors] == [tensor.name for tensor in single.tensors]
    assert all(
        bytes(ours.data) == bytes(theirs.data)
        for ours, theirs in zip((one for reader in read for one in reader.tensors), single.tensors, strict=True)
    )


def test_read_back_by_any_part(folder, tmp_path):
    convert(folder, tmp_path / "gguf" / "model.gguf", to="gguf", max_shard_size="100KB", verify=False)
    for path in (tmp_path / "gguf", *(tmp_path / "gguf").iterdir()):
        assert inspect(path).num_parameters == inspect(folder).num_parameters
        assert verify(folder, path).ok
    convert(tmp_path / "gguf", tmp_path / "hf", to="hf")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes()


def test_what_fits_into_one_file_is_one(folder, tmp_path):
    convert(folder, tmp_path / "model.gguf", to="gguf", max_shard_size="5GB")
    convert(folder, tmp_path / "plain.gguf", to="gguf")
    assert (tmp_path / "model.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_the_command_and_what_it_says_next(folder, tmp_path):
    out = run("convert", folder, tmp_path / "model.gguf", "--max-shard-size", "300KB").stdout
    first = names(tmp_path)[0]
    assert first in out and f"generate {tmp_path / first}" in out
    assert json.loads(run("generate", tmp_path / first, "abc", "--max-new-tokens", "2", "--json").stdout)


def test_what_stands_there(folder, tmp_path):
    """Refused without --overwrite; with it, no part of the old model is left, and nothing else is touched."""
    target, command = tmp_path / "model.gguf", ("convert", folder, tmp_path / "model.gguf", "--max-shard-size")
    run(*command, "100KB")
    old = names(tmp_path)
    (tmp_path / "other-00001-of-00002.gguf").write_bytes(b"mine")
    said = refuse(*command, "300KB")
    assert f"{tmp_path / old[0]} already exists; choose another target or add --overwrite" in said
    run(*command, "300KB", "--overwrite")
    new = names(tmp_path)
    assert "other-00001-of-00002.gguf" in new and not set(old) & set(new) and verify(folder, tmp_path / new[0]).ok
    (tmp_path / "model-00009-of-00009.gguf").write_bytes(b"no GGUF")
    said = refuse(*command, "300KB", "--overwrite")
    assert "model-00009-of-00009.gguf is no GGUF file, so it is not overwritten; remove it yourself" in said
    (tmp_path / "model-00009-of-00009.gguf").unlink()
    said = refuse("convert", tmp_path / new[0], target, "--to", "gguf", "--max-shard-size", "100KB", "--overwrite")
    assert f"{target} and the source {tmp_path / new[0]} must be apart; choose another target" in said
    assert names(tmp_path) == new


KILLED = """
import os, sys
from pathlib import Path
from hf_llama3.conversion import convert
from hf_llama3.files import several

replace, moved = Path.replace, []

def count(path, target):
    if path.suffix == ".gguf" and path.parent.name.endswith(".partial"):
        moved.append(path)
        if len(moved) > {after}:
            os._exit(9)
    return replace(path, target)

Path.replace = count
convert({source!r}, {target!r}, to="gguf", max_shard_size="100KB", overwrite={overwrite})
"""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_killed_while_the_parts_take_their_places(after, overwrite, folder, tmp_path):
    """No part is taken for a model before all are there; the same command, even without --overwrite, ends it."""
    target = tmp_path / "model.gguf"
    if overwrite:
        convert(folder, target, to="gguf", dtype="f16", max_shard_size="100KB", verify=False)
    source = KILLED.format(source=str(folder), target=str(target), after=after, overwrite=overwrite)
    assert subprocess.run([sys.executable, "-c", source]).returncode == 9
    there = [name for name in names(tmp_path) if name.endswith(".gguf")]
    assert len(there) == after and not any("-00001-of-" in name for name in there)
    for name in there:
        assert "lacks model-00001-of-" in refuse("inspect", tmp_path / name)
    report = convert(folder, target, to="gguf", max_shard_size="100KB")
    assert names(tmp_path) == sorted(report.files) == sorted(report.resumed) and report.verification.ok
    assert verify(folder, tmp_path / names(tmp_path)[0]).ok


def test_somebody_elses_parts_are_not_taken_back(folder, tmp_path):
    """Only names that a run has listed are; a list that names other places is not followed."""
    (tmp_path / "mine.gguf").write_bytes(b"mine")
    staging = tmp_path / "model.gguf.partial"
    staging.mkdir()
    (staging / several.PLACING).write_text(json.dumps({"names": ["../mine.gguf", "mine.gguf/.."]}))
    assert several.placed(tmp_path / "model.gguf") == set()
    (tmp_path / "model-00002-of-00004.gguf").write_bytes(b"GGUF, half of a download")
    said = refuse("convert", folder, tmp_path / "model.gguf", "--max-shard-size", "100KB")
    assert "model-00002-of-00004.gguf already exists" in said


def test_a_single_matrix_is_larger(tmp_path):
    hf_model().save_pretrained(tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "model.gguf", to="gguf", max_shard_size="1KB")
    assert len(report.files) > 15 and report.verification.ok


def test_sizes_that_are_none(folder, tmp_path):
    said = refuse("convert", folder, tmp_path / "model.gguf", "--max-shard-size", "many")
    assert "--max-shard-size must be a number with one of" in said


def test_more_parts_than_the_format_counts():
    tensors = [(f"blk.{number}", Assembly(BY_NAME["float32"], (300,), [])) for number in range(2**16)]
    with pytest.raises(UserError, match="--max-shard-size must make at most 65535 files, got 65536; choose a larger"):
        plan_files("model.gguf", {}, tensors, "1KB")
