"""What stands under a file's name, where it is not the file."""

from pathlib import Path

from hf_llama3.errors import UserError


def require_file(path: Path):
    """Raise if something else stands under the name: a pipe would be read for ever."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} must be a file; it is a folder or a device")


def leads_outside(folder: Path, path: Path) -> Path | None:
    """Return where a file of a folder lies if that is outside of it, and of the Hub's cache where the folder is there.

    The cache's folders of a commit, `models--OWNER--NAME/snapshots/COMMIT`, hold links into `blobs` beside them.
    """
    home, place = folder.resolve(), path.resolve()
    commit = next((one for one in (home, *home.parents) if one.parent.name == "snapshots"), None)
    homes = [home] if commit is None else [home, commit.parent.parent / "blobs"]
    return None if any(place.is_relative_to(one) for one in homes) else place


def refuse_links(folder: Path, paths):
    """Raise if a file that would be copied lies outside of its folder: it may be anybody's.

    Raises:
        UserError: naming it.
    """
    for path in paths:
        if path.is_file() and (place := leads_outside(folder, path)):
            raise UserError(f"{path} is a link to {place}, outside of the folder; put a copy there if it belongs to it")


def what_became_of(path: Path) -> str | None:
    """Recognise what stands in place of a file whose download failed; None if it is nothing of the kind."""
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            start = file.read(256).lstrip()
    except OSError:
        return None
    if not path.stat().st_size:
        return ": it is empty; download it again"
    if start.startswith(b"version https://git-lfs"):
        return ": it is a git-lfs pointer; run `git lfs pull` or download the file itself"
    if start[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return ": it is a web page, such as a login or an expired link gives; download it again"
    return None
