"""JSON objects: read strictly and within bounds, written readably."""

import collections
import json
import math
import re
from pathlib import Path

from hf_llama3.errors import UserError, quoted

from .reading import read_file, what_became_of

MAX_ITEMS = 2**21  # values of a file: two million empty objects take 150 MB. Llama 3's tokenizer.json has one million
MAX_DEPTH = 32  # a tokenizer.json has eight levels
MAX_DIGITS = 40  # `model_max_length` has 31 where a tokenizer knows no limit
NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
HALF = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> dict:
    """Read a JSON object, strictly: no NaN or infinity, no key twice, no number or nesting that no tool writes.

    Raises:
        UserError: it cannot be read, is no JSON object, or is the page or pointer that a failed download leaves.
    """
    content = read_file(path)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON{what_became_of(path) or f': {error}'}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def parse_json(content: bytes):
    """Parse JSON as `read_json` does.

    Raises:
        ValueError: in one short sentence, whatever is wrong.
    """
    if json.detect_encoding(content) != "utf-8":  # which no other tool reads
        raise ValueError(f"it is {json.detect_encoding(content)}; save it as plain utf-8")
    structure = b"".join(content.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])  # outside of texts
    items = sum(structure.count(sign) for sign in (b",", b"{", b"["))
    if items > MAX_ITEMS:
        raise ValueError(f"it must hold at most {MAX_ITEMS} values, got {items}")
    brackets = structure.translate(None, NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    try:
        decoded = content.decode("utf-8")
        value = json.loads(
            decoded,
            parse_int=to_int,
            parse_float=to_float,
            parse_constant=refuse_constant,
            object_pairs_hook=refuse_duplicates,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no {error.encoding}") from error
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    if brackets:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if HALF.search(decoded):
        refuse_half_characters(value)
    return value


def to_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number must have at most {MAX_DIGITS} digits, got {len(digits)}")
    return int(digits)


def to_float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{quoted(digits)} is beyond the largest number")
    return value


def refuse_constant(name):
    raise ValueError(f"{name} is not a number")


def refuse_duplicates(pairs):
    if len(unique := dict(pairs)) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"the key {quoted(counts.most_common(1)[0][0])} stands more than once")
    return unique


def refuse_half_characters(value):
    """Refuse a lone UTF-16 surrogate, which could not be written again."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{quoted(item)} holds half a character") from error


def to_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
