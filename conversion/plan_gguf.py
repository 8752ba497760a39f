"""Plan a GGUF file, or several as llama.cpp divides them: metadata, tokenizer and the type of each tensor."""

import tempfile
from pathlib import Path

from hf_llama3.errors import UserError
from hf_llama3.files.atomic import temporary_errors, write_files
from hf_llama3.files.several import placed

from .checkpoint import Checkpoint
from .config.gguf import ROPE_FACTORS, config_to_metadata, rope_factors
from .config.hf import portable_config
from .formats.cast import Cast
from .formats.gguf import (
    BY_KIND,
    EXACT,
    FILE_TYPES,
    SPLIT_NAME,
    SUFFIX,
    GgufLayout,
    Quantise,
    Widen,
    carry,
    find_models,
    is_gguf,
    part_name,
    require_suffix,
    split_keys,
)
from .formats.storage import BY_NAME, Assembly, Part
from .plan import Plan, PlannedFile, assemble, describe, divide_by_size, hf_small_files, parse_size
from .tokenizer.files import sentencepiece_files
from .tokenizer.gguf import NONE, OtherTokenizer, check_gguf_tokenizer, tokenizer_metadata
from .tokenizer.rows import require_rows
from .tokenizer.templates import read_chat_templates
from .weights import EMBEDDING, OUTPUT, Row

MAX_PARTS = 2**16 - 1  # split.count has 16 bits


def make_gguf_plan(
    checkpoint: Checkpoint, target: Path, dtype: str | None, max_shard_size: str | None, **others
) -> Plan:
    """Plan a GGUF file; the other options of a target have no meaning for it."""
    if given := [name for name, value in others.items() if value is not None]:
        option = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{option} is for another format than gguf, got {others[given[0]]!r}; leave it out")
    require_suffix(target)
    kind = EXACT[dtype].name if dtype in EXACT else dtype
    if kind is not None and kind not in FILE_TYPES:
        raise UserError(f"--dtype must be one of {sorted(FILE_TYPES)} for a GGUF file, got {dtype!r}")
    require_rows(checkpoint)
    return plan_gguf(checkpoint, target.name, kind, max_shard_size)


def plan_gguf(source: Checkpoint, name: str, kind: str | None, max_shard_size: str | None = None) -> Plan:
    """Plan a GGUF file of this name, or several, `NAME-00001-of-00002.gguf` and so on.

    Args:
        kind: what matrices are cast to, one of `FILE_TYPES`; each keeps its own type if omitted. Vectors are float32,
            as llama.cpp wants them, and with q4_0 the embedding and the head are q8_0.
        max_shard_size: the most bytes of tensors in a file; if omitted, there is one file.
    """
    metadata, notes = config_to_metadata(source.config, source.path), []
    casts = Casts(kind, notes)
    tensors = [
        (row.gguf, assemble(source, row, "meta", casts.of(row, source.tensors[row.hf][0]))) for row in source.own_rows
    ]
    rope = source.config["rope_parameters"]
    if rope["rope_type"] == "llama3":
        factors = rope_factors(rope, source.config["head_dim"]).view("<u4")
        part = Part(source.tensors[EMBEDDING.hf][0].file, factors)
        tensors.insert(0, (ROPE_FACTORS, Assembly(BY_NAME["float32"], factors.shape, [part])))
    dtype = BY_KIND[kind].dtype.name if kind else source.more_config.get("dtype", source.dtype)
    config = portable_config(source.config, dtype, "llama", source.more_config)
    small = hf_small_files(source, config, {}, 0, notes)
    made = source.tokenizer_kind == "sentencepiece" and "tokenizer.json" not in small
    tokenizer = sentencepiece_files(source) | small if made else small
    lists = gguf_tokenizer(source, tokenizer, notes)
    stored = BY_KIND[kind].dtype.name if kind and BY_KIND[kind].exact else source.dtype
    called = source.name.rpartition("/")[2]
    called = divided[1] if (divided := SPLIT_NAME.fullmatch(called)) else called.removesuffix(SUFFIX)
    general = {"architecture": "llama", "type": "model", "name": called}
    general["file_type"] = FILE_TYPES[kind] if kind else FILE_TYPES[EXACT[stored].name]
    general |= {"quantization_version": 2} if kind and not BY_KIND[kind].exact else {}
    metadata = {f"general.{key}": value for key, value in general.items()} | lists | metadata
    files = plan_files(name, metadata | carry(small, metadata), tensors, max_shard_size)

    def make_small_files():
        if lists["tokenizer.ggml.model"] != NONE and (said := check_gguf_tokenizer(tokenizer, metadata)):
            notes.append(said)
        return {}

    return Plan(source, "gguf", casts.chosen, files, make_small_files, notes)


def plan_files(name: str, metadata: dict, tensors: list, max_shard_size: str | None) -> list[PlannedFile]:
    """Divide tensors among files as llama.cpp's gguf-split does: the first file holds all metadata."""
    limit = parse_size(max_shard_size) if max_shard_size else sum(assembly.nbytes for _, assembly in tensors)
    groups = divide_by_size(tensors, lambda tensor: tensor[1].nbytes, limit)
    if (count := len(groups)) == 1:
        return [PlannedFile(name, GgufLayout(metadata, describe(tensors)), tensors)]
    if count > MAX_PARTS:
        raise UserError(f"--max-shard-size must make at most {MAX_PARTS} files, got {count}; choose a larger one")
    files = []
    for number, group in enumerate(groups):
        keys = (metadata if number == 0 else {}) | split_keys(number, count, len(tensors))
        part = part_name(name.removesuffix(SUFFIX), number + 1, count)
        files.append(PlannedFile(part, GgufLayout(keys, describe(group)), group))
    return files


class Casts:
    """Choose the cast of each tensor of a GGUF file, and note where its type is not the one asked for."""

    def __init__(self, kind: str | None, notes: list[str]):
        self.kind, self.notes, self.made = kind and BY_KIND[kind], notes, {}
        self.chosen = self.make(self.kind) if kind else None

    def make(self, kind):
        if kind.name not in self.made:
            self.made[kind.name] = Cast(kind.dtype) if kind.exact else Quantise(kind)
        return self.made[kind.name]

    def of(self, row: Row, tensor) -> Cast | Quantise | Widen | None:
        stored = tensor.dtype.name
        if len(row.shape) == 1:
            return None if stored == "float32" else Widen() if stored != "float64" else self.make(BY_KIND["f32"])
        if self.kind is None:
            if stored == "float64":
                raise UserError(f"llama.cpp computes nothing in float64, which {row.hf} has; add --dtype f32")
            return None
        kind = self.kind
        if kind.name == "q4_0" and row.hf in (EMBEDDING.hf, OUTPUT.hf):
            kind = BY_KIND["q8_0"]
            self.note("the embedding and the head are q8_0: 4 bits cost more there than they save")
        if tensor.shape[1] % kind.block:
            self.note(f"{row.hf} is f16: its rows of {tensor.shape[1]} are no multiple of {kind.block}")
            kind = BY_KIND["f16"]
        return self.make(kind)

    def note(self, said: str):
        if said not in self.notes:
            self.notes.append(said)


def gguf_tokenizer(source: Checkpoint, files: dict[str, bytes], notes: list[str]) -> dict:
    """Return the metadata of a tokenizer, given a Hugging Face folder's small files; note where llama.cpp has none."""
    if "tokenizer.json" not in files:
        return {"tokenizer.ggml.model": NONE}
    with temporary_errors(), tempfile.TemporaryDirectory() as made:
        write_files(Path(made), {name: content for name, content in files.items() if name != "tokenizer.json"})
        templates = read_chat_templates(Path(made))
    try:
        return tokenizer_metadata(files, source.config["vocab_size"], templates)
    except OtherTokenizer as error:
        notes.append(f"llama.cpp will know token ids alone: {error}; this package reads all of it back")
        return {"tokenizer.ggml.model": NONE}


def find_old_parts(plan: Plan, target: Path, overwrite: bool) -> list[Path]:
    """List the files of a model in GGUF that a divided one would replace, the first of its parts first.

    Raises:
        UserError: they may not be replaced.
    """
    if plan.to != "gguf" or len(plan.files) == 1:
        return []
    old = [path for path in find_models(target) if path.name not in placed(target)]
    read = {path.resolve() for path in plan.source.files}
    for path in old:
        if path.resolve() in read:
            raise UserError(f"{target} and the source {path} must be apart; choose another target")
        if not overwrite:
            raise UserError(f"{path} already exists; choose another target or add --overwrite")
        if not is_gguf(path):
            raise UserError(f"{path} is no GGUF file, so it is not overwritten; remove it yourself or choose another")
    return old
