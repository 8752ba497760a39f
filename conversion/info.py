"""`inspect`: what a checkpoint is, before anything is converted or loaded."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hf_llama3.files.picture import draw_bars

from .checkpoint import Checkpoint
from .hub.hollow import described
from .opening import open_checkpoint
from .weights import HEAD_MODULES, sizes

# Module, as Meta's names have it -> part
PARTS = {
    "tok_embeddings": "embedding",
    "attention": "attention",
    "feed_forward": "feed-forward",
    "attention_norm": "norms",
    "ffn_norm": "norms",
    "norm": "norms",
    "output": "head",
    **dict.fromkeys(HEAD_MODULES, "head"),
}


@dataclass
class CheckpointInfo:
    """A checkpoint of any format; sizes in bytes, lengths in tokens."""

    path: str
    format: str  # "hf", "meta" or "gguf"
    llama_version: str
    instruct: bool
    num_parameters: int
    num_tensors: int
    num_shards: int  # model-parallel shards of Meta's format
    files: list[str]
    bytes: int  # of all tensors
    dtype: str
    dtypes: list[str]
    tied: bool
    loads_as_is: bool  # whether transformers' `from_pretrained` takes the folder as it stands
    head: str  # the end of the class's name, such as "ForCausalLM"
    tokenizer: str | None
    config: dict
    inferred: list[str]

    def to_dict(self) -> dict:
        return asdict(self)


def inspect(path, rope_factor: float | None = None) -> CheckpointInfo:
    """Open a checkpoint of any format and describe it; from the Hub only headers are fetched.

    Raises:
        UserError: it is none, is damaged, contradicts itself, or needs `rope_factor`.
    """
    with described(path) as folder:
        info = describe(open_checkpoint(folder, rope_factor))
        return replace(info, path=info.path.replace(str(folder), str(path)))


def describe(checkpoint: Checkpoint) -> CheckpointInfo:
    stored = {id(tensor): tensor for tensors in checkpoint.tensors.values() for tensor in tensors}.values()
    return CheckpointInfo(
        path=str(checkpoint.path),
        format=checkpoint.format,
        llama_version=checkpoint.version,
        instruct=checkpoint.instruct,
        num_parameters=checkpoint.num_parameters,
        num_tensors=len({id(tensors[0]) for tensors in checkpoint.tensors.values()}),
        num_shards=checkpoint.num_shards,
        files=[str(path.relative_to(checkpoint.folder)) for path in checkpoint.files],
        bytes=sum(tensor.nbytes for tensor in stored),
        dtype=checkpoint.dtype,
        dtypes=sorted({tensor.dtype.name for tensor in stored}),
        tied=checkpoint.tied,
        loads_as_is=checkpoint.loads_as_is,
        head=checkpoint.head,
        tokenizer=checkpoint.tokenizer_kind,
        config=checkpoint.config,
        inferred=checkpoint.inferred,
    )


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
    """Draw the parameters of each part of a checkpoint; where matplotlib is missing, return a note instead.

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
