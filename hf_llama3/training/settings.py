"""The settings of a training run and their defaults, in a module that does not import torch."""

import math
from dataclasses import dataclass, fields

from hf_llama3.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Describe a training run; a step is one update of the weights.

    Raises:
        UserError: in `__init__`, for a number out of its range.
    """

    tokenizer: str = "bpe:2048"  # "char"; "bpe:N", of N tokens; or a folder with one
    layers: int = 4
    hidden_size: int = 192  # channels
    intermediate_size: int | None = None  # channels of the feed-forward; None: Meta's 8/3 of the width
    heads: int = 6  # query heads per layer
    kv_heads: int = 2  # key/value heads per layer
    context: int = 128  # tokens per window
    dropout: float = 0.0  # probability, of attention weights and of what goes into the residual stream
    steps: int = 500
    batch_size: int = 16  # windows per step, over all processes
    accumulate: int = 1  # parts that a step's windows are computed in, one after another
    learning_rate: float = 3e-3  # AdamW's, at its peak
    matrix_learning_rate: float = 0.02  # Muon's, which trains the layers' matrices, likewise; 0: AdamW trains all
    weight_decay: float = 0.1  # of matrices
    warmup: float = 0.1  # share of the steps in which the learning rate rises; it then falls to zero along a cosine
    eval_every: int | None = None  # steps between evaluations; None: a tenth of the steps
    validation_share: float = 0.1  # of the text, after what trains
    test_share: float = 0.0  # of the text, at its end; used once, after training
    source: str | None = None  # folder of a model to continue from, in either format; its shape and tokenizer are kept
    lora: int | None = None  # rank of the adapters to train in place of the model's own weights
    bf16: bool | None = None  # compute in bfloat16 (autocast); None: on a GPU that supports it
    compile: bool = False  # with torch.compile
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    fsdp: bool = False  # divide weights, gradients and optimiser state among processes (FSDP2)
    seed: int = 0  # of weights, windows and dropout

    def __post_init__(self):
        wholes = ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "context", "steps", "batch_size")
        for name in (*wholes, "accumulate", "eval_every", "lora"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{option(name)} must be at least 1, got {value}")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"--learning-rate must be positive, got {self.learning_rate}")
        if not 0 <= self.matrix_learning_rate < math.inf:
            raise UserError(f"--matrix-learning-rate must be 0 or more, got {self.matrix_learning_rate}")
        for name in ("dropout", "weight_decay", "warmup", "validation_share", "test_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{option(name)} must be at least 0 and less than 1, got {getattr(self, name)}")
        if not 0 < self.validation_share < 1 - self.test_share:
            shares = f"{self.validation_share} and {self.test_share}"
            raise UserError(f"--validation-share and --test-share must leave text to train on, got {shares}")
        for name in ("lora", "test_share"):
            if self.fsdp and getattr(self, name):
                raise UserError(f"--fsdp cannot go with {option(name)}, got {getattr(self, name)}; leave one out")
        if self.lora is not None and self.source is None:
            raise UserError(f"--lora adapts a trained model, got --lora {self.lora} without --from")
        if self.lora is not None and self.matrix_learning_rate:
            raise UserError(f"--matrix-learning-rate must be 0 with --lora, got {self.matrix_learning_rate}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed must be between 0 and {2**32 - 1}, got {self.seed}")


# For comparisons on tiny Shakespeare with nanoGPT's two recipes (github.com/karpathy/nanoGPT, README, of as many steps
# and windows) at about as many parameters as theirs: 0.80 and 10.65 million.
PRESETS = {
    "shakespeare-cpu": {
        **{"tokenizer": "char", "layers": 4, "hidden_size": 128, "heads": 4, "kv_heads": 4, "context": 64},
        **{"steps": 2000, "batch_size": 12},
    },
    "shakespeare-gpu": {
        **{"tokenizer": "char", "layers": 6, "hidden_size": 384, "heads": 6, "kv_heads": 6, "context": 256},
        **{"steps": 5000, "batch_size": 64, "dropout": 0.2},
    },
}

# A trained model is changed little by little, by AdamW: Muon moves every matrix by as much whatever the gradient.
SHAPE = ("tokenizer", "layers", "hidden_size", "intermediate_size", "heads", "kv_heads")
FROM_SOURCE = {"learning_rate": 1e-4, "matrix_learning_rate": 0.0}


def make_settings(preset: str | None = None, **options) -> Settings:
    """Combine a preset with options, of which None means the preset's value or the default.

    Raises:
        UserError: the preset does not exist, or a number is out of its range.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(f"--preset must be one of {sorted(PRESETS)}, got {preset!r}")
    given = {name: value for name, value in options.items() if value is not None}
    usual = {}
    if given.get("source"):
        usual, taken = (
            FROM_SOURCE,
            [option(name) for name in SHAPE if name in given] + ["--preset"] * (preset is not None),
        )
        if taken:
            raise UserError(
                f"--from takes shape and tokenizer from its model, got {' and '.join(taken)}; leave them out"
            )
    return Settings(**usual | PRESETS.get(preset, {}) | given)


def differences(ours: Settings, theirs: dict) -> list[str]:
    """List the options that differ from those of an earlier run."""
    names = [field.name for field in fields(Settings)]
    return [option(name) for name in names if getattr(ours, name) != theirs.get(name)]


def option(name: str) -> str:
    """Return the command line's name of a field."""
    return f"--{'from' if name == 'source' else name.replace('_', '-')}"
