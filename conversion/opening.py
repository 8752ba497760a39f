"""Find out which format a checkpoint has, and open it."""

import os
from pathlib import Path

from hf_llama3.errors import UserError, shown
from hf_llama3.files.atomic import SIGNS, is_unfinished

from .adapter.files import is_adapter
from .checkpoint import Checkpoint
from .formats.dcp import METADATA
from .formats.gguf import SPLIT_NAME, SUFFIX, open_gguf
from .formats.hf import open_hf, refuse_adapter
from .formats.meta import PARAMS_FILE, SHARD_GLOBS, open_meta
from .formats.torch_files import ADAPTER, is_weights, refuse_lone_adapter
from .hub.cache import fetch
from .tokenizer.bpe import VERSIONS


def open_checkpoint(
    path,
    rope_factor: float | None = None,
    llama_version: str | None = None,
    instruct: bool | None = None,
    *,
    unfinished: bool = False,
) -> Checkpoint:
    """Open a checkpoint of any format by what lies in its folder; None means to infer.

    Args:
        path: a folder, a GGUF file, or a name on the Hub, which is fetched first (see `hub`).
        unfinished: accept a folder that is still being written.

    Raises:
        UserError: it is no checkpoint, is damaged, contradicts itself, or needs a flag.
    """
    if llama_version is not None and llama_version not in VERSIONS:
        raise UserError(f"--llama-version must be one of {VERSIONS}, got {llama_version!r}")
    if rope_factor is not None and not 1 <= rope_factor < float("inf"):
        raise UserError(f"--rope-factor must be a number of at least 1, got {rope_factor}")
    folder = locate(fetch(path))
    if is_unfinished((folder.parent if folder.is_file() else folder).resolve()) and not unfinished:
        raise UserError(f"{folder} is not finished; run the command that was writing it again")
    if folder.is_file():
        refuse_rope_factor(rope_factor, folder)
        return open_gguf(folder, llama_version, instruct)
    if not (folder / "config.json").exists():
        if is_adapter(folder):
            refuse_adapter(folder)
        return open_meta(folder, rope_factor, llama_version, instruct)
    refuse_rope_factor(rope_factor, folder)
    return open_hf(folder, llama_version, instruct)


def refuse_rope_factor(rope_factor: float | None, folder):
    """Refuse a factor for a folder whose own configuration gives it."""
    if rope_factor is not None:
        where = "it" if Path(folder).suffix == SUFFIX else "its config.json"
        raise UserError(f"--rope-factor is for Meta's format: the RoPE of {folder} stands in {where}")


def locate(path: Path) -> Path:
    """Return the folder that holds the checkpoint: the given one, or Meta's `original/` in a copy from the Hub.

    For a GGUF file, or the only one in a folder without a configuration, return the file.

    Raises:
        UserError: there is none; the sentence says what is there instead.
    """
    try:
        path.stat()
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be opened: {error.strerror}"
        raise UserError(f"{path} {reason}; pass the folder of a checkpoint") from error
    if path.suffix == SUFFIX and not path.is_dir():
        return path
    if not path.is_dir():
        raise UserError(f"{path} is a file; pass the folder that holds it, {path.parent}")
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{path} cannot be opened: Permission denied; run as a user who may read it")
    if (path / "config.json").exists() or (path / PARAMS_FILE).exists():
        return path
    if (path / "original" / PARAMS_FILE).exists():
        return path / "original"
    if (path / ADAPTER).exists():
        refuse_adapter(path)
    refuse_lone_adapter(path)
    if (path / METADATA).is_file():
        raise UserError(f"{path} is of torch.distributed.checkpoint, without a configuration; {configure(path)}")
    if models := find_gguf(path):
        if len(models) > 1:
            names = ", ".join(shown(model.name, 60) for model in models[:4])
            raise UserError(f"{path} holds {len(models)} models in GGUF: {names}; pass one of them")
        return models[0]
    if shards := [found for pattern in SHARD_GLOBS for found in path.glob(pattern)]:
        raise UserError(
            f"{path} holds {shards[0].name} but no {PARAMS_FILE}; pass the folder that Meta's download made"
        )
    if weights := [found for found in sorted(path.iterdir()) if is_weights(found) or found.suffix == ".safetensors"]:
        raise UserError(f"{path} holds {shown(weights[0].name)} but no configuration; {configure(path)}")
    entries = sorted(path.iterdir())
    found = ", ".join(shown(entry.name, 60) for entry in entries[:4]) or "nothing"
    commits = sorted((path / "snapshots").glob("*/"), key=os.path.getmtime, reverse=True)  # in the Hub's cache
    within = [entry for entry in (*entries, *commits) if any(os.access(entry / sign, os.R_OK) for sign in SIGNS)]
    remedy = f"; pass {within[0]}" if within else ""
    formats = f"a Hugging Face folder (config.json) nor one of Meta's ({PARAMS_FILE})"
    raise UserError(f"{path} is neither {formats}; it holds {found}{remedy}")


def find_gguf(folder: Path) -> list[Path]:
    """List the GGUF files of a folder; of a split model only the first part."""
    found = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX and path.is_file())
    return [path for path in found if not (part := SPLIT_NAME.fullmatch(path.name)) or int(part[2]) == 1]


def configure(folder: Path) -> str:
    """Return the remedy for weights that came without a configuration."""
    return f"put that of the model they were trained from beside them: cp MODEL/config.json MODEL/tokenizer* {folder}/"
