"""Open a GGUF file as a checkpoint."""

import tempfile
from pathlib import Path

import numpy as np

from hf_llama3.errors import UserError, quoted
from hf_llama3.files.atomic import temporary_errors, write_files

from ...checkpoint import Checkpoint, check_layers, check_names, check_shapes
from ...config.gguf import ROPE_FACTORS, facts_to_config, read_metadata, read_token_ids, same_factors, unused_keys
from ...config.hf import read_config, read_more_config
from ...config.schema import GEOMETRY, read_small_files
from ...tokenizer.bpe import END_OF_MESSAGE, END_OF_TEXT, END_OF_TURN, special_tokens
from ...tokenizer.facts import read_tokenizer_facts
from ...tokenizer.gguf import OtherTokenizer, read_gguf_tokenizer
from ...tokenizer.templates import DEFAULT
from ...weights import BIAS_KEYS, EMBEDDING, LAYER_TABLE, OUTPUT, bias_of, rows
from ..storage import BY_NAME, StoredTensor
from .blocks import BlockTensor, NarrowedTensor, fits, gguf_package
from .carried import unpack
from .file import Gguf, Tensor, read_gguf

NARROW = ("bfloat16", "float16")
SHAPES = "its metadata"  # keys that give the shapes


def open_gguf(path: Path, llama_version: str | None, instruct: bool | None) -> Checkpoint:
    """Open a GGUF file, or all files of a split model, given one of them; None means to infer.

    The tokenizer's Hugging Face files are made in a temporary folder that lasts as long as the checkpoint.
    """
    found = read_gguf(path)
    with temporary_errors():
        made = tempfile.TemporaryDirectory(prefix="hf-llama3-")
        try:
            return open_read(found, made, llama_version, instruct)
        except UserError as error:  # of the files that the given one carries
            raise UserError(str(error).replace(made.name, str(path))) from error


def open_read(found: Gguf, made, llama_version: str | None, instruct: bool | None) -> Checkpoint:
    path, metadata, folder, inferred = found.path, found.metadata, Path(made.name), []
    facts = read_metadata(metadata, path)
    tensors = dict(found.tensors)
    say_quantised(tensors, path, inferred)
    factors = read_factors(tensors.pop(ROPE_FACTORS, None), path)
    embedding = tensors.get(EMBEDDING.gguf)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{path} lacks a matrix {EMBEDDING.gguf!r}; it is no whole model")
    config = facts_to_config(facts, path, embedding.shape[0], factors, inferred)
    config |= read_token_ids(metadata, config["vocab_size"], path)
    check_layers(config["num_hidden_layers"], len(tensors), path)
    biases = {row.bias: bias_of(row).gguf.format(0) for row in LAYER_TABLE if row.bias}
    config |= {key: biases[key] in tensors for key in BIAS_KEYS}
    config["tie_word_embeddings"] = OUTPUT.gguf not in tensors

    generation, more = None, {}
    carried = read_carried(found, folder, config, factors, inferred)
    if carried is not None:
        config = carried
        small = read_small_files(folder, config["vocab_size"])
        generation, more = small.get("generation_config.json"), read_more_config(folder / "config.json")
    else:
        make_tokenizer(found, folder, config, inferred)
        read_small_files(folder, config["vocab_size"])
    told = read_tokenizer_facts(folder, config, path, llama_version, instruct, inferred)
    if carried is None and told.instruct and told.family == "3":
        add_stops(metadata["tokenizer.ggml.tokens"], config)
    if unused := unused_keys(metadata):
        inferred.append(f"metadata that only GGUF has a place for: {', '.join(unused)}")

    table = rows(
        config["num_hidden_layers"], 1 if told.version == "2" else 0, [key for key in BIAS_KEYS if config[key]]
    )
    if config["tie_word_embeddings"]:
        tensors[OUTPUT.gguf] = embedding
    check_names(tensors.keys(), {row.gguf for row in table}, path)
    shards = {row.hf: [tensors[row.gguf]] for row in table}
    check_shapes(table, shards, config, path, SHAPES)
    narrow_vectors(shards, inferred)
    return Checkpoint(
        *(path, "gguf", config, table, shards, told.tokenizer, told.kind, told.version, told.instruct),
        special_tokens=special_tokens(told.version) if told.kind == "tiktoken" else None,
        chat_template=told.templates.get(DEFAULT),
        generation_config=generation,
        inferred=inferred,
        order="meta",
        loads_as_is=False,
        more_config=more,
        hf_tokenizer=folder if told.tokenizer is not None else None,
        keeps=made,
    )


def say_quantised(tensors: dict[str, Tensor], path: Path, inferred: list[str]):
    """Note in `inferred` which kinds of blocks are decoded.

    Raises:
        UserError: the package that decodes them is missing.
    """
    kinds = [tensor.kind.name for tensor in tensors.values() if isinstance(tensor, BlockTensor)]
    if kinds:
        gguf_package(f"{path} is quantised, which")
        counts = ", ".join(f"{kinds.count(kind)} of {kind}" for kind in sorted(set(kinds)))
        lost = (
            "as llama.cpp decodes them: what quantisation has lost stays lost, and --dtype bfloat16 takes half the room"
        )
        inferred.append(f"quantised tensors, {counts}, are given in float32 {lost}")


def read_factors(tensor: Tensor | None, path: Path) -> np.ndarray | None:
    if tensor is None:
        return None
    if tensor.dtype.name != "float32" or len(tensor.shape) != 1 or not isinstance(tensor, StoredTensor):
        raise UserError(f"{ROPE_FACTORS} in {path} must be a vector of f32, got {tensor.dtype.name} {tensor.shape}")
    return np.frombuffer(tensor.read(), "<f4")


def read_carried(found: Gguf, folder: Path, config: dict, factors, inferred: list[str]) -> dict | None:
    """Write the Hugging Face files that a file carries into a folder, and return their configuration.

    Returns:
        None if it carries none, or they belong to another model.
    """
    files = unpack(found.metadata, found.path)
    if not files or "config.json" not in files:
        return None
    write_files(folder, files)
    told = read_config(folder / "config.json", inferred)
    rope = told["rope_parameters"]
    same_rope = rope == config["rope_parameters"] or (
        factors is not None and same_factors(rope, config["head_dim"], factors)
    )
    same = ("tie_word_embeddings", *BIAS_KEYS, *(key for key in GEOMETRY if key != "rms_norm_eps"))
    if differing := [key for key in same if told[key] != config[key]] + ([] if same_rope else ["rope_parameters"]):
        raise UserError(
            f"{folder / 'config.json'} and the metadata say {quoted(told[differing[0]])} and "
            f"{quoted(config[differing[0]])} of `{differing[0]}`; convert the model it was made from again"
        )
    inferred.append("configuration and tokenizer: the Hugging Face files that the file carries")
    return told


def make_tokenizer(found: Gguf, folder: Path, config: dict, inferred: list[str]):
    """Write the tokenizer's Hugging Face files, or note why there are none."""
    try:
        write_files(folder, read_gguf_tokenizer(found.metadata, found.path, config["max_position_embeddings"]))
    except OtherTokenizer as error:
        inferred.append(f"no tokenizer: {error}; put the original model's tokenizer files into the new folder")


def add_stops(tokens: list[str], config: dict):
    """Let an instruct model of Llama 3 stop where llama.cpp does: at every token whose name ends a text."""
    stops = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    named = [tokens.index(name) for name in (END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN) if name in tokens]
    ids = sorted({*stops, *named} - {None})
    config["eos_token_id"] = ids if len(ids) > 1 else ids[0] if ids else None


def narrow_vectors(shards: dict, inferred: list[str]):
    """Read vectors, which llama.cpp stores in float32, in the type of the matrices if that holds their values."""
    vectors = {name: tensor for name, (tensor,) in shards.items() if len(tensor.shape) == 1}
    others = {tensor.dtype.name for name, (tensor,) in shards.items() if name not in vectors}
    stored = all(isinstance(one, StoredTensor) and one.dtype.name == "float32" for one in vectors.values())
    if len(others) != 1 or not stored or (name := next(iter(others))) not in NARROW:
        return
    if all(fits(tensor, BY_NAME[name]) for tensor in vectors.values()):
        shards |= {key: [NarrowedTensor(tensor, BY_NAME[name])] for key, tensor in vectors.items()}
        inferred.append(f"{len(vectors)} vectors in {name}, which holds all their values: GGUF keeps them in float32")
