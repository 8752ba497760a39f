"""Valid files with one thing changed, given to their readers: `python fuzz_files.py EXAMPLES [SEED [READER ...]]`.

Each example follows from its number alone, so that one that fails is made again by `fuzz_files.py 1 NUMBER READER`.
Runs in a process that may take 5 seconds for a file and 300 MB more than it began with: whatever a file holds, the
answer is a value or a sentence. What is accepted of torch's and safetensors' files, their own loaders accept as well,
with the same tensors. Prints the number of examples, and how many were accepted.
"""

import io
import json
import pickletools
import random
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint
from checkpoints import meta_tensors, params, small_tokenizer
from fuzz_json import RAW, answer, changed, limit_memory, places, written
from safetensors import safe_open
from safetensors.torch import save

from hf_llama3.conversion.formats.dcp.reading import read_dcp
from hf_llama3.conversion.formats.gguf.layout import GgufLayout
from hf_llama3.conversion.formats.gguf.opening import open_gguf
from hf_llama3.conversion.formats.pth import read_pth
from hf_llama3.conversion.formats.safetensors import read_safetensors
from hf_llama3.conversion.formats.storage import BY_NAME
from hf_llama3.conversion.tokenizer.bounds import read_tokenizer_file
from hf_llama3.conversion.tokenizer.bpe import (
    build_tokenizer,
    find_hf_tokenizer,
    meta_tokenizer_file,
    read_ranks,
    read_tokenizer_json,
)

TENSORS = {name: tensor for name, tensor in meta_tensors(params(dim=16, layers=1, vocab=32), ffn=32).items()}
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63,
)
NUMBERS += (2**63 - 1, 2**64 - 1)
JUNK = (None, True, False, "", "x", "1", [], {}, [[]], [1], {"a": 1}, 0.5, -0.5, 1e300, 1e-300, "\x1b[0m\n", "x" * 5000)
JUNK += tuple({"RAW": name} for name, raw in RAW.items() if len(raw) < 100_000)


def change_bytes(content: bytes, dice: random.Random) -> bytes:
    """Change, remove, repeat or put in a few bytes anywhere."""
    at, count = dice.randrange(len(content) + 1), dice.choice((1, 1, 1, 2, 4, 8, 64))
    part = content[at : at + count]
    new = dice.choice((dice.randbytes(count), b"\0" * count, b"\xff" * count, b"", part * 2, part[::-1]))
    return content[:at] + new + content[at + dice.choice((0, count)) :]


def change_number(content: bytes, at: int, size: int, dice: random.Random) -> bytes:
    """Put another number in place of a little-endian one."""
    old = int.from_bytes(content[at : at + size], "little")
    new = dice.choice((*NUMBERS, old + 1, old - 1, old * 2, old // 2, len(content), len(content) - 1))
    return content[:at] + (new % 256**size).to_bytes(size, "little") + content[at + size :]


# Pickles

OPS = [bytes([code]) for code in b"()]}NQRbqrhjtueas0123.lL\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8e\x90\x92\x93\x94\x95C"]
PUT_IN = (
    *OPS,
    b"\x80\x02",
    b"\x80\x05",
    b"cposix\nsystem\n",
    b"cbuiltins\neval\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch\nload\n",
    b"ctorch.storage\n_load_from_bytes\n",
    b"X\x03\x00\x00\x00abc",
    b"X\xff\xff\xff\x7fabc",
    b"X\x02\x00\x00\x00\xed\xa0",
    b"J\xff\xff\xff\xff",
    b"J\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"\x8a\xff" + b"\x7f" * 255,
    b"G\x7f\xf0" + bytes(6),
    b"h\x00",
    b"h\x01",
    b"r\xff\xff\xff\xff",
    b"0" * 1000,
    b"(" * 1000,
    b")" * 1000,
    b"]" * 1000 + b"a" * 999,
    b"}2" * 500,
    b"N" * 20000,
    b"K\x012\x86" * 40,
    b"2\x86" * 64,
    b"(" * 40 + b"t" * 40,
)


def pickle_parts(content: bytes) -> list[bytes]:
    """Divide a pickle into its instructions."""
    starts = [at for _, _, at in pickletools.genops(content)]
    return [content[start:end] for start, end in zip(starts, [*starts[1:], len(content)], strict=True)]


def change_pickle(parts: list[bytes], dice: random.Random) -> bytes:
    """Remove, repeat, exchange or put in an instruction, or change an argument."""
    parts, at = list(parts), dice.randrange(len(parts))
    match dice.randrange(6):
        case 0:
            del parts[at]
        case 1:
            parts.insert(at, parts[at])
        case 2:
            other = dice.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        case 3:
            parts.insert(at, dice.choice(PUT_IN))
        case 4:
            parts[at] = dice.choice(PUT_IN)
        case 5:
            parts[at] = parts[at][:1] + change_bytes(parts[at][1:], dice)
    return b"".join(parts)


def zip_of(pickled: bytes) -> bytes:
    """Put another pickle into a file of torch's."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)
    return made.getvalue()


def save_by_torch(**options) -> bytes:
    made = io.BytesIO()
    torch.save(TENSORS, made, **options)
    return made.getvalue()


def members_of(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def make_pickle(dice: random.Random) -> bytes:
    return zip_of(change_pickle(PICKLE, dice))


def make_unzipped(dice: random.Random) -> bytes:
    at = dice.randrange(5)
    ends = [*UNZIPPED_ENDS]
    start = ends[at - 1] if at else 0
    if dice.randrange(4) == 0:
        return change_bytes(UNZIPPED, dice)
    return UNZIPPED[:start] + change_pickle(pickle_parts(UNZIPPED[start : ends[at]]), dice) + UNZIPPED[ends[at] :]


def make_zip(dice: random.Random) -> bytes:
    """Change a field of a header or of the directory, a member's name, or add a member."""
    match dice.randrange(4):
        case 0:
            signature = dice.choice((b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"))
            found = [at for at in range(len(ZIP)) if ZIP.startswith(signature, at)]
            at = dice.choice(found) + dice.randrange(4, 56)
            return change_number(ZIP, at, dice.choice((1, 2, 4, 8)), dice)
        case 1:
            return change_bytes(ZIP, dice)
        case 2:
            old = dice.choice(list(MEMBERS)).encode()
            return ZIP.replace(old, change_bytes(old, dice), dice.choice((1, 2)))
    made = io.BytesIO(ZIP)
    with zipfile.ZipFile(made, "a", dice.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        name = dice.choice(
            (*MEMBERS, "archive/data/99", "archive/../x", "archive/byteorder", "x", "archive/x/data.pkl")
        )
        archive.writestr(name, dice.choice((b"", b"big", b"little", bytes(10**6), MEMBERS["archive/data/0"])))
    return made.getvalue()


def read_as_torch(path: Path):
    """Read a file of torch's; what is accepted, torch's own loader reads in the same way."""
    ours = read_pth(path)
    try:  # the device that a storage was on is not looked at, as in torch where all goes to the CPU
        options = {"weights_only": True, "map_location": "cpu", "mmap": path.name != "unzipped.pth"}
        theirs = torch.load(path, **options)
    except Exception as error:
        raise AssertionError(f"torch refuses what is accepted: {error}") from error
    nested = next((theirs[key] for key in ("model", "state_dict", "module") if type(theirs.get(key)) is dict), theirs)
    assert ours.keys() == nested.keys(), (ours.keys(), nested.keys())
    for name, tensor in ours.items():
        their = nested[name].detach()
        assert tensor.shape == tuple(their.shape) and str(their.dtype) == f"torch.{tensor.dtype.name}", name
        bits = their.contiguous().view(SIGNED[tensor.dtype.itemsize]).numpy().view(tensor.array.dtype)
        assert np.array_equal(tensor.array, bits), name


SIGNED = {8: torch.int64, 4: torch.int32, 2: torch.int16}

# Safetensors


def make_safetensors(dice: random.Random) -> bytes:
    content = save(TENSORS)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    match dice.randrange(5):
        case 0:
            return change_bytes(content, dice)
        case 1:
            return change_number(content, 0, 8, dice)
        case 2:
            encoded = change_bytes(content[8 : 8 + length], dice)
        case _:
            encoded = change_json(header, dice)
    return len(encoded).to_bytes(8, "little") + encoded + data


def change_json(document, dice: random.Random) -> bytes:
    how = dice.choice(("replace", "replace", "replace", "remove", "rename", "twice"))
    value = dice.choice((*JUNK, *NUMBERS, *(-number for number in NUMBERS)))
    return written(changed(document, dice.choice(places(document)), how, value))


def read_as_safetensors(path: Path):
    ours = read_safetensors(path)
    try:
        with safe_open(path, framework="np") as file:
            theirs = {name: file.get_slice(name) for name in list(file.keys())}
    except Exception as error:
        raise AssertionError(f"safetensors refuses what is accepted: {error}") from error
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (list(tensor.shape), tensor.dtype.safetensors) == (theirs[name].get_shape(), theirs[name].get_dtype())


# Tokenizers


def make_tokenizer(dice: random.Random) -> bytes:
    return change_bytes(TOKENIZER_JSON, dice) if dice.randrange(4) == 0 else change_json(TOKENIZER, dice)


def use_tokenizer(path: Path):
    find_hf_tokenizer(path.parent)
    read_tokenizer_file(path)
    tokenizer = read_tokenizer_json(path.read_bytes(), path)
    try:
        meta_tokenizer_file(path)
    finally:
        len(tokenizer.get_vocab())


def make_ranks(dice: random.Random) -> bytes:
    lines = RANKS.splitlines(keepends=True)
    at = dice.randrange(len(lines))
    lines[at] = dice.choice((change_bytes(lines[at], dice), b"", lines[at] * 2, lines[at - 1], b"YQ== " + b"9" * 5000))
    return b"".join(lines)


# Distributed checkpoints and GGUF


def make_dcp(dice: random.Random) -> bytes:
    return change_pickle(DCP_PARTS, dice) if dice.randrange(5) else change_bytes(DCP, dice)


def read_folder_of_dcp(path: Path):
    for tensor in read_dcp(path.parent, []).values():
        assert tensor.nbytes < 10**6


def make_gguf(dice: random.Random) -> bytes:
    if dice.randrange(2):
        return change_bytes(GGUF, dice)
    found = [at for at in range(GGUF_HEAD) if GGUF[at] < 16]
    return change_number(GGUF, dice.choice(found), dice.choice((4, 8)), dice)


def gguf_file() -> tuple[bytes, int]:
    facts = {"general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64}
    facts |= {"llama.embedding_length": 16, "llama.feed_forward_length": 32, "llama.attention.head_count": 8}
    facts |= {"llama.attention.head_count_kv": 4, "llama.attention.layer_norm_rms_epsilon": 1e-5}
    facts |= {"llama.rope.freq_base": 5e5, "llama.vocab_size": 32, "tokenizer.ggml.model": "gpt2"}
    facts |= {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [chr(97 + i) for i in range(26)] + ["ab", *"12345"],
    }
    facts |= {"tokenizer.ggml.token_type": np.ones(32, "i4"), "tokenizer.ggml.merges": ["a b"]}
    facts |= {"tokenizer.ggml.bos_token_id": 30, "tokenizer.ggml.eos_token_id": 31}
    names = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
    layers = {
        "attention.wq": "attn_q",
        "attention.wk": "attn_k",
        "attention.wv": "attn_v",
        "attention.wo": "attn_output",
    }
    layers |= {"feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up"}
    layers |= {"attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}
    names |= {f"layers.0.{meta}": f"blk.0.{theirs}" for meta, theirs in layers.items()}
    tensors = {f"{names[name.removesuffix('.weight')]}.weight": tensor.float() for name, tensor in TENSORS.items()}
    layout = GgufLayout(facts, [(name, BY_NAME["float32"], tuple(t.shape)) for name, t in tensors.items()])
    content = bytearray(layout.size)
    for offset, tensor in zip(layout.offsets, tensors.values(), strict=True):
        content[offset : offset + tensor.nbytes] = tensor.numpy().tobytes()
    for offset, piece in layout.fixed([]):
        content[offset : offset + len(piece)] = piece
    return bytes(content), layout.offsets[0]


ZIP = save_by_torch()
MEMBERS = members_of(ZIP)
PICKLE = pickle_parts(MEMBERS["archive/data.pkl"])
UNZIPPED = save_by_torch(_use_new_zipfile_serialization=False)
UNZIPPED_ENDS = []
while len(UNZIPPED_ENDS) < 5:
    start = UNZIPPED_ENDS[-1] if UNZIPPED_ENDS else 0
    UNZIPPED_ENDS.append(start + [at for _, _, at in pickletools.genops(UNZIPPED[start:])][-1] + 1)
with tempfile.TemporaryDirectory() as made:
    RANKS = small_tokenizer(made).read_bytes()
    TOKENIZER_JSON = (
        build_tokenizer(
            read_ranks(small_tokenizer(made)), ["<|begin_of_text|>", "<|end_of_text|>"], "<|begin_of_text|>"
        )
        .to_str()
        .encode()
    )
    torch.distributed.checkpoint.save(dict(TENSORS), checkpoint_id=made, no_dist=True)
    DCP = (Path(made) / ".metadata").read_bytes()
    DCP_PIECES = (Path(made) / "__0_0.distcp").read_bytes()
TOKENIZER, DCP_PARTS = json.loads(TOKENIZER_JSON), pickle_parts(DCP)
GGUF, GGUF_HEAD = gguf_file()

READERS = {  # name -> (file, what is valid, what changes it, who reads it)
    "pickle": ("model.pth", ZIP, make_pickle, read_as_torch),
    "unzipped": ("unzipped.pth", UNZIPPED, make_unzipped, read_as_torch),
    "zip": ("model.pth", ZIP, make_zip, read_as_torch),
    "safetensors": ("model.safetensors", save(TENSORS), make_safetensors, read_as_safetensors),
    "tokenizer.json": ("tokenizer.json", TOKENIZER_JSON, make_tokenizer, use_tokenizer),
    "tokenizer.model": ("tokenizer.model", RANKS, make_ranks, read_ranks),
    "dcp": (".metadata", DCP, make_dcp, read_folder_of_dcp),
    "gguf": ("model.gguf", GGUF, make_gguf, lambda path: open_gguf(path, None, None)),
}


def fuzz(name: str, first: int, examples: int) -> int:
    """Read examples of consecutive numbers; returns how many were accepted."""
    file, valid, make, read = READERS[name]
    accepted = 0

    def read_and_count(path):
        nonlocal accepted
        read(path)
        accepted += 1

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file
        (Path(folder) / "__0_0.distcp").write_bytes(DCP_PIECES)
        path.write_bytes(valid)
        read(path)  # what is valid is read
        for number in range(first, first + examples):
            path.write_bytes(make(random.Random(f"{name} {number}")))
            try:
                answer(read_and_count, path)
            except BaseException:
                print(f"{name}: example {number}", file=sys.stderr)
                raise
    return accepted


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, lambda number, frame: sys.exit("it took too long"))
    limit_memory()
    examples, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for name in sys.argv[3:] or READERS:
        print(name, examples, fuzz(name, first, examples), flush=True)
