"""What `inspect` tells of a checkpoint before anything is converted or loaded."""

from dataclasses import asdict, dataclass, replace

from .checkpoint import Checkpoint
from .hub import described
from .opening import open_checkpoint


@dataclass
class CheckpointInfo:
    """Describe a checkpoint of either format; sizes in bytes, lengths in tokens."""

    path: str
    format: str  # "hf" or "meta"
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
    tokenizer: str | None
    config: dict
    inferred: list[str]

    def to_dict(self) -> dict:
        return asdict(self)


def inspect(path, rope_factor: float | None = None) -> CheckpointInfo:
    """Open a checkpoint of either format and say what it is; of one on the Hub only the headers are fetched.

    Raises:
        UserError: it is neither, damaged, contradicts itself, or needs `rope_factor`.
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
        files=[str(path.relative_to(checkpoint.path)) for path in checkpoint.files],
        bytes=sum(tensor.nbytes for tensor in stored),
        dtype=checkpoint.dtype,
        dtypes=sorted({tensor.dtype.name for tensor in stored}),
        tied=checkpoint.tied,
        tokenizer=checkpoint.tokenizer_kind,
        config=checkpoint.config,
        inferred=checkpoint.inferred,
    )
