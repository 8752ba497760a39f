"""A Hugging Face folder: opened with its index checked, its safetensors laid out to the byte before one is written.

A safetensors file is an 8-byte length, a JSON header that says where each tensor's bytes lie, and the bytes.
"""

import json
import math
from pathlib import Path, PurePosixPath, PureWindowsPath

from hf_llama3.errors import UserError

from .checkpoint import Checkpoint, check_layers, check_names, check_shapes, same_tensors
from .hf_config import read_config
from .manifest import read_json, refuse_constant, refuse_duplicates, require_file, what_became_of
from .params import infer_version
from .storage import BY_SAFETENSORS, Dtype, SourceFile, StoredTensor
from .tokenizer import find_hf_tokenizer, read_chat_template, special_tokens
from .weights import EMBEDDING, OUTPUT, rows, without_derived

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


def open_hf(folder: Path, llama_version: str | None, instruct: bool | None) -> Checkpoint:
    """Open a Hugging Face folder; None means to infer."""
    config, inferred = read_config(folder / "config.json"), []
    tensors = find_weights(folder)
    check_layers(config["num_hidden_layers"], len(tensors), folder)
    tensors = without_derived(tensors, config["num_hidden_layers"])
    tokenizer, kind, family = find_hf_tokenizer(folder)
    version, why = infer_version(config, family, llama_version, folder)
    inferred.append(f"Llama {version}: {why}")
    chat_template = read_chat_template(folder)
    if instruct is None:
        instruct = chat_template is not None
        inferred.append("instruct: there is a chat template" if instruct else "base: there is no chat template")
    if tokenizer is None:
        inferred.append("no tokenizer: the folder has no tokenizer.json")

    tied = config["tie_word_embeddings"]
    if tied and EMBEDDING.hf in tensors:
        tensors.setdefault(OUTPUT.hf, tensors[EMBEDDING.hf])
    table = rows(config["num_hidden_layers"], embedding_split=1 if version == "2" else 0)
    check_names(tensors.keys(), {row.hf for row in table}, folder)
    shards = {name: [tensor] for name, tensor in tensors.items()}
    check_shapes(table, shards, config, folder, "config.json")
    if tied and not same_tensors(shards[OUTPUT.hf], shards[EMBEDDING.hf]):
        raise UserError(f"{folder}: config.json ties {OUTPUT.hf} to {EMBEDDING.hf}, but the file holds two that differ")
    generation = folder / "generation_config.json"
    return Checkpoint(
        *(folder, "hf", config, table, shards, tokenizer, kind, version, instruct),
        special_tokens=special_tokens(version) if kind == "tiktoken" else None,
        chat_template=chat_template,
        generation_config=read_json(generation) if generation.exists() else None,
        inferred=inferred,
    )


def find_weights(folder: Path) -> dict[str, StoredTensor]:
    """List the tensors of a Hugging Face folder by name.

    Raises:
        UserError: there are none, they are in another format, or index and files disagree.
    """
    if (folder / INDEX).exists() and (folder / SINGLE).exists():
        raise UserError(f"{folder} holds both {SINGLE} and {INDEX}; remove the one that is not meant")
    if (folder / INDEX).exists():
        return read_sharded(folder)
    if (folder / SINGLE).exists():
        return read_safetensors(folder / SINGLE)
    if list(folder.glob("*.bin")):
        raise UserError(
            f"{folder} holds its weights as .bin, which can run code when it is read; load the model in transformers "
            "and write it again with save_pretrained, which makes safetensors"
        )
    raise UserError(f"{folder} has a config.json but no {SINGLE} and no {INDEX}; download the weights")


def read_sharded(folder: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX} must hold a `weight_map` from tensors to files, got {weight_map!r}")
    tensors = {}
    for name in sorted({str(file) for file in weight_map.values()}):
        if {PurePosixPath(name).name, PureWindowsPath(name).name} != {name}:
            raise UserError(f"{folder / INDEX} must name plain files beside it, got {name!r}; do not trust this folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}, which its index names; download it")
        found = read_safetensors(folder / name)
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{folder / name} holds {twice[0]!r}, which another file holds as well")
        tensors |= found
        if found.keys() != (listed := {key for key, file in weight_map.items() if file == name}):
            differing = sorted(found.keys() ^ listed)
            raise UserError(f"{folder / INDEX} and {name} disagree about {len(differing)} tensors: {differing[:3]}")
    return tensors


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of one file by name.

    Raises:
        UserError: the header is damaged, or a tensor lies outside the file or in another's place.
    """
    require_file(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
                raise UserError(
                    f"{path} is not a whole safetensors file{what_became_of(path) or ': download it again'}"
                )
            header = json.loads(file.read(length), parse_constant=refuse_constant, object_pairs_hook=refuse_duplicates)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the header of {path} is damaged ({error}); download it again") from error
    if not isinstance(header, dict):
        raise UserError(f"the header of {path} must be a JSON object, got {type(header).__name__}")

    source, tensors, spans = SourceFile(path), {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, end) = read_entry(name, entry, path)
        tensors[name] = StoredTensor(source, dtype, shape, 8 + length + start)
        spans.append((start, end, name))
    reached = 0
    for start, end, name in sorted(spans):
        if start != reached:
            raise UserError(f"{name} in {path} must begin at byte {reached}, where the one before it ends, got {start}")
        reached = end
    if 8 + length + reached != size:
        raise UserError(f"{path} must be {8 + length + reached} bytes by its header, got {size}; download it again")
    return tensors


def read_entry(name: str, entry, path: Path):
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BY_SAFETENSORS:
        raise UserError(f"{name} in {path} has the type {dtype!r}; only {sorted(BY_SAFETENSORS)} can be converted")
    numbers = [*shape, *span] if isinstance(shape, list) and isinstance(span, list) and len(span) == 2 else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise UserError(f"the entry of {name} in {path} is damaged: {json.dumps(entry)[:200]}")
    dtype = BY_SAFETENSORS[dtype]
    if math.prod(shape) * dtype.itemsize != span[1] - span[0]:
        needed = math.prod(shape) * dtype.itemsize
        raise UserError(f"{name} {shape} in {path} must have {needed} bytes, got {span[1] - span[0]}")
    return dtype, tuple(shape), span


class SafetensorsLayout:
    """Fix where every byte of a safetensors file goes, before any tensor is at hand.

    Args:
        tensors: (name, dtype, shape), in order.
        align: what the first tensor's offset shall be a multiple of.
    """

    needs_checksums = False

    def __init__(self, tensors: list[tuple[str, Dtype, tuple[int, ...]]], align: int = 8):
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, dtype, shape in tensors:
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [start, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-(8 + len(encoded)) % align)
        self._header = len(encoded).to_bytes(8, "little") + encoded
        data = len(self._header)
        self.offsets = [data + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"]
        self.size = data + end

    def fixed(self, checksums: list[int]) -> list[tuple[int, bytes]]:
        """Return all that is not a tensor as (offset, bytes)."""
        return [(0, self._header)]
