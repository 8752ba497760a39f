"""What is said of each thing that is wrong with a file of torch's: in its pickle, in the zip, in the older format."""

import io
import pickle
import struct

import pytest
import torch
from test_archives import PICKLES, PROTO, STOP, again, entries, holding, sound, tensor, text  # noqa: F401
from test_dcp import NAME, change, first, folder  # noqa: F401

from hf_llama3.conversion import inspect
from hf_llama3.conversion.formats.pth import read_pth
from hf_llama3.conversion.formats.unpickle import Damaged, read_pickle
from hf_llama3.errors import UserError

OTHERWISE = "otherwise than torch.save does"
STORAGE = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu")
SAID = {
    "value that grows": "its values hold one another more often or deeper than tensors' do",
    "empty sets": "it holds EMPTY_SET, which torch.save does not write",
    "number of 88 bits": "a number in it has 11 bytes",
    "state that is a text": f"it sets the state of a value {OTHERWISE}",
    "state of nothing": "it adds to a dict where there is none",
    "call of a text": "it calls what is no function",
    "call of a type": f"it calls torch.FloatStorage {OTHERWISE}",
    "tensor of nothing": f"it describes a tensor {OTHERWISE}",
    "key twice": "it holds the key 'w' twice",
    "key without a value": "a key in it has no value",
    "key that is a tensor": "a key in it is a Tensor",
    "name without an end": "a name in it has no end",
    "memo of what is not there": "memo index 7",
    "mark in a pair": "it takes a value where there is none",
    "too early": "it ends too early",
    "two values": "it ends with 2 values",
    "another protocol": "it has the protocol 5, and torch.save writes 2",
}
MORE = {
    "no instruction": (PROTO + b"\xff", r"it holds b'\xff', which torch.save does not write"),
    "no mark": (PROTO + b"}u" + STOP, "it goes back to a mark where there is none"),
    "added to what another holds": (
        PROTO + b"}q\x00]h\x00ah\x00" + text(b"w") + b"Ns" + STOP,
        "it adds to a dict that another value holds",
    ),
    "a storage of one thing less": (holding(tensor(pid=STORAGE + b"t")), f"it names a storage {OTHERWISE}"),
    "a storage that is a text": (holding(tensor(pid=text(b"0"))), f"it names a storage {OTHERWISE}"),
}


@pytest.mark.parametrize("case", [*SAID, *MORE])
def test_of_a_pickle(case):
    content, sentence = MORE[case] if case in MORE else (PICKLES[case], SAID[case])
    with pytest.raises(Damaged) as info:
        read_pickle(content)
    assert str(info.value) == sentence


# The zip


def put(kind, value, entry=None, own=None, end=None):
    """Write a number at an offset of an entry of the directory, of a member's own header, or of the end."""

    def change_zip(content, places):
        for start, offset in ((places[0], entry), (places[1], own), (len(content) - 22, end)):
            if offset is not None:
                struct.pack_into(kind, content, start + offset, value)

    return change_zip


def extra_field(content, places):
    """Make the end of a name in the directory a field that says to be longer than it is."""
    length = struct.unpack_from("<H", content, places[0] + 28)[0]
    struct.pack_into("<2H", content, places[0] + 28, length - 4, 4)
    struct.pack_into("<2H", content, places[0] + 46 + length - 4, 7, 999)


ZIPS = {
    "two bytes": (lambda content, places: content.__delitem__(slice(2, None)), "it is no zip file"),
    "something behind it": (lambda content, places: content.extend(b"x"), "it does not end as a zip file does"),
    "disks": (put("<H", 1, end=4), "it is divided among several disks, of which this is 1"),
    "a directory elsewhere": (put("<L", 7, end=16), "its directory is not where it says"),
    "an entry that is none": (put("<L", 0, entry=0), "an entry of its directory is none"),
    "encrypted": (
        put("<H", 1, entry=8, own=6),
        "'x/.data/serialization_id' is encrypted or of another kind, flags 0x1",
    ),
    "a name with an end in it": (put("<B", 0, entry=46, own=30), r"a member is called '\x00/.data/serialization_id'"),
    "a folder": (put("<L", 0x10, entry=38), "'x/.data/serialization_id' lies on another disk, or is a folder"),
    "beyond the file": (put("<L", 2**31, entry=42), "'x/.data/serialization_id' begins beyond the file"),
    "a name beyond the file": (
        put("<H", 60000, own=26),
        "'x/.data/serialization_id' reaches beyond the file's members",
    ),
    "an extra field": (extra_field, "an extra field is too long, or stands twice"),
    "one entry less": (put("<H", 1, end=8), "its directory is not where it says"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_of_a_zip(case, sound):  # noqa: F811
    again(sound)
    content = bytearray(sound.read_bytes())
    edit, sentence = ZIPS[case]
    edit(content, entries(content)[-1])
    sound.write_bytes(content)
    with pytest.raises(UserError) as info:
        read_pth(sound)
    assert str(info.value) == f"{sound} is not a readable PyTorch checkpoint ({sentence}); download it again"


def test_of_a_directory_with_more_than_its_members(sound):  # noqa: F811
    again(sound)
    content = bytearray(sound.read_bytes())
    count, _, length, _ = struct.unpack_from("<2H2L", content, len(content) - 14)
    for offset in (8, 10):
        struct.pack_into("<H", content, len(content) - 22 + offset, count - 1)
    sound.write_bytes(content)
    with pytest.raises(UserError, match=rf"its directory must have \d+ bytes for {count - 1} members, got {length}"):
        read_pth(sound)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("version", b"99\n", r"must be of a version from \d+ to \d+ of PyTorch's format, got b'99\\n'; save it again"),
        ("byteorder", b"big", "must be little-endian, got byte order b'big'; save it again on this machine"),
        (".format_version", b"\xff", r"\.format_version in .* must be a text; download it again"),
    ],
)
def test_of_what_a_file_says_of_itself(name, content, sentence, sound):  # noqa: F811
    again(sound, lambda member, old: [(member, content if member.removeprefix("x/") == name else old)])
    with pytest.raises(UserError, match=sentence):
        read_pth(sound)


def test_of_a_storage_of_the_older_format_in_a_zip(sound):  # noqa: F811
    older = holding(tensor(pid=STORAGE + b"K\x04Nt"))
    again(sound, lambda member, old: [(member, older if member == "x/data.pkl" else old)])
    with pytest.raises(UserError, match="the storage '0' is named as in files without a zip"):
        read_pth(sound)


# The older format


def unzipped(change_parts):
    made = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, made, _use_new_zipfile_serialization=False)
    made.seek(0)
    parts = []
    for _ in range(3):
        parts.append(pickle.load(made))
    rest = made.read()
    change_parts(parts)
    return b"".join(pickle.dumps(part, protocol=2) for part in parts) + rest


@pytest.mark.parametrize(
    ("change_parts", "sentence"),
    [
        (
            lambda parts: parts.__setitem__(0, 7),
            "is a pickle, but none of torch.save's; save the model's state_dict by",
        ),
        (lambda parts: parts.__setitem__(1, 7), "must be of version 1001 of its format, got 7; save it again"),
        (lambda parts: parts[2].update(little_endian=False), "must be little-endian; save it again on this machine"),
        (lambda parts: parts.__setitem__(2, 7), "must be little-endian; save it again on this machine"),
    ],
)
def test_of_the_older_format(change_parts, sentence, tmp_path):
    (tmp_path / "x.pth").write_bytes(unzipped(change_parts))
    with pytest.raises(UserError, match=sentence):
        read_pth(tmp_path / "x.pth")


def test_of_a_storage_that_is_another(tmp_path):
    content = unzipped(lambda parts: None)
    path = tmp_path / "x.pth"
    path.write_bytes(content[:-24] + struct.pack("<Q", 5) + content[-16:])
    with pytest.raises(UserError, match=r"the storage '\d+' of .* is damaged or of an unknown type; save it again"):
        read_pth(path)
    path.write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"x.pth is truncated at \d+ bytes; download it again"):
        read_pth(path)


# Distributed checkpoints


def size(value):
    return lambda metadata: setattr(metadata.state_dict_metadata[NAME], "size", value)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (size(torch.Size([-1, 4])), r"a shape in it is \(-1, 4\)"),
        (size([4, 4]), "a shape in it is none"),
        (size(torch.Size([1] * 99)), "a shape in it is none"),
        (size(torch.Size([4])), "'.*' is described otherwise than torch does"),
        (lambda metadata: setattr(first(metadata), "offset", -1), r"a piece lies at \('__0_0.distcp', -1, \d+\)"),
    ],
)
def test_of_a_list_of_tensors(edit, sentence, folder):  # noqa: F811
    change(folder, edit)
    with pytest.raises(
        UserError, match=rf"metadata is no readable list of tensors \(.*{sentence}.*; save the model again"
    ):
        inspect(folder)
