"""Small files, read whole: regular files only, and none larger than its kind can be."""

import os
import stat
from fnmatch import fnmatch
from pathlib import Path

from hf_llama3.errors import UserError

MIB = 2**20
# Name, or pattern -> the most bytes of such a file; the first that fits counts. The largest published beside a Llama is
# a tokenizer.json of 17 MB.
MAX_BYTES = {
    "params.json": MIB,
    "config.json": 4 * MIB,
    "generation_config.json": 4 * MIB,
    "special_tokens_map.json": 4 * MIB,
    "adapter_config.json": 4 * MIB,
    "added_tokens.json": 16 * MIB,
    "tokenizer_config.json": 32 * MIB,  # names added tokens one by one
    "tokenizer.json": 64 * MIB,
    "tokenizer.model*": 32 * MIB,
    "vocab.*": 32 * MIB,
    "merges.txt*": 32 * MIB,
    "*.json": 64 * MIB,
    "*.jinja": 2 * MIB,
    "*.md": 4 * MIB,
    "*.chk": 4 * MIB,
    "*SUMS": 4 * MIB,
    "*.py": 4 * MIB,
    "*": 4 * MIB,
}


def max_bytes(path: Path) -> int:
    return next(size for pattern, size in MAX_BYTES.items() if fnmatch(path.name, pattern))


def read_file(path: Path, at_most: int | None = None) -> bytes:
    """Read a small file whole.

    Args:
        at_most: bytes, where it is none of `MAX_BYTES`.

    Raises:
        UserError: it cannot be read, is no regular file, or is larger than `MAX_BYTES` allows.
    """
    limit = max_bytes(path) if at_most is None else at_most
    try:
        # Without blocking: opening a pipe would wait for its writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(not_a_file(path))
            content = file.read(limit + 1) if status.st_size <= limit else b""
            size = max(status.st_size, len(content))
    except IsADirectoryError as error:
        raise UserError(not_a_file(path)) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if size > limit:
        raise UserError(f"{path} must be at most {limit} bytes, got {size}{what_became_of(path) or ''}")
    return content


def read_text(path: Path, remedy: str) -> str:
    """Read a small file of text in UTF-8, as `read_file` does; `remedy` says what to do if it is not."""
    try:
        return read_file(path).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as UTF-8 text; {remedy}") from error


def check_file(path: Path):
    """Check a small file that a library is going to read.

    Raises:
        UserError: it is no regular file, or larger than `MAX_BYTES` allows.
    """
    require_file(path)
    if path.exists() and (size := path.stat().st_size) > (limit := max_bytes(path)):
        raise UserError(f"{path} must be at most {limit} bytes, got {size}{what_became_of(path) or ''}")


def require_file(path: Path, remedy: str = ""):
    """Refuse what is no regular file: reading a pipe would never end."""
    if path.exists() and not path.is_file():
        raise UserError(not_a_file(path) + remedy)


def require_files(folder: Path, remedy: str = ""):
    """Refuse whatever below a folder is neither a file nor a folder."""
    for path in sorted(folder.rglob("*")):
        if not path.is_dir():
            require_file(path, remedy)


def not_a_file(path: Path) -> str:
    return f"{path} must be a file; it is a folder or a device"


def leads_outside(folder: Path, path: Path) -> Path | None:
    """Return where a link leads if that is outside of its folder (and of the Hub's cache, for a folder in it).

    The cache's folders of a commit, `models--OWNER--NAME/snapshots/COMMIT`, hold links into `blobs` beside them.
    """
    home, place = folder.resolve(), path.resolve()
    commit = next((one for one in (home, *home.parents) if one.parent.name == "snapshots"), None)
    homes = [home] if commit is None else [home, commit.parent.parent / "blobs"]
    return None if any(place.is_relative_to(one) for one in homes) else place


def refuse_links(folder: Path, paths):
    """Refuse to copy a file through a link that leads outside of its folder.

    Raises:
        UserError: there is one.
    """
    for path in paths:
        if path.is_file() and (place := leads_outside(folder, path)):
            raise UserError(f"{path} is a link to {place}, outside of the folder; put a copy there if it belongs to it")


def what_became_of(path: Path) -> str | None:
    """Recognise what a failed download leaves in place of a file; None for anything else."""
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            start = file.read(256).lstrip()
    except OSError:
        return None
    if not path.stat().st_size:
        return ": it is empty; download it again"
    if start.startswith(b"version https://git-lfs"):
        return ": it is a git-lfs pointer; run `git lfs pull` or download the file itself"
    if start[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return ": it is a web page, such as a login or an expired link gives; download it again"
    return None
