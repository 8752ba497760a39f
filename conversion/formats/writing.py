"""Write a planned file of tensors, or recognise one that is finished."""

import errno
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hf_llama3.files.atomic import finish

from .storage import Assembly, SourceFile, write_all

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
