"""A tokenizer for a text, trained on it, in Meta's format and in Hugging Face's at once."""

from collections.abc import Iterable

from hf_llama3.conversion.meta_checkpoint import TOKENIZER_FILE
from hf_llama3.conversion.tokenizer import (
    NUM_SPECIAL_TOKENS,
    PATTERN,
    byte_characters,
    hf_tokenizer_files,
    special_tokens,
    tiktoken_file,
    token_ids,
)
from hf_llama3.errors import UserError

VERSION = "3.1"  # whose special tokens a new tokenizer gets: the first with one for padding
NUM_BYTES = 256  # every byte is a token, so that any text can be encoded


def train_bpe(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """Train a byte-level BPE on `texts` and return its tokens in the order of their ranks.

    Args:
        vocab_size: tokens in all, with the 256 special ones that every Llama 3 has after its ranks.

    Raises:
        UserError: the vocabulary is too small.
    """
    smallest = NUM_BYTES + NUM_SPECIAL_TOKENS
    if vocab_size < smallest:
        raise UserError(f"bpe:N must have at least {smallest} tokens (bytes and special tokens), got {vocab_size}")
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
    tokenizer.train_from_iterator(texts, trainer)
    to_byte = {character: byte for byte, character in byte_characters().items()}
    ranked = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return [bytes(to_byte[character] for character in token) for token, _ in ranked]


def make_tokenizer(tokens: list[bytes], context: int) -> tuple[dict[str, bytes], dict]:
    """Return the files of a tokenizer, Meta's and Hugging Face's, and what the model's configuration must know of it.

    Args:
        tokens: in the order of their ranks.
        context: tokens that the model is made for.
    """
    names = special_tokens(VERSION)
    vocabulary = {"vocab_size": len(tokens) + len(names)} | token_ids(names, len(tokens), instruct=False)
    files = hf_tokenizer_files(tokens, names, vocabulary | {"max_position_embeddings": context}, instruct=False)
    encoded = {name: content.encode() for name, content in files.items()}
    return encoded | {TOKENIZER_FILE: tiktoken_file(tokens)}, vocabulary
