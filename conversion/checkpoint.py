"""A checkpoint of either format, opened: its configuration, where its tensors lie, and what had to be inferred."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hf_llama3.errors import UserError

from . import hf_checkpoint, meta_checkpoint
from .hf_config import read_config
from .manifest import read_json
from .params import infer_version, params_to_config, read_params
from .sidecar import SIDECAR, read_sidecar
from .storage import Part, StoredTensor, row_blocks
from .tokenizer import VERSIONS, read_ranks, special_tokens, token_ids, token_ids_without_tokenizer, tokenizer_kind
from .weights import EMBEDDING, OUTPUT, Row, check_names, rows, sizes, without_derived


@dataclass(eq=False)
class Checkpoint:
    """Hold what a conversion needs to know of its source; of the tensors nothing has been read but where they lie."""

    path: Path  # the folder that holds the files
    format: str  # "hf" or "meta"
    config: dict  # as `hf_config.read_config` returns it
    rows: list[Row] = field(repr=False)  # the table as it applies here
    tensors: dict[str, list[StoredTensor]] = field(repr=False)  # by Hugging Face's names, one for each shard
    tokenizer: Path | None
    tokenizer_kind: str | None  # "tiktoken", "sentencepiece" or "tokenizer.json"
    version: str  # of Llama: "2", "3.0", "3.1", "3.2" or "3.3"
    instruct: bool
    special_tokens: list[str] | None  # in the order of their ids; None where the tokenizer's own file names them
    chat_template: str | None  # another than Llama 3's
    generation_config: dict | None
    inferred: list[str]  # sentences: what, and why

    @property
    def num_shards(self) -> int:
        """How many model-parallel shards there are (1 in Hugging Face's format)."""
        return len(self.tensors[EMBEDDING.hf])

    @property
    def tied(self) -> bool:
        return self.config["tie_word_embeddings"]

    @property
    def own_rows(self) -> list[Row]:
        """The rows whose tensors are parameters of their own: without the output head where it is the embedding."""
        return [row for row in self.rows if not (self.tied and row.hf == OUTPUT.hf)]

    @property
    def dtype(self) -> str:
        """The type of most of the bytes."""
        count = Counter()
        for tensors in self.tensors.values():
            count[tensors[0].dtype.name] += sum(tensor.nbytes for tensor in tensors)
        return count.most_common(1)[0][0]

    @property
    def num_parameters(self) -> int:
        size = sizes(self.config)
        return sum(math.prod(row.full_shape(size)) for row in self.own_rows)

    def cut(self, row: Row, start: int, stop: int) -> list[Part]:
        """Return the indices from `start` to `stop` of the dimension that shards divide, as parts to lay end to end."""
        tensors = self.tensors[row.hf]
        if row.split is None:
            return [Part(tensors[0].file, tensors[0].array)]
        width, parts = tensors[0].shape[row.split], []
        for index, tensor in enumerate(tensors):
            first, last = max(start - index * width, 0), min(stop - index * width, width)
            if first < last:
                chosen = (slice(None),) * row.split + (slice(first, last),)
                parts.append(Part(tensor.file, tensor.array[chosen]))
        return parts


def open_checkpoint(
    path, rope_factor: float | None = None, llama_version: str | None = None, instruct: bool | None = None
) -> Checkpoint:
    """Open a checkpoint of either format by what lies in its folder; None means to infer.

    Raises:
        UserError: it is neither format, damaged, contradicts itself, or needs a flag.
    """
    folder = locate(Path(path))
    if llama_version is not None and llama_version not in VERSIONS:
        raise UserError(f"--llama-version must be one of {VERSIONS}, got {llama_version!r}")
    if (folder / "config.json").exists():
        return open_hf(folder, llama_version, instruct)
    return open_meta(folder, rope_factor, llama_version, instruct)


def locate(path: Path) -> Path:
    """Find the folder that holds the checkpoint: the one given, or Meta's `original/` in a copy from the Hub.

    Raises:
        UserError: there is none, with what was found instead.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; pass the folder of a checkpoint")
    if not path.is_dir():
        raise UserError(f"{path} is a file; pass the folder that holds it, {path.parent}")
    if (path / "config.json").exists() or (path / meta_checkpoint.PARAMS_FILE).exists():
        return path
    if (path / "original" / meta_checkpoint.PARAMS_FILE).exists():
        return path / "original"
    if (path / "adapter_config.json").exists():
        raise UserError(
            f"{path} is an adapter, not a model; merge it into its model with peft's merge_and_unload first"
        )
    if shards := list(path.glob("*.pth")):
        raise UserError(
            f"{path} holds {len(shards)} .pth files but no params.json; pass the folder that Meta's download made"
        )
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:4]) or "nothing"
    raise UserError(
        f"{path} is neither a Hugging Face folder (config.json) nor one of Meta's (params.json); it holds {found}"
    )


def open_hf(folder: Path, llama_version, instruct) -> Checkpoint:
    config, inferred = read_config(folder / "config.json"), []
    tensors = without_derived(hf_checkpoint.find_weights(folder), config["num_hidden_layers"])
    tokenizer, kind = find_hf_tokenizer(folder)
    version, why = infer_version(config, kind) if llama_version is None else (llama_version, "given by --llama-version")
    inferred.append(f"Llama {version}: {why}")
    chat_template = read_chat_template(folder)
    if instruct is None:
        instruct = chat_template is not None
        inferred.append("instruct: there is a chat template" if instruct else "base: there is no chat template")

    table = rows(config["num_hidden_layers"], embedding_split=1 if version == "2" else 0)
    if config["tie_word_embeddings"]:
        tensors.setdefault(OUTPUT.hf, tensors.get(EMBEDDING.hf))
    check_names(tensors.keys(), {row.hf for row in table}, folder)
    shards = {name: [tensor] for name, tensor in tensors.items()}
    check_shapes(table, shards, config, folder, "config.json")
    if config["tie_word_embeddings"] and not same_bytes(shards[OUTPUT.hf], shards[EMBEDDING.hf]):
        raise UserError(f"{folder}: config.json ties {OUTPUT.hf} to {EMBEDDING.hf}, but the file holds two that differ")
    return Checkpoint(
        *(folder, "hf", config, table, shards, tokenizer, kind, version, instruct),
        special_tokens=None,
        chat_template=chat_template,
        generation_config=read_optional(folder / "generation_config.json"),
        inferred=inferred,
    )


def open_meta(folder: Path, rope_factor, llama_version, instruct) -> Checkpoint:
    params_path = folder / meta_checkpoint.PARAMS_FILE
    params = read_params(params_path)
    named = meta_checkpoint.read_shards(folder)
    sidecar = read_sidecar(folder)
    if rope_factor is None:
        rope_factor = sidecar.get("rope_factor")
    split, vocab_size = embedding_layout(named.get(EMBEDDING.meta), params["dim"], folder)
    config, inferred = params_to_config(params, params_path, vocab_size, rope_factor)

    table = rows(config["num_hidden_layers"], split)
    named = without_derived(named, config["num_hidden_layers"])
    named.setdefault(OUTPUT.meta, named[EMBEDDING.meta])
    check_names(named.keys(), {row.meta for row in table}, folder)
    shards = {row.hf: named[row.meta] for row in table}
    check_shapes(table, shards, config, folder, params_path.name)
    if copies := fold_repeated_heads(table, shards, config):
        inferred.append(f"{config['num_key_value_heads']} key/value heads: each is stored {copies} times")
    config["tie_word_embeddings"] = split == 0 and same_bytes(shards[OUTPUT.hf], shards[EMBEDDING.hf])
    inferred.append(
        f"embeddings {'tied' if config['tie_word_embeddings'] else 'untied'}: compared with the output head"
    )

    tokenizer = folder / meta_checkpoint.TOKENIZER_FILE
    tokenizer, kind = (tokenizer, tokenizer_kind(tokenizer)) if tokenizer.exists() else (None, None)
    version, why = infer_version(config, kind) if llama_version is None else (llama_version, "given by --llama-version")
    inferred.append(f"Llama {version}: {why}")
    if instruct is None:
        instruct, why = (sidecar["instruct"], f"says {SIDECAR}") if sidecar else (False, "no file of Meta's says")
        inferred.append(f"{'instruct' if instruct else 'base'}: {why}")
    names = sidecar.get("special_tokens")
    if kind == "tiktoken":
        names = names or special_tokens(version)
        first = first_special_id(tokenizer, names, config["vocab_size"])
        config |= token_ids(names, first, instruct)
    else:
        config |= token_ids_without_tokenizer(version)
        if kind is None:
            inferred.append("no tokenizer: the folder has no tokenizer.model")
    return Checkpoint(
        *(folder, "meta", config | sidecar.get("config", {}), table, shards, tokenizer, kind, version, instruct),
        special_tokens=names,
        chat_template=sidecar.get("chat_template"),
        generation_config=sidecar.get("generation_config"),
        inferred=inferred,
    )


def embedding_layout(shards: list[StoredTensor] | None, dim, folder: Path) -> tuple[int, int]:
    """Return the dimension along which shards divide the embedding (1 in Llama 2), and how many tokens it has."""
    if not shards:
        raise UserError(f"{folder} lacks 1 tensor: {EMBEDDING.meta!r}")
    shapes = [tensor.shape for tensor in shards]
    if len(shapes[0]) == 2 and set(shapes) == {shapes[0]}:
        if shapes[0][1] == dim:
            return 0, shapes[0][0] * len(shapes)
        if shapes[0][1] * len(shapes) == dim:
            return 1, shapes[0][0]
    raise UserError(
        f"{EMBEDDING.meta} in {folder} must have `dim` {dim} columns over its {len(shapes)} shards, got {shapes[:3]}"
    )


def check_shapes(table: list[Row], shards: dict[str, list[StoredTensor]], config: dict, folder: Path, config_name: str):
    """Raise unless every tensor has the shape that the configuration says.

    Raises:
        UserError: with both shapes.
    """
    size = sizes(config)
    for row in table:
        expected = list(row.full_shape(size))
        if row.split is not None:
            if expected[row.split] % len(shards[row.hf]):
                raise UserError(f"{folder}: {len(shards[row.hf])} shards cannot divide {row.hf} {expected} evenly")
            expected[row.split] //= len(shards[row.hf])
        for tensor in shards[row.hf]:
            if list(tensor.shape) != expected:
                got = f"{list(tensor.shape)} in {tensor.file.path.name}"
                raise UserError(f"{folder}: {config_name} makes {row.hf} {expected}, but it is {got}")


def fold_repeated_heads(table: list[Row], shards: dict[str, list[StoredTensor]], config: dict) -> int | None:
    """Keep one of the copies where every shard has a key/value head of its own but there are fewer heads than shards.

    Meta stores the 8 heads of the 405B so, for 16 shards. Changes `shards` and `config` and returns how many copies
    there were, if there were any.
    """
    rows_of_heads = [row for row in table if "key_value" in row.shape]
    count = len(shards[rows_of_heads[0].hf])
    if count == 1 or config["num_key_value_heads"] != count:
        return None
    for copies in [number for number in range(count, 1, -1) if count % number == 0]:
        kept = {row.hf: shards[row.hf][::copies] for row in rows_of_heads}
        if all(
            same_bytes([tensor], [kept[row.hf][index // copies]])
            for row in rows_of_heads
            for index, tensor in enumerate(shards[row.hf])
        ):
            shards |= kept
            config["num_key_value_heads"] //= copies
            return copies
    return None


def same_bytes(ours: list[StoredTensor], theirs: list[StoredTensor]) -> bool:
    """Compare two tensors, shard by shard, to the bit."""
    return all(
        one.dtype == other.dtype and (one is other or same_arrays(one.array, other.array))
        for one, other in zip(ours, theirs, strict=True)
    )


def same_arrays(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and all(np.array_equal(one[block], other[block]) for block in row_blocks(one))


def find_hf_tokenizer(folder: Path) -> tuple[Path | None, str | None]:
    model = folder / meta_checkpoint.TOKENIZER_FILE
    if model.exists() and tokenizer_kind(model) == "sentencepiece":
        return model, "sentencepiece"
    if (folder / "tokenizer.json").exists():
        return folder / "tokenizer.json", "tokenizer.json"
    return (model, "tiktoken") if model.exists() else (None, None)


def read_chat_template(folder: Path) -> str | None:
    """Find the chat template where version 5 keeps it, or where version 4 does."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text("utf-8")
    template = (read_optional(folder / "tokenizer_config.json") or {}).get("chat_template")
    return template if isinstance(template, str) else None


def read_optional(path: Path) -> dict | None:
    return read_json(path) if path.exists() else None


def first_special_id(tokenizer: Path, names: list[str], vocab_size: int) -> int:
    """Return the id after the last rank, having checked that ranks and special tokens fill the embedding."""
    count = len(read_ranks(tokenizer))
    if count + len(names) != vocab_size:
        raise UserError(
            f"{tokenizer} with {len(names)} special tokens makes {count + len(names)} ids, but the embedding has "
            f"{vocab_size} rows; it belongs to another model"
        )
    return count
