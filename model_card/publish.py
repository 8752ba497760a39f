"""Upload a model folder to the Hub: checked, with its card, and repeatable."""

import contextlib
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path

from hf_llama3.conversion import inspect
from hf_llama3.conversion.formats.hf import INDEX
from hf_llama3.conversion.hub.cache import endpoint
from hf_llama3.errors import UserError
from hf_llama3.files.atomic import system_errors, write_files

from .card import CARD, as_list, build_card, is_made_here, read_card, write_card
from .front_matter import check_card
from .licenses import META
from .repository import NOTICE, check_repository, choose, notes_on

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", INDEX)  # older ones would be loaded
MESSAGE = "Upload model with hf_llama3"
REMEDIES = {
    401: "log in by `hf auth login` with a token that may write",
    403: "use a token that may write there, or another owner",
    404: "check the name, or leave out --create-pr to make it",
    409: "choose another name",
    429: "wait some minutes",
}


@dataclass
class PublishReport:
    """What was uploaded, or would be; sizes in bytes."""

    repo_id: str
    address: str  # address of the model, or of the pull request
    revision: str | None
    commit: str | None  # that now holds the files; None for a dry run
    files: dict[str, int]  # name -> bytes
    bytes: int
    left_out: list[str]  # files in the folder that do not belong to the model
    notes: list[str]
    dry_run: bool

    def to_dict(self) -> dict:
        return asdict(self)


def publish(
    folder,
    repo_id: str,
    *,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> PublishReport:
    """Check a Hugging Face folder, make its card, and upload what belongs to the model.

    The same call resumes an upload that was cut off, and changes nothing if everything is there. Weights under other
    names are removed from the repository. A card that a person wrote is uploaded as it is.

    Args:
        repo_id: owner/name; created if it does not exist.
        license: identifier of the Hub; that of the folder's card if omitted.
        private: create a private repository; an existing public one is refused.
        revision: branch (created if it does not exist) or pull request (refs/pr/1); main if omitted.
        create_pr: open a new pull request in an existing repository; `revision` adds to one that is open.
        dry_run: check everything and report what would be uploaded; nothing is written, here or there.
        progress: show a bar while files are hashed.

    Raises:
        UserError: the folder is not fit to be published, or the Hub refuses.
    """
    folder = Path(folder)
    check_name(repo_id)
    if create_pr and revision is not None:
        raise UserError(f"--create-pr opens one against main, got --revision {revision} as well; leave one out")
    existing = read_card(folder / CARD)
    keeps_card = not is_made_here(existing)
    card = existing if keeps_card else build_card(folder, license, repo_id, progress=progress)
    front_matter, info = check_card(card, folder / CARD), inspect(folder)
    if keeps_card and license not in (None, front_matter["license"]):
        raise UserError(
            f"{folder / CARD} has the licence {front_matter['license']!r}, got --license {license}; edit it"
        )
    terms = [META[one] for one in as_list(front_matter["license"]) if one in META]
    chosen, left_out = choose(folder, info)
    check_repository(folder, info, chosen, progress)
    made = {} if keeps_card else {CARD: card.encode()}
    if terms and NOTICE not in chosen:
        made[NOTICE] = "".join(f"{one.notice}\n" for one in terms).encode()
    files = {name: (folder / name).stat().st_size for name in chosen}
    files |= {name: len(content) for name, content in made.items()}
    report = PublishReport(
        *(repo_id, f"{endpoint()}/{repo_id}", revision, None, dict(sorted(files.items())), sum(files.values())),
        left_out=left_out,
        notes=notes_on(folder, repo_id, info, terms),
        dry_run=dry_run,
    )
    if dry_run:
        return report
    if CARD in made:
        write_card(folder / CARD, card)
    if NOTICE in made:
        with system_errors(folder):
            write_files(folder, {NOTICE: made[NOTICE]})
    with hub_errors(report):
        upload(folder, report, private, create_pr)
    return report


def check_name(repo_id: str):
    """Check that a repository of the Hub can have this name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).split(":")[0].split(". ")[0]
        raise UserError(f"a repository must be named as the Hub allows, got {repo_id!r} ({reason}); mend it") from error
    if "/" not in repo_id:
        raise UserError(f"a repository must be named as owner/name, got {repo_id!r}; put the owner before it")


def upload(folder: Path, report: PublishReport, private: bool, create_pr: bool):
    """Create repository and branch if they do not exist, and send the files that they lack."""
    from huggingface_hub import HfApi

    api, repo_id, revision = HfApi(library_name="hf_llama3"), report.repo_id, report.revision
    if not create_pr:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise UserError(f"{repo_id} exists and is public; make it private in its settings, or leave out --private")
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[escape(name) for name in report.files],
        delete_patterns=list(WEIGHTS),
        commit_message=MESSAGE,
        revision=revision,
        create_pr=create_pr,
    )
    report.commit = done.oid
    if done.pr_url:
        report.address, report.revision = done.pr_url, done.pr_revision


@contextlib.contextmanager
def hub_errors(report: PublishReport):
    """Turn errors of the Hub and of the network into a sentence."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, errors.LocalTokenNotFoundError, ConnectionError) as error:
        raise UserError(explain(error, report)) from error
    except UnicodeError as error:
        raise UserError("the token for the Hub holds other letters than a token has; mend HF_TOKEN") from error
    except RuntimeError as error:  # the library's error for one of several uploads
        raise UserError(explain(error.__cause__ or error, report)) from error


def explain(error: BaseException, report: PublishReport) -> str:
    """Return what went wrong and what to do."""
    from huggingface_hub import errors

    repo_id, again = report.repo_id, "the same command goes on where it stopped"
    match error:
        case errors.OfflineModeIsEnabled():
            return f"{repo_id} cannot be pushed offline; unset HF_HUB_OFFLINE"
        case errors.LocalTokenNotFoundError():
            return f"{repo_id} needs you to be logged in; run `hf auth login`"
        case errors.RevisionNotFoundError():
            return f"{repo_id} has no revision {report.revision!r}; name one that exists"
        case errors.HfHubHTTPError():
            status = error.response.status_code
            reason = " ".join((error.server_message or "no reason").split())[:200]
            remedy = REMEDIES.get(status, "try later" if status >= 500 else "mend that")
            return f"the Hub refused {repo_id} with {status} ({reason}); {remedy}; {again}"
        case _:
            return f"the upload to {endpoint()}/{repo_id} was cut off ({type(error).__name__}); {again}"
