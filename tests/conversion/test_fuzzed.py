"""Files that the fuzzers of `fuzz_files.py` found to be read where torch refuses them, each once; and a short run."""

import io
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import params, small_tokenizer, write_meta

from hf_llama3.conversion import convert, inspect
from hf_llama3.conversion.formats.pth import read_pth
from hf_llama3.errors import UserError
from hf_llama3.training.output import check_free

TENSOR = {"a": torch.arange(4.0)}


def members() -> dict[str, bytes]:
    made = io.BytesIO()
    torch.save(TENSOR, made)
    with zipfile.ZipFile(made) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zip_of(members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return made.getvalue()


def change_pickle(old: bytes, new: bytes) -> bytes:
    found = members()
    pickled = found["archive/data.pkl"]
    assert pickled.count(old) == 1, old
    return zip_of(found | {"archive/data.pkl": pickled.replace(old, new)})


def change_saved(at: bytes, offset: int, new: bytes, **options) -> bytes:
    """Put bytes at an offset from the last place where a signature stands."""
    made = io.BytesIO()
    torch.save(TENSOR, made, **options)
    content = bytearray(made.getvalue())
    start = content.rindex(at) + offset
    content[start : start + len(new)] = new
    return bytes(content)


def old_without(part: bytes, before: bytes) -> bytes:
    made = io.BytesIO()
    torch.save(TENSOR, made, **OLD)
    assert made.getvalue().count(part + before) == 1
    return made.getvalue().replace(part + before, before)


def without(name: str) -> bytes:
    return zip_of({member: content for member, content in members().items() if member != name})


OLD = {"_use_new_zipfile_serialization": False}
EMPTY_DICT = b")Rq\x0bt"  # the last argument of the function that makes a tensor
FOUND = {
    "a storage shorter than its member": (lambda: change_pickle(b"K\x04tq", b"K\x03tq"), "must have 12 bytes, got 16"),
    "a storage longer than its member": (lambda: change_pickle(b"K\x04tq", b"K\x05tq"), "must have 20 bytes, got 16"),
    "an argument too many": (
        lambda: change_pickle(EMPTY_DICT, EMPTY_DICT[:-1] + b"\x88t"),
        "otherwise than torch.save",
    ),
    "a member elsewhere": (lambda: zip_of(members() | {"x": b""}), "must hold nothing outside of archive/, got 'x'"),
    "no version": (lambda: without("archive/version"), "must be of a version from 1 to 10 .*, got b'none'"),
    "another version": (lambda: zip_of(members() | {"archive/version": b"99\n"}), r"version from 1 to 10 .*, got b'99"),
    "a fact that is no text": (
        lambda: zip_of(members() | {"archive/.data/serialization_id": b"\xff"}),
        "serialization_id in .* must be a text",
    ),
    "a disk of an entry": (lambda: change_saved(b"PK\x01\x02", 34, b"\x02"), "lies on another disk"),
    "an entry that is a folder": (lambda: change_saved(b"PK\x01\x02", 38, b"\x10"), "or is a folder"),
    "several disks": (lambda: change_saved(b"PK\x05\x06", 4, b"\x01"), "divided among several disks"),
    "no disk": (lambda: change_saved(b"PK\x06\x07", 16, b"\0"), "its end is not where it says"),
    "a longer record": (lambda: change_saved(b"PK\x06\x06", 4, b"\x2d"), "its two ends contradict each other"),
    "another protocol": (
        lambda: change_saved(b"\x80\x02M\xe9\x03.", 3, b"\xea", **OLD),
        "must be of version 1001 .*, got 1002",
    ),
    "no place for views": (lambda: old_without(b"N", before=b"tq"), "storage '0'|is damaged"),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_torch_refuses(case, tmp_path):
    make, message = FOUND[case]
    path = tmp_path / "a.pth"
    path.write_bytes(make())
    with pytest.raises(UserError, match=message) as info:
        read_pth(path)
    assert "\n" not in str(info.value)


def test_what_torch_writes(tmp_path):
    for options in ({}, OLD):
        torch.save(TENSOR, tmp_path / "a.pth", **options)
        assert read_pth(tmp_path / "a.pth")["a"].array.view("<f4").tolist() == [0, 1, 2, 3]
    (tmp_path / "a.pth").write_bytes(zip_of(members()))
    assert read_pth(tmp_path / "a.pth")["a"].array.view("<f4").tolist() == [0, 1, 2, 3]


def test_fuzzed_files():
    """A hundred examples of each reader, in a process that may take 5 seconds and 300 MB for one."""
    script = Path(__file__).parent / "fuzz_files.py"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", script, "100"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert len(re.findall(r"^[a-z.]+ 100 \d+$", result.stdout, re.MULTILINE)) == 8, result.stdout


def test_no_room_for_what_a_gguf_file_carries(tmp_path):
    """The tokenizer's files are made in a temporary folder, whose disk may be full: benchmarks/interrupt.py met it."""
    write_meta(tmp_path / "meta", params(vocab=516), tokenizer=small_tokenizer(tmp_path))
    convert(tmp_path / "meta", tmp_path / "a.gguf", to="gguf")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(UserError, match=r"could not be written \(File too large\); make room there"):
            inspect(tmp_path / "a.gguf")
        with pytest.raises(UserError, match=r"\(File too large\); make room there"):
            convert(tmp_path / "meta", tmp_path / "b.gguf", to="gguf", dry_run=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert inspect(tmp_path / "a.gguf").format == "gguf"


def test_a_run_that_was_stopped_as_it_began(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.partial").write_text("{")
    check_free(tmp_path / "run")
    (tmp_path / "run" / "mine").write_text("a")
    with pytest.raises(UserError, match="already exists"):
        check_free(tmp_path / "run")
