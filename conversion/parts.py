"""Where the parameters of a checkpoint are: in which part, and which layer, from its headers alone."""

import math
from pathlib import Path

from .checkpoint import Checkpoint
from .hub import described
from .opening import open_checkpoint
from .picture import draw_bars
from .weights import sizes

# Module, as Meta's names have it -> part
PARTS = {
    "tok_embeddings": "embedding",
    "attention": "attention",
    "feed_forward": "feed-forward",
    "attention_norm": "norms",
    "ffn_norm": "norms",
    "norm": "norms",
    "output": "head",
}


def parameters_by_part(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Count the parameters of each part, layer by layer; a tied head has none of its own."""
    size, parts = sizes(checkpoint.config), {part: {} for part in PARTS.values()}
    for row in checkpoint.own_rows:
        module, *inner = row.meta.split(".")
        layer = None
        if module == "layers":
            layer, module, *_ = inner
        layers = parts[PARTS[module]]
        layers[layer] = layers.get(layer, 0) + math.prod(row.full_shape(size))
    return {part: list(layers.values()) for part, layers in parts.items()}


def plot_parts(path, rope_factor: float | None, picture: Path) -> str | None:
    """Draw the parameters of each part of a checkpoint; return a note where matplotlib is missing, instead.

    Raises:
        UserError: it is no checkpoint, or the picture cannot be written.
    """
    with described(path) as folder:
        parts = parameters_by_part(open_checkpoint(folder, rope_factor))
    total = sum(map(sum, parts.values()))
    bars = {}
    for part, layers in parts.items():
        size = f"{sum(layers):,}, {sum(layers) / total:.1%}" if layers else "the embedding's"
        bars[f"{part}\n{size}"] = [count / 1e6 for count in layers]
    return draw_bars(bars, f"millions of parameters, a stripe for each layer; {total:,} together", picture)
