"""Convert an adapter from PEFT's names and order of rotary rows to Meta's, or back, in files that PEFT loads.

PEFT loads one beside transformers' model, the other beside a model with Meta's module names and rotation. The original
configuration is kept in the header of the matrices, and comes back.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_llama3.errors import UserError, quoted
from hf_llama3.files.json import to_json
from hf_llama3.files.reading import read_file

from ..config.hf import read_config
from ..config.params import read_params
from ..formats.gguf import SUFFIX, require_suffix
from ..formats.gguf.file import read_gguf
from ..formats.meta import PARAMS_FILE
from ..formats.safetensors import SafetensorsLayout, read_metadata
from ..formats.storage import to_floats
from ..formats.torch_files import ADAPTER
from ..weights import EMBEDDING, LAYER_TABLE, OUTPUT, half_to_interleaved, interleaved_to_half
from .files import LORA, LORA_OF_EMBEDDING, PREFIX, TENSORS, Adapter, Pair, left_out, read_adapter, row_of
from .gguf import ENDS as GGUF_ENDS
from .gguf import gguf_adapter

HEAD_DIM, BEFORE = "head_dim", "adapter_config"  # keys of the header
IN_LAYERS = {
    to: {getattr(row, to).removesuffix(".weight").rpartition(".")[2] for row in LAYER_TABLE} for to in ("hf", "meta")
}
NAMED_MODULES = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")


@dataclass
class CrossedAdapter:
    """The files of an adapter in the other order."""

    adapter: Adapter
    to: str  # "hf", "meta" or "gguf"
    files: dict[str, bytes]
    tensors: int
    head_dim: int | None
    notes: list[str]


def cross_adapter(folder: Path, target: Path, to: str | None = None) -> CrossedAdapter:
    """Make the files of an adapter in the other format's names and order, or the one file of llama.cpp.

    Raises:
        UserError: it is no LoRA adapter of a Llama, or the width of its heads is unknown.
    """
    adapter = read_adapter(folder)
    other = "meta" if adapter.order == "hf" else "hf"
    if to not in (None, other, "gguf"):
        order = {"hf": "Hugging Face", "meta": "Meta"}[adapter.order]
        raise UserError(f"--to must be {other!r} or 'gguf' for an adapter in {order}'s order, got {to!r}; leave it out")
    to = to or ("gguf" if target.suffix == SUFFIX else other)
    if to == "gguf":
        require_suffix(target)
    safe = folder / TENSORS
    metadata = read_metadata(safe) if safe.exists() else {}
    rotary = any(row_of(name).rotary for name in adapter.pairs)
    head_dim = find_head_dim(adapter, metadata) if rotary else None
    notes = left_out(folder)
    if to == "gguf":

        def rows_of_b(name: str) -> np.ndarray:
            b = adapter.pairs[name].b
            turned = row_of(name).rotary and adapter.order == "hf"
            return reorder(b.array[:], "meta", head_dim, f"{b.file.path}: {name}") if turned else b.array[:]

        files = {target.name: gguf_adapter(adapter, rows_of_b, notes)}
        return CrossedAdapter(adapter, to, files, 2 * len(adapter.pairs), head_dim, notes)
    arrays = {}
    for name, pair in adapter.pairs.items():
        row = row_of(name)
        module = PREFIX + (row.meta if to == "meta" else row.hf).removesuffix(".weight")
        b = pair.b.array[:]
        if row.rotary:
            b = reorder(b, to, head_dim, f"{pair.b.file.path}: {name}")
        ends = LORA_OF_EMBEDDING if row.hf == EMBEDDING.hf else LORA
        for end, tensor, array in zip(ends, (pair.a, pair.b), (pair.a.array[:], b), strict=True):
            arrays[module + end] = (tensor.dtype, np.ascontiguousarray(array))
    config = read_file(folder / ADAPTER).decode("utf-8")
    kept = {BEFORE: config} if to == "meta" else {}
    kept |= {HEAD_DIM: str(head_dim)} if head_dim and to == "meta" else {}
    described = [(name, dtype, array.shape) for name, (dtype, array) in arrays.items()]
    layout = SafetensorsLayout(described, metadata=kept)
    content = b"".join([layout.fixed([])[0][1], *(array.tobytes() for _, array in arrays.values())])
    before = metadata.get(BEFORE) if to == "hf" else None
    written = before.encode() if before else to_json(rename_modules(adapter, to))
    return CrossedAdapter(adapter, to, {TENSORS: content, ADAPTER: written}, len(arrays), head_dim, notes)


def reorder(b: np.ndarray, to: str, head_dim: int, what: str) -> np.ndarray:
    """Put the rows of B, the channels of heads, into the other order."""
    if b.shape[0] % head_dim:
        raise UserError(f"{what} must have a multiple of {head_dim} rows, the width of a head, got {b.shape[0]}")
    turned = half_to_interleaved(b, head_dim) if to == "meta" else interleaved_to_half(b, head_dim)
    return turned.reshape(b.shape)


def find_head_dim(adapter: Adapter, metadata: dict[str, str]) -> int:
    """Return the width of the heads, from the header, the configuration beside the adapter, or that of its model.

    Raises:
        UserError: none of them says it.
    """
    if (kept := metadata.get(HEAD_DIM, "")).isdecimal() and len(kept) < 6 and int(kept) > 0 and int(kept) % 2 == 0:
        return int(kept)
    base = adapter.config.get("base_model_name_or_path") or ""
    for folder in (adapter.path, Path(base), Path(base) / "original"):
        if (folder / "config.json").is_file():
            return read_config(folder / "config.json")["head_dim"]
        if (folder / PARAMS_FILE).is_file():
            params = read_params(folder / PARAMS_FILE)
            return params["dim"] // params["n_heads"]
    raise UserError(
        f"{adapter.path} does not say how wide a head is, and its model {quoted(base)} is no folder here; put that "
        f"model's config.json or {PARAMS_FILE} beside {ADAPTER}"
    )


def rename_modules(adapter: Adapter, to: str) -> dict:
    """Return the configuration with the modules' names in the other format."""
    names = {}
    for row in (*LAYER_TABLE, EMBEDDING, OUTPUT):
        ours, theirs = (name.removesuffix(".weight").removeprefix("model.").split(".") for name in (row.hf, row.meta))
        pairs = zip(ours, theirs, strict=True)
        names |= {one: other for one, other in (pairs if to == "meta" else ((b, a) for a, b in pairs))}

    def rename(name: str) -> str:
        bare = name.removeprefix("^").removesuffix("$")
        parts = [names.get(part, part) for part in bare.split(".") if part != "model"]
        if to == "hf" and parts[0] in ("layers", "embed_tokens"):
            parts.insert(0, "model")
        return name.replace(bare, ".".join(parts))

    modules = {getattr(row_of(name), to).removesuffix(".weight") for name in adapter.pairs}
    leaves = {module.rpartition(".")[2] for module in modules}
    config = dict(adapter.config)
    for key in NAMED_MODULES:
        if isinstance(config.get(key), dict):
            config[key] = {rename(name): value for name, value in config[key].items()}
        elif isinstance(config.get(key), list):
            config[key] = sorted(rename(name) for name in config[key] if isinstance(name, str))
    layers = {module.split(".")[-3] for module in modules if "layers." in module}
    everywhere = len(modules) == sum(len(layers) if leaf in IN_LAYERS[to] else 1 for leaf in leaves)
    config["target_modules"] = sorted(leaves if everywhere else modules)
    if to == "meta":
        config["task_type"] = None  # it needs methods of transformers' models
    return config


def check_crossed(crossed: CrossedAdapter, folder: Path):
    """Read back what was written, and check that it is the adapter in the other order.

    Raises:
        UserError: a weight differs.
    """
    if crossed.to == "gguf":
        check_gguf(crossed, folder)
        return
    written = read_adapter(folder, unfinished=True)
    for name, pair in crossed.adapter.pairs.items():
        other = written.pairs.get(name)
        order = rows_of_other(pair.b.shape[0], crossed.to, crossed.head_dim) if row_of(name).rotary else None
        if other is None or not same_pair(pair, other, order):
            raise UserError(f"{folder} differs from its source in {name}; please report this")


def same_pair(ours: Pair, theirs: Pair, order: list[int] | None) -> bool:
    """Compare to the bit; `order` is the row of `ours` for each row of `theirs`."""
    if ours.scale != theirs.scale or not np.array_equal(ours.a.array[:], theirs.a.array[:]):
        return False
    b = ours.b.array[:] if order is None else ours.b.array[:][order]
    return np.array_equal(b, theirs.b.array[:])


def rows_of_other(count: int, to: str, head_dim: int) -> list[int]:
    """Return the row in the other order for each row, computed independently of what wrote the files."""
    half = head_dim // 2
    in_hf = [row - row % head_dim + row % 2 * half + row % head_dim // 2 for row in range(count)]  # for Meta's rows
    return in_hf if to == "meta" else sorted(range(count), key=in_hf.__getitem__)


def check_gguf(crossed: CrossedAdapter, folder: Path):
    """Check that a GGUF file holds the adapter's matrices and scales.

    Raises:
        UserError: a weight differs.
    """
    found = read_gguf(folder / next(iter(crossed.files)))
    alpha = found.metadata["adapter.lora.alpha"]
    for name, pair in crossed.adapter.pairs.items():
        row, rank = row_of(name), pair.a.shape[0]
        a, b = (found.tensors[row.gguf + end] for end in GGUF_ENDS)
        ours = to_floats(np.ascontiguousarray(pair.b.array[:]), pair.b.dtype)
        if row.rotary and crossed.adapter.order == "hf":
            ours = ours[rows_of_other(len(ours), "meta", crossed.head_dim)]
        theirs = to_floats(np.ascontiguousarray(b.array[:]), b.dtype) * (np.float32(alpha / rank) if alpha else 1)
        turned = a.array[:].T if row.hf == EMBEDDING.hf else a.array[:]
        if not np.array_equal(turned, pair.a.array[:]) or not np.allclose(theirs, ours * pair.scale, rtol=1e-6, atol=0):
            raise UserError(f"{folder} differs from its source in {name}; please report this")
