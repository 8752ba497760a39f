"""Lay out a GGUF file to the byte before a tensor is written."""

import numpy as np

from ..storage import Dtype
from .file import ALIGNMENT, MAGIC, Value
from .kinds import ARRAY, EXACT, FLAG, FLOAT32, INT32, TEXT, UINT16, UINT32, Kind

VERSION = 3


class GgufLayout:
    """The place of every byte of a GGUF file.

    Args:
        metadata: texts, numbers, flags, and lists of one of these.
        tensors: (name, type, shape), in order.
    """

    needs_checksums = False

    def __init__(self, metadata: dict[str, Value], tensors: list[tuple[str, Dtype | Kind, tuple[int, ...]]]):
        entries, places, end = [], [], 0
        for name, dtype, shape in tensors:
            kind = dtype if isinstance(dtype, Kind) else EXACT[dtype.name]
            lengths = b"".join(length.to_bytes(8, "little") for length in reversed(shape))
            numbers = len(shape).to_bytes(4, "little") + lengths + kind.number.to_bytes(4, "little")
            entries.append(encode_text(name) + numbers + end.to_bytes(8, "little"))
            places.append((end, end + kind.bytes_of(shape)))
            end = align(places[-1][1])
        pairs = [encode_text(key) + encode(value) for key, value in metadata.items()]
        counts = (VERSION.to_bytes(4, "little"), len(tensors).to_bytes(8, "little"), len(pairs).to_bytes(8, "little"))
        head = b"".join((MAGIC, *counts, *pairs, *entries))
        data = align(len(head))
        self._head = head.ljust(data, b"\0")
        self.offsets = [data + start for start, _ in places]
        self._gaps = [(data + stop, bytes(align(stop) - stop)) for _, stop in places if stop % ALIGNMENT]
        self.size = data + end

    def fixed(self, checksums: list[int]) -> list[tuple[int, bytes]]:
        """Return all other bytes as (offset, bytes)."""
        return [(0, self._head), *self._gaps]


def split_keys(number: int, count: int, num_tensors: int) -> dict[str, Value]:
    """Return the keys by which llama.cpp recognises a part of a model; each of the type that it asks for."""
    return {
        "split.no": np.uint16(number),
        "split.count": np.uint16(count),
        "split.tensors.count": np.int32(num_tensors),
    }


def align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def encode_text(text: str) -> bytes:
    encoded = text.encode()
    return len(encoded).to_bytes(8, "little") + encoded


def encode(value: Value) -> bytes:
    """Return a value's bytes, after the number of its type."""
    number, content = encode_value(value)
    return number.to_bytes(4, "little") + content


def encode_value(value: Value) -> tuple[int, bytes]:
    match value:
        case bool():
            return FLAG, bytes([value])
        case str():
            return TEXT, encode_text(value)
        case int():
            return UINT32, value.to_bytes(4, "little")
        case np.uint16():
            return UINT16, value.tobytes()
        case np.int32():
            return INT32, value.tobytes()
        case float():
            return FLOAT32, np.array(value, "<f4").tobytes()
        case np.ndarray():
            kind = {"f": FLOAT32, "i": INT32}[value.dtype.kind]
            content = value.astype("<f4" if kind == FLOAT32 else "<i4").tobytes()
        case list():
            kind, content = TEXT, b"".join(map(encode_text, value))
    return ARRAY, kind.to_bytes(4, "little") + len(value).to_bytes(8, "little") + content
