"""Proof that two checkpoints split texts in the same way: every id, and texts that break tokenizers."""

from pathlib import Path

from hf_llama3.errors import UserError
from hf_llama3.files.reading import read_file

from ..checkpoint import Checkpoint
from .bpe import build_tokenizer, read_ranks, read_tokenizer_json, special_name
from .files import build_sentencepiece, copy_files, read_sentencepiece


def compare_tokenizers(source: Checkpoint, target: Checkpoint) -> str:
    """Return "equal", "absent", "only in source", "only in target", "differs", or why they were not compared."""
    if source.tokenizer is None or target.tokenizer is None:
        held = [name for name, checkpoint in (("source", source), ("target", target)) if checkpoint.tokenizer]
        return f"only in {held[0]}" if held else "absent"
    if describe(source) == describe(target) or (source.format != target.format and same_files(source, target)):
        return "equal"
    try:
        ours, theirs = load_tokenizer(source), load_tokenizer(target)
    except UserError as error:
        return f"not compared: {error}"
    # Meta's code is told with each text whether a token begins it; that stands in Hugging Face's file only.
    return "equal" if split_alike(ours, theirs, source.format == target.format) else "differs"


def same_files(source: Checkpoint, target: Checkpoint) -> bool:
    """Tell whether a tokenizer's Hugging Face files are the same on both sides, wherever they lie."""
    if source.hf_tokenizer is None or target.hf_tokenizer is None:
        return False
    return copy_files(source.hf_tokenizer) == copy_files(target.hf_tokenizer)


def describe(checkpoint: Checkpoint) -> tuple:
    """Return what cannot be the same for two tokenizers that split alike only by chance."""
    return checkpoint.format, checkpoint.special_tokens, read_file(tokenizer_file(checkpoint))


def tokenizer_file(checkpoint: Checkpoint) -> Path:
    """Return the file that a reader of the checkpoint's format takes."""
    fast = checkpoint.path / "tokenizer.json"
    return fast if checkpoint.format == "hf" and fast.is_file() else checkpoint.tokenizer


def load_tokenizer(checkpoint: Checkpoint):
    """Build the `tokenizers.Tokenizer` that a checkpoint's file describes.

    Raises:
        UserError: the file is damaged, or an extra is missing.
    """
    path = tokenizer_file(checkpoint)
    if path.suffix == ".json":
        return read_tokenizer_json(read_file(path), path)
    if checkpoint.tokenizer_kind == "sentencepiece":
        return build_sentencepiece(read_sentencepiece(path))
    tokens, names = read_ranks(path), checkpoint.special_tokens
    return build_tokenizer(tokens, names, special_name(checkpoint.config["bos_token_id"], len(tokens), names))


def split_alike(ours, theirs, with_begin: bool) -> bool:
    """Tell whether two tokenizers have the same ids, and split, and join again, every hard text alike."""
    if ours.get_vocab(with_added_tokens=True) != theirs.get_vocab(with_added_tokens=True):
        return False
    texts = hard_texts() + [ours.id_to_token(index) for index in ours.get_added_tokens_decoder()]
    ids, other_ids = (
        [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=with_begin)]
        for tokenizer in (ours, theirs)
    )
    joined, other_joined = (tokenizer.decode_batch(ids, skip_special_tokens=False) for tokenizer in (ours, theirs))
    return ids == other_ids and joined == other_joined


def hard_texts() -> list[str]:
    """List texts that break tokenizers: every Unicode block, long runs, white space, contractions, special tokens."""
    starts = [start for start in range(0, 0x11000, 64) if not 0xD800 <= start < 0xE000]  # no surrogates
    blocks = ["".join(map(chr, range(start, start + 64))) for start in starts]
    emoji = ["".join(map(chr, range(start, start + 16))) for start in range(0x1F300, 0x1FA00, 16)]
    runs = [" " * 300, "\n" * 50, "x" * 500, "0123456789" * 9]
    words = ["I'll don't WE'VE they'd 'S", "a  b   c\t\td\n\n\ne \r\n f", "Hello world", "hello, World!  ", "3.14159"]
    odd = ["", " ", "é", "e\u0301", "\ufeff", "\x00", "ﷺ", "\U0001d518\U0001d52b", "👩‍👩‍👧‍👦"]
    special = ["<|begin_of_text|>", "a<|eot_id|>b", "<|start_header_id|>user<|end_header_id|>", "<|not_special|>"]
    return blocks + emoji + runs + words + odd + special
