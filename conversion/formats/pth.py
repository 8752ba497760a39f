"""PyTorch's checkpoint file: read as data, laid out to the byte before a tensor is written.

A `.pth` file is a zip of uncompressed members: `NAME/data.pkl`, a pickle that names the tensors, and a `NAME/data/KEY`
for each storage. Reading gives where each tensor's bytes lie; the pickle is not run, see `unpickle.py`.
"""

import io
import math
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

from hf_llama3.errors import UserError, quoted, shown
from hf_llama3.files.reading import require_file, what_became_of

from .storage import Dtype, SourceFile, StoredTensor
from .unpickle import MAX_PICKLE_BYTES, Described, TensorUnpickler
from .unzipped import is_unzipped, read_unzipped

ALIGNMENT = 64  # bytes, torch's own
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
CENTRAL_HEADER = struct.Struct("<4s6H3L5H2L")
MAX_32 = 0xFFFFFFFF  # this much and more stands in a zip's 64-bit fields
UTF8 = 0x800  # flag: names are UTF-8
NEW_YEAR_1980 = 0x21  # a zip's earliest date: the same tensors give the same file


def read_pth(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a file of `torch.save` by name.

    Raises:
        UserError: the file is damaged, holds anything but tensors, or a tensor reaches beyond its storage.
    """
    require_file(path)
    unpickler, storages = read_unzipped(path) if is_unzipped(path) else read_zip(path)
    file, tensors = SourceFile(path), {}
    for name, tensor in unpickler.load_tensors().items():
        tensors[name] = place(tensor, storages, file, name)
    return tensors


def read_parts(paths: list[Path]) -> dict[str, StoredTensor]:
    """List the tensors of several files, each of which holds some of a model's.

    Raises:
        UserError: two hold the same one.
    """
    tensors = {}
    for path in paths:
        found = read_pth(path)
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{path} holds {quoted(twice[0])}, which another part holds as well")
        tensors |= found
    return tensors


def read_zip(path: Path, start: int = 0, length: int | None = None):
    """Return the unpickler of a zip of torch's, which may lie in a larger file, and where each storage lies."""
    try:
        with open(path, "rb") as file:
            length = path.stat().st_size if length is None else length
            with zipfile.ZipFile(Window(file, start, length)) as archive:
                pickled, storages, byte_order = read_members(archive, path, length)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged zip makes its reader stumble over
        reason = what_became_of(path) or f" ({error}); download it again"
        raise UserError(f"{path} is not a readable PyTorch checkpoint{reason}") from error
    if byte_order not in (None, b"little"):
        raise UserError(f"{path} must be little-endian, got byte order {byte_order!r}; save it again on this machine")
    return TensorUnpickler(path, pickled), {key: (start + at, size) for key, (at, size) in storages.items()}


def place(tensor: Described, storages: dict[str, tuple[int, int]], file: SourceFile, name: str) -> StoredTensor:
    """Say where a tensor lies, having checked that it lies within its storage."""
    dtype, key, first, shape, strides = tensor
    path, name = file.path, shown(name)
    if key not in storages:
        raise UserError(f"{path} names the storage {quoted(key)} of {name} but does not hold it; download it again")
    start, size = storages[key]
    reach = first + sum((length - 1) * step for length, step in zip(shape, strides, strict=True)) + 1
    needed = max(reach, math.prod(shape)) * dtype.itemsize  # the product, too: a stride of 0 reaches nowhere
    if min(first, *shape, *strides, 0) < 0 or needed > size:
        raise UserError(f"{name} {list(shape)} in {path} must fit its storage of {size} bytes, needs {needed}")
    return StoredTensor(file, dtype, shape, start + first * dtype.itemsize, strides)


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


def read_members(archive: zipfile.ZipFile, path: Path, end: int):
    """Return the pickle, where each storage lies as {key: (offset, bytes)}, and the byte order where it is told."""
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError(f"{path} must hold one pickle of tensors, got {len(pickles)}; it is no PyTorch checkpoint")
    if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        size = members[pickles[0]].file_size
        raise UserError(f"the list of tensors in {path} must be at most {MAX_PICKLE_BYTES} bytes, got {size}")
    prefix = pickles[0].removesuffix("data.pkl")
    storages = {}
    for name, info in members.items():
        if not name.startswith(f"{prefix}data/"):
            continue
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{name} in {path} must be stored uncompressed; save the checkpoint again with torch.save")
        archive.fp.seek(info.header_offset)
        header = LOCAL_HEADER.unpack(archive.fp.read(LOCAL_HEADER.size))
        storages[name.removeprefix(f"{prefix}data/")] = (
            info.header_offset + LOCAL_HEADER.size + header[-2] + header[-1],
            info.file_size,
        )
    if any(offset + size > end for offset, size in storages.values()):
        raise UserError(f"{path} is truncated at {end} bytes; download it again")
    byte_order = archive.read(f"{prefix}byteorder") if f"{prefix}byteorder" in members else None
    return archive.read(pickles[0]), storages, byte_order


class PthLayout:
    """Fix where every byte of a `.pth` file goes, before any tensor is at hand.

    Args:
        stem: the file's name without suffix, which torch puts before every member's.
        tensors: (name, dtype, shape), in order.
    """

    needs_checksums = True  # the CRC-32 of every tensor stands in the headers

    def __init__(self, stem: str, tensors: list[tuple[str, Dtype, tuple[int, ...]]]):
        sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in tensors]
        members = [(f"{stem}/data.pkl", len(pickled := pickle_tensors(tensors)))]
        members += [(f"{stem}/data/{key}", size) for key, size in enumerate(sizes)]
        members += [(f"{stem}/byteorder", 6), (f"{stem}/version", 2)]
        self._known = {0: pickled, len(members) - 2: b"little", len(members) - 1: b"3\n"}
        self._members = []  # (name, size, where its header begins, where its bytes begin)
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
        """Return all that is not a tensor as (offset, bytes), given the CRC-32 of every tensor's bytes."""
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
        # The 64-bit records stand in every file, as torch writes them: a reader takes them where the others overflow.
        wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, start)
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, start + length, 1)
        capped = [min(count, 0xFFFF)] * 2 + [min(length, MAX_32), min(start, MAX_32)]
        return entries + wide + locator + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *capped, 0)


def local_header(name: str, size: int, checksum: int = 0, padding: int = 0) -> bytes:
    """Return a zip member's own header; sizes of 4 GiB and more stand in an extra field, as does the padding."""
    extra = struct.pack("<2H2Q", 1, 16, size, size) if size >= MAX_32 else b""
    if padding:
        extra += struct.pack("<2sH", b"FB", padding - 4) + b"Z" * (padding - 4)
    sizes = [MAX_32 if size >= MAX_32 else size] * 2
    fields = LOCAL_HEADER.pack(b"PK\x03\x04", 45, UTF8, 0, 0, NEW_YEAR_1980, checksum, *sizes, len(name), len(extra))
    return fields + name.encode() + extra


def central_header(name: str, size: int, start: int, checksum: int) -> bytes:
    """Return a zip member's entry in the directory at the end of the file."""
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


def pickle_tensors(tensors) -> bytes:
    """Write the pickle that `torch.load` turns into {name: tensor}, each tensor in a storage of its own."""
    out = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for key, (name, dtype, shape) in enumerate(tensors):
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        out += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n", pickle.MARK]
        out += [pickle.MARK, text("storage"), f"ctorch\n{dtype.storage}\n".encode(), text(str(key)), text("cpu")]
        out += [integer(math.prod(shape)), pickle.TUPLE, pickle.BINPERSID, integer(0)]
        out += [pickle.MARK, *map(integer, shape), pickle.TUPLE, pickle.MARK, *map(integer, strides), pickle.TUPLE]
        out += [pickle.NEWFALSE, b"ccollections\nOrderedDict\n", pickle.EMPTY_TUPLE, pickle.REDUCE]
        out += [pickle.TUPLE, pickle.REDUCE]
    return b"".join([*out, pickle.SETITEMS, pickle.STOP])


def text(value: str) -> bytes:
    encoded = value.encode()
    return pickle.BINUNICODE + struct.pack("<L", len(encoded)) + encoded


def integer(value: int) -> bytes:
    encoded = value.to_bytes(8, "little")  # 8 bytes, signed: enough for any tensor
    return pickle.LONG1 + b"\x08" + encoded
