"""A source that changes under a conversion: what was planned is what is read, or one sentence says what changed."""

import os

import pytest
from checkpoints import params, small_tokenizer, write_meta

from hf_llama3.conversion import convert
from hf_llama3.conversion.formats import storage
from hf_llama3.conversion.formats.pth import read_pth
from hf_llama3.errors import UserError


@pytest.fixture
def meta(tmp_path):
    write_meta(tmp_path / "meta", params(vocab=516), mp=2, tokenizer=small_tokenizer(tmp_path))
    return tmp_path / "meta"


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def overwrite(path):
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"another model's bytes")


def replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("call", ["copy_run", "write_all", "read_back"])
@pytest.mark.parametrize("change", [cut, empty, overwrite, replace, remove])
@pytest.mark.parametrize("name", ["consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"])
def test_changes(name, change, call, meta, tmp_path, monkeypatch):
    original, changed = getattr(storage, call), []

    def watched(*arguments):
        if not changed:
            changed.append(change(meta / name))
        return original(*arguments)

    monkeypatch.setattr(storage, call, watched)
    how = {"to": "meta", "mp": 4} if call != "write_all" else {}
    with pytest.raises(UserError, match=f"{name} (changed|was cut short|is not|cannot|must)") as info:
        convert(meta, tmp_path / "out", **how)
    assert changed and "report" not in str(info.value) and not (tmp_path / "out").exists()


def test_a_shard_that_shrinks_between_two_reads(meta):
    """Neither a signal nor a loop: a map of a file that was cut short ends the process where it is read."""
    tensor = read_pth(meta / "consolidated.00.pth")["output.weight"]
    view = tensor.array
    os.truncate(meta / "consolidated.00.pth", 100)
    with pytest.raises(UserError, match=r"consolidated.00.pth was cut short while it was read"):
        tensor.file.take(view)
    with pytest.raises(UserError, match=r"consolidated.00.pth was cut short while it was read"):
        tensor.read()
