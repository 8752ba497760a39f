"""One run at a time in a folder."""

import contextlib
import os
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from hf_llama3.errors import UserError

try:
    import fcntl
except ImportError:  # another system
    fcntl = None


@contextlib.contextmanager
def locked(folder: Path, target: Path):
    """Lock the folder in which `target` is made; it is made if absent, and removed if left empty.

    The lock is on the folder itself: it moves with the folder, leaves no file behind, and ends with the process. Where
    the file system cannot lock folders, a lock file beside it is used.

    Raises:
        UserError: another run holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        handle = hold(folder, target, make=True)
        if handle is None:
            held.enter_context(locked_by_file(folder.with_name(f"{folder.name}.lock"), target))
            folder.mkdir(exist_ok=True)
        else:
            held.callback(os.close, handle)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # it is not empty, or was renamed


def hold(folder: Path, target: Path, make: bool = False) -> int | None:
    """Lock a folder and return the handle that holds it until it is closed; None where folders cannot be locked.

    Raises:
        UserError: another run holds it.
    """
    while fcntl is not None:
        if make:
            folder.mkdir(exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            if make:
                continue  # another run was refused and removed the folder, which it had made
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_same(os.fstat(handle), folder):
                return handle
        except BlockingIOError as error:
            os.close(handle)
            raise busy(target) from error
        except OSError:  # NFS locks only what is open for writing, others lock nothing
            os.close(handle)
            return None
        os.close(handle)  # another run has finished and renamed it
    return None


def is_same(status: os.stat_result, path: Path) -> bool:
    """Tell whether the opened folder still has its name."""
    try:
        return os.path.samestat(status, path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked_by_file(path: Path, target: Path):
    """Hold a lock file, which is removed at the end."""
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except NotImplementedError:  # no locks at all: the file's existence is the lock
            lock = SoftFileLock(path)
            lock.acquire(timeout=0)
    except Timeout as error:
        raise busy(target, f", or remove {path} if it was killed") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()


def busy(target: Path, remedy: str = "") -> UserError:
    return UserError(f"another run is writing {target}; wait for it, or choose another target{remedy}")
