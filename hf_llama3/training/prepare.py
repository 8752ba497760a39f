"""A tokenised text: its tokenizer and the token ids of its parts, in files that every process maps."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_llama3.errors import UserError
from hf_llama3.files.atomic import write_files
from hf_llama3.files.json import read_json, to_json
from hf_llama3.files.progress import byte_bar

from .data import Text, map_tokens, read_range, write_tokens
from .settings import Settings
from .tokenizer import TextTokenizer, make_tokenizer

FOLDER = "tokens"  # in the output, while training is not finished
DONE = "vocabulary.json"  # written last
PARTS = ("training", "validation", "test")


@dataclass
class Prepared:
    """The tokenizer, and the ids of the part that trains, of the one that validates, and of the one that tests."""

    tokenizer: TextTokenizer
    training: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def prepare(text: Text, output: Path, settings: Settings, tokenizer: TextTokenizer | None, progress: bool):
    """Make the tokenizer, if none is given, and write the ids of every part; a finished part is kept.

    Raises:
        UserError: the text is too short, or there is no such tokenizer.
    """
    folder = output / FOLDER
    if (folder / DONE).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    parts = text.divide(settings.validation_share, settings.test_share)
    if tokenizer is None:
        tokenizer = make_tokenizer(settings.tokenizer, counted(text, parts[0], "tokenizer", progress), settings.context)
    for name, characters in zip(PARTS, parts, strict=True):
        with closing(counted(text, characters, name, progress)) as pieces:  # and its bar, whatever ends it
            tokens = write_tokens(folder / f"{name}.bin", pieces, tokenizer.encode, tokenizer.vocabulary["vocab_size"])
        needed = settings.context + 1 if name == "training" else 2
        if len(tokens) < needed and (len(characters) or name != "test"):
            raise UserError(
                f"{text.path} is too short: its {name} part has {len(tokens)} tokens and needs {needed} for windows of "
                f"{settings.context}; take a longer text or a smaller --context"
            )
    write_files(folder, tokenizer.files)
    facts = {"vocabulary": tokenizer.vocabulary, "files": sorted(tokenizer.files)}
    (folder / DONE).write_bytes(to_json(facts))


def counted(text: Text, characters: range, name: str, progress: bool):
    """Yield the pieces of a part and show a progress bar."""
    with byte_bar(name, len(characters), progress) as bar:
        yield from read_range(text, characters, bar.update)


def read_prepared(output: Path) -> Prepared:
    """Map what `prepare` wrote."""
    folder = output / FOLDER
    facts = read_json(folder / DONE)
    tokenizer = TextTokenizer({name: (folder / name).read_bytes() for name in facts["files"]}, facts["vocabulary"])
    size = facts["vocabulary"]["vocab_size"]
    return Prepared(tokenizer, *(map_tokens(folder / f"{name}.bin", size) for name in PARTS))
