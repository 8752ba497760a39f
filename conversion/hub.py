"""Fetch a checkpoint from the Hub: only the files that are needed, into a local folder.

A name is `owner/name`, or `owner/name/original` for Meta's files beside Hugging Face's, with `@revision` after either.
Files stay in huggingface_hub's cache, and are taken from there if the Hub cannot be reached.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path, PurePath
from typing import NamedTuple

from hf_llama3.errors import UserError, without_password, words_of
from hf_llama3.files.json import read_json

from .config.hf import read_config
from .config.params import read_params
from .formats.hf import INDEX, SINGLE
from .formats.meta import PARAMS_FILE
from .formats.torch_files import BIN, BIN_INDEX
from .tokenizer.files import CARRIED

# huggingface_hub is imported where it is used: a local folder need not wait for it.

NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?P<original>/original)?(?:@(?P<revision>.+))?")
# Files that show the format; in the library's patterns "*" also matches "/".
TELLING = ("config.json", "adapter_config.json", PARAMS_FILE)
HF_TEXTS = ("*.json", "chat_template.jinja", "additional_chat_templates/*.jinja", "tokenizer.model")
HF_TEXTS += ("vocab.txt", "merges.txt")
HF_WEIGHTS = ("*.safetensors",)
HF_PICKLED = ("pytorch_model*.bin",)
NOT_OF_HF = ("*/*.json", "*/*.safetensors", "consolidated*")  # copies for other tools, Meta's files
META_FILES = ("*.json", "tokenizer.model", "checklist.chk", "consolidated.*", "*.pth", f"{CARRIED}/*")


class HubName(NamedTuple):
    repo: str
    original: bool
    revision: str | None  # the main branch, if None


def parse_name(path) -> HubName | None:
    """Parse a name on the Hub; None for a path that exists, or that no repository can have as its name."""
    found = NAME.fullmatch(str(path))
    if not found or os.path.lexists(path) or os.path.lexists(found["repo"]):
        return None  # a folder exists here; with `original` or a revision it would name somebody's repository
    return HubName(found["repo"], found["original"] is not None, found["revision"])


def fetch(path, weights: bool = True) -> Path:
    """Return the local folder of a name on the Hub; a path is returned as it is.

    Args:
        weights: fetch the weights of a Hugging Face repository; Meta's files are always fetched whole.

    Raises:
        UserError: the Hub lacks or refuses it, or cannot be reached and the cache lacks it.
    """
    name = parse_name(path)
    if name is None:
        return Path(path)
    folder = download(name, [f"original/{PARAMS_FILE}"] if name.original else TELLING)
    if not name.original and (folder / "config.json").exists():
        read_config(folder / "config.json")  # before gigabytes of what cannot be converted
        return fetch_hf(name, weights)
    if not name.original and (folder / "adapter_config.json").exists():
        return folder  # for the same sentence as a local folder
    inside = "original/" if name.original or not (folder / PARAMS_FILE).exists() else ""
    params = download(name, [inside + PARAMS_FILE]) / inside / PARAMS_FILE
    if not params.exists():
        lacking = ("" if name.original else f"config.json, {PARAMS_FILE} nor ") + f"original/{PARAMS_FILE}"
        raise UserError(f"{name.repo} holds no {lacking} on the Hub; name a repository of a Llama model")
    read_params(params)
    return download(name, [inside + pattern for pattern in META_FILES]) / inside


def fetch_hf(name: HubName, weights: bool) -> Path:
    """Fetch the needed files of a Hugging Face repository; pickled weights only if there are no others."""
    folder = download(name, HF_TEXTS + (HF_WEIGHTS if weights else ()), NOT_OF_HF)
    if not weights or any((folder / file).exists() for file in (SINGLE, INDEX)):
        return folder
    folder = download(name, (*HF_TEXTS, *HF_PICKLED), NOT_OF_HF)
    if not any((folder / file).exists() for file in (BIN, BIN_INDEX)):
        lacking = ", ".join((SINGLE, INDEX, BIN))
        raise UserError(
            f"{name.repo} holds no {lacking} nor {BIN_INDEX} on the Hub; name a repository with its weights"
        )
    return folder


@contextlib.contextmanager
def described(path):
    """Open a folder to inspect: for a name on the Hub, a temporary one with only the headers of its weights.

    Its files of weights are as long as those on the Hub, but sparse. Meta's files, whose headers are at their end, and
    what the Hub cannot serve in parts, are fetched whole.
    """
    name, texts = parse_name(path), fetch(path, weights=False)
    if name is None or not (texts / "config.json").exists():
        yield texts
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / name.repo.split("/")[1]
        if not copy_hollow(name, texts, folder):
            yield fetch(path)
            return
        try:
            yield folder
        except UserError as error:
            raise UserError(str(error).replace(str(folder), str(path))) from error


@contextlib.contextmanager
def hollow_files(name: HubName, path):
    """Open a temporary folder of a commit's files with sparse weights (see `described`).

    It is None where headers are not enough: for Meta's files, pickled weights, or if the Hub does not answer.
    """
    texts = fetch(path, weights=False)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made, "models--" + name.repo.replace("/", "--"), "snapshots", texts.name)
        is_hf = not name.original and (texts / "config.json").exists()
        yield folder if is_hf and copy_hollow(name, texts, folder) else None


def copy_hollow(name: HubName, texts: Path, folder: Path) -> bool:
    """Fill a folder with a repository's small files and sparse weights; return whether the Hub served headers."""
    folder.mkdir(parents=True)
    for text in [text for pattern in HF_TEXTS for text in texts.glob(pattern)]:
        (folder / text.relative_to(texts)).parent.mkdir(exist_ok=True)
        shutil.copy(text, folder / text.relative_to(texts))
    return add_hollow_weights(name, texts.name, folder)


def sizes_to_fetch(path) -> dict[str, int]:
    """Return the sizes of a Hugging Face repository's files of weights that are not in the cache, by name.

    The Hub is asked once, and only if a file is missing. The dictionary is empty if none is, or without an answer.
    """
    name, texts = parse_name(path), fetch(path, weights=False)
    if name.original or not (texts / "config.json").exists():
        return {}
    files = {SINGLE}
    if (texts / INDEX).exists():
        weight_map = read_json(texts / INDEX).get("weight_map")
        files = {str(file) for file in weight_map.values()} if isinstance(weight_map, dict) else set()
    missing = sorted(file for file in files if not (texts / file).is_file())
    if not missing:
        return {}
    try:
        return ask_sizes(name, texts.name, missing)
    except Exception:  # an error is reported when the files are fetched
        return {}


def ask_sizes(name: HubName, commit: str, files: list[str]) -> dict[str, int]:
    """Return the sizes of files of a commit by one request; names that it lacks are left out."""
    from huggingface_hub import HfApi

    found = HfApi().get_paths_info(name.repo, files, revision=commit)
    return {one.path: one.size for one in found if getattr(one, "size", None) is not None}


def fetch_file(name: HubName, commit: str, file: str, place: Path) -> Path:
    """Fetch one file of a commit into a folder; an interrupted download is resumed.

    Raises:
        UserError: in one sentence what the Hub or the way to it did, and what to do.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(name):
        return Path(hf_hub_download(name.repo, file, revision=commit, local_dir=place))


def add_hollow_weights(name: HubName, commit: str, folder: Path) -> bool:
    """Write sparse files of weights with their headers; return whether the Hub served headers.

    Raises:
        UserError: the Hub refuses.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    try:
        for file, content in get_safetensors_metadata(name.repo, revision=commit).files_metadata.items():
            if PurePath(file).name != file:
                return False  # another name is an attack; the reader of whole files refuses it
            write_hollow(folder / file, content.tensors)
    except NotASafetensorsRepoError:
        return False
    except HfHubHTTPError as error:
        raise UserError(explain(error, name)) from error
    except Exception:  # no connection, or a damaged header or index: the library raises many kinds
        return False
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


def download(name: HubName, patterns, but=None) -> Path:
    """Fetch files into the cache; return the folder of their commit.

    Each call asks for the revision again, so the last call, for all files, returns those of one commit. (With a commit
    instead, and no connection, the library would retry for every missing file: 23 seconds.)

    Raises:
        UserError: in one sentence what the Hub or the way to it did, and what to do.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(name):
        return Path(
            snapshot_download(
                name.repo, revision=name.revision, allow_patterns=list(patterns), ignore_patterns=but and list(but)
            )
        )


@contextlib.contextmanager
def hub_errors(name: HubName):
    """Turn errors of the Hub, of the network and of the cache into a sentence."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError as error:  # the library's cause says more
        raise UserError(explain(error.__cause__ or error, name)) from error
    except (OSError, HTTPError, ValueError) as error:
        raise UserError(explain(error, name)) from error


def explain(error: BaseException, name: HubName) -> str:
    """Return what went wrong, without the library's own text where it could contain a token."""
    from huggingface_hub import constants, errors

    page = f"{endpoint()}/{name.repo}"
    cached = "and not all that is needed is in the cache"
    match error:
        case errors.GatedRepoError():
            return f"{name.repo} is gated; accept its licence on {page}, then log in by `hf auth login`"
        case errors.RepositoryNotFoundError():
            known = "a repository on the Hub that you may see"
            return f"{name.repo} is neither a folder here nor {known}; mend the name, or log in by `hf auth login`"
        case errors.RevisionNotFoundError():
            return f"{name.repo} has no revision {name.revision!r} on the Hub; {page}/tree/main lists its branches"
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return "the Hub does not take your token; log in by `hf auth login`, or mend the variable HF_TOKEN"
        case errors.HfHubHTTPError() if error.response.status_code == 429:
            return f"the Hub gives you no more of {name.repo} for now, {cached}; {wait(error)}, or log in"
        case errors.HfHubHTTPError():
            return (
                f"the Hub answered {error.response.status_code} to a request for {name.repo}, {cached}; {wait(error)}"
            )
        case errors.OfflineModeIsEnabled():
            return f"{name.repo} cannot be loaded: it is no folder here, HF_HUB_OFFLINE is set, {cached}; unset it"
        case errors.HFValidationError():
            return f"{name.repo} is neither a folder here nor a name that the Hub can have; mend it"
        case errors.HTTPError():
            reason = type(error).__name__
            return f"{endpoint()} cannot be reached for {name.repo} ({reason}), {cached}; try again when it can"
        case UnicodeError():
            return f"{name.repo} cannot be asked for with a token that is not ASCII; mend the variable HF_TOKEN"
        case errors.LocalEntryNotFoundError():
            return f"{name.repo} cannot be fetched, {cached}; try again with a connection"
        case _:
            reason = getattr(error, "strerror", None) or words_of(error)
            return f"{name.repo} cannot be fetched into {constants.HF_HUB_CACHE}: {reason}; try again"


def endpoint() -> str:
    """Return the Hub's address without a password."""
    from huggingface_hub import constants

    return without_password(constants.ENDPOINT)


def wait(error) -> str:
    seconds = error.response.headers.get("Retry-After")
    return f"try again in {seconds} seconds" if seconds else "try again later"
