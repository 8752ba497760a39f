"""A target that is whole or not there: written beside its place, under a lock, and put there in one step.

Everything goes into `TARGET.partial`, every file as `NAME.partial` until it is synced to disk. An interrupted run
leaves that folder; the same command finds in it what was finished. A folder that this package did not make is not
touched.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from hf_llama3.errors import UserError

# One of them tells a checkpoint: they are written last, and a folder that has none is not replaced.
SIGNS = ("config.json", "params.json")


def check_target(source: Path, target: Path, needed: int, overwrite: bool) -> int:
    """Return the free bytes on the target's disk.

    Raises:
        UserError: the target is not apart from the source, not free to take, or lacks the room that is `needed`.
    """
    for place in (target, staging_of(target), replaced_by(target)):
        if place == source or source in place.parents or place in source.parents:
            raise UserError(f"{target} and the source {source} must be apart; choose another target")
    if is_taken(target):
        if not overwrite:
            raise UserError(f"{target} already exists; choose another target or add --overwrite")
        if not target.is_dir() or not any((target / sign).exists() for sign in SIGNS):
            raise UserError(
                f"{target} is no checkpoint, so it is not overwritten; remove it yourself or choose another"
            )
    parent = parent_of(target)
    staging = staging_of(target)
    there = sum(file.stat().st_size for file in staging.iterdir()) if staging.is_dir() else 0
    if (free := shutil.disk_usage(parent).free) + there < needed:
        raise UserError(f"{target} needs {needed} bytes, but its disk has {free} free; make room there")
    return free


def is_taken(target: Path) -> bool:
    """Tell whether anything stands there but an empty folder."""
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def parent_of(target: Path) -> Path:
    """Return the nearest folder above that exists.

    Raises:
        UserError: it is a file.
    """
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{target} cannot be made: {parent} is a file; choose another place")
    return parent


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Open the folder that will become `target`, alone; at the end of the block it takes the target's place.

    Raises:
        UserError: another run has it, it is not one of ours, or the system refuses.
    """
    recover(target)
    folder = staging_of(target)
    with system_errors(folder):
        if folder.exists() and any(folder.iterdir()) and not is_unfinished(folder):
            raise UserError(f"{folder} is in the way and was not made by this package; move it elsewhere")
        with locked(folder, target):
            folder.mkdir(exist_ok=True)
            yield folder
            take_place(folder, target)


@contextlib.contextmanager
def locked(folder: Path, target: Path):
    """Hold the lock on the folder in which `target` is written; it stays beside it until that is finished.

    Raises:
        UserError: another run holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_of(folder))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another run is writing {target}; wait for it, or choose another target") from error
    try:
        yield
        lock_of(folder).unlink(missing_ok=True)
    finally:
        lock.release()


@contextlib.contextmanager
def system_errors(place: Path, remedy: str = "mend that and run the same again"):
    """Turn what the system refuses into a sentence; what was finished stays for the next run."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place} could not be written ({error.strerror or error}); {remedy}") from error


def staging_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def lock_of(folder: Path) -> Path:
    """Return the file that a run holds while it writes `folder`, and that stays beside it until it is finished."""
    return folder.with_name(f"{folder.name}.lock")


def is_unfinished(folder: Path) -> bool:
    return lock_of(folder).exists()


def replaced_by(target: Path) -> Path:
    return target.with_name(f"{target.name}.replaced-by-hf-llama3")


def take_place(folder: Path, target: Path):
    """Put the finished folder in the target's place; what was there goes when the new one stands."""
    old = replaced_by(target)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path):
    """Mend what a run left that was killed between the two renames above."""
    old = replaced_by(target)
    if old.exists() and not target.exists():
        old.rename(target)
    elif old.exists():
        shutil.rmtree(old, ignore_errors=True)


def write_files(folder: Path, files: dict[str, bytes]):
    """Write small files by their names, which may lie in a folder of their own, each whole or not at all."""
    for name in sorted(files, key=lambda name: name in SIGNS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, files[name])


def write_file(path: Path, content: bytes):
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    finish(partial)


def finish(partial: Path):
    """Sync a file to disk and give it its name."""
    sync(partial)
    partial.rename(partial.with_name(partial.name.removesuffix(".partial")))


def sync(path: Path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
