"""The list of tensors in a folder of torch.distributed.checkpoint: a pickle, read as records and never run."""

from pathlib import Path
from typing import Any

from hf_llama3.errors import UserError, quoted, shown
from hf_llama3.files.reading import require_file

from ..unpickle import Damaged, Forbidden, Global, Machine, forbidden

METADATA = ".metadata"
MAX_METADATA_BYTES = 64 * 2**20  # the 405B's on 64 GPUs, with its optimiser's state, is 20 MB
MAX_DIMENSIONS = 32
OURS = "torch.distributed.checkpoint"
INDEX = Global(f"{OURS}.metadata", "MetadataIndex")
SIZE = Global("torch", "Size")
RECORDS = {INDEX, Global(f"{OURS}.filesystem", "_StorageInfo")} | {
    Global(f"{OURS}.metadata", name)
    for name in (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        "StorageMeta",
    )
}
IGNORED = {  # calls whose facts are not needed
    Global("torch.serialization", "_get_layout"),
    Global(f"{OURS}.metadata", "_MEM_FORMAT_ENCODING"),
    *(Global(module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    *(Global(module, "PurePosixPath") for module in ("pathlib", "pathlib._local")),
}


class Record:
    """The pickled fields of an object of torch's."""

    def __init__(self, kind: Global):
        self.kind, self.facts = kind, None


class MetadataMachine(Machine):
    """Read this pickle, whose protocol is newer than that of tensors."""

    def proto(self):
        if not 2 <= (version := self.number("<B")) <= 5:
            raise Damaged(f"it has the protocol {version}")

    def memoize(self):
        self.put(len(self.memo))

    def short_text(self):
        self.stack.append(self.take(self.number("<B")).decode())

    def stack_global(self):
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise Damaged("it names no global")
        self.allow(Global(module, name))

    def find_global(self):
        self.allow(Global(self.line(), self.line()))

    def allow(self, found: Global):
        if not (found.is_type or found == SIZE or found in RECORDS | IGNORED):
            raise Forbidden(f"{found.module}.{found.name}")
        self.stack.append(found)

    def new(self):
        arguments, kind = self.pop(), self.pop()
        if arguments != () or kind not in RECORDS:
            raise Damaged("it makes what is no record")
        self.stack.append(Record(kind))

    def build(self):
        state = self.pop()
        record = self.stack[-1] if self.stack else None
        if type(record) is not Record or record.facts is not None or type(state) not in (dict, tuple):
            raise Damaged("it sets the state of a value otherwise than torch does")
        self.placed.add(id(state))
        record.facts = state

    def reduce(self):
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple or type(function) is not Global:
            raise Damaged("it calls what is no function")
        if function == SIZE:
            self.push_tuple(shape_of(*arguments))
        elif function in IGNORED:
            self.stack.append(None)
        else:
            raise Damaged(f"it calls {function.module}.{function.name}")

    def add_items(self, flat: list):
        """Add items as in tensors' pickles; keys may also be pieces: a name, and the first index."""
        keys = [key_of(key.facts) if type(key) is Record and key.kind == INDEX else key for key in flat[::2]]
        made = self.top(dict)
        if len(flat) % 2 or not all(type(key) in (str, int, tuple) for key in keys):
            raise Damaged("a key in it is none, or has no value")
        for key, value in zip(keys, flat[1::2], strict=True):
            if key in made:
                raise Damaged(f"it holds the key {quoted(key)} twice")
            made[key] = value
        self.grow(made, flat)

    own_instructions = {
        b"\x80": proto,
        b"c": find_global,
        b"R": reduce,
        b"b": build,
        b"\x8c": short_text,
        b"\x93": stack_global,
        b"\x94": memoize,
        b"\x95": lambda self: self.take(8),  # the length of a frame, which is not needed
        b"\x81": new,
    }


def key_of(facts: Any) -> tuple[str, tuple[int, ...] | None]:
    match facts:
        case {"fqn": str() as name, **rest}:
            start = rest.get("offset")
            return name, None if start is None else shape_of(start)
    raise Damaged("it names a piece otherwise than torch does")


def shape_of(numbers: Any = ()) -> tuple[int, ...]:
    if type(numbers) is not tuple or len(numbers) > MAX_DIMENSIONS:
        raise Damaged("a shape in it is none")
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise Damaged(f"a shape in it is {quoted(numbers)}")
    return numbers


def read_metadata(path: Path):
    """Return the tensors, {name: (type, shape, [(start, size)])}, and where pieces lie, {(name, start): (file, offset,
    length)}.

    Raises:
        UserError: it is damaged, too large, or asks for anything but these facts.
    """
    require_file(path)
    if (size := path.stat().st_size) > MAX_METADATA_BYTES:
        raise UserError(f"{path} must be at most {MAX_METADATA_BYTES} bytes, got {size}")
    content = path.read_bytes()
    try:
        metadata = MetadataMachine(content, 0).run()
        return list_tensors(metadata.facts, len(content)), list_places(metadata.facts, path)
    except Forbidden as error:
        raise forbidden(path, error) from error
    except (Damaged, UnicodeDecodeError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is no readable list of tensors ({shown(error)}); save the model again") from error


def list_tensors(facts: dict, limit: int) -> dict[str, tuple]:
    """List the tensors, with fewer pieces than `limit`: a list that is referenced many times could take for ever."""
    tensors, pieces = {}, 0
    for name, told in facts["state_dict_metadata"].items():
        if "chunks" in (told.facts or {}):  # not the bytes of another object
            pieces += len(told.facts["chunks"])
            if pieces > limit:
                raise Damaged("its tensors have more pieces than it has bytes")
            dtype, size = told.facts["properties"].facts[0], shape_of(told.facts["size"])
            starts = [(shape_of(one.facts["offsets"]), shape_of(one.facts["sizes"])) for one in told.facts["chunks"]]
            if type(dtype) is not Global or {len(size)} != {len(numbers) for one in starts for numbers in one}:
                raise Damaged(f"{quoted(name)} is described otherwise than torch does")
            tensors[str(name)] = (dtype.name, size, starts)
    return tensors


def list_places(facts: dict, path: Path) -> dict[tuple, tuple[str, int, int]]:
    places = {}
    for index, info in facts["storage_data"].items():
        if info.facts.get("transform_descriptors"):
            how = quoted(info.facts["transform_descriptors"])
            raise UserError(f"the pieces in {path.parent} are transformed ({how}); save the model without extensions")
        file, offset, length = (info.facts[key] for key in ("relative_path", "offset", "length"))
        if not (isinstance(file, str) and type(offset) is type(length) is int and min(offset, length) >= 0):
            raise Damaged(f"a piece lies at {quoted((file, offset, length))}")
        places[index] = (file, offset, length)
    return places
