"""Whether a file is what its name says: hashes in and out, and what became of a broken download."""

import collections
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from hf_llama3.errors import UserError

TRAINING_FACTS = "training.json"  # what training leaves in a model's folder, for its card
CURVES_FILE = "curves.png"  # its losses, as a picture
EVALUATIONS = "evaluations.json"  # what `evaluate --record` measured, for the card
CHECKLIST = "checklist.chk"  # Meta's: an MD5 for each file, as `md5sum` writes it
CHECKSUMS = "SHA256SUMS"  # ours: as `sha256sum` writes it
HEX_DIGITS = {32: "md5", 64: "sha256"}  # some lists under Meta's name hold the longer kind
READ_BYTES = 4 * 2**20
MAX_JSON_BYTES = 64 * 2**20  # the 405B's index is 0.1 MB, a tokenizer.json 17 MB


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict:
    """Read a JSON object, strictly: no NaN or infinity, no key twice.

    Raises:
        UserError: it cannot be read, is none, or is what a failed download leaves under that name.
    """
    try:
        require_file(path)
        if path.stat().st_size > limit:
            raise UserError(f"{path} must be at most {limit} bytes, got {path.stat().st_size}")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        value = json.loads(content, parse_constant=refuse_constant, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON{what_became_of(path) or f': {error}'}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def require_file(path: Path):
    """Raise if something else stands under the name: a pipe would be read for ever."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} must be a file; it is a folder or a device")


def refuse_constant(name):
    raise ValueError(f"{name} is not a number")


def refuse_duplicates(pairs):
    if len(unique := dict(pairs)) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"the key {counts.most_common(1)[0][0]!r} stands more than once")
    return unique


def what_became_of(path: Path) -> str | None:
    """Recognise what stands in place of a file whose download failed; None if it is nothing of the kind."""
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


def to_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_sums(path: Path) -> dict[str, str]:
    """Read a list of hashes: {file name: hash}.

    Raises:
        UserError: a line is none, or names a file elsewhere.
    """
    sums = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read{what_became_of(path) or ''}") from error
    for line in filter(str.strip, lines):
        value, _, name = line.strip().partition(" ")
        name = name.strip().removeprefix("*")
        is_hash = len(value) in HEX_DIGITS and set(value.lower()) <= set("0123456789abcdef")
        if not is_hash or Path(name).name != name:
            remedy = what_became_of(path) or "; download it again, or remove it to go without"
            raise UserError(f"{path} must hold a hash and a file name on each line, got {line[:80]!r}{remedy}")
        sums[name] = value.lower()
    return sums


def check_sums(path: Path, progress: bool = False, remedy: str = "download it again"):
    """Raise unless every file of a list that is there has the hash that stands there.

    Raises:
        UserError: naming the file, with both hashes.
    """
    sums = {name: value for name, value in read_sums(path).items() if (path.parent / name).is_file()}
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
    """Return a file's hash, "md5" or "sha256", in hexadecimal; `progress` is told of the bytes."""
    digest, buffer = hashlib.new(kind, usedforsecurity=False), bytearray(READ_BYTES)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            progress(count)
    return digest.hexdigest()


def byte_bar(name: str, total: int, shown: bool) -> tqdm:
    """Return a bar of bytes with the time left, on standard error."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=not shown)


def format_sums(sums: dict[str, str]) -> bytes:
    """Write a list of hashes as `md5sum` and `sha256sum` do."""
    return "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())).encode()
