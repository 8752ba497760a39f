"""Whether a file is what its name says: what became of a broken download, and hashes."""

import collections
import json
import os
from pathlib import Path

from hf_llama3.errors import UserError

MAX_JSON_BYTES = 64 * 2**20  # the 405B's index is 0.1 MB, a tokenizer.json 17 MB


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict:
    """Read a JSON object, strictly: no NaN or infinity, no key twice.

    Raises:
        UserError: it cannot be read, is none, or is what a failed download leaves under that name.
    """
    try:
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


def refuse_constant(name):
    raise ValueError(f"{name} is not a number")


def refuse_duplicates(pairs):
    if len(unique := dict(pairs)) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"the key {counts.most_common(1)[0][0]!r} stands more than once")
    return unique


def what_became_of(path: Path) -> str | None:
    """Recognise what stands in place of a file whose download failed; None if it is nothing of the kind."""
    try:
        with open(path, "rb") as file:
            start = file.read(256).lstrip()
    except OSError:
        return None
    if not os.path.getsize(path):
        return ": it is empty; download it again"
    if start.startswith(b"version https://git-lfs"):
        return ": it is a git-lfs pointer; run `git lfs pull` or download the file itself"
    if start[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return ": it is a web page, such as a login or an expired link gives; download it again"
    return None


def to_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
