"""A text of any size as training data: read in pieces, split, written as token ids, cut into windows."""

import codecs
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_llama3.errors import UserError
from hf_llama3.files.progress import byte_bar
from hf_llama3.files.reading import require_file

READ_BYTES = 2**20
LONGEST_LINE = 2**20  # characters; what is longer is cut anywhere: nothing is seen while a piece is made tokens
IGNORED = -100  # the label of a position that does not count


@dataclass
class Text:
    """A text file that was read through once: its length and its hash."""

    path: Path
    length: int  # characters
    sha256: str

    def divide(self, validation_share: float, test_share: float) -> tuple[range, range, range]:
        """Return the ranges of characters for training, validation and test, which do not overlap."""
        first, second = (int(self.length * share) for share in (1 - validation_share - test_share, 1 - test_share))
        return range(first), range(first, second), range(second, self.length)


def survey(path: Path, progress: bool = False) -> Text:
    """Read a text file through once; `progress` shows a bar.

    Raises:
        UserError: it is missing, in another encoding, or holds no text.
    """
    length, digest, blank = 0, hashlib.sha256(), True
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    with byte_bar("reading", size, progress) as bar:
        for piece in read_pieces(path, bar.update):
            length += len(piece)
            digest.update(piece.encode())
            blank = blank and not piece.strip()
    if blank:
        raise UserError(f"{path} must hold text, got {length} characters of white space; choose another file")
    return Text(path, length, digest.hexdigest())


def read_pieces(path: Path, progress: Callable[[int], None] = lambda count: None) -> Iterator[str]:
    """Yield a text file in pieces, unchanged but for the mark that some editors put before it.

    Raises:
        UserError: it cannot be read, or is not in UTF-8.
    """
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        require_file(path, "; pass a text file")  # it is read several times
        with open(path, "rb") as file:
            while chunk := file.read(READ_BYTES):
                waiting = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut
                piece = decoder.decode(chunk)
                yield piece if read else piece.removeprefix("\ufeff")
                read += len(chunk)
                progress(len(chunk))
            waiting, chunk = len(decoder.getstate()[0]), b""
            decoder.decode(b"", final=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; pass a text file") from error
    except UnicodeDecodeError as error:
        place = read - waiting + error.start
        raise UserError(
            f"{path} must be text in UTF-8, but byte {place} is {error.object[error.start]:#04x}; "
            "convert it first, for example with iconv"
        ) from error


def read_range(text: Text, characters: range, progress: Callable[[int], None] = lambda count: None) -> Iterator[str]:
    """Yield a part of a text in pieces that end with a line, so that a tokenizer splits them as it would the whole."""
    position, rest = 0, ""
    for piece in read_pieces(text.path):
        start, stop = max(characters.start - position, 0), max(characters.stop - position, 0)
        position += len(piece)
        rest += piece[start:stop]
        if cut := end_of_line(rest) or len(rest) // LONGEST_LINE * LONGEST_LINE:
            progress(cut)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        progress(len(rest))
        yield rest


def end_of_line(text: str) -> int:
    """Return where the last line begins, or 0 if that is unclear because white space may belong to what follows."""
    cut = len(text)
    while cut := text.rfind("\n", 0, cut) + 1:
        if cut < len(text) and not text[cut].isspace():
            return cut
        cut -= 1
    return 0


def write_tokens(path: Path, pieces: Iterator[str], encode: Callable[[str], list[int]], vocab_size: int) -> np.memmap:
    """Write the token ids of a text to a file, in the narrowest type for the vocabulary, and map the file."""
    dtype = token_dtype(vocab_size)
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(np.array(encode(piece), dtype).tobytes())
    return map_tokens(path, vocab_size)


def map_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """Map a file that `write_tokens` wrote."""
    dtype = token_dtype(vocab_size)
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class ShuffledWindows(Dataset):
    """Windows of `context` tokens with the token after each position as label, in an order that the seed determines.

    Every window of a text is seen once before any is seen again; each round through the text starts at another offset.
    Item i is the same in every process and every run, so that a resumed run continues where it stopped.
    """

    def __init__(self, tokens: np.ndarray, context: int, length: int, seed: int):
        self.tokens, self.context, self.length, self.seed = tokens, context, length, seed
        self.per_round = max((len(tokens) - 1) // context - 1, 1)  # one is lost to the offset

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        number, place = divmod(index, self.per_round)
        room = len(self.tokens) - 1 - self.per_round * self.context
        offset = draw(self.seed, number) % (room + 1)
        place = permute(place, self.per_round, self.seed + number)
        return window(self.tokens, offset + place * self.context, self.context)


def permute(index: int, count: int, seed: int) -> int:
    """Map 0 ... count - 1 onto itself in an order drawn by seed, without a table of it.

    A Feistel network permutes the next power of four; what falls outside is permuted again until it falls inside.
    """
    bits = (max(count - 1, 1).bit_length() + 1) // 2
    mask = 2**bits - 1
    while True:
        left, right = index >> bits, index & mask
        for number in range(4):
            left, right = right, left ^ (draw(seed, number, right) & mask)
        index = left << bits | right
        if index < count:
            return index


def draw(*key: int) -> int:
    """Return a random number below 2**64 that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


class ConsecutiveWindows(Dataset):
    """A whole text in windows of `context` tokens that do not see each other; padding does not count.

    The number of windows is a multiple of `multiple`, so that each process gets as many; the last may be all padding.
    """

    def __init__(self, tokens: np.ndarray, context: int, multiple: int = 1):
        self.tokens, self.context = tokens, context
        needed = -(-max(len(tokens) - 1, 0) // context)
        self.length = -(-needed // multiple) * multiple

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return window(self.tokens, index * self.context, self.context)


def window(tokens: np.ndarray, start: int, context: int) -> dict[str, torch.Tensor]:
    """Cut inputs and the tokens to predict, already shifted: every one of the `context` positions is scored."""
    cut = torch.from_numpy(tokens[start : start + context + 1].astype(np.int64))
    inputs, labels = cut.new_zeros(context), cut.new_full((context,), IGNORED)
    count = max(len(cut) - 1, 0)
    inputs[:count], labels[:count] = cut[:count], cut[1:]
    return {"input_ids": inputs, "labels": labels, "shift_labels": labels}
