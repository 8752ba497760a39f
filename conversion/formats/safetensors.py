"""A safetensors file: read and check its header, or lay it out to the byte before a tensor is written.

The file is an 8-byte length, a JSON header with the place of every tensor, and the tensors' bytes.
"""

import json
import math
from pathlib import Path

from hf_llama3.errors import UserError, quoted, shown
from hf_llama3.files.json import parse_json
from hf_llama3.files.reading import require_file, what_became_of

from .storage import BY_SAFETENSORS, Dtype, SourceFile, StoredTensor

MAX_HEADER_BYTES = 8 * 2**20  # seventy thousand tensors; what json makes of a hostile header takes 25 times as much
MAX_DIMENSIONS = 32  # numpy's
KINDS = sorted(BY_SAFETENSORS)


def read_header(path: Path) -> tuple[dict, int, int]:
    """Return the header of one file, its length and the file's size.

    Raises:
        UserError: it is damaged.
    """
    require_file(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
                raise UserError(
                    f"{path} is not a whole safetensors file{what_became_of(path) or ': download it again'}"
                )
            header = parse_json(file.read(length))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the header of {path} is damaged ({error}); download it again") from error
    if not isinstance(header, dict):
        raise UserError(f"the header of {path} must be a JSON object, got {type(header).__name__}")
    return header, length, size


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts that a header holds beside its tensors."""
    metadata = read_header(path)[0].get("__metadata__")
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return {key: value for key, value in texts if isinstance(value, str)}


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of one file by name.

    Raises:
        UserError: the header is damaged, or a tensor lies outside of the file or overlaps another.
    """
    header, length, size = read_header(path)
    source, tensors, spans = SourceFile(path), {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, end) = read_entry(name, entry, path)
        tensors[name] = StoredTensor(source, dtype, shape, 8 + length + start)
        spans.append((start, end, name))
    reached = 0
    for start, end, name in sorted(spans):
        if start != reached:
            raise UserError(
                f"{shown(name)} in {path} must begin at byte {reached}, where the one before it ends, got {start}"
            )
        reached = end
    if 8 + length + reached != size:
        raise UserError(f"{path} must be {8 + length + reached} bytes by its header, got {size}; download it again")
    return tensors


def read_entry(name: str, entry, path: Path):
    label, fields = shown(name), entry if isinstance(entry, dict) else {}
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BY_SAFETENSORS:
        raise UserError(f"{label} in {path} has the type {quoted(dtype)}; only {KINDS} can be converted")
    numbers = [*shape, *span] if isinstance(shape, list) and isinstance(span, list) and len(span) == 2 else [None]
    if len(numbers) > MAX_DIMENSIONS + 2 or not all(type(one) is int and 0 <= one < 2**63 for one in numbers):
        raise UserError(f"the entry of {label} in {path} is damaged: {quoted(entry)}")
    dtype = BY_SAFETENSORS[dtype]
    if math.prod(shape) * dtype.itemsize != span[1] - span[0]:
        needed = math.prod(shape) * dtype.itemsize
        raise UserError(f"{label} {quoted(shape)} in {path} must have {needed} bytes, got {span[1] - span[0]}")
    return dtype, tuple(shape), span


class SafetensorsLayout:
    """The place of every byte of a safetensors file.

    Args:
        tensors: (name, dtype, shape), in order.
        align: the first tensor begins at a multiple of this.
        metadata: texts for the header.
    """

    needs_checksums = False

    def __init__(self, tensors: list[tuple[str, Dtype, tuple[int, ...]]], align: int = 8, metadata=()):
        header, end = {"__metadata__": {"format": "pt"} | dict(metadata)}, 0
        for name, dtype, shape in tensors:
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [start, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-(8 + len(encoded)) % align)
        self._header = len(encoded).to_bytes(8, "little") + encoded
        data = len(self._header)
        self.offsets = [data + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"]
        self.size = data + end

    def fixed(self, checksums: list[int]) -> list[tuple[int, bytes]]:
        """Return all other bytes as (offset, bytes)."""
        return [(0, self._header)]
