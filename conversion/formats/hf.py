"""Open a Hugging Face folder, and check its index and every header."""

import shlex
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

from hf_llama3.errors import UserError, quoted, shown
from hf_llama3.files.json import read_json

from ..checkpoint import Checkpoint, check_layers, check_names, check_shapes, repository_of, same_tensors
from ..config.hf import head_of, read_config, read_more_config
from ..config.schema import INDEX_MAP, read_small_files
from ..tokenizer.bpe import special_tokens
from ..tokenizer.facts import read_tokenizer_facts
from ..tokenizer.templates import DEFAULT
from ..weights import BIAS_KEYS, EMBEDDING, LANGUAGE_MODEL, OUTPUT, name_in_file, rows
from .dcp import find_dcp, read_dcp
from .names import is_rope_table, settle
from .pth import read_parts, read_pth
from .safetensors import read_safetensors
from .storage import StoredTensor
from .torch_files import ADAPTER, BIN, BIN_INDEX, SUFFIXES, find_parts, find_torchtune_adapters, refuse_lone_adapter

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"


def open_hf(folder: Path, llama_version: str | None, instruct: bool | None) -> Checkpoint:
    """Open a Hugging Face folder; None means to infer."""
    inferred = []
    config = read_config(folder / "config.json", inferred)
    generation = read_small_files(folder, config["vocab_size"]).get("generation_config.json")
    found = find_weights(folder, inferred)
    if (folder / ADAPTER).exists():
        check_adapter(folder, inferred)
    tensors, order, said = settle(found, folder)
    inferred += said
    check_layers(config["num_hidden_layers"], len(tensors), folder)
    told = read_tokenizer_facts(folder, config, folder, llama_version, instruct, inferred)
    if told.tokenizer is None:
        inferred.append("no tokenizer: the folder has no tokenizer.json")
    if len(told.templates) > 1:
        inferred.append(f"chat templates: {', '.join(sorted(told.templates))}")

    biases, head = [key for key in BIAS_KEYS if config[key]], head_of(config)
    table = rows(config["num_hidden_layers"], 1 if told.version == "2" else 0, biases, head)
    if order == "meta":
        inferred.append("names of tensors and order of their rows: Meta's")
        to_hf = {row.meta: row.hf for row in table}
        tensors = {to_hf.get(name, name): tensor for name, tensor in tensors.items()}
    tied = config["tie_word_embeddings"] and head == LANGUAGE_MODEL
    if tied and EMBEDDING.hf in tensors:
        tensors.setdefault(OUTPUT.hf, tensors[EMBEDDING.hf])
    if OUTPUT.hf not in tensors and {row.hf for row in table} - tensors.keys() == {OUTPUT.hf}:
        key = f"set `tie_word_embeddings` to true in {folder / 'config.json'}"
        raise UserError(f"{folder} lacks 1 tensor: {OUTPUT.hf!r}; if its head is the embedding, {key}")
    check_names(tensors.keys(), {row.hf for row in table}, folder)
    shards = {name: [tensor] for name, tensor in tensors.items()}
    check_shapes(table, shards, config, folder, "config.json")
    if tied and not same_tensors(shards[OUTPUT.hf], shards[EMBEDDING.hf]):
        config["tie_word_embeddings"] = False
        inferred.append("embeddings untied: config.json ties them, but there is a head that differs, which is kept")
    is_alone = not (folder / ADAPTER).exists()  # or `from_pretrained` would take another model and add the adapter
    names_as_is = {name_in_file(name, head) for name in tensors} - found.keys() <= {OUTPUT.hf}
    divides = config["hidden_size"] % config["num_attention_heads"] == 0  # or upstream's class refuses any `head_dim`
    return Checkpoint(
        *(folder, "hf", config, table, shards, told.tokenizer, told.kind, told.version, told.instruct),
        special_tokens=special_tokens(told.version) if told.kind == "tiktoken" else None,
        chat_template=told.templates.get(DEFAULT),
        generation_config=generation,
        inferred=inferred,
        order=order,
        more_config=read_more_config(folder / "config.json"),
        hf_tokenizer=folder if told.tokenizer is not None else None,
        loads_as_is=is_alone and names_as_is and divides and any((folder / name).exists() for name in (SINGLE, INDEX)),
    )


def find_weights(folder: Path, inferred: list[str]) -> dict[str, StoredTensor]:
    """List the tensors of a Hugging Face folder by name, from safetensors or else from torch's files.

    Raises:
        UserError: there are none, or index and files disagree.
    """
    for single, index, read in ((SINGLE, INDEX, read_safetensors), (BIN, BIN_INDEX, read_pth)):
        if (folder / index).exists() and (folder / single).exists():
            raise UserError(f"{folder} holds both {single} and {index}; remove the one that is not meant")
        if (folder / index).exists():
            return read_sharded(folder, index, read)
        if (folder / single).exists():
            return read(folder / single)
    if distributed := find_dcp(folder):
        return read_dcp(distributed, inferred)
    for suffixes, read in (((SUFFIX,), read_safetensors), (SUFFIXES, read_pth)):
        if paths := find_parts(folder, suffixes=suffixes):
            inferred.append(f"weights without an index, in {', '.join(shown(path.name, 60) for path in paths[:4])}")
            return read_parts(paths, read)
    if (folder / ADAPTER).exists():
        refuse_adapter(folder)
    refuse_lone_adapter(folder)
    raise UserError(f"{folder} has a config.json but no {SINGLE} and no {INDEX}; download the weights")


def check_adapter(folder: Path, inferred: list[str]):
    """Refuse an adapter beside a model: `from_pretrained` would add it, and a conversion would not.

    The exception is torchtune's, which leaves one, in its own form as well, beside weights that it is merged into.
    """
    is_torchtunes = find_torchtune_adapters(folder)
    if not is_torchtunes and any((folder / name).exists() for name in (SINGLE, INDEX, BIN, BIN_INDEX)):
        alone = f"to take the model alone, move {ADAPTER} elsewhere"
        raise UserError(f"{folder} holds a model and an adapter beside it; {alone}; to merge it, {merging(folder)}")
    inferred.append("the adapter beside the weights is left out: torchtune has merged it into them")


def refuse_adapter(folder: Path):
    raise UserError(f"{folder} is an adapter, not a model; merge it into its model: {merging(folder)}")


def merging(folder: Path) -> str:
    """Return the command that merges an adapter into its model; of a commit in the Hub's cache, after a download."""
    base, before = base_of_adapter(folder) or "MODEL", ""
    if repository := repository_of(folder):
        folder = Path(repository.rpartition("/")[2])
        before = f"{shlex.join(('hf', 'download', repository, '--local-dir', str(folder)))} && "
    return before + shlex.join(
        ("hf-llama3", "convert", base, f"{folder}-merged", "--to", "hf", "--adapter", str(folder))
    )


def base_of_adapter(folder: Path) -> str | None:
    """Return the name or path of an adapter's model; None if its configuration has none that can be typed as it is."""
    try:
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    except UserError:
        return None
    if not isinstance(base, str) or not base.strip() or base.startswith("-") or shown(base) != base:
        return None
    return None if Path(base) == folder else base


def merging_by_peft(folder: Path) -> str:
    """Return the command by which PEFT merges an adapter that is more than LoRA."""
    return (
        'python -c "from peft import AutoPeftModelForCausalLM as M; '
        f"model = M.from_pretrained('{folder}').merge_and_unload(); model.save_pretrained('{folder}-merged')\""
    )


def read_sharded(folder: Path, index: str, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    weight_map = read_json(folder / index).get("weight_map")
    if not INDEX_MAP.takes(weight_map) or not weight_map:
        raise UserError(f"{folder / index} must hold a `weight_map` from tensors to files, got {quoted(weight_map)}")
    tensors = {}
    for name in sorted(set(weight_map.values())):
        if {PurePosixPath(name).name, PureWindowsPath(name).name} != {name}:
            raise UserError(
                f"{folder / index} must name plain files beside it, got {quoted(name)}; do not trust this folder"
            )
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {shown(name)}, which its index names; download it")
        found = read(folder / name)
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{folder / name} holds {quoted(twice[0])}, which another file holds as well")
        tensors |= found
        listed = {key for key, file in weight_map.items() if file == name}
        if differing := sorted(key for key in found.keys() ^ listed if not may_be_absent(key)):
            raise UserError(
                f"{folder / index} and {name} disagree about {len(differing)} tensors: {quoted(differing[:3])}"
            )
    return tensors


def may_be_absent(name: str) -> bool:
    """Tell whether an index may list a tensor that its file lacks: a tied head, or a tensor that is not read.

    If the head is not tied, the comparison with the table reports it as missing.
    """
    return name.endswith(OUTPUT.hf) or is_rope_table(name)
