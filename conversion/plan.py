"""Plan a conversion: what it reads, writes and needs, before it starts."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from hf_llama3.errors import UserError, quoted
from hf_llama3.files.json import to_json
from hf_llama3.remote_code import code_files

from .checkpoint import Checkpoint
from .config.hf import portable_config
from .config.params import config_to_params
from .config.sidecar import SIDECAR, make_sidecar
from .formats.cast import Cast
from .formats.dcp import METADATA, SUFFIX, DcpLayout, make_metadata
from .formats.gguf import GgufLayout, Quantise, Recompute
from .formats.hf import INDEX, SINGLE
from .formats.meta import PARAMS_FILE
from .formats.pth import PthLayout
from .formats.safetensors import SafetensorsLayout
from .formats.storage import Assembly, Part
from .tokenizer.files import (
    TOKENIZER_MODEL,
    hash_of,
    hf_tokenizer,
    meta_tokenizer,
    tokenizer_paths,
)
from .tokenizer.templates import llama3_chat_template
from .weights import Row, half_to_interleaved, interleaved_to_half, name_in_file, sizes

DEFAULT_SHARD_SIZE = "5GB"
TORCHTITAN = "torchtitan"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(eq=False)
class PlannedFile:
    """A file of tensors, with the place of every byte."""

    name: str
    layout: SafetensorsLayout | PthLayout | DcpLayout | GgufLayout
    tensors: list[tuple[str, Assembly]] = field(repr=False)


@dataclass(eq=False)
class Plan:
    """Everything that a conversion writes; small files are made beside the tensors, since a tokenizer takes time."""

    source: Checkpoint
    to: str  # "hf", "meta", "dcp" or "gguf"
    cast: Cast | Quantise | None
    files: list[PlannedFile]
    make_small_files: Callable[[], dict[str, bytes]]  # adds to `notes`
    notes: list[str]  # remarks about the result for the user

    @property
    def nbytes(self) -> int:
        return sum(file.layout.size for file in self.files)

    @property
    def needed_bytes(self) -> int:
        """The most that the target takes; a tokenizer.json is eight times as large as its tokenizer.model."""
        source = self.source
        times = 10 if self.to != "meta" and source.tokenizer_kind in ("tiktoken", "sentencepiece") else 1
        carried = tokenizer_paths(source.hf_tokenizer).values() if source.hf_tokenizer else ()
        small = [times * path.stat().st_size for path in (source.tokenizer, *carried) if path]
        return self.nbytes + sum(small)

    @property
    def num_tensors(self) -> int:
        return sum(len(file.tensors) for file in self.files)


def plan_hf(source: Checkpoint, model_type: str, max_shard_size: str, cast: Cast | None) -> Plan:
    """Plan a Hugging Face folder of `model_type` "llama", which everything reads, or "llama3" with its code."""
    dtype = cast.to.name if cast else source.more_config.get("dtype", source.dtype)
    head = source.head
    tensors = [(name_in_file(row.hf, head), assemble(source, row, "hf", cast)) for row in source.own_rows]
    divided = divide(tensors, lambda tensor: tensor[1].nbytes, parse_size(max_shard_size))
    files = [PlannedFile(name, SafetensorsLayout(describe(group)), group) for name, group in divided.items()]

    notes = []

    def make_small_files():
        weight_map = {name: file.name for file in files for name, _ in file.tensors}
        nbytes = sum(assembly.nbytes for _, assembly in tensors)
        config = portable_config(source.config, dtype, model_type, source.more_config)
        small = hf_small_files(source, config, weight_map, nbytes, notes)
        return small | (code_files() if model_type == "llama3" else {})

    return Plan(source, "hf", cast, files, make_small_files, notes)


def plan_dcp(source: Checkpoint, names: str, max_shard_size: str, cast: Cast | None) -> Plan:
    """Plan a folder of torch.distributed.checkpoint, with a Hugging Face folder's other files beside it.

    Args:
        names: "llama" or "llama3" for Hugging Face's, "torchtitan" for those that torchtitan has from Meta. A tied head
            is written too, since a training framework asks for what its model's `state_dict` lists.
    """
    dtype = cast.to.name if cast else source.more_config.get("dtype", source.dtype)
    order = "meta" if names == TORCHTITAN else "hf"
    if order == "meta":
        config_to_params(source.config, source.path, source.config["num_key_value_heads"])  # has it a place for all?
    head = source.head
    tensors = [
        (row.meta if order == "meta" else name_in_file(row.hf, head), assemble(source, row, order, cast))
        for row in source.rows
    ]
    groups = divide(tensors, lambda tensor: tensor[1].nbytes, parse_size(max_shard_size)).values()
    described = {f"__0_{index}{SUFFIX}": describe(group) for index, group in enumerate(groups)}
    files = [
        PlannedFile(name, DcpLayout(described[name]), group) for name, group in zip(described, groups, strict=True)
    ]
    notes = [f"names of tensors: {'torchtitan and Meta' if order == 'meta' else 'Hugging Face'}'s, as {tensors[1][0]}"]

    def make_small_files():
        metadata = make_metadata({file.name: (file.layout, described[file.name]) for file in files})
        config = portable_config(source.config, dtype, "llama3" if names == "llama3" else "llama", source.more_config)
        small = hf_small_files(source, config, {}, 0, notes) | {METADATA: metadata}
        return small | (code_files() if names == "llama3" else {})

    return Plan(source, "dcp", cast, files, make_small_files, notes)


def divide(entries: list, nbytes: Callable[..., int], limit: int) -> dict[str, list]:
    """Divide tensors, in order, among safetensors files of at most `limit` bytes; return them by file name."""
    groups = divide_by_size(entries, nbytes, limit)
    total = len(groups)
    if total == 1:
        return {SINGLE: groups[0]}
    return {f"model-{index + 1:05d}-of-{total:05d}.safetensors": group for index, group in enumerate(groups)}


def divide_by_size(entries: list, nbytes: Callable[..., int], limit: int) -> list[list]:
    """Divide tensors, in order, into groups of at most `limit` bytes, or of a single tensor."""
    groups, room = [[]], limit
    for entry in entries:
        size = nbytes(entry)
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(entry)
        room -= size
    return groups


def hf_small_files(source: Checkpoint, config: dict, weight_map: dict[str, str], nbytes: int, notes: list[str]):
    """Return the small files by name; `weight_map` maps tensors to files, `nbytes` is the size of all tensors."""
    small = {"config.json": to_json(config)}
    if source.generation_config is not None:
        small["generation_config.json"] = to_json(source.generation_config)
    if len(set(weight_map.values())) > 1:
        small[INDEX] = to_json({"metadata": {"total_size": nbytes}, "weight_map": weight_map})
    return small | hf_tokenizer(source, notes)


def plan_meta(source: Checkpoint, mp: int, cast: Cast | None) -> Plan:
    """Plan a directory of Meta's with `mp` model-parallel shards."""
    size, kv_heads = sizes(source.config), source.config["num_key_value_heads"]
    check_divisible(source, mp)
    written_kv_heads = max(kv_heads, mp)
    params = config_to_params(source.config, source.path, written_kv_heads)
    files = []
    for shard in range(mp):
        tensors = []
        for row in source.rows:
            start, stop = 0, None
            if row.split is not None:
                # With more shards than key/value heads, a head is written into every shard that needs it.
                copies = written_kv_heads // kv_heads if "key_value" in row.shape else 1
                width = row.full_shape(size)[row.split] * copies // mp
                start = shard // copies * width
                stop = start + width
            tensors.append((row.meta, assemble(source, row, "meta", cast, start, stop)))
        stem = f"consolidated.{shard:02d}"
        files.append(PlannedFile(f"{stem}.pth", PthLayout(stem, describe(tensors)), tensors))

    notes = []
    if written_kv_heads != kv_heads:
        notes.append(f"each of the {kv_heads} key/value heads is stored {mp // kv_heads} times, once for every shard")
    factor = source.config["rope_parameters"].get("factor", 8)
    if factor != 8:
        notes.append(
            f"params.json cannot say the RoPE factor {factor:g}: Meta's own code takes 8, this package {SIDECAR}"
        )

    def make_small_files():
        small, special_tokens = meta_tokenizer(source, notes)
        template = None if source.chat_template == llama3_chat_template() else source.chat_template
        model = small.get(TOKENIZER_MODEL)
        sidecar = make_sidecar(
            *(source.config, source.more_config, source.generation_config, source.instruct, special_tokens, template),
            model and hash_of(model),
        )
        return small | {SIDECAR: to_json(sidecar), PARAMS_FILE: to_json(params)}

    return Plan(source, "meta", cast, files, make_small_files, notes)


def assemble(
    source: Checkpoint, row: Row, to: str, cast: Cast | None = None, start: int = 0, stop: int | None = None
) -> Assembly:
    """Return a tensor in the order `to`, "hf" or "meta", or its part from `start` to `stop` along the divided axis."""
    shape = list(row.full_shape(sizes(source.config)))
    stop = shape[row.split or 0] if stop is None else stop
    parts = source.cut(row, start, stop)
    if row.rotary and source.order != to:
        reorder = interleaved_to_half if to == "hf" else half_to_interleaved
        parts = [Part(part.file, reorder(part.array, source.config["head_dim"])) for part in parts]
    shape[row.split or 0] = stop - start
    stored = source.tensors[row.hf][0].dtype
    needed = cast if cast is not None and (cast.to != stored or isinstance(cast, Recompute)) else None
    return Assembly(stored, tuple(shape), parts, axis=row.split or 0, cast=needed)


def describe(tensors: list[tuple[str, Assembly]]):
    return [(name, assembly.dtype, assembly.shape) for name, assembly in tensors]


def check_divisible(source: Checkpoint, mp: int):
    """Check that `mp` shards divide the model as Meta's parallel layers do.

    Raises:
        UserError: they do not.
    """
    config = source.config
    for key in ("num_attention_heads", "intermediate_size", "vocab_size", "hidden_size"):
        if mp < 1 or config[key] % mp:
            raise UserError(f"--mp must divide `{key}` {config[key]} of {source.path}, got {mp}")
    kv_heads = config["num_key_value_heads"]
    if kv_heads % mp and mp % kv_heads:
        raise UserError(f"--mp must divide the {kv_heads} key/value heads of {source.path} or be a multiple, got {mp}")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "5GB" or "200MiB"."""
    factors = {unit.upper(): factor for unit, factor in UNITS.items()}
    match = re.fullmatch(r"\s*0*([1-9][0-9]{0,11})\s*([A-Za-z]{2,3})\s*", text)
    if match and match[2].upper() in factors:
        return int(match[1]) * factors[match[2].upper()]
    raise UserError(f"--max-shard-size must be a number with one of {sorted(UNITS)}, got {quoted(text)}")
