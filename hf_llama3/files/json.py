"""JSON objects, read strictly and written as people read them."""

import collections
import json
from pathlib import Path

from hf_llama3.errors import UserError, quoted

from .reading import require_file, what_became_of

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


def refuse_constant(name):
    raise ValueError(f"{name} is not a number")


def refuse_duplicates(pairs):
    if len(unique := dict(pairs)) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"the key {quoted(counts.most_common(1)[0][0])} stands more than once")
    return unique


def to_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
