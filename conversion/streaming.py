"""Convert a repository on the Hub file by file: fetch one, write its tensors to their places, drop it.

So the disk never holds the model twice. Headers are enough for the plan. A run resumes what an earlier one has written:
a journal in the unfinished target lists the files whose tensors are in their places.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_llama3.errors import UserError, shown
from hf_llama3.files.atomic import OURS, finish, parent_of, sync, write_file
from hf_llama3.files.hashes import hash_file
from hf_llama3.files.json import read_json, to_json
from hf_llama3.files.schema import OBJECT, check, text

from .formats.storage import SourceFile, write_all
from .formats.writing import checksum_if_written, reserve
from .hub import HubName, fetch_file, hollow_files, parse_name, sizes_to_fetch
from .plan import Plan
from .weights import EMBEDDING, OUTPUT

JOURNAL, FETCHED = f".streamed{OURS}", ".fetched"  # in the unfinished target
AT_ONCE = 2  # the most files of the source on the disk: one that is read, and the next
JOURNAL_KEYS = {"plan": text(), "done": OBJECT}


@dataclass(eq=False)
class Stream:
    """A repository whose weights are still on the Hub: its small files, and sparse files in place of the weights."""

    name: HubName
    commit: str
    folder: Path
    files: dict[str, int]  # file of weights -> bytes
    merged: str = ""  # hash of the adapter that is merged on the way

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    @property
    def room(self) -> int:
        """The most bytes of the source that are on the disk at once."""
        return AT_ONCE * max(self.files.values())

    def say(self, target: int) -> str:
        """Return how much disk each way takes."""
        repo, once = self.name.repo, f"{self.room} bytes of them on the disk at most"
        return (
            f"the weights of {repo} are fetched one file after another, {once} beside the {target} of the target; all "
            f"at once would take {self.nbytes} in the Hub's cache beside these"
        )

    @contextlib.contextmanager
    def fetched(self, file: str, place: Path) -> Iterator[None]:
        """Fetch one file, which replaces the sparse one inside the block."""
        hollow, aside = self.folder / file, self.folder.parent / f"{file}.hollow"
        there = fetch_file(self.name, self.commit, file, place)
        hollow.rename(aside)
        hollow.symlink_to(there.resolve())
        try:
            yield
        finally:
            hollow.unlink()
            aside.rename(hollow)
        shutil.rmtree(place)


@contextlib.contextmanager
def stream_of(source, target: Path, wanted: bool | None, adapter: Path | None = None) -> Iterator[Stream | None]:
    """Return a repository to be read file by file, if that is wanted or the disk lacks room; otherwise None.

    Args:
        wanted: None to look at the disk.
        adapter: the folder of one that is merged on the way.

    Raises:
        UserError: it is wanted, but the repository cannot be read so.
    """
    name = parse_name(source)
    if name is None and wanted:
        raise UserError(f"--stream is for a repository on the Hub, got {source}; leave it out")
    if name is None or wanted is False or (wanted is None and fits(sum(sizes_to_fetch(source).values()), target)):
        yield None
        return
    with hollow_files(name, source) as folder:
        reason, files = "it has no headers of safetensors to plan by", {}
        if folder is not None:
            files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
        if files:
            stream, reason = Stream(name, folder.name, folder, files, hash_adapter(adapter)), None
        if reason and wanted:
            raise UserError(f"{name.repo} cannot be read file by file, since {reason}; leave out --stream")
        yield None if reason else stream


def hash_adapter(folder: Path | None) -> str:
    """Return a hash of an adapter's files, or nothing without one: what is merged must not change between runs."""
    paths = sorted(folder.glob("adapter_*")) if folder else []
    found = [f"{path.name} {hash_file(path, 'sha256', lambda count: None)}" for path in paths if path.is_file()]
    return hashlib.sha256("\n".join(found).encode()).hexdigest() if found else ""


def fits(nbytes: int, target: Path) -> bool:
    """Tell whether the disk has room for the files to fetch and as much again."""
    return 2 * nbytes <= shutil.disk_usage(parent_of(target)).free


def check_streamed(plan: Plan):
    """Check that a plan needs no elements, which are still on the Hub.

    Raises:
        UserError: it does; the sentence says which.
    """
    stored = plan.source.tensors
    if plan.source.tied and stored[OUTPUT.hf][0] is not stored[EMBEDDING.hf][0]:
        raise UserError(
            f"{plan.source.name} stores a head beside the embedding that it is tied to, which have to be compared "
            "first; add --no-stream, and make room for all of it"
        )


def write_streamed(
    plan: Plan, folder: Path, stream: Stream, remake: Callable[[], Plan], progress: Callable[[int], None], verify: bool
) -> tuple[list[str], float | None]:
    """Write all tensors of a plan into `folder`, one file of the source after another.

    Args:
        remake: returns the plan again, for the files of the source that are now whole.

    Returns:
        The source's files that an earlier run had written, and the largest error of a cast in the others.

    Raises:
        UserError: a file on the Hub contradicts its header, or was not written as it was read.
    """
    laid_out = lay_out(plan)
    journal = read_journal(folder, f"{stream.commit} {laid_out} {stream.merged}".rstrip())
    error, resumed = None, sorted(journal["done"])
    for file in plan.files:
        make_room(folder / f"{file.name}.partial", file.layout.size, journal)
    for file, size in stream.files.items():
        if file not in journal["done"]:
            with stream.fetched(file, folder / FETCHED):
                again = remake()
                if lay_out(again) != laid_out:
                    raise UserError(f"{shown(file)} of {stream.name.repo} is not what its header said; try again")
                journal["done"][file] = write_from(again, file, folder, verify)
                for one in plan.files:
                    sync(folder / f"{one.name}.partial")
            if again.cast is not None:
                error = max(error or 0.0, again.cast.largest_error)
            write_file(folder / JOURNAL, to_json(journal))
        progress(size)
    for file in plan.files:
        path, checksums = folder / f"{file.name}.partial", {}
        for done in journal["done"].values():
            checksums |= done.get(file.name, {})
        with open(path, "r+b", buffering=0) as out:
            for offset, content in file.layout.fixed([checksums[str(index)] for index in range(len(file.tensors))]):
                write_all(out, content, offset)
        finish(path)
    return resumed, error


def lay_out(plan: Plan) -> str:
    """Return a hash of all that is written but the elements, to recognise a plan: names, types, shapes, metadata."""
    digest = hashlib.sha256()
    for file in plan.files:
        digest.update(f"{file.name} {file.layout.size} ".encode())
        for offset, content in file.layout.fixed([0] * len(file.tensors)):
            digest.update(f"{offset} {len(content)} ".encode() + content)
    return digest.hexdigest()


def write_from(plan: Plan, name: str, folder: Path, verify: bool) -> dict[str, dict[str, int]]:
    """Write the tensors of one file of the source; return checksums by target file and place."""
    found = {}
    for file in plan.files:
        path = folder / f"{file.name}.partial"
        with open(path, "r+b", buffering=0) as out:
            for index, ((tensor, assembly), offset) in enumerate(zip(file.tensors, file.layout.offsets, strict=True)):
                if {part.file.path.name for part in assembly.parts} != {name}:
                    continue
                checksum = assembly.write(out, offset, lambda count: None, file.layout.needs_checksums)
                found.setdefault(file.name, {})[str(index)] = checksum
                if verify and checksum_if_written(assembly, SourceFile(path), offset, with_checksum=False) is None:
                    raise UserError(f"{path} differs from its source in {shown(tensor)}; please report this")
    return found


def read_journal(folder: Path, plan: str) -> dict:
    """Return what an earlier run with the same plan has written."""
    path = folder / JOURNAL
    if path.is_file():
        journal = check(read_json(path), JOURNAL_KEYS, path, tuple(JOURNAL_KEYS))
        if journal["plan"] == plan:
            return journal
    return {"plan": plan, "done": {}}


def make_room(path: Path, size: int, journal: dict):
    """Reserve the space of a file; what an earlier run wrote into it stays."""
    finished = path.with_name(path.name.removesuffix(".partial"))
    if finished.is_file():
        finished.replace(path)
    if not path.is_file() or path.stat().st_size != size:
        journal["done"].clear()
        with open(path, "wb", buffering=0) as out:
            reserve(out, size)


def kept_files(plan: Plan, folder: Path) -> list[str]:
    """List the files of an earlier run that this one resumes."""
    waiting = [path.relative_to(folder).as_posix() for path in (folder / FETCHED).rglob("*") if path.is_file()]
    return [JOURNAL, *waiting, *(name for file in plan.files for name in (file.name, f"{file.name}.partial"))]
