"""PyTorch's files, read without a pickle machine and written without torch, against torch itself."""

import io
import os
import pickle
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_llama3.conversion.formats.pth import PthLayout, read_pth
from hf_llama3.conversion.formats.storage import BY_NAME, write_all
from hf_llama3.errors import UserError

TENSORS = {
    "bf16": torch.randn(30, 20).bfloat16(),
    "f32": torch.randn(5),
    "f16": torch.randn(4, 3, 2).half(),
    "f64": torch.randn(2, 2).double(),
    "transposed": torch.randn(6, 4).T,
    "sliced": torch.randn(10, 4)[3:7, 1:],
}


def to_torch(stored):
    array = np.array(stored.array, order="C").view(f"i{stored.dtype.itemsize}")
    return torch.from_numpy(array).view(getattr(torch, stored.dtype.name))


def test_reads_what_torch_writes(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth")
    read = read_pth(tmp_path / "x.pth")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(to_torch(read[name]), tensor), name


def test_reads_shared_storage_and_parameters(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"all": base, "row": base[1], "parameter": torch.nn.Parameter(base.clone())}, tmp_path / "x.pth")
    read = read_pth(tmp_path / "x.pth")
    assert torch.equal(to_torch(read["row"]), base[1])
    assert torch.equal(to_torch(read["parameter"]), base)


def write(path, tensors):
    layout = PthLayout(path.stem, [(name, BY_NAME[str(t.dtype)[6:]], tuple(t.shape)) for name, t in tensors.items()])
    with open(path, "wb", buffering=0) as out:
        checksums = []
        for tensor, offset in zip(tensors.values(), layout.offsets, strict=True):
            content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            checksums.append(zlib.crc32(content))
            write_all(out, content, offset)
        for offset, content in layout.fixed(checksums):
            write_all(out, content, offset)
    return layout


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_is_written(tmp_path, mmap):
    layout = write(tmp_path / "y.pth", TENSORS)
    assert (tmp_path / "y.pth").stat().st_size == layout.size
    read = torch.load(tmp_path / "y.pth", weights_only=True, mmap=mmap)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_is_a_sound_zip_with_aligned_tensors(tmp_path):
    layout = write(tmp_path / "y.pth", TENSORS)
    assert zipfile.ZipFile(tmp_path / "y.pth").testzip() is None
    assert all(offset % 64 == 0 for offset in layout.offsets)
    assert read_pth(tmp_path / "y.pth").keys() == TENSORS.keys()


def test_files_beyond_4_gib(tmp_path):
    """The 64-bit fields of the zip, in a sparse file: a tensor larger than 4 GiB, and one that begins behind it."""
    tensors = [("big", BY_NAME["bfloat16"], (3 * 2**30,)), ("small", BY_NAME["float32"], (2,))]
    layout = PthLayout("big", tensors)
    with open(tmp_path / "big.pth", "wb", buffering=0) as out:
        for offset, content in layout.fixed([0, 0]):
            write_all(out, content, offset)
        write_all(out, np.array([1.5, 2.5], "<f4"), layout.offsets[1])
        write_all(out, np.array([7], "<u2"), layout.offsets[0] + 6 * 2**30 - 2)
    read = torch.load(tmp_path / "big.pth", weights_only=True, mmap=True)
    assert read["small"].tolist() == [1.5, 2.5] and read["big"][-1].view(torch.int16) == 7
    ours = read_pth(tmp_path / "big.pth")
    assert ours["small"].array.view("<f4").tolist() == [1.5, 2.5] and ours["big"].array[-1] == 7


# Files that no checkpoint is


MARKER = Path(tempfile.gettempdir()) / "hf_llama3-ran-a-pickle"


class Runs:
    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


def save_pickle(path, content, name="x/data.pkl", compression=zipfile.ZIP_STORED, **more):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, content)
        archive.writestr("x/version", "3\n")
        for key, value in more.items():
            archive.writestr(f"x/{key}", value)


class Storage:
    """What a forged tensor says that it lies in."""


def forged(shape, strides, first=0, key="0"):
    """The pickle of a tensor whose numbers do not fit its storage, of four float32."""

    class Forger(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, key, "cpu", 4) if isinstance(value, Storage) else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), first, shape, strides, False, {})

    out = io.BytesIO()
    Forger(out, protocol=2).dump({"w": Tensor()})
    return out.getvalue()


HOSTILE = {
    "code": (pickle.dumps({"w": Runs()}, protocol=2), r"asks to run \w+.system, which no checkpoint needs"),
    "not tensors": (pickle.dumps({"w": [1, 2]}, protocol=2), "nothing but tensors by name, got list 'w'"),
    "not a dictionary": (pickle.dumps([1], protocol=2), "must hold a dictionary of tensors, got list"),
    "names that are numbers": (pickle.dumps({1: 2}, protocol=2), "nothing but tensors by name"),
    "damaged": (b"\x80\x02}q\x00(", "list of tensors .* is damaged"),
    "huge memo index": (b"\x80\x02}r\xff\xff\xff\x7f.", "damaged .*memo index 2147483647"),
    "too far": (forged((5,), (1,)), r"w \[5\] .* must fit its storage of 16 bytes, needs 20"),
    "strided too far": (forged((2, 2), (3, 1)), "needs 20"),
    "starts too late": (forged((4,), (1,), first=1), "needs 20"),
    "negative start": (forged((4,), (1,), first=-1), "must fit its storage"),
    "negative shape": (forged((-4,), (1,)), "must fit its storage"),
    "stride of zero": (forged((1000000000,), (0,)), "needs 4000000000"),
    "no such storage": (forged((4,), (1,), key="7"), "names the storage '7' of w but does not hold it"),
    "odd shape": (forged(("4",), (1,)), "damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles(case, tmp_path):
    content, message = HOSTILE[case]
    save_pickle(tmp_path / "x.pth", content, **{"data/0": bytes(16)})
    with pytest.raises(UserError, match=message):
        read_pth(tmp_path / "x.pth")
    assert not MARKER.exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_other_types_are_named(dtype, tmp_path):
    torch.save({"w": torch.zeros(4).to(dtype)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"holds tensors of type (float8_e4m3fn|CharStorage); only \['bfloat16'"):
        read_pth(tmp_path / "x.pth")


def test_compressed_storage(tmp_path):
    save_pickle(tmp_path / "x.pth", forged((4,), (1,)), compression=zipfile.ZIP_DEFLATED, **{"data/0": bytes(16)})
    with pytest.raises(UserError, match=r"x/data/0 in .* must be stored uncompressed"):
        read_pth(tmp_path / "x.pth")


def test_big_endian(tmp_path):
    save_pickle(tmp_path / "x.pth", forged((4,), (1,)), **{"data/0": bytes(16), "byteorder": "big"})
    with pytest.raises(UserError, match="must be little-endian, got byte order b'big'"):
        read_pth(tmp_path / "x.pth")


@pytest.mark.parametrize("kept", [0, 10, 1000, -1])
def test_truncated(kept, tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(content[:kept])
    with pytest.raises(UserError, match=r"not a readable PyTorch checkpoint.* download it again"):
        read_pth(tmp_path / "x.pth")


def test_a_pickle_that_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="must hold one pickle of tensors, got 0"):
        read_pth(tmp_path / "x.pth")
