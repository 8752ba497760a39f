"""What a training run can be told, with the defaults; apart from the recipe, which imports torch."""

import math
from dataclasses import dataclass

from hf_llama3.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Say how to train; one step is one update of the weights.

    Raises:
        UserError: in `__init__`, for a number out of its range.
    """

    tokenizer: str = "bpe:2048"  # a byte-level BPE of so many tokens, trained on the training part
    layers: int = 4
    hidden_size: int = 192  # channels
    heads: int = 6  # query heads per layer
    kv_heads: int = 2  # key/value heads per layer
    context: int = 128  # tokens per window
    steps: int = 500
    batch_size: int = 16  # windows per step
    learning_rate: float = 3e-3  # AdamW's, at its peak after a tenth of the steps; it falls to zero along a cosine
    matrix_learning_rate: float = 0.02  # Muon's, which trains the layers' matrices, likewise
    eval_every: int | None = None  # steps between evaluations; None: a fifth of the steps
    seed: int = 0  # of weights and windows

    def __post_init__(self):
        for name in ("layers", "hidden_size", "heads", "kv_heads", "context", "steps", "batch_size", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("learning_rate", "matrix_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed must be between 0 and {2**32 - 1}, got {self.seed}")
        if not self.vocab_size:
            raise UserError(f"--tokenizer must be bpe:N with a number of tokens, got {self.tokenizer!r}")

    @property
    def vocab_size(self) -> int:
        """The N of `bpe:N`, 0 if it is something else."""
        kind, _, size = self.tokenizer.partition(":")
        return int(size) if kind == "bpe" and size.isascii() and size.isdecimal() else 0
