"""Read a GGUF file as data: its metadata and the place of each tensor; every count, length and offset is checked.

The file is a magic number, a version, two counts, the metadata, an entry for each tensor, and, aligned, their bytes.
A model may be split into `NAME-00001-of-00005.gguf` and so on; the first file holds the metadata.
Source: llama.cpp, ggml/src/gguf.cpp, whose rules for alignment and order are kept.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_llama3.errors import UserError, quoted, shown
from hf_llama3.files.reading import require_file, what_became_of

from ..storage import SourceFile, StoredTensor
from .blocks import BlockTensor
from .kinds import ARRAY, BY_KIND, BY_NUMBER, FLAG, SCALARS, TEXT, Kind

MAGIC = b"GGUF"
SUFFIX = ".gguf"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 128 * 2**20  # Llama 3's has 8 million, and 17 more with a tokenizer.json in it
MAX_ITEMS = 2**21  # texts in all lists; Llama 3's tokens and merges are 0.4 million
MAX_KEYS = 2**14
MAX_TENSORS = 2**17
MAX_KEY_BYTES = 2**16 - 1  # the format's own limit
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 4
ALIGNMENT = 32  # unless `general.alignment` says otherwise
MAX_ALIGNMENT = 2**20
SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

Value = int | float | bool | str | list[str] | np.ndarray  # a list of numbers is an array
Tensor = StoredTensor | BlockTensor


class Damaged(ValueError):
    """The file is damaged, and how."""


@dataclass(eq=False)
class Gguf:
    path: Path  # the file, or the first of several
    metadata: dict[str, Value]
    tensors: dict[str, Tensor]


class Cursor:
    """Reads the head of a file from front to back, within the file and the bound."""

    def __init__(self, file, size: int):
        self.file, self.at, self.items = file, 0, 0
        self.end = min(size, MAX_HEADER_BYTES)

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            what = "the file" if self.end < MAX_HEADER_BYTES else f"the {MAX_HEADER_BYTES} bytes that a header may have"
            raise Damaged(f"at byte {self.at} it wants {count} more, which is beyond {what}")
        content = self.file.read(count)
        if len(content) < count:
            raise Damaged(f"it was cut short at byte {self.at + len(content)}")
        self.at += count
        return content

    def number(self, size: int = 4) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self, at_most: int | None = None) -> str:
        length, start = self.number(8), self.at
        if at_most is not None and length > at_most:
            raise Damaged(f"the name at byte {start} must be at most {at_most} bytes, got {length}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise Damaged(f"the text at byte {start} is not UTF-8") from error

    def value(self, kind: int) -> Value:
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            kind, count = self.number(), self.number(8)
            if kind == TEXT:
                self.items += count
                if self.items > MAX_ITEMS:
                    raise Damaged(f"its lists must hold at most {MAX_ITEMS} texts, got {self.items}")
                return [self.text() for _ in range(count)]
            values = self.numbers(kind, count)
            return values.astype(bool) if kind == FLAG else values
        value = self.numbers(kind, 1)[0]
        # The writer meant the shortest decimal of a float32: 1e-05, not 9.999999747378752e-06.
        return bool(value) if kind == FLAG else float(str(value)) if value.dtype.kind == "f" else int(value)

    def numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in SCALARS:
            raise Damaged(f"it holds a value of type {kind}, which the format does not have there")
        dtype = SCALARS[kind]
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind == FLAG and values.size and values.max() > 1:
            raise Damaged(f"a flag must be 0 or 1, got {values.max()}")
        return values


def require_suffix(target: Path):
    """Refuse a target whose name does not end as that of a GGUF file."""
    if target.suffix != SUFFIX:
        raise UserError(f"--to gguf makes one file, so TARGET must end with {SUFFIX}, got {target.name!r}")


def is_gguf(path: Path) -> bool:
    """Tell whether a file is GGUF, by its first bytes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> Gguf:
    """Read the head of a model's file, or of all its files if it is split.

    Raises:
        UserError: one is damaged, missing, of another model, or holds a type that cannot be read.
    """
    parts = find_parts(path)
    metadata, tensors = read_part(parts[0])
    for number, part in enumerate(parts[1:], 1):
        head, more = read_part(part)
        place = head.get("split.no"), head.get("split.count")
        if place != (number, len(parts)):
            got = f"{quoted(place[0])} of {quoted(place[1])}"
            raise UserError(
                f"{part} must be part {number} of {len(parts)} by its metadata, got {got}; download it again"
            )
        if twice := sorted(more.keys() & tensors.keys()):
            raise UserError(f"{part} holds {quoted(twice[0])}, which another part holds as well; download it again")
        tensors |= more
    count, total = metadata.get("split.count", 1), metadata.get("split.tensors.count", len(tensors))
    if (len(parts) > 1 or count != 1) and (metadata.get("split.no"), count, total) != (0, len(parts), len(tensors)):
        got = f"{quoted(count)} parts with {quoted(total)} tensors; found {len(parts)} with {len(tensors)}"
        raise UserError(f"{parts[0]} is the first of {got}; keep the names NAME-00001-of-0000N{SUFFIX}")
    return Gguf(parts[0], metadata, tensors)


def find_parts(path: Path) -> list[Path]:
    """List all files of a model in order, given one of them.

    Raises:
        UserError: one is missing.
    """
    match = SPLIT_NAME.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match[3])
    found = {one.name for one in path.parent.iterdir()} if count > 1 else {path.name}
    parts = [part_name(match[1], number, count) for number in range(1, count + 1)]
    if missing := next((name for name in parts if name not in found), None):
        raise UserError(f"{path.parent} lacks {shown(missing)}, one of {count} parts; download it")
    return [path.with_name(name) for name in parts] or [path]


def part_name(stem: str, number: int, count: int) -> str:
    """Return the name of a part, counted from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}{SUFFIX}"


def find_models(path: Path) -> list[Path]:
    """List what stands where a model of this name would: the file, and parts of one, the first ones first."""
    stem = path.name.removesuffix(SUFFIX)
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    parts = [one for one in beside if (match := SPLIT_NAME.fullmatch(one.name)) and match[1] == stem]
    return [one for one in beside if one.name == path.name] + parts


def read_part(path: Path) -> tuple[dict[str, Value], dict[str, Tensor]]:
    require_file(path)
    try:
        source = SourceFile(path)
        with open(path, "rb") as file:
            return read_head(Cursor(file, path.stat().st_size), source)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Damaged as error:
        became = what_became_of(path)
        raise UserError(f"{path} is no readable GGUF file{became or f' ({error}); download it again'}") from error


def read_head(cursor: Cursor, source: SourceFile) -> tuple[dict[str, Value], dict[str, Tensor]]:
    if (magic := cursor.take(4)) != MAGIC:
        raise Damaged(f"it begins with {quoted(magic)} and not {quoted(MAGIC)}")
    version = cursor.number()
    if version not in VERSIONS:
        big = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        what = "it is of a big-endian machine" if big else f"its version must be one of {VERSIONS}, got {version}"
        raise Damaged(what)
    num_tensors, num_keys = cursor.number(8), cursor.number(8)
    for what, count, most in (("tensors", num_tensors, MAX_TENSORS), ("keys", num_keys, MAX_KEYS)):
        if count > most:
            raise Damaged(f"it must hold at most {most} {what}, got {count}")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.text(MAX_KEY_BYTES)
        if key in metadata:
            raise Damaged(f"the key {quoted(key)} stands twice")
        metadata[key] = cursor.value(cursor.number())
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise Damaged(f"`general.alignment` must be a power of two, got {quoted(alignment)}")
    entries = {}
    for _ in range(num_tensors):
        name = cursor.text(MAX_NAME_BYTES)
        if name in entries:
            raise Damaged(f"the tensor {quoted(name)} stands twice")
        entries[name] = read_entry(cursor, name)
    return metadata, place(entries, -(-cursor.at // alignment) * alignment, alignment, source)


def read_entry(cursor: Cursor, name: str) -> tuple[Kind, tuple[int, ...], int]:
    """Read a tensor's kind, its shape (slowest dimension first) and its offset."""
    if not 1 <= (dimensions := cursor.number()) <= MAX_DIMENSIONS:
        raise Damaged(f"{quoted(name)} must have 1 to {MAX_DIMENSIONS} dimensions, got {dimensions}")
    shape = tuple(reversed([cursor.number(8) for _ in range(dimensions)]))
    number, offset = cursor.number(), cursor.number(8)
    if number not in BY_NUMBER:
        raise Damaged(f"{quoted(name)} has the type {number}; only {', '.join(BY_KIND)} can be read")
    kind = BY_NUMBER[number]
    if not all(0 < length < 2**40 for length in shape) or shape[-1] % kind.block:
        raise Damaged(f"{quoted(name)} cannot have the shape {list(shape)} with the type {kind.name}")
    return kind, shape, offset


def place(entries: dict, start: int, alignment: int, source: SourceFile) -> dict[str, Tensor]:
    """Locate the tensors, which follow one another in the file, each aligned.

    Raises:
        Damaged: they overlap, leave gaps, or end beyond the file.
    """
    reached = 0
    for name, (kind, shape, offset) in sorted(entries.items(), key=lambda entry: entry[1][2]):
        if offset != reached:
            raise Damaged(f"{quoted(name)} must begin at byte {reached} of the data, got {offset}")
        end = offset + kind.bytes_of(shape)
        if start + end > (size := source.planned.size if source.planned else 0):
            raise Damaged(f"{quoted(name)} ends at byte {start + end}, and the file has {size}")
        reached = -(-end // alignment) * alignment
    return {
        name: StoredTensor(source, kind.dtype, shape, start + offset)
        if kind.exact
        else BlockTensor(source, kind, shape, start + offset)
        for name, (kind, shape, offset) in entries.items()
    }
