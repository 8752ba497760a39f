"""Open a directory of Meta's, with any number of model-parallel shards.

It holds `params.json`, a `consolidated.NN.pth` for each shard, `tokenizer.model`, `checklist.chk`. Copies on
the Hub have shards as folders of parts, or as safetensors; some people rename a single shard, and torchtune writes
`meta_model_0.pt`.
"""

import re
from pathlib import Path

from hf_llama3.errors import UserError, quoted

from ..checkpoint import Checkpoint, check_layers, check_names, check_shapes, same_tensors
from ..config.hf import TOKEN_IDS, published_generation
from ..config.params import infer_version, params_to_config, read_params
from ..config.schema import check_ids, read_small_files
from ..config.sidecar import SIDECAR, read_sidecar
from ..tokenizer.bpe import (
    check_special_tokens,
    find_hf_tokenizer,
    read_ranks,
    special_tokens,
    token_ids,
    token_ids_without_tokenizer,
    tokenizer_kind,
)
from ..tokenizer.files import CARRIED, TOKENIZER_MODEL, find_carried, hash_of
from ..weights import EMBEDDING, OUTPUT, Row, rows
from .dcp import find_dcp, read_dcp
from .names import settle
from .pth import read_parts, read_pth
from .safetensors import read_safetensors
from .storage import StoredTensor
from .torch_files import find_parts, first_missing, refuse_lone_adapter

PARAMS_FILE = "params.json"
UNTOLD = "no file of Meta's says; an Instruct model needs --instruct, or it has no chat template and does not stop"
SHARD_GLOBS = ("*.pth", "consolidated*.safetensors", "consolidated.*/")
SHARD_NAME = re.compile(r"consolidated(?:\.(\d{1,9}))?(?:\.pth|\.safetensors)?")  # a shard, or its folder of parts


def open_meta(folder: Path, rope_factor: float | None, llama_version: str | None, instruct: bool | None) -> Checkpoint:
    """Open a directory of Meta's; None means to infer."""
    params_path = folder / PARAMS_FILE
    params, sidecar = read_params(params_path), read_sidecar(folder)
    other_dialogue = bool(sidecar) and instruct not in (None, sidecar["instruct"])
    if other_dialogue:
        sidecar = forget_dialogue(sidecar)
    inferred = []
    named, order, said = settle(read_shards(folder, inferred), folder)
    check_layers(params["n_layers"], len(named), folder)
    if order == "hf":
        to_meta = {row.hf: row.meta for row in rows(params["n_layers"])}
        named = {to_meta.get(name, name): tensors for name, tensors in named.items()}
        said.append("names of tensors and order of their rows: Hugging Face's")
    vocab_size = count_tokens(named.get(EMBEDDING.meta), params["dim"], folder)
    config, more = params_to_config(params, params_path, vocab_size, rope_factor, sidecar.get("rope_factor"))
    inferred += said + more
    if not sidecar:
        context = config["max_position_embeddings"]
        inferred.append(f"context of {context} tokens: that of the released models with this RoPE")

    tokenizer, carried = folder / TOKENIZER_MODEL, find_carried(folder, sidecar.get("tokenizer_model"), inferred)
    if tokenizer.exists():
        kind = tokenizer_kind(tokenizer)
        family = {"tiktoken": "3", "sentencepiece": "2"}[kind]
        if "tokenizer_model" in sidecar and sidecar["tokenizer_model"] != hash_of(tokenizer):
            sidecar = forget_token_ids(sidecar)
    else:
        tokenizer, kind, family = find_hf_tokenizer(carried) if carried else (None, None, None)
    if carried and other_dialogue and kind == "tiktoken":
        carried = None
        inferred.append(f"tokenizer: made anew, since {CARRIED}/ is {'a base' if instruct else 'an instruct'} model's")
    if carried:
        read_small_files(carried, vocab_size)
    version, why = infer_version(config, family, llama_version, folder)
    inferred.append(f"Llama {version}: {why}")

    named.setdefault(OUTPUT.meta, named[EMBEDDING.meta])
    table = rows(config["num_hidden_layers"], embedding_split(named[EMBEDDING.meta], params["dim"], version))
    check_names(named.keys(), {row.meta for row in table}, folder)
    shards = {row.hf: named[row.meta] for row in table}
    check_shapes(table, shards, config, folder, PARAMS_FILE)
    copies = fold_repeated_heads(table, shards, config, sidecar.get("num_key_value_heads"))
    if copies:
        count = config["num_key_value_heads"]
        inferred.append(f"{count} key/value heads: each is stored {params['n_kv_heads'] // count} times")
    tied = table[0].split == OUTPUT.split and same_tensors(shards[OUTPUT.hf], shards[EMBEDDING.hf])
    says_untied = tied and not sidecar.get("tie_word_embeddings", True)
    config["tie_word_embeddings"] = tied = tied and not says_untied
    why = f"says {SIDECAR}" if says_untied else "compared with the output head"
    inferred.append(f"embeddings {'tied' if tied else 'untied'}: {why}")

    if instruct is None:
        instruct, why = (sidecar["instruct"], f"says {SIDECAR}") if sidecar else (False, UNTOLD)
        inferred.append(f"{'instruct' if instruct else 'base'}: {why}")
    names = sidecar.get("special_tokens")
    if kind == "tiktoken":
        names = names or special_tokens(version)
        check_special_tokens(names, folder / SIDECAR)
        config |= token_ids(names, first_special_id(tokenizer, names, vocab_size, inferred), instruct)
    else:
        config |= token_ids_without_tokenizer(version, vocab_size, instruct)
        if kind is None:
            inferred.append(f"no tokenizer: the folder has no {TOKENIZER_MODEL}")
    config |= sidecar.get("config", {})
    generation = sidecar["generation_config"] if "generation_config" in sidecar else published_generation(config)
    for values in (config, generation or {}):
        check_ids(values, vocab_size, folder / SIDECAR)
    return Checkpoint(
        *(folder, "meta", config, table, shards, tokenizer, kind, version, instruct),
        special_tokens=names,
        chat_template=sidecar.get("chat_template"),
        generation_config=generation,
        inferred=inferred,
        copies=copies,
        order=order,
        loads_as_is=False,
        more_config=sidecar.get("more_config", {}),
        hf_tokenizer=carried,
    )


def read_shards(folder: Path, inferred: list[str]) -> dict[str, list[StoredTensor]]:
    """List the tensors of a Meta directory by Meta's names, one for each shard.

    Raises:
        UserError: there are none, one is missing or damaged, or they hold different tensors.
    """
    paths = find_shards(folder)
    if not paths and (distributed := find_dcp(folder)):
        return {name: [tensor] for name, tensor in read_dcp(distributed, inferred).items()}
    if not paths:
        remedy = "if they are shards, name them consolidated.00.pth, consolidated.01.pth, ..."
        parts = find_parts(folder, remedy)
        if not parts:
            refuse_lone_adapter(folder)
            raise UserError(f"{folder} holds no consolidated.00.pth; pass the folder that Meta's download made")
        return {name: [tensor] for name, tensor in read_parts(parts, read_pth).items()}
    shards = [read_shard(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        if differing := sorted(shard.keys() ^ shards[0].keys()):
            raise UserError(
                f"{path.name} and {paths[0].name} must hold the same tensors, differ in {quoted(differing[:3])}"
            )
    return {name: [shard[name] for shard in shards] for name in shards[0]}


def find_shards(folder: Path) -> list[Path]:
    """List the shards of a Meta directory in order: files or folders of parts; empty if none has a shard's name."""
    found = {}
    for path in sorted(folder.iterdir()):
        is_shard = path.is_dir() or (path.is_file() and path.suffix in (".pth", ".safetensors"))
        if is_shard and (match := SHARD_NAME.fullmatch(path.name)):
            index = int(match[1] or 0)
            if index in found:
                raise UserError(f"{folder} holds shard {index} twice: {found[index].name} and {path.name}; remove one")
            found[index] = path
    last = max(found, default=-1)
    if (missing := first_missing(found.keys(), 0, last)) is not None:
        raise UserError(f"{folder} lacks shard {missing} of {last + 1} (consolidated.{missing:02d}.pth); download it")
    return [found[index] for index in sorted(found)]


def read_shard(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a shard, which may be a folder of parts."""
    if not path.is_dir():
        return read_pth(path) if path.suffix == ".pth" else read_safetensors(path)
    parts = sorted(part for part in path.iterdir() if part.suffix in (".pth", ".safetensors") and part.is_file())
    if not parts:
        raise UserError(f"{path} holds no .pth file; download the parts of this shard")
    tensors = {}
    for part in parts:
        found = read_shard(part)
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{part} holds {quoted(twice[0])}, which another part holds as well")
        tensors |= found
    return tensors


def count_tokens(shards: list[StoredTensor] | None, dim: int, folder: Path) -> int:
    """Return the number of the embedding's rows; shards may divide rows or columns."""
    if not shards:
        raise UserError(f"{folder} lacks 1 tensor: {EMBEDDING.meta!r}")
    shapes = {tensor.shape for tensor in shards}
    shape = next(iter(shapes))
    if len(shapes) == 1 and len(shape) == 2:
        if shape[1] == dim:
            return shape[0] * len(shards)
        if shape[1] * len(shards) == dim:
            return shape[0]
    listed = sorted(map(list, shapes))[:3]
    raise UserError(f"{EMBEDDING.meta} in {folder} must have {dim} columns over its {len(shards)} shards, got {listed}")


def embedding_split(shards: list[StoredTensor], dim: int, version: str) -> int:
    """Return the dimension along which shards divide the embedding; for a single shard the version decides."""
    if len(shards) == 1:
        return 1 if version == "2" else 0
    return 0 if shards[0].shape[1] == dim else 1


def fold_repeated_heads(
    table: list[Row], shards: dict[str, list[StoredTensor]], config: dict, true_count: int | None
) -> list[tuple[StoredTensor, StoredTensor]]:
    """Keep one copy of each key/value head where there are fewer heads than shards and every shard holds one.

    Meta stores the 405B so: 8 heads in 16 shards. The first layer decides; the others are compared when a conversion
    reads them. Changes `shards` and `config`, and returns pairs of what is used and what is left out.

    Args:
        true_count: the number of heads, if the sidecar says it; otherwise equal heads count as copies.
    """
    names = [row.hf for row in table if "key_value" in row.shape]
    first_layer, stored = names[:2], config["num_key_value_heads"]
    if true_count and (stored % true_count or (stored != true_count and stored != len(shards[names[0]]))):
        raise UserError(
            f"`num_key_value_heads` in {SIDECAR} must be the {stored} of {PARAMS_FILE}, or a count that they are "
            f"copies of, got {true_count}; remove the file"
        )
    if stored == 1 or stored != len(shards[names[0]]) or true_count == stored:
        return []

    def copies_of(name, number):
        return [(shards[name][index - index % number], tensor) for index, tensor in enumerate(shards[name])]

    candidates = [stored // true_count] if true_count else [n for n in range(stored, 1, -1) if stored % n == 0]
    for number in candidates:
        if all(same_tensors([one], [other]) for name in first_layer for one, other in copies_of(name, number)):
            pairs = [pair for name in names for pair in copies_of(name, number) if pair[0] is not pair[1]]
            shards |= {name: shards[name][::number] for name in names}
            config["num_key_value_heads"] //= number
            return pairs
    return []


def first_special_id(tokenizer: Path, names: list[str], vocab_size: int, inferred: list[str]) -> int:
    """Return the id after the last rank, and check that ranks and special tokens fit the embedding."""
    count = len(read_ranks(tokenizer))
    total = count + len(names)
    if total > vocab_size:
        detail = f"makes {total} ids, but the embedding has {vocab_size} rows"
        raise UserError(f"{tokenizer} with {len(names)} special tokens {detail}; it belongs to another model")
    if total < vocab_size:
        inferred.append(f"{vocab_size - total} rows of the embedding have no token: the tokenizer has {total}")
    return count


def forget_dialogue(sidecar: dict) -> dict:
    """Remove from the sidecar what depends on whether a model was tuned for dialogue."""
    return forget_token_ids(sidecar) | {"chat_template": None}


def forget_token_ids(sidecar: dict) -> dict:
    """Remove from the sidecar the ids of another tokenizer, and the generation settings that use them."""
    config = {key: value for key, value in sidecar["config"].items() if key not in TOKEN_IDS}
    return {key: value for key, value in sidecar.items() if key != "generation_config"} | {"config": config}
