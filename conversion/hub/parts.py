"""Files of weights without their elements: sparse, with the bytes that list the tensors fetched from the Hub in parts.

Safetensors list their tensors in front. A zip of `torch.save` does at its end, and in a pickle near its front; the
header before each of its members follows from that list. What is made here has the names, types and shapes of the real
file, and its size; the elements are a hole. Opening a checkpoint compares a few elements, see `add_compared`.
"""

import struct
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from hf_llama3.errors import UserError

from ..config.params import read_params
from ..formats.meta import PARAMS_FILE, find_shards, read_shard
from ..formats.names import is_rope_table
from ..formats.pth import read_pth
from ..formats.safetensors import read_safetensors
from ..formats.storage import StoredTensor
from ..formats.unpickle import MAX_PICKLE_BYTES
from ..formats.zip import LOCAL_HEADER, MAX_32, Damaged, Member, find_directory, read_at, read_entry
from ..weights import EMBEDDING, OUTPUT
from .cache import explain
from .names import HubName

TAIL = 2**16  # bytes of a zip's end that are fetched first; its directory takes some 80 for a tensor
MOST_FETCHED = 2**24  # bytes of a file's lists
PREFIX = 2**16  # bytes by which an embedding and a head are compared
MOST_PADDING = 1024  # bytes between a member's header and its own; torch.save's are fewer than 200
AT_A_TIME, TRIES, WAIT = 8, 3, 60  # requests at a time, tries of each, seconds without a byte
KEYS, VALUES = "layers.0.attention.wk.weight", "layers.0.attention.wv.weight"


class NotInParts(Exception):
    """The Hub does not serve parts, or the file cannot be planned by them; and why."""


class Hollow:
    """A sparse file in the place of one on the Hub, filled where it is needed."""

    def __init__(self, path: Path, size: int, fetch: Callable[[int, int], bytes]):
        self.path, self.size, self.fetch, self.spans = path, size, fetch, []
        self.members = []  # of a zip: (offset of its header, offset of what follows it)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(size)

    def has(self, start: int, stop: int) -> bool:
        return any(first <= start and stop <= last for first, last in self.spans)

    def member_at(self, offset: int) -> tuple[int, int]:
        """Return the place of the member that holds a byte."""
        return self.members[bisect_right(self.members, offset, key=lambda member: member[0]) - 1]

    def need(self, start: int, stop: int):
        """Fetch the bytes from `start` to `stop`, if they are not there."""
        if stop > start and not self.has(start, stop):
            self.put(start, self.fetch(start, stop))
            self.spans.append((start, stop))

    def blank(self, start: int, stop: int):
        """Make a hole again of what was fetched from `start` to `stop`."""
        for first, last in self.spans:
            if (low := max(first, start)) < (high := min(last, stop)):
                self.put(low, bytes(high - low))

    def put(self, start: int, content: bytes):
        with open(self.path, "r+b") as file:
            file.seek(start)
            file.write(content)


def add_hollow_pth(path: Path, size: int, fetch: Callable[[int, int], bytes]) -> Hollow:
    """Make a file with all that `read_pth` reads of one of `torch.save`.

    Raises:
        NotInParts: it is no zip, or its lists are too large.
    """
    hollow = Hollow(path, size, fetch)
    hollow.need(max(size - TAIL, 0), size)
    try:
        with open(path, "rb") as file:
            count, start, length = find_directory(file, size)
            hollow.need(start, size)
            directory, at, members = read_at(file, start, length), 0, []
        for _ in range(count):
            member, flags, header, at = read_entry(directory, at)
            members.append((header, member, flags))
        members.sort(key=lambda one: one[0])
        ends = [header for header, _, _ in members[1:]] + [start]
        hollow.members = [(header, end) for (header, _, _), end in zip(members, ends, strict=True)]
        if not all(
            header + len(local_header(*one)) + one[0].packed <= end
            for (header, *one), end in zip(members, ends, strict=True)
        ):
            raise Damaged("its members overlap")
    except (Damaged, ValueError, struct.error) as error:
        raise NotInParts(f"{path.name} is no zip of torch.save's") from error
    small = [is_small(member) for _, member, _ in members]
    runs = merged([place for place, is_list in zip(hollow.members, small, strict=True) if is_list])
    if sum(end - first for first, end in runs) > MOST_FETCHED:
        raise NotInParts(f"the lists of tensors in {path.name} are too large")
    for first, end in runs:
        hollow.need(first, end)
    for (header, member, flags), (_, end), is_list in zip(members, hollow.members, small, strict=True):
        if not is_list:
            hollow.blank(header, end)  # elements that came with the end of the file would be compared with holes
            hollow.put(header, local_header(member, flags))
    hollow.spans.clear()
    return hollow


def is_small(member: Member) -> bool:
    """Tell whether a member of a zip is a list or a fact, and no storage."""
    return "/data/" not in member.name and member.packed <= MAX_PICKLE_BYTES


def local_header(member: Member, flags: int) -> bytes:
    """Return a member's header without padding, so that its bytes begin before or where they do in the real file."""
    name, wide = member.name.encode(), member.size >= MAX_32
    sizes = [MAX_32 if wide else member.packed, MAX_32 if wide else member.size]
    extra = b"\1\0\x10\0" + member.size.to_bytes(8, "little") * 2 if wide else b""
    fields = (b"PK\x03\x04", 45, flags, member.method, 0, 0, member.checksum, *sizes, len(name), len(extra))
    return LOCAL_HEADER.pack(*fields) + name + extra


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge spans that touch one another."""
    found = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


def part_of(name: HubName, commit: str, file: str, start: int, stop: int) -> bytes:
    """Fetch bytes of a file on the Hub.

    Raises:
        NotInParts: the Hub does not serve parts of it.
        UserError: in one sentence what the Hub or the way to it did.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url, content = hf_hub_url(name.repo, file, revision=commit), bytearray()
    for left in reversed(range(TRIES)):
        headers = {"Range": f"bytes={start + len(content)}-{stop - 1}", "Accept-Encoding": "identity"}
        try:
            options = {"headers": build_hf_headers() | headers, "timeout": WAIT, "follow_redirects": True}
            with get_session().stream("GET", url, **options) as response:
                hf_raise_for_status(response)
                expected = f"bytes {start + len(content)}-{stop - 1}/"
                if response.status_code != 206 or not response.headers.get("Content-Range", "").startswith(expected):
                    raise NotInParts(f"the Hub serves no parts of {file}")
                for block in response.iter_raw():
                    content += block
            if len(content) != stop - start:
                raise NotInParts(f"the Hub serves other parts of {file} than those asked for")
            return bytes(content)
        except (HTTPError, OSError) as error:
            passes = not isinstance(error, HfHubHTTPError) or error.response.status_code >= 500
            if not left or not passes:
                raise UserError(explain(error, name)) from error
    raise AssertionError("the last try returns or raises")


def add_compared(folder: Path, hollows: dict[Path, Hollow]):
    """Fetch the elements that opening a checkpoint of `torch.save`'s files compares.

    The beginnings of the embedding and of the head show whether they are the same; of Meta's shards the vectors are
    compared, and the keys and values of the first layer show whether heads are stored several times.

    Raises:
        NotInParts: they lie otherwise than in the files that are published.
    """
    shards = find_shards(folder) if (folder / PARAMS_FILE).exists() and not (folder / "config.json").exists() else []
    if not shards:
        for path, hollow in hollows.items():
            fetch_prefixes(partial(read_pth, path), {path: hollow})
        return
    tensors = [read_shard(path) for path in shards]
    if not all(shard.keys() >= {EMBEDDING.meta} for shard in tensors):
        raise NotInParts("the names of its tensors are not Meta's")
    fetch_prefixes(partial(read_shard, shards[0]), hollows)
    if len(shards) == 1:
        return
    params = read_params(folder / PARAMS_FILE)
    compared = [tensors[0][name] for name in replicated(tensors[0])]
    if (params.get("n_kv_heads") or params["n_heads"]) == len(shards):
        compared += [shard[name] for shard in tensors for name in (KEYS, VALUES) if name in shard]
    fetch_tensors([(tensor, tensor.nbytes) for tensor in compared], hollows)
    first = read_shard(shards[0])
    values = {name: first[name].read() for name in replicated(first)}
    for path in shards[1:]:
        for name, tensor in read_shard(path).items():
            if name in values and tensor.nbytes == len(values[name]):
                hollows[tensor.file.path].put(tensor.offset, values[name])


def replicated(shard: dict[str, StoredTensor]) -> list[str]:
    """List the tensors that all shards hold whole: vectors."""
    return [name for name, tensor in shard.items() if len(tensor.shape) == 1 and not is_rope_table(name)]


def fetch_prefixes(read: Callable[[], dict[str, StoredTensor]], hollows: dict[Path, Hollow]):
    """Fetch the beginnings of the embedding and of the head, of equal lengths; after them is a hole."""
    fetch_tensors([(tensor, min(PREFIX, tensor.nbytes)) for tensor in embedding_and_head(read())], hollows)
    for tensor in embedding_and_head(read()):  # now at its real place
        hollows[tensor.file.path].blank(tensor.offset + PREFIX, tensor.offset + tensor.nbytes)


def add_prefixes(path: Path, fetch: Callable[[int, int], bytes]):
    """Do the same in sparse safetensors, whose header is shorter or longer than the real one."""
    for tensor in embedding_and_head(read_safetensors(path)):
        with open(path, "r+b") as file:
            moved = int.from_bytes(fetch(0, 8), "little") - int.from_bytes(file.read(8), "little")
            file.seek(tensor.offset)
            file.write(fetch(tensor.offset + moved, tensor.offset + moved + min(PREFIX, tensor.nbytes)))


def embedding_and_head(tensors: dict[str, StoredTensor]) -> list[StoredTensor]:
    """Return both, if there are both."""
    names = ((EMBEDDING.hf, EMBEDDING.meta), (OUTPUT.hf, OUTPUT.meta))
    found = [[tensor for name, tensor in tensors.items() if name.endswith(ends)] for ends in names]
    return [one[0] for one in found] if [len(one) for one in found] == [1, 1] else []


def fetch_tensors(wanted: list[tuple[StoredTensor, int]], hollows: dict[Path, Hollow]):
    """Fetch the first bytes of tensors, each with the header before its member, which says where they begin."""
    spans = {}
    for tensor, nbytes in wanted:
        hollow = hollows[tensor.file.path]
        header, end = hollow.member_at(tensor.offset)
        spans.setdefault(hollow, []).append((header, min(end, tensor.offset + nbytes + MOST_PADDING)))
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for done in [pool.submit(hollow.need, *span) for hollow, own in spans.items() for span in merged(own)]:
            done.result()
