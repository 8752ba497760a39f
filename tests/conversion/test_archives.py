"""A `.pth` as an attacker writes it: bounded in time and memory, one sentence, and never read in one way of two."""

import pickle
import pickletools
import struct
import zipfile
from pathlib import Path

import pytest
import torch._weights_only_unpickler

from hf_llama3.conversion.formats.pth import read_pth
from hf_llama3.conversion.formats.unpickle import INSTRUCTIONS, Damaged, Forbidden, read_pickle
from hf_llama3.errors import UserError

PROTO, STOP = b"\x80\x02", b"."


def twice(times, first=b"N"):
    """A tuple of a tuple of ... twice each time: 2**times leaves in a few bytes."""
    return first + b"".join(b"q%ch%c\x86" % (index, index) for index in range(times))


def text(value):
    return b"X" + struct.pack("<L", len(value)) + value


def tensor(first=b"K\x00", shape=b"K\x04\x85", strides=b"K\x01\x85", pid=None):
    pid = pid or b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\x04t"
    ordered = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"Q" + first + shape + strides + b"\x89" + ordered + b"tR"


def holding(value, key=None):
    return PROTO + b"}" + (text(b"w") if key is None else key) + value + b"s" + STOP


LONG = b"\x8b" + struct.pack("<L", 7500) + b"\x7f" * 7500
PICKLES = {
    "value that grows": holding(twice(60)),
    "key that grows": holding(b"N", twice(60)),
    "shape that grows": holding(tensor(shape=twice(60))),
    "strides that grow": holding(tensor(strides=twice(60))),
    "persistent id that grows": holding(tensor(pid=twice(60))),
    "dictionaries that grow": holding(
        b"}" + b"".join(b"q%c}K\x00h%csK\x01h%cs" % (i, i, i) for i in range(60)),
    ),
    "lists that grow": PROTO + b"]" + b"".join(b"q%c]h%cah%ca" % (i, i, i) for i in range(60)) + STOP,
    "list that holds itself": PROTO + b"]q\x00h\x00a" + STOP,
    "dictionary that holds itself": PROTO + b"}q\x00K\x00h\x00s" + STOP,
    "cycle of two": PROTO + b"]q\x00]q\x01h\x00ah\x01a" + STOP,
    "deep tuples": holding(b"N" + b"\x85" * 10**6),
    "deep lists": holding(b"]" * 10**6 + b"a" * (10**6 - 1)),
    "marks": holding(b"(" * 10**6),
    "empty sets": PROTO + b"\x8f" * 10**6 + STOP,
    "nothing, taken away": PROTO + b"N0" * 10**6 + b"}" + STOP,
    "number of 60,000 bits": holding(tensor(shape=LONG + b"\x85")),
    "number of 88 bits": holding(tensor(first=b"\x8a\x0b" + b"\x7f" * 11)),
    "state that is a text": holding(b"ccollections\nOrderedDict\n)R" + text(b"x") + b"b"),
    "state of nothing": holding(b"N}b"),
    "call of a text": holding(text(b"x") + b")R"),
    "call of a type": holding(b"ctorch\nFloatStorage\n)R"),
    "arguments of OrderedDict": holding(b"ccollections\nOrderedDict\nN\x85R"),
    "tensor of too little": holding(b"ctorch._utils\n_rebuild_tensor_v2\n)R"),
    "tensor of nothing": holding(b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR"),
    "parameter of nothing": holding(b"ctorch._utils\n_rebuild_parameter\n)R"),
    "many dimensions": holding(tensor(shape=b"(" + b"K\x01" * 99 + b"t", strides=b"(" + b"K\x01" * 99 + b"t")),
    "key twice": PROTO + b"}(" + (text(b"w") + b"N") * 2 + b"u" + STOP,
    "key without a value": PROTO + b"}(" + text(b"w") + b"u" + STOP,
    "key that is a tensor": holding(b"N", tensor()),
    "added to what is no list": PROTO + b"}Na" + STOP,
    "text beyond the end": holding(b"X\xff\xff\xff\x7fabc"),
    "text that is no UTF-8": holding(text(b"\xff")),
    "name without an end": PROTO + b"c" + b"x" * 10**5,
    "memo of what is not there": holding(b"h\x07"),
    "mark in a pair": PROTO + b"}(" + text(b"w") + b"s" + STOP,
    "too early": PROTO + b"}",
    "two values": PROTO + b"}}" + STOP,
    "nothing": b"",
    "another protocol": b"\x80\x05}.",
    "call of NEWOBJ": holding(b"ccollections\nOrderedDict\n)\x81"),
}
FORBIDDEN = ("posix system", "builtins eval", "torch load", "torch._utils _rebuild_sparse_tensor", "torch Tensor")
FORBIDDEN += ("torch.storage _load_from_bytes", "torch os.system", "torch ", "torch _x_", "__main__ x")


@pytest.mark.parametrize("case", PICKLES)
def test_pickles(case, tmp_path):
    """Each is refused before it is walked: in bounded time, which the test's own would tell."""
    with pytest.raises((Damaged, UnicodeDecodeError)):
        read_pickle(PICKLES[case])
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", PICKLES[case])
        archive.writestr("x/data/0", bytes(16))
    with pytest.raises(UserError, match=r"is damaged|must be at most") as info:
        read_pth(tmp_path / "x.pth")
    assert len(str(info.value)) < 1000


@pytest.mark.parametrize("name", FORBIDDEN)
def test_names_that_are_not_in_the_table(name):
    module, _, name = name.partition(" ")
    with pytest.raises(Forbidden, match=f"{module}.{name}"):
        read_pickle(PROTO + f"c{module}\n{name}\n.".encode())


def test_what_torch_writes_beside_tensors():
    """Numbers, texts and what holds them, as trainers leave them: read, though no checkpoint of ours."""
    value = {
        "epoch": 3,
        "rate": 0.5,
        "big": 2**40,
        "names": ["a", "b"],
        "nested": {"x": (1, None, True, -70000)},
        "e": [],
    }
    assert read_pickle(pickle.dumps(value, protocol=2)).value == value


def test_instructions_are_some_of_those_that_torch_reads():
    """Of those that torch's own loader without code takes: `torch/_weights_only_unpickler.py`."""
    source = Path(torch._weights_only_unpickler.__file__).read_text("utf-8")
    for code in INSTRUCTIONS:
        assert f"{pickletools.code2op[code.decode('latin-1')].name}[0]" in source.replace("MARK,", "MARK[0],"), code


# The zip


@pytest.fixture
def sound(tmp_path):
    torch.save({"w": torch.arange(4.0), "v": torch.arange(6.0)}, tmp_path / "x.pth")
    assert read_pth(tmp_path / "x.pth").keys() == {"w", "v"}
    return tmp_path / "x.pth"


def again(path, change=lambda name, content: [(name, content)], method=zipfile.ZIP_STORED):
    """Write a zip again, each member as `change` makes it."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for pair in members:
            for name, content in change(*pair):
                archive.writestr(name, content)


def double(name, content):
    return [(name, content), (name, content[::-1])] if name.endswith(("data.pkl", "data/0")) else [(name, content)]


def refused(path, message):
    with pytest.raises(UserError, match=message) as info:
        read_pth(path)
    assert "\n" not in str(info.value)


def entries(content):
    """Where the directory's entries and the members' own headers begin."""
    at, found = 0, []
    while (at := content.find(b"PK\x01\x02", at)) >= 0:
        found.append((at, struct.unpack_from("<L", content, at + 42)[0]))
        at += 46
    return found


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice(sound):
    again(sound, double)
    refused(sound, "holds 'x/data.pkl' twice")


# Offset from the entry in the directory or from the member's own header, the format, what is written, the sentence
HEADERS = {
    "encrypted": ("both", (8, 6), "<H", 1, "encrypted"),
    "encrypted in the directory": ("entry", 8, "<H", 1, "encrypted"),
    "encrypted in its own header": ("own", 6, "<H", 1, "contradicts"),
    "method in its own header": ("own", 8, "<H", 8, "contradicts"),
    "another method": ("both", (10, 8), "<H", 12, "by the method 12"),
    "no header": ("own", 0, "<L", 0, "no header of its own"),
    "name": ("own", 30, "<B", ord("y"), "contradicts"),
    "size in the directory": ("entry", 24, "<L", 3, "bytes in"),
    "sizes in the directory": ("entry", (20, 24), "<L", 3, "contradicts"),
    "sizes into the next member": ("entry", (20, 24), "<L", 3000, "contradicts|reaches beyond"),
    "place": ("entry", 42, "<L", 1, "no header of its own"),
    "place beyond the file": ("entry", 42, "<L", 2**31, "begins beyond"),
    "length of its name": ("entry", 28, "<H", 60000, "not a readable"),
    "length of its extra field": ("own", 28, "<H", 60000, "reaches beyond|contradicts|too long"),
}


@pytest.mark.parametrize("member", [0, -3])
@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_contradict_each_other(case, member, sound):
    again(sound)
    where, offsets, kind, value, message = HEADERS[case]
    content = bytearray(sound.read_bytes())
    entry, own = entries(content)[member]
    offsets = offsets if isinstance(offsets, tuple) else (offsets,)
    starts = (entry, own) if where == "both" else [entry if where == "entry" else own] * len(offsets)
    for start, offset in zip(starts, offsets, strict=True):
        struct.pack_into(kind, content, start + offset, value)
    sound.write_bytes(content)
    refused(sound, message)


def test_two_members_in_one_place(sound):
    again(sound)
    content = bytearray(sound.read_bytes())
    (first, _), (_, other) = entries(content)[1:3]
    struct.pack_into("<L", content, first + 42, other)
    sound.write_bytes(content)
    refused(sound, "contradicts the directory|lies in another member's place")


@pytest.mark.parametrize("change", [lambda b: b + b"x", lambda b: b"x" + b, lambda b: b + b[-22:]])
def test_what_is_put_around_it(change, sound):
    sound.write_bytes(change(sound.read_bytes()))
    refused(sound, "not a readable PyTorch checkpoint")


@pytest.mark.parametrize("name", ["byteorder", "data.pkl", "data/0", "version", "other"])
def test_bombs(name, sound):
    """300 MB in 300 kB: of nothing that is packed more than a megabyte is taken out."""
    with zipfile.ZipFile(sound, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        folder = archive.namelist()[0].split("/")[0]
        other = folder if f"{folder}/{name}" not in archive.namelist() else "y"
        with archive.open(f"{other}/{name}", "w", force_zip64=True) as member:
            for _ in range(30):
                member.write(bytes(10 * 2**20))
    if name in ("other", "data/0"):
        refused(sound, "must be at most 1024 bytes|must hold nothing outside of")
    elif name == "data.pkl":
        refused(sound, "must hold one pickle of tensors, got 2")
    with zipfile.ZipFile(sound, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("x/data.pkl", holding(tensor()))
        if name != "data.pkl":
            archive.writestr(f"x/{name}", bytes(300 * 2**20))
    if name == "byteorder":
        refused(sound, r"x/byteorder in .* must be at most 1024 bytes, got 314572800")


def test_a_member_whose_size_is_a_lie(sound):
    """It says 100 bytes and would unpack to a megabyte."""
    with zipfile.ZipFile(sound, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(2**20))
    content = bytearray(sound.read_bytes())
    entry, own = entries(content)[0]
    for at in (entry + 24, own + 22):
        struct.pack_into("<L", content, at, 100)
    sound.write_bytes(content)
    refused(sound, "is not what it was")


def test_a_pickle_whose_sum_is_another(sound):
    again(sound)
    content = bytearray(sound.read_bytes())
    at = content.index(b"data.pkl") + 20
    content[at] ^= 1
    sound.write_bytes(content)
    refused(sound, "is not what it was")
