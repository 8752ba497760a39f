"""GGUF files that lie: each is refused in one sentence, without the time or memory that it asks for."""

import random
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from checkpoints import hf_model
from command_line import refuse
from gguf_files import write_gguf

from hf_llama3.conversion import inspect
from hf_llama3.conversion.formats.gguf.file import read_gguf
from hf_llama3.errors import UserError

TEXT, ARRAY, FLAG, U8, U32, F32 = 8, 9, 7, 0, 4, 6


def text(content):
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content)) + content


def pair(key, kind, content):
    return text(key) + struct.pack("<I", kind) + content


def entry(name="a", shape=(32,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def whole(pairs=(), entries=(), version=3, magic=b"GGUF", tensors=None, keys=None, data=4096):
    counts = struct.pack("<IQQ", version, *(len(x) if n is None else n for x, n in ((entries, tensors), (pairs, keys))))
    head = magic + counts + b"".join((*pairs, *entries))
    return head + bytes(-len(head) % 32) + bytes(data)


ATTACKS = {
    "empty": (b"", "it is empty; download it again"),
    "another format": (b"PK\3\4" + bytes(100), r"it begins with b'PK\\x03\\x04' and not b'GGUF'"),
    "a web page": (b"<!DOCTYPE html><html>", "it is a web page"),
    "of a large machine": (whole(version=3 << 24), "it is of a big-endian machine"),
    "an old version": (whole(version=1), r"its version must be one of \(2, 3\), got 1"),
    "cut": (whole(keys=1, data=0), "at byte 32 it wants 4 more, which is beyond the file"),
    "many keys": (whole(keys=2**40), "at most 16384 keys, got 1099511627776"),
    "many tensors": (whole(tensors=2**60), "at most 131072 tensors, got 1152921504606846976"),
    "a long name": (whole([text(b"k" * 70000)]), "the name at byte 32 must be at most 65535 bytes, got 70000"),
    "a name without end": (whole([struct.pack("<Q", 2**63)]), "must be at most 65535 bytes, got 9223372036854775808"),
    "a text without end": (whole([pair("a", TEXT, struct.pack("<Q", 2**63))]), "it wants 9223372036854775808 more"),
    "no text": (whole([pair("a", TEXT, text(b"\xff"))]), "the text at byte .* is not UTF-8"),
    "a type of metadata": (whole([pair("a", 13, bytes(8))]), "it holds a value of type 13"),
    "a list of lists": (whole([pair("a", ARRAY, struct.pack("<IQ", ARRAY, 2))]), "it holds a value of type 9"),
    "a list without end": (whole([pair("a", ARRAY, struct.pack("<IQ", U8, 2**62))]), "it wants 4611686018427387904"),
    "texts without end": (whole([pair("a", ARRAY, struct.pack("<IQ", TEXT, 2**62))]), "at most 2097152 texts"),
    "a flag": (whole([pair("a", FLAG, b"\2")]), "a flag must be 0 or 1, got 2"),
    "a key twice": (whole([pair("a", FLAG, b"\1")] * 2), "the key 'a' stands twice"),
    "no alignment": (
        whole([pair("general.alignment", U32, struct.pack("<I", 0))]),
        "`general.alignment` must be a power of two, got 0",
    ),
    "an odd alignment": (
        whole([pair("general.alignment", U32, struct.pack("<I", 24))]),
        "`general.alignment` must be a power of two, got 24",
    ),
    "a tensor twice": (whole(entries=[entry(), entry(offset=128)]), "the tensor 'a' stands twice"),
    "no dimensions": (whole(entries=[entry(shape=())]), "'a' must have 1 to 4 dimensions, got 0"),
    "many dimensions": (whole(entries=[entry(shape=(1,) * 5)]), "'a' must have 1 to 4 dimensions, got 5"),
    "a type of tensors": (whole(entries=[entry(kind=39)]), "'a' has the type 39; only f32, f16, bf16"),
    "no elements": (whole(entries=[entry(shape=(0, 4))]), r"'a' cannot have the shape \[4, 0\] with the type f32"),
    "a product that overflows": (whole(entries=[entry(shape=(2**39,) * 4)]), "'a' ends at byte .*, and the file has"),
    "half a block": (whole(entries=[entry(shape=(48, 2), kind=8)]), r"'a' cannot have the shape \[2, 48\] with the"),
    "beyond the file": (whole(entries=[entry(shape=(2048,))]), "'a' ends at byte 8256, and the file has 4160"),
    "one in another": (
        whole(entries=[entry("a"), entry("b", offset=64)]),
        "'b' must begin at byte 128 of the data, got 64",
    ),
    "a gap": (whole(entries=[entry("a"), entry("b", offset=256)]), "'b' must begin at byte 128 of the data, got 256"),
    "not aligned": (whole(entries=[entry("a"), entry("b", offset=132)]), "'b' must begin at byte 128 of the data"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_is_refused(name, tmp_path):
    content, sentence = ATTACKS[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match=sentence) as error:
        inspect(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(error.value) and str(path) in str(error.value) and peak < 2**22


def test_what_is_built_so_is_read_where_nothing_is_wrong(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(whole([pair("a", F32, struct.pack("<f", 1e-5))], [entry("a"), entry("b", (4, 8), offset=128)]))
    found = read_gguf(path)
    assert found.metadata == {"a": 1e-5} and found.tensors["b"].shape == (8, 4)
    assert found.tensors["b"].array.shape == (8, 4)


def test_a_header_that_is_too_large(tmp_path):
    """A hole in the file costs its writer nothing."""
    path = tmp_path / "model.gguf"
    path.write_bytes(whole([pair("a", ARRAY, struct.pack("<IQ", U8, 2**28))], data=0))
    with open(path, "r+b") as file:
        file.truncate(2**30)
    assert "beyond the 134217728 bytes that a header may have" in refuse("inspect", path)


def test_a_pipe_and_a_folder(tmp_path):
    (tmp_path / "model.gguf").mkdir()
    assert "neither a Hugging Face folder" in refuse("inspect", tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("lists", "sentence"),
    [
        ({"ggml.tokens": ["a", "b", "a"]}, "must hold each token once, got 'a' 2 times"),
        ({"ggml.token_type": [1]}, "`tokenizer.ggml.token_type` in .* must be 3 numbers"),
        ({"ggml.merges": ["ab"]}, "holds the merge 'ab', which is no pair of tokens"),
        ({"ggml.merges": ["a z"]}, "the tokenizer in .* is damaged"),
        ({"ggml.merges": 3}, "`tokenizer.ggml.merges` in .* must be a list of texts"),
        ({"ggml.bos_token_id": 3}, "the bos token in .* must be one of 3 tokens, got 3"),
        ({"ggml.tokens": ["a" * 8200, "b", "c"]}, "holds tokens that are too long"),
        ({"chat_template": "x" * (2**20 + 1)}, "the chat template 'default' in .* must be at most 1048576 characters"),
        ({"chat_templates": ["../x"]}, r"a chat template in .* must have a plain name, got '\.\./x'"),
        ({"ggml.model": "llama"}, "`tokenizer.ggml.scores` in .* must be 3 numbers"),
    ],
)
def test_a_tokenizer_that_lies(lists, sentence, tmp_path):
    good = {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.tokens": ["a", "b", "ab"], "ggml.merges": ["a b"]}
    write_gguf(tmp_path / "model.gguf", hf_model(), tokenizer=good | lists)
    with pytest.raises(UserError, match=sentence):
        inspect(tmp_path / "model.gguf")


def test_any_byte_of_the_head_changed(tmp_path):
    """It is read, or refused in a sentence: nothing else."""
    lists = {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.tokens": ["a", "b", "ab"], "ggml.merges": ["a b"]}
    write_gguf(tmp_path / "good.gguf", hf_model(), tokenizer=lists | {"ggml.token_type": [1, 1, 3]})
    good = (tmp_path / "good.gguf").read_bytes()
    head = gguf.GGUFReader(tmp_path / "good.gguf").data_offset
    generator, path, refused = random.Random(0), tmp_path / "model.gguf", 0
    for _ in range(300):
        content = bytearray(good)
        for _ in range(generator.choice([1, 1, 4])):
            content[generator.randrange(head)] = generator.choice([0, 1, 127, 128, 255, generator.randrange(256)])
        path.write_bytes(content)
        try:
            inspect(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 100 < refused < 300


def test_scales_that_are_no_numbers(tmp_path):
    """What a block makes of them is said by its numbers, not by a warning of numpy's."""
    write_gguf(tmp_path / "model.gguf", hf_model(), "Q8_0")
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    start = gguf.GGUFReader(tmp_path / "model.gguf").tensors[0].data_offset
    content[start : start + 2] = np.array([np.inf], np.float16).tobytes()
    (tmp_path / "model.gguf").write_bytes(content)
    assert not np.isfinite(read_gguf(tmp_path / "model.gguf").tensors["token_embd.weight"].array[0:1].view("<f4")).all()
