"""A target that is whole or absent: it is written beside its place by one run at a time, and moved there in one step.

Everything is written into `TARGET.partial`, each file as `NAME.partial` until it is synced to disk. A marker in that
folder says that it belongs to this package and is unfinished; the same command resumes from it. A folder without a
marker was made by somebody else, and is never touched.
"""

import contextlib
import ctypes
import errno
import fnmatch
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from hf_llama3.errors import UserError, quoted

from .facts import CURVES_FILE, EVALUATIONS, TRAINING_FACTS
from .hashes import CHECKLIST, CHECKSUMS
from .locking import hold, locked

# A checkpoint has one of them. They are written last, and a folder that has none is not replaced.
SIGNS = ("config.json", "params.json")
# What else lies in one, by its name. A folder that holds anything besides is not replaced: somebody put it there.
PARTS = (
    *("*.safetensors", "*.bin", "*.pth", "*.pt", "*.distcp", ".metadata", "*.index.json", "consolidated.[0-9][0-9]"),
    *("generation_config.json", "adapter_config.json", "huggingface.json", "huggingface", "provenance.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.*", "additional_chat_templates", CHECKLIST, CHECKSUMS, TRAINING_FACTS, EVALUATIONS, CURVES_FILE),
    *("configuration_llama3.py", "modeling_llama3.py", "attention.py", "mlp.py", "norm.py", "rotary.py"),
)
OURS = "-by-hf-llama3"  # ends the names of what is gone when a folder is finished
MARKER = f".unfinished{OURS}"
REPLACED = "replaced"  # the old target's name in the folder where it waits to be removed
RENAME_EXCHANGE = 2  # linux/fs.h
AT_FDCWD = -100  # linux/fcntl.h: names are relative to the working directory


def place_of(target) -> Path:
    """Return where a target will stand, whatever links lead there.

    Raises:
        UserError: nothing can stand there: a loop of links, a name that is too long, the root.
    """
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(target)  # since Python 3.13 `resolve` takes links that lead in a circle
        place = Path(target).resolve()
        if not place.name:
            raise UserError(f"{target} is where all folders begin; name one that can be made")
        for path in (staging_of(place), replaced_by(place)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.lstat()
    except OSError as error:
        raise UserError(f"{target} cannot be made ({error.strerror}); name another place") from error
    return place


def is_checkpoint(target: Path) -> bool:
    """Tell whether a folder holds a model, so that another may replace it."""
    return target.is_dir() and any((target / sign).exists() for sign in SIGNS)


def check_target(
    source: Path,
    target: Path,
    needed: int,
    overwrite: bool,
    may_go: Callable[[Path], bool] = is_checkpoint,
    kind: str = "checkpoint",
) -> int:
    """Return the free bytes on the target's disk.

    Args:
        may_go: tells whether what stands there is what `overwrite` means, a `kind` of thing.

    Raises:
        UserError: the target is not apart from the source, not free to take, or lacks the room that is `needed`.
    """
    for place in (target, staging_of(target), replaced_by(target)):
        if place == source or source in place.parents or place in source.parents:
            raise UserError(f"{target} and the source {source} must be apart; choose another target")
    if is_taken(target):
        if not overwrite:
            raise UserError(f"{target} already exists; choose another target or add --overwrite")
        if not may_go(target):
            raise UserError(f"{target} is no {kind}, so it is not overwritten; remove it yourself or choose another")
        if others := foreign(target):
            names = f"{quoted(others[0])}{f' and {len(others) - 1} more' if others[1:] else ''}"
            raise UserError(
                f"{target} also holds {names}, which no conversion makes, so it is not overwritten; "
                "move that elsewhere, or choose another target"
            )
    parent = parent_of(target)
    staging = staging_of(target)
    there = sum(file.lstat().st_size for file in staging.iterdir()) if staging.is_dir() else 0
    if (free := shutil.disk_usage(parent).free) + there < needed:
        raise UserError(f"{target} needs {needed} bytes, but its disk has {free} free; make room there")
    return free


def foreign(target: Path) -> list[str]:
    """List what lies in a folder that is no part of a checkpoint; in a file there is nothing."""
    names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    return [name for name in names if not any(fnmatch.fnmatchcase(name, part) for part in (*SIGNS, *PARTS))]


def is_taken(target: Path) -> bool:
    """Tell whether a path is taken: anything is there but an empty folder."""
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def parent_of(target: Path) -> Path:
    """Return the nearest parent folder that exists.

    Raises:
        UserError: it is a file.
    """
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{target} cannot be made: {parent} is a file; choose another place")
    return parent


@contextlib.contextmanager
def staging(target: Path, overwrite: bool = False, put: Callable[[Path, Path], None] | None = None) -> Iterator[Path]:
    """Open the folder that becomes `target` at the end of the block; one run at a time can.

    Args:
        put: moves what the folder holds to its place, if that is not the folder itself: `put_file` for a file of the
            target's name.

    Raises:
        UserError: another run has it, it is not one of ours, the target is taken, or the system refuses.
    """
    folder = staging_of(target)
    with system_errors(folder):
        if not is_ours(folder) and not was_exchanged(folder, target):
            raise in_the_way(folder)
        with locked(folder, target):
            recover(folder, target)
            if is_taken(target) and not overwrite:  # another run may have made it since the check
                raise UserError(f"{target} already exists; choose another target or add --overwrite")
            if is_taken(target):
                make_free(replaced_by(target))
            folder.chmod(stat.S_IMODE(folder.stat().st_mode) | stat.S_ISVTX)
            write_file(folder / MARKER, b"hf-llama3 is making a model here; the same command goes on with it.\n")
            yield folder
            (put or take_place)(folder, target)


@contextlib.contextmanager
def system_errors(place: Path, remedy: str = "mend that and run the same again"):
    """Turn the system's errors into a sentence; finished files stay for the next run."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place} could not be written ({error.strerror or error}); {remedy}") from error


def temporary_errors():
    """Turn the system's errors about temporary files into a sentence."""
    return system_errors(Path(tempfile.gettempdir()), "make room there, or name another place by TMPDIR")


def staging_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def replaced_by(target: Path) -> Path:
    """Return the folder in which an old target waits to be removed, beside a marker that identifies it."""
    return target.with_name(f"{target.name}.replaced-by-hf-llama3")


def is_ours(folder: Path) -> bool:
    """Tell whether a run may write into a folder: it is absent, empty, or left by an earlier run.

    After the marker is removed and before the folder is renamed, a bit of its mode, which nobody else sets, says so.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return False
    return not folder.exists() or not any(folder.iterdir()) or is_marked(folder)


def is_marked(folder: Path) -> bool:
    return (folder / MARKER).is_file() or bool(folder.stat().st_mode & stat.S_ISVTX)


def is_unfinished(folder: Path) -> bool:
    """Tell whether a folder is the unfinished work of a run."""
    named = folder.name.endswith(".partial") and folder.is_dir()
    return (folder / MARKER).is_file() or (named and is_marked(folder))


def in_the_way(folder: Path) -> UserError:
    return UserError(f"{folder} is in the way and was not made by this package; move it elsewhere")


def take_place(folder: Path, target: Path):
    """Move the finished folder to the target's place; the old target is removed afterwards."""
    if is_taken(target):
        replace(folder, target)
    else:
        if target.exists():
            target.rmdir()
        (folder / MARKER).unlink()
        folder.rename(target)
        sync(target.parent)
    target.chmod(stat.S_IMODE(target.stat().st_mode) & ~stat.S_ISVTX)


def put_file(folder: Path, target: Path):
    """Put the finished file in the target's place, in one step, and empty the folder that it was made in."""
    if target.is_dir():
        raise UserError(f"{target} is a folder, and a file is to stand there; choose another target")
    (folder / target.name).replace(target)
    sync(target.parent)
    clear(folder)
    (folder / MARKER).unlink()


def replace(folder: Path, target: Path):
    """Exchange the finished folder and the target, in one step where the system can, and remove the old target."""
    made, waiting = folder / REPLACED, replaced_by(target)
    made.mkdir()
    write_file(made / MARKER, identity(target))
    made.rename(waiting)
    (folder / MARKER).unlink()
    handle = hold(target, target)  # or another run could take the renamed folder for one that it may write into
    try:
        if exchange(folder, target):
            folder.rename(waiting / REPLACED)
        else:
            target.rename(waiting / REPLACED)
            folder.rename(target)
        sync(target.parent)
        remove_replaced(waiting)
    finally:
        if handle is not None:
            os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; return False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, an old C library
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # another file system
        return False
    raise OSError(code, os.strerror(code))


def identity(folder: Path) -> bytes:
    """Return what identifies a folder under any name."""
    status = folder.lstat()
    return f"{status.st_dev} {status.st_ino}\n".encode()


def was_exchanged(folder: Path, target: Path) -> bool:
    """Tell whether `TARGET.partial` is the old target: a run was killed right after the exchange."""
    marker = replaced_by(target) / MARKER
    return marker.is_file() and folder.is_dir() and marker.read_bytes() == identity(folder)


def recover(folder: Path, target: Path):
    """Finish the exchange of a run that was killed during it."""
    waiting = replaced_by(target)
    if not (waiting / MARKER).is_file():
        return  # nothing, or somebody else's
    if was_exchanged(folder, target):
        clear(folder)
    elif (waiting / REPLACED).exists() and not target.exists():
        (waiting / REPLACED).rename(target)
    remove_replaced(waiting)


def make_free(waiting: Path):
    """Remove an empty folder, left by a run that was killed as it removed one.

    Raises:
        UserError: there is anything else.
    """
    try:
        if os.path.lexists(waiting):
            waiting.rmdir()
    except OSError as error:
        raise in_the_way(waiting) from error


def remove_replaced(waiting: Path):
    """Remove an old target; the marker goes last, so that after a kill the next run goes on with it."""
    write_file(waiting / MARKER, b"hf-llama3 removes the old model here.\n")
    shutil.rmtree(waiting / REPLACED, ignore_errors=True)
    if not (waiting / REPLACED).exists():
        (waiting / MARKER).unlink()
        with contextlib.suppress(OSError):  # somebody has put something there
            waiting.rmdir()


def clear(folder: Path, keep=()):
    """Remove everything in a folder but the files in `keep`; links are removed, not followed."""
    for place, folders, files in os.walk(folder, topdown=False):
        for path in (Path(place, name) for name in (*folders, *files)):
            is_plain = stat.S_ISREG(path.lstat().st_mode)
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # it holds something that is kept
                    path.rmdir()
            elif not (is_plain and path.relative_to(folder).as_posix() in (*keep, MARKER)):
                path.unlink()


def files_in(folder: Path) -> dict[str, Path]:
    """List all files below a folder, by their paths in it."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if not (path.parent == folder and name.endswith(OURS))}


def write_files(folder: Path, files: dict[str, bytes]):
    """Write small files by their paths in a folder, each whole or not at all."""
    for name in sorted(files, key=lambda name: name in SIGNS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, files[name])


def write_file(path: Path, content: bytes):
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # left by a run that was stopped, or somebody's link
    with open(partial, "xb") as file:
        file.write(content)
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
