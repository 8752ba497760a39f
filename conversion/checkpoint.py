"""An opened checkpoint of any format: its configuration, where its tensors lie, and what had to be inferred."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hf_llama3.errors import UserError, quoted

from .config.hf import head_of
from .formats.storage import Part, StoredTensor, row_blocks
from .weights import EMBEDDING, LANGUAGE_MODEL, OUTPUT, Row, sizes

PURPOSES = {  # heads of models that do not write texts
    "ForSequenceClassification": "scores a whole text",
    "ForTokenClassification": "scores each token",
    "ForQuestionAnswering": "finds where an answer stands",
    "Model": "gives hidden states",
}


def repository_of(commit: Path) -> str | None:
    """Return the name of the repository that a folder is a commit of, in the Hub's cache; None for any other folder."""
    if commit.parent.name != "snapshots" or not commit.parent.parent.name.startswith("models--"):
        return None
    return commit.parent.parent.name.removeprefix("models--").replace("--", "/", 1)


@dataclass(eq=False)
class Checkpoint:
    """What a conversion knows of its source. Tensors are located, but not read."""

    path: Path  # the folder that holds the files, or a GGUF file
    format: str  # "hf", "meta" or "gguf"
    config: dict  # as `config.hf.read_config` returns it
    rows: list[Row] = field(repr=False)  # the table's rows for this model
    tensors: dict[str, list[StoredTensor]] = field(repr=False)  # by Hugging Face's names; one for each shard
    tokenizer: Path | None
    tokenizer_kind: str | None  # "tiktoken", "sentencepiece" or "tokenizer.json"
    version: str  # of Llama: "2", "3.0", "3.1", "3.2", "3.3" or "unknown"
    instruct: bool
    special_tokens: list[str] | None  # in the order of their ids; None where the tokenizer's own file names them
    chat_template: str | None  # the default template, if it is not Llama 3's
    generation_config: dict | None  # None: the folder has none
    inferred: list[str]  # sentences: what, and why
    copies: list[tuple[StoredTensor, StoredTensor]] = field(default_factory=list, repr=False)  # (used, left out)
    order: str = ""  # of query and key rows, "hf" or "meta"; that of the format if omitted
    loads_as_is: bool = True  # whether transformers' `from_pretrained` takes the folder as it stands
    more_config: dict = field(default_factory=dict)  # the other keys of config.json
    hf_tokenizer: Path | None = None  # folder with the tokenizer's original Hugging Face files, if any
    keeps: object = field(default=None, repr=False)  # a temporary folder of tokenizer files

    def __post_init__(self):
        self.order = self.order or self.format

    @property
    def folder(self) -> Path:
        """The folder that file names are relative to."""
        return self.path.parent if self.format == "gguf" else self.path

    @property
    def name(self) -> str:
        """What it is called: as on the Hub, if it lies in its cache, otherwise by the name of its folder or file."""
        place = self.folder.resolve() / (self.path.name if self.format == "gguf" else "")
        place = place.parent if place.name == "original" else place
        for commit in (place, *place.parents):
            if repository := repository_of(commit):
                return "/".join([repository, *place.relative_to(commit).parts])
        return place.name

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted({path for tensors in self.tensors.values() for tensor in tensors for path in tensor.paths})

    @property
    def num_shards(self) -> int:
        """The number of model-parallel shards (1 in Hugging Face's format)."""
        return len(self.tensors[EMBEDDING.hf])

    @property
    def tied(self) -> bool:
        return self.config["tie_word_embeddings"]

    @property
    def head(self) -> str:
        """The model's head, one of `HEADS`."""
        return head_of(self.config)

    def require_language_model(self):
        """Check that the model writes texts.

        Raises:
            UserError: it does not; the sentence says what it does and what loads it.
        """
        if self.head != LANGUAGE_MODEL:
            loader = f"AutoModel{self.head.removeprefix('Model')}.from_pretrained('{self.path}')"
            kind = self.config["architectures"][0]
            raise UserError(
                f"{self.path} is a {kind}, which {PURPOSES[self.head]} and writes no text; load it by {loader}"
            )

    @property
    def own_rows(self) -> list[Row]:
        """The rows whose tensors are stored: without the output head if it is tied."""
        return [row for row in self.rows if not (self.tied and row.hf == OUTPUT.hf)]

    @property
    def dtype(self) -> str:
        """The type that most bytes have."""
        count = Counter()
        for tensors in self.tensors.values():
            count[tensors[0].dtype.name] += sum(tensor.nbytes for tensor in tensors)
        return count.most_common(1)[0][0]

    @property
    def num_parameters(self) -> int:
        size = sizes(self.config)
        return sum(math.prod(row.full_shape(size)) for row in self.own_rows)

    def check_copies(self):
        """Check that tensors which were left out as copies are copies.

        Raises:
            UserError: naming the file.
        """
        for taken, left_out in self.copies:
            if not same_tensors([taken], [left_out]):
                raise self.no_copies(taken, left_out)

    def no_copies(self, taken: StoredTensor, left_out: StoredTensor) -> UserError:
        files = f"{taken.file.path.name} and {left_out.file.path.name}"
        return UserError(f"{self.path}: {files} must hold the same key/value head, as they do in the first layer")

    def cut(self, row: Row, start: int, stop: int) -> list[Part]:
        """Return the elements from `start` to `stop` along the divided dimension, as parts to be concatenated."""
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


def check_layers(num_layers: int, num_tensors: int, path: Path):
    """Refuse a configuration with more layers than there are tensors, before the table is expanded."""
    if num_layers > num_tensors:
        raise UserError(f"{path} lacks tensors: {num_layers} layers are configured, and it holds {num_tensors} tensors")


def check_names(found: set[str], expected: set[str], path: Path):
    """Check that a checkpoint has exactly the expected tensors, by name.

    Raises:
        UserError: some are missing or unknown; the sentence counts them and names the first.
    """
    problems = []
    for verb, kind, names in (("lacks", "", expected - found), ("holds", "unknown ", found - expected)):
        if names:
            first = ", ".join(map(quoted, sorted(names)[:3])) + (", ..." if len(names) > 3 else "")
            problems.append(f"{verb} {len(names)} {kind}tensor{'s' * (len(names) > 1)}: {first}")
    if problems:
        another = "" if found & expected else "it is of another kind than its configuration says: "
        remedy = f"{another}take the configuration that came with these weights"
        missing = " or download the files that are missing" if found & expected and expected - found else ""
        raise UserError(f"{path} {' and '.join(problems)}; {remedy}{missing}")


def check_shapes(table: list[Row], shards: dict[str, list[StoredTensor]], config: dict, folder: Path, config_name: str):
    """Check that every tensor has the shape of the configuration, and the same type in all shards.

    Raises:
        UserError: one has not; the sentence gives both.
    """
    size = sizes(config)
    for row in table:
        tensors, expected = shards[row.hf], list(row.full_shape(size))
        if row.split is not None:
            if expected[row.split] % len(tensors):
                raise UserError(f"{folder}: {len(tensors)} shards cannot divide {row.hf} {expected} evenly")
            expected[row.split] //= len(tensors)
        for tensor in tensors:
            if list(tensor.shape) != expected:
                got = f"{list(tensor.shape)} in {tensor.file.path.name}"
                raise UserError(f"{folder}: {config_name} makes {row.hf} {expected}, but it is {got}")
            if tensor.dtype != tensors[0].dtype:
                types = f"{tensors[0].dtype.name} and {tensor.dtype.name} in {tensor.file.path.name}"
                raise UserError(f"{folder}: {row.hf} must have one type in all shards, got {types}")
        if row.split is None and len({tensor.read() for tensor in tensors}) > 1:
            raise UserError(f"{folder}: {row.hf} must be the same in all shards, which each hold all of it")


def same_tensors(ours: list[StoredTensor], theirs: list[StoredTensor]) -> bool:
    """Compare two tensors, shard by shard, to the bit."""
    return all(
        one.dtype == other.dtype and (one is other or same_arrays(one, other))
        for one, other in zip(ours, theirs, strict=True)
    )


def same_arrays(one: StoredTensor, other: StoredTensor) -> bool:
    return one.shape == other.shape and all(
        np.array_equal(one.file.take(one.array[block]), other.file.take(other.array[block]))
        for block in row_blocks(one.array)
    )
