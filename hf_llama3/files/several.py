"""A target of several files that stand beside one another in somebody's folder, as the parts of a divided model.

No system moves several files in one step. So the first, without which nobody takes the others for a model, is moved
last, and an old one is removed first; a list in the unfinished folder names those that a stopped run has moved.
"""

from pathlib import Path

from .atomic import MARKER, OURS, clear, staging_of, sync, write_file
from .json import read_json, to_json

PLACING = f".placing{OURS}"


def placed(target: Path) -> set[str]:
    """Return the names of the files that a run was moving to their places when it was stopped."""
    path = staging_of(target) / PLACING
    names = read_json(path).get("names") if path.is_file() and not path.is_symlink() else None
    return {name for name in names if isinstance(name, str) and Path(name).name == name} if names else set()


def take_back(folder: Path, target: Path):
    """Move the files of a run that was stopped back into the unfinished folder, to be checked as any that it holds."""
    for name in sorted(placed(target)):
        there = target.with_name(name)
        if there.is_file() and not there.is_symlink() and not (folder / name).exists():
            there.replace(folder / name)
    (folder / PLACING).unlink(missing_ok=True)


def put_files(folder: Path, target: Path, names: list[str], old: list[Path]):
    """Move finished files to their places beside `target`, and empty the folder that they were made in.

    Args:
        names: of the files, that one first without which the others are nothing.
        old: files that they replace, in the same order.
    """
    write_file(folder / PLACING, to_json({"names": names}))
    for path in old:
        path.unlink()
    for name in (*names[1:], names[0]):
        (folder / name).replace(target.with_name(name))
    sync(target.parent)
    clear(folder)
    (folder / MARKER).unlink()
