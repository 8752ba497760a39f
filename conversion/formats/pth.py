"""PyTorch's checkpoint file: read as data, or laid out to the byte before a tensor is written.

A `.pth` file is a zip of uncompressed members: `NAME/data.pkl`, a pickle that names the tensors, and a `NAME/data/KEY`
for each storage. Reading locates each tensor's bytes; no pickle is run, see `unpickle.py` and `zip.py`.
"""

import io
import math
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from hf_llama3.errors import UserError, quoted, shown
from hf_llama3.files.reading import require_file

from .names import is_rope_table
from .storage import BY_STORAGE, Dtype, SourceFile, StoredTensor
from .unpickle import MAX_PICKLE_BYTES, Damaged, Forbidden, Read, Storage, Tensor, forbidden, read_pickle
from .unzipped import SIZES, is_unzipped, read_unzipped
from .zip import CENTRAL_HEADER, LOCAL_HEADER, MAX_32, STORED, UTF8, read_member, read_members

PICKLE_BYTES, PICKLE_BYTES_OF_A_TENSOR = 2**18, 2**12  # at most; torch.save takes some 300 for a tensor
MAX_FACT = 1024  # bytes of a member beside the pickle and the storages: a version, a byte order, a number
VERSIONS = range(1, 11)  # of the format; torch's caffe2/serialize/versions.h
# Where trainers keep the weights beside the state of their run.
STATE_KEYS = ("model", "state_dict", "model_state_dict", "module", "weights")
ALIGNMENT = 64  # bytes, torch's own
NEW_YEAR_1980 = 0x21  # a zip's earliest date: the same tensors give the same file


def read_pth(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a file of `torch.save` by name.

    Raises:
        UserError: the file is damaged, holds anything but tensors, or a tensor reaches beyond its storage.
    """
    require_file(path)
    source = SourceFile(path)
    try:
        read, storages = read_unzipped(path) if is_unzipped(path) else read_zip(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return {name: place(tensor, storages, source, name) for name, tensor in tensors_of(read.value, path).items()}


def read_parts(paths: list[Path], read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """List the tensors of several files that together hold a model.

    Raises:
        UserError: two files hold the same tensor.
    """
    tensors = {}
    for path in paths:
        found = read(path)
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{path} holds {quoted(twice[0])}, which another part holds as well")
        tensors |= found
    return tensors


def read_zip(path: Path, start: int = 0, length: int | None = None) -> tuple[Read, dict[str, tuple[int, int]]]:
    """Return what the pickle describes in a zip of torch's, which may lie in a larger file, and where storages lie.

    Raises:
        UserError: it is damaged, or no zip of torch's.
    """
    with open(path, "rb") as file:
        window = Window(file, start, path.stat().st_size if length is None else length)
        members = read_members(window, path, window.length)
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path} must hold one pickle of tensors, got {len(pickles)}; it is no PyTorch checkpoint")
        prefix = pickles[0].removesuffix("data.pkl")
        if outside := next((name for name in members if not name.startswith(prefix)), None):
            raise UserError(f"{path} must hold nothing outside of {shown(prefix)}, got {quoted(outside)}")
        storages = {}
        for name, member in members.items():
            if not name.startswith(f"{prefix}data/"):
                continue
            if member.method != STORED:
                remedy = "save the checkpoint again with torch.save"
                raise UserError(f"{shown(name)} in {path} must be stored uncompressed; {remedy}")
            storages[name.removeprefix(f"{prefix}data/")] = start + member.start, member.size
        facts = {}
        for name, member in members.items():
            if name != pickles[0] and not name.startswith(f"{prefix}data/"):
                facts[name.removeprefix(prefix)] = read_member(window, path, member, MAX_FACT)
        most = min(PICKLE_BYTES + PICKLE_BYTES_OF_A_TENSOR * len(storages), MAX_PICKLE_BYTES)
        pickled = read_member(window, path, members[pickles[0]], most)
    try:
        read = read_pickle(pickled)
        check_storages(read.storages, storages)
    except Forbidden as error:
        raise forbidden(path, error) from error
    except (Damaged, UnicodeDecodeError) as error:
        raise UserError(f"the list of tensors in {path} is damaged ({shown(error)}); download it again") from error
    check_facts(facts, path)
    return read, storages


def check_facts(facts: dict[str, bytes], path: Path):
    """Raise unless what a file says of itself is what torch reads.

    Raises:
        UserError: it is of another version or byte order, or no text.
    """
    order, version = facts.get("byteorder", b"little"), facts.get("version", facts.get(".data/version", b"none"))
    if order != b"little":
        raise UserError(f"{path} must be little-endian, got byte order {quoted(order)}; save it again on this machine")
    if not version.strip().isdigit() or len(version) > 8 or int(version) not in VERSIONS:
        rule = f"must be of a version from {VERSIONS[0]} to {VERSIONS[-1]} of PyTorch's format"
        raise UserError(f"{path} {rule}, got {quoted(version)}; save it again")
    if damaged := next((name for name, content in facts.items() if not content.isascii()), None):
        raise UserError(f"{shown(damaged)} in {path} must be a text; download it again")


def check_storages(named: dict[str, Storage], found: dict[str, tuple[int, int]]):
    """Raise unless each storage is as long as the pickle says: torch takes that, whatever lies behind it.

    Raises:
        Damaged: naming the storage.
    """
    for key, storage in named.items():
        if storage.is_view:
            raise Damaged(f"the storage {quoted(key)} is named as in files without a zip")
        wanted = storage.elements * SIZES.get(storage.kind.name, 1)
        if key in found and storage.kind.name in (*SIZES, "UntypedStorage") and found[key][1] != wanted:
            raise Damaged(f"the storage {quoted(key)} must have {wanted} bytes, got {found[key][1]}")


def tensors_of(state, path: Path) -> dict[str, Tensor]:
    """Return the tensors by name, without tables of RoPE of a type that is not read.

    Raises:
        UserError: there is something else.
    """
    if type(state) is not dict:
        raise UserError(f"{path} must hold a dictionary of tensors, got {type(state).__name__}")
    nested = [state[key] for key in STATE_KEYS if type(state.get(key)) is dict]
    tensors = {}
    for name, value in (nested[0] if nested else state).items():
        if type(name) is not str or type(value) is not Tensor:
            got = f"{type(value).__name__} {quoted(name)}"
            raise UserError(f"{path} must hold nothing but tensors by name, got {got}")
        if value.kind.name in BY_STORAGE:
            tensors[name] = value
        elif not is_rope_table(name):
            kinds = sorted(dtype.name for dtype in BY_STORAGE.values())
            raise UserError(f"{path} holds tensors of type {shown(value.kind.name)}; only {kinds} can be converted")
    return tensors


def place(tensor: Tensor, storages: dict[str, tuple[int, int]], source: SourceFile, name: str) -> StoredTensor:
    """Locate a tensor, and check that it is within its storage."""
    dtype, shape, strides = BY_STORAGE[tensor.kind.name], tensor.shape, tensor.strides
    path, label, key = source.path, shown(name), tensor.storage.key
    if key not in storages:
        raise UserError(f"{path} names the storage {quoted(key)} of {label} but does not hold it; download it again")
    start, size = storages[key]
    reach = tensor.first + sum((length - 1) * step for length, step in zip(shape, strides, strict=True)) + 1
    # The product as well: with a stride of 0 no index reaches far
    needed = max(reach, math.prod(shape)) * dtype.itemsize
    if min(tensor.first, *shape, *strides, 0) < 0 or needed > size:
        rule = f"must fit its storage of {size} bytes"
        raise UserError(f"{label} {quoted(list(shape))} in {path} {rule}, needs {needed}")
    return StoredTensor(source, dtype, shape, start + tensor.first * dtype.itemsize, strides)


class Window(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, file, start: int, length: int):
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=0):
        self.at = max(offset + (0, self.at, self.length)[whence], 0)
        return self.at

    def tell(self):
        return self.at

    def readinto(self, buffer):
        count = max(min(len(buffer), self.length - self.at), 0)
        self.file.seek(self.start + self.at)
        content = self.file.read(count)
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)


class PthLayout:
    """The place of every byte of a `.pth` file.

    Args:
        stem: the file's name without suffix, with which torch prefixes every member.
        tensors: (name, dtype, shape), in order.
        bare: whether the file holds a single tensor instead of a dictionary.
    """

    needs_checksums = True  # the headers contain the CRC-32 of every tensor

    def __init__(self, stem: str, tensors: list[tuple[str, Dtype, tuple[int, ...]]], bare: bool = False):
        sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in tensors]
        members = [(f"{stem}/data.pkl", len(pickled := pickle_tensors(tensors, bare)))]
        members += [(f"{stem}/data/{key}", size) for key, size in enumerate(sizes)]
        members += [(f"{stem}/byteorder", 6), (f"{stem}/version", 2)]
        self._known = {0: pickled, len(members) - 2: b"little", len(members) - 1: b"3\n"}
        self._members = []  # (name, size, offset of its header, offset of its bytes)
        end = 0
        for name, size in members:
            start = end
            data = -(-(start + len(local_header(name, size)) + 4) // ALIGNMENT) * ALIGNMENT
            self._members.append((name, size, start, data))
            end = data + size
        self._end_of_members = end
        self.offsets = [data for _, _, _, data in self._members[1:-2]]
        self.size = end + len(self._directory([0] * len(members)))

    def fixed(self, checksums: list[int]) -> list[tuple[int, bytes]]:
        """Return all other bytes as (offset, bytes), given the CRC-32 of every tensor."""
        checksums = [zlib.crc32(self._known[0]), *checksums, zlib.crc32(b"little"), zlib.crc32(b"3\n")]
        pieces = [(self._members[index][3], content) for index, content in self._known.items()]
        for (name, size, start, data), checksum in zip(self._members, checksums, strict=True):
            header = local_header(name, size, checksum, padding=data - start - len(local_header(name, size)))
            pieces.append((start, header))
        return [*pieces, (self._end_of_members, self._directory(checksums))]

    def _directory(self, checksums):
        entries = b"".join(
            central_header(name, size, start, checksum)
            for (name, size, start, _), checksum in zip(self._members, checksums, strict=True)
        )
        count, length, start = len(self._members), len(entries), self._end_of_members
        # Every file has the 64-bit records, as from torch; a reader uses them where the others overflow.
        wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, start)
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, start + length, 1)
        capped = [min(count, 0xFFFF)] * 2 + [min(length, MAX_32), min(start, MAX_32)]
        return entries + wide + locator + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *capped, 0)


def local_header(name: str, size: int, checksum: int = 0, padding: int = 0) -> bytes:
    """Return a zip member's local header; sizes from 4 GiB on, and the padding, are in an extra field."""
    extra = struct.pack("<2H2Q", 1, 16, size, size) if size >= MAX_32 else b""
    if padding:
        extra += struct.pack("<2sH", b"FB", padding - 4) + b"Z" * (padding - 4)
    sizes = [MAX_32 if size >= MAX_32 else size] * 2
    fields = LOCAL_HEADER.pack(b"PK\x03\x04", 45, UTF8, 0, 0, NEW_YEAR_1980, checksum, *sizes, len(name), len(extra))
    return fields + name.encode() + extra


def central_header(name: str, size: int, start: int, checksum: int) -> bytes:
    """Return a zip member's entry in the central directory."""
    wide = [size, size] if size >= MAX_32 else []
    wide += [start] if start >= MAX_32 else []
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    sizes = [MAX_32 if size >= MAX_32 else size] * 2
    lengths = [len(name), len(extra), 0]
    fields = CENTRAL_HEADER.pack(
        *(b"PK\x01\x02", 45, 45, UTF8, 0, 0, NEW_YEAR_1980, checksum),
        *(*sizes, *lengths, 0, 0, 0, min(start, MAX_32)),
    )
    return fields + name.encode() + extra


def pickle_tensors(tensors, bare: bool = False) -> bytes:
    """Return the pickle that `torch.load` reads as {name: tensor}, each tensor in a storage of its own.

    Args:
        bare: whether it is a single tensor instead.
    """
    out = [pickle.PROTO, b"\x02"] + ([] if bare else [pickle.EMPTY_DICT, pickle.MARK])
    for key, (name, dtype, shape) in enumerate(tensors):
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        out += [*([] if bare else [text(name)]), b"ctorch._utils\n_rebuild_tensor_v2\n", pickle.MARK]
        out += [pickle.MARK, text("storage"), f"ctorch\n{dtype.storage}\n".encode(), text(str(key)), text("cpu")]
        out += [integer(math.prod(shape)), pickle.TUPLE, pickle.BINPERSID, integer(0)]
        out += [pickle.MARK, *map(integer, shape), pickle.TUPLE, pickle.MARK, *map(integer, strides), pickle.TUPLE]
        out += [pickle.NEWFALSE, b"ccollections\nOrderedDict\n", pickle.EMPTY_TUPLE, pickle.REDUCE]
        out += [pickle.TUPLE, pickle.REDUCE]
    return b"".join([*out, *([] if bare else [pickle.SETITEMS]), pickle.STOP])


def text(value: str) -> bytes:
    encoded = value.encode()
    return pickle.BINUNICODE + struct.pack("<L", len(encoded)) + encoded


def integer(value: int) -> bytes:
    encoded = value.to_bytes(8, "little")  # 8 bytes, signed: enough for any tensor
    return pickle.LONG1 + b"\x08" + encoded
