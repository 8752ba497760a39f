"""Fetch a checkpoint from the Hub: only the files that are needed, into a local folder.

Files stay in huggingface_hub's cache, and are taken from there if the Hub cannot be reached.
"""

import contextlib
from pathlib import Path

from hf_llama3.errors import UserError, shown, without_password, words_of
from hf_llama3.files.json import read_json

from ..config.hf import read_config
from ..config.params import read_params
from ..formats.gguf import SPLIT_NAME, SUFFIX
from ..formats.hf import INDEX, SINGLE
from ..formats.meta import PARAMS_FILE
from ..formats.torch_files import BIN, BIN_INDEX
from ..tokenizer.files import CARRIED
from .names import HubName, parse_name

# huggingface_hub is imported where it is used: a local folder need not wait for it.

# Files that show the format; in the library's patterns "*" also matches "/".
TELLING = ("config.json", "adapter_config.json", PARAMS_FILE)
HF_TEXTS = ("*.json", "chat_template.jinja", "additional_chat_templates/*.jinja", "tokenizer.model")
HF_TEXTS += ("vocab.txt", "merges.txt")
HF_WEIGHTS = ("*.safetensors",)
HF_PICKLED = ("pytorch_model*.bin",)
NOT_OF_HF = ("*/*.json", "*/*.safetensors", "consolidated*")  # copies for other tools, Meta's files
META_TEXTS = ("*.json", "tokenizer.model", "checklist.chk", f"{CARRIED}/*")
META_WEIGHTS = ("consolidated.*", "*.pth")
MOST_LISTED = 4  # files in a sentence


def fetch(path, weights: bool = True) -> Path:
    """Return the local folder, or file of GGUF, of a name on the Hub; a path is returned as it is.

    Args:
        weights: fetch the weights of a folder.

    Raises:
        UserError: the Hub lacks or refuses it, or cannot be reached and the cache lacks it.
    """
    name = parse_name(path)
    if name is None:
        return Path(path)
    if name.file:
        return fetch_gguf(name)
    folder = download(name, [f"original/{PARAMS_FILE}"] if name.original else TELLING)
    if not name.original and (folder / "config.json").exists():
        read_config(folder / "config.json")  # before gigabytes of what cannot be converted
        return fetch_hf(name, weights)
    if not name.original and (folder / "adapter_config.json").exists():
        return folder  # for the same sentence as a local folder
    inside = "original/" if name.original or not (folder / PARAMS_FILE).exists() else ""
    params = download(name, [inside + PARAMS_FILE]) / inside / PARAMS_FILE
    if not params.exists():
        if not name.original:
            name_gguf(name, folder.name)
        lacking = ("" if name.original else f"config.json, {PARAMS_FILE} nor ") + f"original/{PARAMS_FILE}"
        raise UserError(f"{name.repo} holds no {lacking} on the Hub; name a repository of a Llama model")
    read_params(params)
    return fetch_meta(name, inside, weights)


def fetch_weights(name: HubName, texts: Path) -> Path:
    """Fetch the rest of a folder whose small files were fetched."""
    inside = commit_of(texts)[1]
    if not inside and (texts / "config.json").exists():
        return fetch_hf(name, weights=True)
    return texts if (texts / "adapter_config.json").exists() else fetch_meta(name, inside, weights=True)


def fetch_meta(name: HubName, inside: str, weights: bool) -> Path:
    """Fetch the needed files of Meta's, which lie in a folder of the repository or at its root."""
    wanted = META_TEXTS + (META_WEIGHTS if weights else ())
    return download(name, [inside + pattern for pattern in wanted]) / inside


def fetch_hf(name: HubName, weights: bool) -> Path:
    """Fetch the needed files of a Hugging Face repository; pickled weights only if there are no others."""
    folder = download(name, HF_TEXTS + (HF_WEIGHTS if weights else ()), NOT_OF_HF)
    if not weights or any((folder / file).exists() for file in (SINGLE, INDEX)):
        return folder
    folder = download(name, (*HF_TEXTS, *HF_PICKLED), NOT_OF_HF)
    if not any((folder / file).exists() for file in (BIN, BIN_INDEX)):
        name_gguf(name, folder.name)
        lacking = ", ".join((SINGLE, INDEX, BIN))
        raise UserError(
            f"{name.repo} holds no {lacking} nor {BIN_INDEX} on the Hub; name a repository with its weights"
        )
    return folder


def fetch_gguf(name: HubName) -> Path:
    """Fetch a file of GGUF, or all files of a model that is split, and nothing else."""
    folder, _, file = name.file.rpartition("/")
    part = SPLIT_NAME.fullmatch(file)
    wanted = f"{part[1]}-[0-9][0-9][0-9][0-9][0-9]-of-{part[3]}{SUFFIX}" if part else file
    fetched = download(name, [f"{folder}/{wanted}" if folder else wanted])
    if not (fetched / name.file).exists():
        name_gguf(name, fetched.name)
        raise UserError(
            f"{name.repo} holds no file {shown(name.file)} on the Hub, nor any other of GGUF; mend the name"
        )
    return fetched / name.file


def name_gguf(name: HubName, commit: str):
    """Refuse a name if its repository holds files of GGUF, one of which is meant.

    Raises:
        UserError: listing them, with the name to type.
    """
    try:
        files = sorted(file for file in list_files(name, commit) if file.endswith(SUFFIX))
    except Exception:  # without an answer there are none to list
        return
    parts = {file: SPLIT_NAME.fullmatch(file.rpartition("/")[2]) for file in files}
    models = [file for file, part in parts.items() if not part or int(part[2]) == 1]
    if models:
        listed = ", ".join(shown(model, 80) for model in models[:MOST_LISTED])
        listed += f", ... ({len(models)} of them)" if len(models) > MOST_LISTED else ""
        what = f"no file {shown(name.file)}, but" if name.file else "only"
        revision = f"@{name.revision}" if name.revision else ""
        raise UserError(
            f"{name.repo} holds {what} models in GGUF: {listed}; name one, as {name.repo}/{shown(models[0])}{revision}"
        )


def list_files(name: HubName, commit: str) -> dict[str, int]:
    """Return the sizes of all files of a commit, by one request for a thousand of them."""
    from huggingface_hub import HfApi

    found = HfApi().list_repo_tree(name.repo, revision=commit, recursive=True)
    return {one.path: one.size for one in found if getattr(one, "size", None) is not None}


def commit_of(texts: Path) -> tuple[str, str]:
    """Return the commit of a folder that was fetched, and the folder in the repository: "" or "original/"."""
    is_inside = texts.name == "original" and texts.parent.parent.name == "snapshots"
    return (texts.parent.name, "original/") if is_inside else (texts.name, "")


def list_weights(name: HubName, texts: Path) -> dict[str, int]:
    """Return the sizes of a folder's files of weights, by their paths in it; the Hub is asked once."""
    from huggingface_hub.utils import filter_repo_objects

    commit, inside = commit_of(texts)
    sizes = {
        file.removeprefix(inside): size for file, size in list_files(name, commit).items() if file.startswith(inside)
    }
    if not (texts / "config.json").exists() or inside:
        kinds, but = META_WEIGHTS, ()
    else:
        kinds, but = HF_WEIGHTS if sizes.keys() & {SINGLE, INDEX} else HF_PICKLED, NOT_OF_HF
    chosen = filter_repo_objects(sizes, allow_patterns=list(kinds), ignore_patterns=list(but))
    return {file: sizes[file] for file in sorted(chosen)}


def sizes_to_fetch(name: HubName, texts: Path) -> dict[str, int]:
    """Return the sizes of the files of weights that are not in the cache, by name.

    The Hub is asked once, unless an index or the only file shows that all are. It is empty without an answer, too.
    """
    for single, index in ((SINGLE, INDEX), (BIN, BIN_INDEX)):
        weight_map = read_json(texts / index).get("weight_map") if (texts / index).exists() else None
        files = set(weight_map.values()) if isinstance(weight_map, dict) else {single}
        if all((texts / str(file)).is_file() for file in files):
            return {}
    try:
        return {file: size for file, size in list_weights(name, texts).items() if not (texts / file).is_file()}
    except Exception:  # an error is reported when the files are fetched
        return {}


def fetch_file(name: HubName, commit: str, file: str, place: Path) -> Path:
    """Fetch one file of a commit into a folder; an interrupted download is resumed.

    Raises:
        UserError: in one sentence what the Hub or the way to it did, and what to do.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(name):
        return Path(hf_hub_download(name.repo, file, revision=commit, local_dir=place))


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
    named, kind = (f"{name.repo}/{name.file}", "file") if name.file else (name.repo, "folder")
    match error:
        case errors.GatedRepoError():
            return f"{name.repo} is gated; accept its licence on {page}, then log in by `hf auth login`"
        case errors.RepositoryNotFoundError():
            known = f"{'in ' if name.file else ''}a repository on the Hub that you may see"
            return f"{named} is neither a {kind} here nor {known}; mend the name, or log in by `hf auth login`"
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
            return f"{named} cannot be loaded: it is no {kind} here, HF_HUB_OFFLINE is set, {cached}; unset it"
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
