"""A text as training data: read, split, cut into windows."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_llama3.errors import UserError

TRAINING_SHARE = 0.9  # of the text, from its start; the rest validates


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        UserError: it is missing, in another encoding, or empty.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} must be text in UTF-8, but byte {error.start} is {error.object[error.start]:#04x}; "
            "convert it first, for example with iconv"
        ) from error
    if not text.strip():
        raise UserError(f"{path} must hold text, got {len(text)} characters of white space; choose another file")
    return text


def split_text(text: str) -> tuple[str, str]:
    """Divide a text into what trains and what validates, which never meet."""
    cut = int(len(text) * TRAINING_SHARE)
    return text[:cut], text[cut:]


class RandomWindows(Dataset):
    """Windows of `context` tokens and the tokens that follow each of them, at places drawn by seed.

    Item i is the same in every process and every run, so that a resumed run continues where it stopped.
    """

    def __init__(self, tokens: np.ndarray, context: int, length: int, seed: int):
        self.tokens, self.context, self.length, self.seed = tokens, context, length, seed

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        start = np.random.default_rng((self.seed, index)).integers(len(self.tokens) - self.context)
        return window(self.tokens, start, self.context)


class ConsecutiveWindows(Dataset):
    """All of a text in windows of `context` tokens, each starting afresh; a shorter rest at the end is left out."""

    def __init__(self, tokens: np.ndarray, context: int):
        self.tokens, self.context = tokens, context

    def __len__(self):
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index):
        return window(self.tokens, index * self.context, self.context)


def window(tokens: np.ndarray, start: int, context: int) -> dict[str, torch.Tensor]:
    """Cut inputs and the tokens to predict, already shifted: every one of the `context` positions is scored."""
    cut = torch.from_numpy(tokens[start : start + context + 1].astype(np.int64))
    return {"input_ids": cut[:-1], "labels": cut[1:], "shift_labels": cut[1:]}
