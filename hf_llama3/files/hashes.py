"""Lists of file hashes: read, checked and written."""

import hashlib
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from hf_llama3.errors import UserError, quoted

from .progress import byte_bar
from .reading import read_text, what_became_of

CHECKLIST = "checklist.chk"  # Meta's: an MD5 for each file, as `md5sum` writes it
CHECKSUMS = "SHA256SUMS"  # ours: as `sha256sum` writes it
HEX_DIGITS = {32: "md5", 64: "sha256"}  # some lists under Meta's name hold the longer kind
READ_BYTES = 4 * 2**20


def read_sums(path: Path) -> dict[str, str]:
    """Read a list of hashes: {file name: hash}.

    Raises:
        UserError: a line is malformed, or names a file elsewhere.
    """
    sums = {}
    for line in filter(str.strip, read_text(path, "download it again, or remove it to go without").splitlines()):
        value, _, name = line.strip().partition(" ")
        name = name.strip().removeprefix("*")
        is_hash = len(value) in HEX_DIGITS and set(value.lower()) <= set("0123456789abcdef")
        place = PurePosixPath(name)
        if not is_hash or place.is_absolute() or ".." in place.parts or "\\" in name or not place.name:
            remedy = what_became_of(path) or "; download it again, or remove it to go without"
            raise UserError(f"{path} must hold a hash and a file name on each line, got {quoted(line)}{remedy}")
        sums[name] = value.lower()
    return sums


def check_sums(
    path: Path, progress: bool = False, remedy: str = "download it again", only: Container[str] | None = None, but=()
):
    """Check the hash of every file of a list that is present.

    Args:
        only: the files that are meant, if not all are.
        but: files that are not meant.

    Raises:
        UserError: a file has another hash.
    """
    sums = {name: value for name, value in read_sums(path).items() if (path.parent / name).is_file()}
    sums = {name: sums[name] for name in sums if name not in but and (only is None or name in only)}
    total = sum((path.parent / name).stat().st_size for name in sums)
    with ThreadPoolExecutor(max_workers=2) as pool, byte_bar(f"checking {path.name}", total, progress) as bar:
        kinds = [HEX_DIGITS[len(value)] for value in sums.values()]
        found = pool.map(lambda name, kind: hash_file(path.parent / name, kind, bar.update), sums, kinds)
        for (name, expected), got in zip(sums.items(), found, strict=True):
            if got != expected:
                raise UserError(
                    f"{path.parent / name} must have the hash {expected} of {path.name}, got {got}; {remedy}"
                )


def hash_file(path: Path, kind: str, progress: Callable[[int], None]) -> str:
    """Return a file's hash, "md5" or "sha256", in hexadecimal; `progress` gets the number of bytes read."""
    digest, buffer = hashlib.new(kind, usedforsecurity=False), bytearray(READ_BYTES)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            progress(count)
    return digest.hexdigest()


def format_sums(sums: dict[str, str]) -> bytes:
    """Write a list of hashes as `md5sum` and `sha256sum` do."""
    return "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())).encode()
