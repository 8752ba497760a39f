"""The tokenizer of a training run: its characters, a byte-level BPE trained on the text, or one from a folder."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hf_llama3.conversion.config.schema import read_small
from hf_llama3.conversion.tokenizer.bounds import read_tokenizer_file
from hf_llama3.conversion.tokenizer.bpe import (
    NUM_SPECIAL_TOKENS,
    PATTERN,
    byte_characters,
    hf_tokenizer_files,
    read_ranks,
    read_tokenizer_json,
    special_tokens,
    tiktoken_file,
    token_ids,
    tokenizer_kind,
)
from hf_llama3.conversion.tokenizer.files import PORTABLE_CLASS, TOKENIZER_MODEL, copy_files
from hf_llama3.errors import UserError, library_errors, quoted
from hf_llama3.files.json import to_json

VERSION = "3.1"  # whose special tokens a new tokenizer gets: the first with one for padding
NUM_BYTES = 256  # every byte is a token, so that any text can be encoded
MOST_TOKENS = 2**20  # room for all of them is taken before the first is found
UNKNOWN = "<unk>"  # what a tokenizer of characters makes of one that it has not met


@dataclass
class TextTokenizer:
    """The files of a tokenizer, and the part of a model's configuration that depends on it.

    Raises:
        UserError: in `__init__`, tokenizer.json is damaged, or has more ids than the embedding has rows.
    """

    files: dict[str, bytes]
    vocabulary: dict  # vocab_size and token ids

    def __post_init__(self):
        self.fast = read_tokenizer_json(self.files["tokenizer.json"], Path("tokenizer.json"))
        largest, rows = max(self.fast.get_vocab(with_added_tokens=True).values()), self.vocabulary["vocab_size"]
        if largest >= rows:
            raise UserError(f"the tokenizer's ids must be below the {rows} rows of the embedding, got {largest}")

    def encode(self, text: str) -> list[int]:
        with library_errors("the tokenizer fails at the text", "choose another by --tokenizer"):
            return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.fast.decode(ids)


def make_tokenizer(kind: str, pieces: Iterable[str], context: int) -> TextTokenizer:
    """Make the tokenizer that `--tokenizer` names.

    Args:
        kind: "char", "bpe:N" or a folder.
        pieces: of the training text alone.
        context: tokens that the model is made for.

    Raises:
        UserError: there is no such tokenizer.
    """
    name, _, size = kind.partition(":")
    if kind == "char":
        return character_tokenizer(pieces, context)
    if name == "bpe" and re.fullmatch("0*[0-9]{1,12}", size):
        return tiktoken_tokenizer(train_bpe(pieces, int(size)), context)
    if os.path.isdir(kind):  # where nothing can have such a name, there is none
        return read_tokenizer(Path(kind), context)
    kinds = "char, bpe:N with a number of tokens, or a folder with one"
    raise UserError(f"--tokenizer must be {kinds}, got {quoted(kind)}")


def character_tokenizer(pieces: Iterable[str], context: int) -> TextTokenizer:
    """Make every character of the text a token.

    Raises:
        UserError: there is only one.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = set()
    for piece in pieces:
        characters |= set(piece)
    if len(characters) < 2:
        raise UserError(f"the text must have at least two different characters to learn, got {sorted(characters)}")
    vocab = {character: index for index, character in enumerate(sorted(characters))}
    vocab[UNKNOWN] = len(vocab)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(UNKNOWN, normalized=False)])
    config = {
        "tokenizer_class": PORTABLE_CLASS,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
    }
    files = {"tokenizer.json": tokenizer.to_str(pretty=True).encode(), "tokenizer_config.json": to_json(config)}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return TextTokenizer(files, {"vocab_size": len(vocab)} | ids)


def train_bpe(pieces: Iterable[str], vocab_size: int) -> list[bytes]:
    """Train a byte-level BPE and return its tokens in the order of their ranks.

    Args:
        vocab_size: tokens in all, with the 256 special ones that every Llama 3 has after its ranks.

    Raises:
        UserError: the vocabulary is too small, or too large.
    """
    smallest = NUM_BYTES + NUM_SPECIAL_TOKENS
    if vocab_size < smallest:
        raise UserError(f"bpe:N must have at least {smallest} tokens (bytes and special tokens), got {vocab_size}")
    if vocab_size > MOST_TOKENS:
        raise UserError(f"bpe:N must have at most {MOST_TOKENS} tokens, got {vocab_size}; Llama 3 has 128,256")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    to_byte = {character: byte for byte, character in byte_characters().items()}
    ranked = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return [bytes(to_byte[character] for character in token) for token, _ in ranked]


def tiktoken_tokenizer(tokens: list[bytes], context: int) -> TextTokenizer:
    """Make the files of both formats from tokens in the order of their ranks."""
    names = special_tokens(VERSION)
    vocabulary = {"vocab_size": len(tokens) + len(names)} | token_ids(names, len(tokens), instruct=False)
    files = hf_tokenizer_files(tokens, names, vocabulary | {"max_position_embeddings": context}, instruct=False)
    encoded = {name: content.encode() for name, content in files.items()}
    return TextTokenizer(encoded | {TOKENIZER_MODEL: tiktoken_file(tokens)}, vocabulary)


def read_tokenizer(folder: Path, context: int) -> TextTokenizer:
    """Read the tokenizer of a folder in either format.

    Raises:
        UserError: it holds none that can be taken.
    """
    model = folder / TOKENIZER_MODEL
    if not (folder / "tokenizer.json").is_file():
        if not model.is_file() or tokenizer_kind(model) != "tiktoken":
            raise UserError(f"{folder} must hold tokenizer.json, or Llama 3's tokenizer.model; name another folder")
        return tiktoken_tokenizer(read_ranks(model), context)
    files, path = copy_files(folder), folder / "tokenizer.json"
    read_tokenizer_file(path)
    fast = read_tokenizer_json(files[path.name], path)
    vocab_size = max(fast.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps
    return TextTokenizer(files, {"vocab_size": vocab_size} | read_token_ids(folder, fast))


def read_token_ids(folder: Path, fast) -> dict:
    """Return the ids of the special tokens that tokenizer_config.json names."""
    path = folder / "tokenizer_config.json"
    config = read_small(path) if path.is_file() else {}
    ids = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        ids[f"{name}_id"] = fast.token_to_id(token) if isinstance(token, str) else None
    return ids
