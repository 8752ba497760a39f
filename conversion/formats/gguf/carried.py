"""A Hugging Face folder's small files inside a GGUF file, for what its own keys have no place for.

`tokenizer.huggingface.json` is the format's own key for a tokenizer.json; the other files are in a key of this package.
They count as long as the metadata is what they were written with; a hash beside them shows that.
"""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np

from hf_llama3.errors import UserError, quoted
from hf_llama3.files.json import parse_json
from hf_llama3.files.reading import max_bytes
from hf_llama3.files.schema import fields, mapped, text

from ...config.gguf import ARCHITECTURE
from ...config.schema import TOKENIZER_FILES

TOKENIZER = "tokenizer.huggingface.json"
FILES = "huggingface.files"
WRITTEN_WITH = "huggingface.written_with"
CONTENT = text(2**26)
RULE = fields({"texts": mapped(CONTENT), "bytes": mapped(CONTENT)}, required=("texts", "bytes"))
CONFIGS = ("config.json", "generation_config.json")


def carry(files: dict[str, bytes], metadata: dict) -> dict:
    """Return the keys that carry files, for the metadata that was made from them."""
    texts, others = {}, {}
    for name, content in files.items():
        try:
            texts[name] = content.decode()
        except UnicodeDecodeError:
            others[name] = base64.b64encode(content).decode()
    whole = texts.pop("tokenizer.json", None)
    found = {FILES: json.dumps({"texts": texts, "bytes": others}, ensure_ascii=False)}
    return found | {WRITTEN_WITH: hash_of(metadata)} | ({TOKENIZER: whole} if whole is not None else {})


def unpack(metadata: dict, path: Path) -> dict[str, bytes] | None:
    """Return the files that a GGUF file carries; None if there are none, or the metadata was changed since.

    Raises:
        UserError: they are damaged, or not files that this package writes.
    """
    if FILES not in metadata or metadata.get(WRITTEN_WITH) != hash_of(metadata):
        return None
    try:
        found = parse_json(metadata[FILES].encode())
        if not RULE.takes(found):
            raise ValueError(f"it must be {RULE.words}")
        files = {name: content.encode() for name, content in found["texts"].items()}
        files |= {name: base64.b64decode(content, validate=True) for name, content in found["bytes"].items()}
        if isinstance(whole := metadata.get(TOKENIZER), str):
            files["tokenizer.json"] = whole.encode()
    except (ValueError, AttributeError) as error:
        raise UserError(f"`{FILES}` in {path} is damaged ({error}); download it again") from error
    for name, content in files.items():
        folder, _, plain = name.rpartition("/")
        known = name in CONFIGS or plain.startswith(TOKENIZER_FILES) or folder == "additional_chat_templates"
        if folder not in ("", "additional_chat_templates") or not known or "\\" in name or plain in ("", ".", ".."):
            raise UserError(f"`{FILES}` in {path} must hold files of a tokenizer, got {quoted(name)}; do not trust it")
        if len(content) > (most := max_bytes(Path(plain))):
            raise UserError(f"{quoted(name)} in {path} must be at most {most} bytes, got {len(content)}")
    return files


def hash_of(metadata: dict) -> str:
    """Return the hash of the metadata of a model and its tokenizer, without the carried files."""
    facts = {}
    for key in sorted(metadata):
        if key.startswith((f"{ARCHITECTURE}.", "tokenizer.")) and key != TOKENIZER:
            value = metadata[key]
            facts[key] = value.tolist() if isinstance(value, np.ndarray) else plain(value)
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode()).hexdigest()


def plain(value):
    """Return a number as a file stores it: 32 bits, by its shortest decimal."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
