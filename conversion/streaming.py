"""Convert a repository on the Hub file by file: fetch one, write its tensors to their places, drop it.

So the disk never holds the model twice. The lists of tensors are enough for the plan. A tensor of which several files
hold parts is filled by one after another. A run resumes what an earlier one has written: a journal in the unfinished
target lists the files whose tensors are in their places.
"""

import contextlib
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_llama3.errors import UserError, shown
from hf_llama3.files.atomic import OURS, finish, parent_of, sync, write_file
from hf_llama3.files.hashes import CHECKLIST, check_sums, hash_file, read_sums
from hf_llama3.files.json import read_json, to_json
from hf_llama3.files.schema import OBJECT, check, text

from .checkpoint import Checkpoint
from .config.hf import head_of, read_config
from .formats.gguf import Quantise
from .formats.storage import BY_NAME, SourceFile, row_blocks, write_all
from .formats.writing import checksum_if_written, checksum_of, holds_part, reserve, write_part
from .hub.cache import commit_of, fetch, fetch_file, fetch_weights, sizes_to_fetch
from .hub.hollow import hollow_files
from .hub.names import HubName, parse_name
from .hub.parts import NotInParts
from .plan import Plan
from .weights import BIAS_KEYS, EMBEDDING, OUTPUT, rows, sizes

JOURNAL, FETCHED = f".streamed{OURS}", ".fetched"  # in the unfinished target
AT_ONCE = 2  # the most files of the source on the disk: one that is read, and the next
JOURNAL_KEYS = {"plan": text(), "done": OBJECT, "copies": OBJECT}


@dataclass(eq=False)
class Stream:
    """A repository whose weights are still on the Hub: its small files, and sparse files in place of the weights."""

    name: HubName
    commit: str
    inside: str  # folder in the repository, "" or "original/"
    folder: Path
    files: dict[str, int]  # file of weights, by its path in the folder -> bytes
    merged: str = ""  # hash of the adapter that is merged on the way

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    @property
    def room(self) -> int:
        """The most bytes of the source that are on the disk at once."""
        return min(AT_ONCE, len(self.files)) * max(self.files.values())

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
        hollow, aside = self.folder / file, self.folder.parent / f"{file.replace('/', '--')}.hollow"
        there = fetch_file(self.name, self.commit, self.inside + file, place)
        hollow.rename(aside)
        hollow.symlink_to(there.resolve())
        try:
            yield
        finally:
            hollow.unlink()
            aside.rename(hollow)
        shutil.rmtree(place)


@contextlib.contextmanager
def stream_of(source, target: Path, wanted: bool | None, adapter: Path | None = None) -> Iterator[tuple]:
    """Return a repository to be read file by file, if that is wanted or the disk lacks room; otherwise None.

    Args:
        wanted: None to look at the disk.
        adapter: the folder of one that is merged on the way.

    Returns:
        The `Stream` or None, a note for the user or None, and the folder of whole files or the source as it is.

    Raises:
        UserError: it is wanted, but the repository cannot be read so.
    """
    name = parse_name(source)
    if wanted and (name is None or name.file):
        kind = "a repository of safetensors or of torch.save's files" if name else "a repository on the Hub"
        raise UserError(f"--stream is for {kind}, got {source}; leave it out")
    if name is None or name.file or wanted is False:
        yield None, None, source
        return
    texts = fetch(source, weights=False)
    if wanted is None and (fits(most_bytes(texts), target) or fits(sum(sizes_to_fetch(name, texts).values()), target)):
        yield None, None, fetch_weights(name, texts)
        return
    with contextlib.ExitStack() as stack:
        try:
            folder, files = stack.enter_context(hollow_files(name, texts, source))
        except NotInParts as error:
            if wanted:
                raise UserError(
                    f"{name.repo} cannot be read file by file, since {error}; leave out --stream"
                ) from error
            found = None, f"the files are not read one after another, since {error}", fetch_weights(name, texts)
        else:
            found = Stream(name, *commit_of(texts), folder, files, hash_adapter(adapter)), None, folder
        yield found


def hash_adapter(folder: Path | None) -> str:
    """Return a hash of an adapter's files, or nothing without one: what is merged must not change between runs."""
    paths = sorted(folder.glob("adapter_*")) if folder else []
    found = [f"{path.name} {hash_file(path, 'sha256', lambda count: None)}" for path in paths if path.is_file()]
    return hashlib.sha256("\n".join(found).encode()).hexdigest() if found else ""


def most_bytes(texts: Path) -> float:
    """Return the most bytes that a configuration's weights take, in float32; infinite if none of ours says it."""
    if not (texts / "config.json").exists():
        return math.inf
    config = read_config(texts / "config.json")
    size, head = sizes(config), head_of(config)
    biases = [key for key in BIAS_KEYS if config[key]]
    one, two = (sum(math.prod(row.full_shape(size)) for row in rows(count, 0, biases, head)) for count in (1, 2))
    return BY_NAME["float32"].itemsize * (one + (two - one) * (config["num_hidden_layers"] - 1))


def fits(nbytes: float, target: Path) -> bool:
    """Tell whether the disk has room for the files to fetch and as much again."""
    return 2 * nbytes <= shutil.disk_usage(parent_of(target)).free


def check_streamed(plan: Plan):
    """Check that a plan needs no elements, which are still on the Hub.

    Raises:
        UserError: it does; the sentence says which.
    """
    remedy = "add --no-stream, and make room for all of it"
    heads, embeddings = (plan.source.tensors[row.hf] for row in (OUTPUT, EMBEDDING))
    apart = any(head.file.path != embedding.file.path for head, embedding in zip(heads, embeddings, strict=True))
    if plan.source.tied and apart:
        what = "a head in another file than the embedding that it is tied to, which have to be compared first"
        raise UserError(f"{plan.source.name} stores {what}; {remedy}")
    if isinstance(plan.cast, Quantise):
        for file in plan.files:
            for tensor, assembly in file.tensors:
                if not assembly.has_whole_blocks:
                    what = f"{shown(tensor)} in files whose parts are no multiples of a block of {plan.cast.to.name}"
                    raise UserError(f"{plan.source.name} stores {what}; {remedy}")


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
    journal = read_journal(folder, f"{stream.commit} {laid_out} {stream.merged} {verify}")
    error, resumed = None, sorted(journal["done"])
    sums = read_sums(stream.folder / CHECKLIST) if verify and (stream.folder / CHECKLIST).is_file() else {}
    for file in plan.files:
        make_room(folder / f"{file.name}.partial", file.layout.size, journal)
    for file, size in stream.files.items():
        if file not in journal["done"]:
            with stream.fetched(file, folder / FETCHED):
                again = remake()
                if lay_out(again) != laid_out or again.source.config != plan.source.config:
                    what = (
                        f"{shown(file)} of {stream.name.repo} differs from the parts of it that the plan was made from"
                    )
                    raise UserError(f"{what}; add --no-stream")
                if file in sums:
                    check_sums(stream.folder / CHECKLIST, only=(file,))
                journal["done"][file] = write_from(again, file, folder, verify)
                journal["copies"][file] = hash_copies(again.source, file)
                for one in plan.files:
                    sync(folder / f"{one.name}.partial")
            if again.cast is not None:
                error = max(error or 0.0, again.cast.largest_error)
            write_file(folder / JOURNAL, to_json(journal))
        progress(size)
    compare_copies(plan.source, journal)
    for file in plan.files:
        path, known = folder / f"{file.name}.partial", {}
        for done in journal["done"].values():
            known |= done.get(file.name, {})
        with open(path, "r+b", buffering=0) as out:
            checksums = [
                known[str(index)] if str(index) in known else checksum_of(out, offset, assembly.nbytes)
                for index, ((_, assembly), offset) in enumerate(zip(file.tensors, file.layout.offsets, strict=True))
            ]
            for offset, content in file.layout.fixed(checksums):
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
    """Write what one file of the source holds of each tensor; return checksums of whole ones by file and place."""
    found = {}
    for file in plan.files:
        path = folder / f"{file.name}.partial"
        with open(path, "r+b", buffering=0) as out:
            for index, ((tensor, assembly), offset) in enumerate(zip(file.tensors, file.layout.offsets, strict=True)):
                there = [number for number, part in enumerate(assembly.parts) if is_in(part.file, name, plan.source)]
                if len(there) == len(assembly.parts):
                    checksum = assembly.write(out, offset, lambda count: None, file.layout.needs_checksums)
                    found.setdefault(file.name, {})[str(index)] = checksum
                    same = not verify or checksum_if_written(assembly, SourceFile(path), offset, False) is not None
                else:
                    for number in there:
                        write_part(assembly, number, out, offset)
                    same = not verify or all(holds_part(assembly, number, out, offset) for number in there)
                if not same:
                    raise UserError(f"{path} differs from its source in {shown(tensor)}; please report this")
    return found


def is_in(file: SourceFile, name: str, source: Checkpoint) -> bool:
    return file.path.relative_to(source.path).as_posix() == name


def hash_copies(source: Checkpoint, name: str) -> dict[str, str]:
    """Return hashes of the tensors of one file that are copies, or have some, by pair and side."""
    found = {}
    for index, pair in enumerate(source.copies):
        for side, tensor in enumerate(pair):
            if is_in(tensor.file, name, source):
                digest = hashlib.sha256()
                for rows in row_blocks(tensor.array):
                    digest.update(tensor.file.take(tensor.array[rows]))
                found[f"{index} {side}"] = digest.hexdigest()
    return found


def compare_copies(source: Checkpoint, journal: dict):
    """Check that tensors which were left out as copies were copies.

    Raises:
        UserError: naming the files.
    """
    hashes = {place: digest for found in journal["copies"].values() for place, digest in found.items()}
    for index, pair in enumerate(source.copies):
        if hashes[f"{index} 0"] != hashes[f"{index} 1"]:
            raise source.no_copies(*pair)


def read_journal(folder: Path, plan: str) -> dict:
    """Return what an earlier run with the same plan has written."""
    path = folder / JOURNAL
    if path.is_file():
        journal = {"copies": {}} | check(read_json(path), JOURNAL_KEYS, path, ("plan", "done"))
        if journal["plan"] == plan:
            return journal
    return {"plan": plan, "done": {}, "copies": {}}


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
