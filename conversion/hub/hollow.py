"""A repository on the Hub as a folder whose files of weights are sparse: enough to describe it, or to plan from it."""

import contextlib
import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePath, PurePosixPath

from hf_llama3.errors import UserError
from hf_llama3.files.atomic import temporary_errors

from ..config.hf import read_config
from .cache import HF_TEXTS, META_TEXTS, commit_of, explain, fetch, list_weights
from .names import HubName, parse_name
from .parts import AT_A_TIME, NotInParts, add_compared, add_hollow_pth, add_prefixes, part_of


@contextlib.contextmanager
def described(path):
    """Open a folder to inspect: for a name on the Hub, a temporary one with only the headers of its weights.

    Its files of weights are as long as those on the Hub, but sparse. GGUF, and what the Hub cannot serve in parts, are
    fetched whole.
    """
    name, texts = parse_name(path), fetch(path, weights=False)
    if name is None or name.file or (texts / "adapter_config.json").exists():
        yield texts
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / name.repo.split("/")[1] / commit_of(texts)[1]
        try:
            with called(folder, path), temporary_errors():
                copy_hollow(name, texts, folder)
        except NotInParts:
            yield fetch(path)
            return
        with called(folder, path):
            yield folder


@contextlib.contextmanager
def hollow_files(name: HubName, texts: Path, path):
    """Open a temporary folder of a commit's files with sparse weights (see `described`), and the sizes of these.

    Raises:
        NotInParts: they cannot be planned by parts.
    """
    commit, inside = commit_of(texts)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made, "models--" + name.repo.replace("/", "--"), "snapshots", commit, inside)
        with called(folder, path):
            with temporary_errors():
                sizes = copy_hollow(name, texts, folder)
            yield folder, sizes


@contextlib.contextmanager
def called(folder: Path, path):
    """Let errors name a repository where they name the temporary folder."""
    try:
        yield
    except UserError as error:
        if str(folder) not in str(error):
            raise
        raise UserError(str(error).replace(str(folder), str(path))) from error


def copy_hollow(name: HubName, texts: Path, folder: Path) -> dict[str, int]:
    """Fill a folder with a repository's small files and sparse weights; return the sizes of the latter.

    Raises:
        NotInParts: the Hub does not serve them in parts, or they cannot be planned by parts.
        UserError: the Hub refuses.
    """
    folder.mkdir(parents=True)
    for text in [text for pattern in {*HF_TEXTS, *META_TEXTS} for text in texts.glob(pattern) if text.is_file()]:
        (folder / text.relative_to(texts)).parent.mkdir(exist_ok=True)
        shutil.copy(text, folder / text.relative_to(texts))
    commit, inside = commit_of(texts)
    is_hf = not inside and (texts / "config.json").exists()
    if is_hf and add_hollow_safetensors(name, commit, folder):
        paths = sorted(folder.glob("*.safetensors"))
        for path in paths if read_config(texts / "config.json")["tie_word_embeddings"] else ():
            add_prefixes(path, partial(part_of, name, commit, path.name))
        return {path.name: path.stat().st_size for path in paths}
    sizes = ask(name, texts)
    if not sizes or all((texts / file).is_file() for file in sizes):
        raise NotInParts("its weights are in the cache already" if sizes else "it has no files of weights")
    if other := next((file for file in sizes if PurePosixPath(file).suffix not in (".bin", ".pth")), None):
        raise NotInParts(f"{other} is neither Hugging Face's safetensors nor of torch.save")
    if any(".." in PurePosixPath(file).parts or "\\" in file or file.startswith("/") for file in sizes):
        raise NotInParts("its names lead elsewhere")

    def add(file: str):
        fetch_part = partial(part_of, name, commit, inside + file)
        return folder / file, add_hollow_pth(folder / file, sizes[file], fetch_part)

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        hollows = dict(pool.map(add, sizes))
    add_compared(folder, hollows)
    return sizes


def ask(name: HubName, texts: Path) -> dict[str, int]:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return list_weights(name, texts)
    except HfHubHTTPError as error:
        raise UserError(explain(error, name)) from error
    except Exception as error:  # no connection, or no mode for it: the library raises many kinds
        raise NotInParts("the Hub does not answer") from error


def add_hollow_safetensors(name: HubName, commit: str, folder: Path) -> bool:
    """Write sparse safetensors with their headers; return whether the repository has any.

    Raises:
        NotInParts: the Hub did not serve headers.
        UserError: the Hub refuses.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    try:
        for file, content in get_safetensors_metadata(name.repo, revision=commit).files_metadata.items():
            if PurePath(file).name != file:  # an attack; the reader of whole files refuses it
                raise NotInParts("its names lead elsewhere")
            write_hollow(folder / file, content.tensors)
    except NotASafetensorsRepoError:
        return False
    except HfHubHTTPError as error:
        raise UserError(explain(error, name)) from error
    except NotInParts:
        raise
    except Exception as error:  # no connection, or a damaged header or index: the library raises many kinds
        raise NotInParts("its safetensors have no headers to plan by") from error
    return True


def write_hollow(path: Path, tensors: dict):
    """Write a sparse safetensors file: its header, then a hole."""
    header = {
        tensor: {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": entry.data_offsets}
        for tensor, entry in tensors.items()
    }
    encoded = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + max((entry.data_offsets[1] for entry in tensors.values()), default=0))
