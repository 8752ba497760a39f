"""Write a planned file of tensors, or recognise one that is finished."""

import errno
import math
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hf_llama3.files.atomic import finish

from .storage import BLOCK_BYTES, Assembly, SourceFile, read_back, row_blocks, write_all

WORKERS = 2  # threads: one moves bytes while the other hashes or rearranges


def is_whole(path: Path, file) -> bool:
    """Tell whether a file of an earlier run is what would be written, to the bit."""
    if not path.is_file() or path.stat().st_size != file.layout.size:
        return False
    written, checksums = SourceFile(path), []
    for (_, assembly), offset in zip(file.tensors, file.layout.offsets, strict=True):
        checksum = checksum_if_written(assembly, written, offset, file.layout.needs_checksums)
        if checksum is None:
            return False
        checksums.append(checksum)
    pieces = file.layout.fixed(checksums)
    return all(written.read(offset, len(content)) == content for offset, content in pieces)


def checksum_if_written(assembly: Assembly, written: SourceFile, offset: int, with_checksum: bool) -> int | None:
    """Return the CRC-32 of a tensor (0 if it is not wanted), or None if a file does not hold it, to the bit."""
    checksum = 0
    for block in assembly.blocks():
        there = written.read(offset, block.nbytes)
        if not np.array_equal(block.reshape(-1).view(np.uint8), np.frombuffer(there, np.uint8)):
            return None
        checksum = zlib.crc32(there, checksum) if with_checksum else 0
        offset += block.nbytes
    return checksum


def runs_of_part(assembly: Assembly, number: int, offset: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield what one part of a tensor at `offset` adds to a file, as (offset, bytes): whole, or row by row."""
    part, dtype = assembly.parts[number], assembly.dtype
    before = [other.array.shape for other in assembly.parts[:number]]
    if assembly.axis == 0:  # rows that are reordered may have more dimensions
        offset, width, step = offset + dtype.bytes_of((sum(map(math.prod, before)),)), None, None
    else:
        offset += dtype.bytes_of((sum(shape[assembly.axis] for shape in before),))
        width, step = dtype.bytes_of(part.array.shape[1:]), dtype.bytes_of(assembly.shape[1:])
    for rows in row_blocks(part.array):
        block = part.file.take(part.array[rows])
        content = (assembly.cast(block, assembly.stored) if assembly.cast else block).reshape(-1).view(np.uint8)
        for run in content.reshape(-1, width or content.size):
            yield offset, run
            offset += step or run.size


def write_part(assembly: Assembly, number: int, out, offset: int):
    """Write one part of a tensor, which others complete, into `out`, which is unbuffered."""
    for at, run in runs_of_part(assembly, number, offset):
        write_all(out, run, at)


def holds_part(assembly: Assembly, number: int, out, offset: int) -> bool:
    """Tell whether a file holds a part of a tensor, to the bit."""
    return all(read_back(out, at, run.size) == run.tobytes() for at, run in runs_of_part(assembly, number, offset))


def checksum_of(out, offset: int, count: int) -> int:
    """Return the CRC-32 of bytes of a file."""
    checksum = 0
    for start in range(0, count, BLOCK_BYTES):
        checksum = zlib.crc32(read_back(out, offset + start, min(BLOCK_BYTES, count - start)), checksum)
    return checksum


def write_tensors(file, folder: Path, progress):
    """Write one file of tensors: the tensors first, side by side, then the headers that make it readable."""
    path = folder / f"{file.name}.partial"
    with open(path, "wb", buffering=0) as out:
        reserve(out, file.layout.size)

    def write_one(entry):
        (_, assembly), offset = entry
        with open(path, "r+b", buffering=0) as out:
            return assembly.write(out, offset, progress, with_checksum=file.layout.needs_checksums)

    with ThreadPoolExecutor(WORKERS) as pool:
        checksums = list(pool.map(write_one, zip(file.tensors, file.layout.offsets, strict=True)))
    with open(path, "r+b", buffering=0) as out:
        for offset, content in file.layout.fixed(checksums):
            write_all(out, content, offset)
    finish(path)


def reserve(out, size: int):
    """Reserve the space of a whole file, so that a full disk is noticed before the first tensor."""
    try:
        os.posix_fallocate(out.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        out.truncate(size)  # another system, another file system
