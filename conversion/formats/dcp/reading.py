"""Locate the tensors of a folder of torch.distributed.checkpoint, and check every piece."""

import math
from pathlib import Path, PurePosixPath

from hf_llama3.errors import UserError, quoted, shown

from ..pth import place, read_zip
from ..storage import BY_NAME, BY_STORAGE, SourceFile, StoredTensor
from ..unpickle import Tensor
from .chunks import ChunkedTensor, lay_out
from .metadata import METADATA, read_metadata

SUFFIX = ".distcp"
INSIDE = "pytorch_model_fsdp_*"  # where accelerate's FSDP puts it
# First or second parts of names that belong to a run, not to a model.
TRAINING = {"optimizer", "optim", "optimizers", "optimizer_state", "state", "param_groups", "train_state", "rng_state"}
TRAINING |= {"lr_scheduler", "lr_schedulers", "scheduler", "dataloader", "extra_state"}


def find_dcp(folder: Path) -> Path | None:
    """Return the folder of torch.distributed.checkpoint that a folder is or holds."""
    inside = sorted(folder.glob(f"{INSIDE}/{METADATA}"))
    return folder if (folder / METADATA).exists() else inside[0].parent if inside else None


def read_dcp(folder: Path, inferred: list[str]) -> dict[str, StoredTensor | ChunkedTensor]:
    """List the tensors by name, without those of the run's state.

    Raises:
        UserError: the list is damaged or would run code, or pieces are missing or do not make a tensor.
    """
    path = folder / METADATA
    listed, stored = read_metadata(path)
    kept = {name: told for name, told in listed.items() if told[1] and not TRAINING & set(name.split(".")[:2])}
    if left_out := len(listed) - len(kept):
        inferred.append(f"{left_out} tensors of the state of training left out")
    files, tensors = {}, {}
    for name, (dtype, shape, starts) in kept.items():
        chunks = {}
        for start, size in starts:
            if math.prod(size):
                chunks[start] = read_chunk(folder, stored.get((name, start)), name, dtype, size, files)
        if not 1 <= len(shape) <= 2 or (bands := lay_out(chunks, shape)) is None:
            raise UserError(
                f"the pieces of {quoted(name)} in {path} do not make a tensor of {list(shape)}; save it again"
            )
        whole = next(iter(chunks.values())) if len(chunks) == 1 else ChunkedTensor(BY_NAME[dtype], shape, bands)
        tensors[name] = whole
    inferred.append(f"weights of torch.distributed.checkpoint in {len(files)} file{'s' * (len(files) > 1)}")
    return tensors


def read_chunk(folder: Path, where, name: str, dtype: str, size: tuple[int, ...], files: dict) -> StoredTensor:
    """Locate a piece, and check it against the list."""
    if where is None:
        raise UserError(f"{folder / METADATA} does not say where a piece of {quoted(name)} lies; save it again")
    file, offset, length = where
    if PurePosixPath(file).name != file or "\\" in file:
        raise UserError(f"{folder / METADATA} must name plain files beside it, got {quoted(file)}; do not trust it")
    path = folder / file
    if not path.is_file():
        raise UserError(f"{folder} lacks {shown(file)}, which its {METADATA} names; copy it from where it was saved")
    if offset + length > path.stat().st_size:
        raise UserError(f"{path} is truncated at {path.stat().st_size} bytes; copy it from where it was saved")
    read, storages = read_zip(path, offset, length)
    found = read.value
    kind = BY_STORAGE.get(found.kind.name) if type(found) is Tensor else None
    if type(found) is not Tensor or found.shape != size or (kind is not None and kind.name != dtype):
        got = f"{found.kind.name} {list(found.shape)}" if type(found) is Tensor else "none"
        raise UserError(f"{path} must hold a tensor of {dtype} {list(size)} for {quoted(name)}, got {shown(got)}")
    if kind is None:
        raise UserError(
            f"{quoted(name)} in {path} has the type {shown(dtype)}; only {sorted(BY_NAME)} can be converted"
        )
    return place(found, storages, files.setdefault(path, SourceFile(path)), name)
