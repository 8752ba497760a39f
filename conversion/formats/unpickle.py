"""Read the pickle of a checkpoint as data: the few instructions that torch.save writes for a dictionary of tensors.

No code is called, and everything is bounded before it is built: a value counts all leaves that a walk through it would
meet, so that it cannot contain itself, or grow by references. Everything that is not in the tables below is refused by
name. Source of the instructions: Python 3.11, Lib/pickletools.py.
"""

import pickletools
import re
import struct
from typing import Any, NamedTuple

from hf_llama3.errors import UserError, quoted, shown

MAX_PICKLE_BYTES = 2 * 2**20  # the 405B's is 0.3 MB a shard
MAX_DEPTH = 16  # a checkpoint of an optimiser has seven
MAX_NAME = 200  # bytes in the name of a module or its member
STRUCTS = {letter: struct.Struct(letter) for letter in ("<B", "<H", "<i", "<L", ">d")}
TYPES = re.compile(r"[A-Z]\w{2,20}Storage|(b?float|u?int|complex|q?u?int)\d{1,3}(_\w{1,20})?|bool", re.ASCII)
ORDERED_DICT = ("collections", "OrderedDict")
REBUILD = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),  # of a type without a storage class: float8, ...
    ("torch._utils", "_rebuild_parameter"),
}


class Global(NamedTuple):
    """A name that a pickle would import."""

    module: str
    name: str

    @property
    def is_type(self) -> bool:
        """Whether it is a type of elements or the storage of one."""
        if self.module == "torch.storage":
            return self.name in ("UntypedStorage", "TypedStorage")
        return self.module == "torch" and TYPES.fullmatch(self.name) is not None


class Storage(NamedTuple):
    kind: Global
    key: str
    elements: int
    is_view: bool = False  # whether a place for views follows, as in files from before torch 1.6


class Tensor(NamedTuple):
    storage: Storage
    first: int  # element of the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements
    dtype: Global | None = None  # where the storage has none

    @property
    def kind(self) -> Global:
        return self.dtype or self.storage.kind


class Damaged(ValueError):
    """The pickle is not one of tensors, and why."""


class Forbidden(ValueError):
    """The pickle asks to run something, and what."""


class Read(NamedTuple):
    """The value of a pickle: numbers, texts, tuples, lists, dictionaries, `Storage` and `Tensor`."""

    value: Any
    end: int  # offset of its end
    storages: dict[str, Storage]  # all storages that it names, by their keys


def read_pickle(content: bytes, start: int = 0) -> Read:
    """Return the value of the pickle that begins at `start`.

    Raises:
        Damaged: it is too large, or not whole.
        Forbidden: it names anything that is not in the tables.
    """
    machine = Machine(content, start)
    return Read(machine.run(), machine.at, machine.storages)


def forbidden(path, error: Forbidden) -> UserError:
    return UserError(f"{path} asks to run {shown(error)}, which no checkpoint needs; do not trust this file")


class Machine:
    """Reads one pickle; `INSTRUCTIONS` maps each instruction to a method."""

    own_instructions = {}  # instructions of a subclass, before those of `INSTRUCTIONS`

    def __init__(self, content: bytes, start: int):
        self.content, self.at = content, start
        self.stack, self.marks, self.memo, self.storages = [], [], {}, {}
        self.measures = {}  # id of a tuple, list or dictionary -> (leaves, depth); absent: (1, 1)
        self.placed = set()  # ids of lists and dictionaries inside of other values, which must not change any more

    def run(self):
        while True:
            code = self.take(1)
            if code == b".":
                break
            instruction = self.own_instructions.get(code) or INSTRUCTIONS.get(code)
            if instruction is None:
                known = pickletools.code2op.get(code.decode("latin-1"))
                raise Damaged(f"it holds {known.name if known else quoted(code)}, which torch.save does not write")
            instruction(self)
        if len(self.stack) != 1 or self.marks:
            raise Damaged(f"it ends with {len(self.stack)} values")
        return self.stack[0]

    # The stream

    def take(self, count: int) -> bytes:
        part = self.content[self.at : self.at + count]
        if len(part) < count:
            raise Damaged("it ends too early")
        self.at += count
        return part

    def number(self, kind: str):
        (value,) = STRUCTS[kind].unpack(self.take(STRUCTS[kind].size))
        return value

    def line(self) -> str:
        end = self.content.find(b"\n", self.at, self.at + MAX_NAME + 1)
        if end < 0:
            raise Damaged("a name in it has no end")
        encoded = self.take(end - self.at)
        self.at += 1
        return encoded.decode()

    # The stack

    def pop(self):
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Damaged("it takes a value where there is none")
        return self.stack.pop()

    def pop_to_mark(self) -> list:
        if not self.marks:
            raise Damaged("it goes back to a mark where there is none")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def top(self, kind: type):
        if len(self.stack) <= (self.marks[-1] if self.marks else 0) or type(self.stack[-1]) is not kind:
            raise Damaged(f"it adds to a {kind.__name__} where there is none")
        if id(self.stack[-1]) in self.placed:
            raise Damaged(f"it adds to a {kind.__name__} that another value holds")
        return self.stack[-1]

    # Values

    def grow(self, container, values):
        """Update the leaves and the depth of a container after values were added."""
        leaves, depth = self.measures.get(id(container), (1, 1))
        for value in values:
            if type(value) in (tuple, list, dict):
                if type(value) is not tuple:
                    self.placed.add(id(value))
                own, deep = self.measures.get(id(value), (1, 1))
                leaves, depth = leaves + own, max(depth, deep + 1)
            else:
                leaves += 1
        if id(container) in self.placed or leaves > len(self.content) or depth > MAX_DEPTH:
            raise Damaged("its values hold one another more often or deeper than tensors' do")
        self.measures[id(container)] = leaves, depth

    def push_new(self, container):
        self.measures.pop(id(container), None)  # of one that is gone
        self.placed.discard(id(container))
        self.stack.append(container)

    def push_tuple(self, values):
        made = tuple(values)
        if made:
            self.measures.pop(id(made), None)  # of one that is gone
            self.placed.discard(id(made))
            self.grow(made, made)
        self.stack.append(made)

    def add_items(self, flat: list):
        made = self.top(dict)
        if len(flat) % 2:
            raise Damaged("a key in it has no value")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if type(key) not in (str, int):
                raise Damaged(f"a key in it is a {type(key).__name__}")
            if key in made:
                raise Damaged(f"it holds the key {quoted(key)} twice")
            made[key] = value
        self.grow(made, flat)

    def add_elements(self, values: list):
        self.top(list).extend(values)
        self.grow(self.stack[-1], values)

    # Instructions

    def proto(self):
        if (version := self.number("<B")) != 2:
            raise Damaged(f"it has the protocol {version}, and torch.save writes 2")

    def put(self, index: int):
        if index > len(self.content):
            raise Damaged(f"memo index {index}")
        value = self.pop()
        self.stack.append(value)
        self.memo[index] = value

    def get(self, index: int):
        if index not in self.memo:
            raise Damaged(f"memo index {index}")
        self.stack.append(self.memo[index])

    def text(self):
        self.stack.append(self.take(self.number("<L")).decode())

    def long(self):
        size = self.number("<B")
        if size > 10:  # the number that the format from before torch 1.6 begins with
            raise Damaged(f"a number in it has {size} bytes")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def find_global(self):
        found = Global(self.line(), self.line())
        if not (found.is_type or found == ORDERED_DICT or found in REBUILD):
            raise Forbidden(f"{found.module}.{found.name}")
        self.stack.append(found)

    def find_storage(self):
        pid = self.pop()
        match pid:
            case ("storage", Global() as kind, str() as key, str(), int() as elements, *rest):
                storage = Storage(kind, key, elements, rest == [None])
                known = self.storages.setdefault(key, storage) == storage
                if type(pid) is tuple and rest in ([], [None]) and kind.is_type and known:
                    self.stack.append(storage)
                    return
        raise Damaged("it names a storage otherwise than torch.save does")

    def reduce(self):
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple or type(function) is not Global:
            raise Damaged("it calls what is no function")
        if function == ORDERED_DICT and not arguments:
            self.push_new({})
        elif function.name == "_rebuild_parameter" and tuple(map(type, arguments)) == (Tensor, bool, dict):
            self.stack.append(arguments[0])
        elif function in REBUILD and function.name != "_rebuild_parameter":
            self.stack.append(describe_tensor(arguments, function.name.endswith("v3")))
        else:
            raise Damaged(f"it calls {function.module}.{function.name} otherwise than torch.save does")

    def build(self):
        state = self.pop()
        if type(state) is not dict:  # `_metadata`, which modules leave at their state_dict
            raise Damaged("it sets the state of a value otherwise than torch.save does")
        self.top(dict)


def describe_tensor(arguments: tuple, with_type: bool) -> Tensor:
    match arguments:
        case (Storage() as storage, int() as first, tuple() as shape, tuple() as strides, bool(), dict(), *rest):
            numbers, dtype = (first, *shape, *strides), rest[0] if with_type and rest else None
            is_typed = type(dtype) is Global and dtype.is_type if with_type else True
            more = rest[with_type:]  # attributes of the tensor in Python
            is_plain = more in ([], [None]) or list(map(type, more)) == [dict]
            numbers_fit = all(type(one) is int for one in numbers) and len(shape) == len(strides) <= 32
            if is_typed and is_plain and numbers_fit:
                return Tensor(storage, first, shape, strides, dtype)
    raise Damaged("it describes a tensor otherwise than torch.save does")


# Everything that torch.save writes for a dictionary of tensors, numbers and texts
INSTRUCTIONS = {
    b"\x80": Machine.proto,
    b"(": lambda self: self.marks.append(len(self.stack)),
    b"q": lambda self: self.put(self.number("<B")),
    b"r": lambda self: self.put(self.number("<L")),
    b"h": lambda self: self.get(self.number("<B")),
    b"j": lambda self: self.get(self.number("<L")),
    b"N": lambda self: self.stack.append(None),
    b"\x88": lambda self: self.stack.append(True),
    b"\x89": lambda self: self.stack.append(False),
    b"J": lambda self: self.stack.append(self.number("<i")),
    b"K": lambda self: self.stack.append(self.number("<B")),
    b"M": lambda self: self.stack.append(self.number("<H")),
    b"\x8a": Machine.long,
    b"G": lambda self: self.stack.append(self.number(">d")),
    b"X": Machine.text,
    b")": lambda self: self.push_tuple([]),
    b"\x85": lambda self: self.push_tuple([self.pop()]),
    b"\x86": lambda self: self.push_tuple([self.pop(), self.pop()][::-1]),
    b"\x87": lambda self: self.push_tuple([self.pop(), self.pop(), self.pop()][::-1]),
    b"t": lambda self: self.push_tuple(self.pop_to_mark()),
    b"]": lambda self: self.push_new([]),
    b"a": lambda self: self.add_elements([self.pop()]),
    b"e": lambda self: self.add_elements(self.pop_to_mark()),
    b"}": lambda self: self.push_new({}),
    b"s": lambda self: self.add_items([self.pop(), self.pop()][::-1]),
    b"u": lambda self: self.add_items(self.pop_to_mark()),
    b"c": Machine.find_global,
    b"Q": Machine.find_storage,
    b"R": Machine.reduce,
    b"b": Machine.build,
}
