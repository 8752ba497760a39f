"""Files that no honest tool wrote: one sentence, nothing written, bounded memory and time. (Pickles: `test_pth.py`.)"""

import json
import os
import struct
import zipfile

import pytest
import torch
from checkpoints import hf_model, params, small_tokenizer, write_meta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_llama3.conversion import convert, inspect
from hf_llama3.errors import UserError


@pytest.fixture
def hf(tmp_path):
    hf_model().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def meta(tmp_path):
    write_meta(tmp_path / "meta", params())
    return tmp_path / "meta"


def refused(source, message):
    """Inspect and convert both say no, and nothing appears."""
    for use in (lambda: inspect(source), lambda: convert(source, source.parent / "out")):
        with pytest.raises(UserError, match=message) as info:
            use()
        assert "\n" not in str(info.value)
    assert not list(source.parent.glob("out*"))


# Safetensors


def header_of(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path, header, data):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def change_entry(name, **changes):
    def change(path):
        header, data = header_of(path)
        header[name] |= changes
        write_header(path, header, data)

    return change


def raw_header(text):
    def change(path):
        write_header(path, text, header_of(path)[1])

    return change


NAME = "model.norm.weight"
SAFETENSORS = {
    "overlapping": (change_entry(NAME, data_offsets=[0, 128]), "must begin at byte"),
    "out of range": (change_entry(NAME, data_offsets=[10**12, 10**12 + 128]), "must begin at byte"),
    "backwards": (change_entry(NAME, data_offsets=[128, 0]), "must have 128 bytes, got -128"),
    "negative": (change_entry(NAME, data_offsets=[-128, 0]), "is damaged"),
    "three offsets": (change_entry(NAME, data_offsets=[0, 1, 2]), "is damaged"),
    "offsets as text": (change_entry(NAME, data_offsets=["0", "128"]), "is damaged"),
    "absurd shape": (change_entry(NAME, shape=[2**62, 2**62]), r"must have \d+ bytes, got 128"),
    "negative shape": (change_entry(NAME, shape=[-64]), "is damaged"),
    "shape as text": (change_entry(NAME, shape="64"), "is damaged"),
    "boolean shape": (change_entry(NAME, shape=[True]), "is damaged"),
    "eight bits": (change_entry(NAME, dtype="F8_E4M3"), "has the type 'F8_E4M3'; only"),
    "no type": (change_entry(NAME, dtype=None), "has the type None; only"),
    "unhashable type": (change_entry(NAME, dtype=[]), "has the type"),
    "entry is a list": (lambda path: write_header(path, {NAME: []}, b""), "has the type None"),
    "duplicate keys": (raw_header(b'{"a": {}, "a": {}}'), "the key 'a' stands more than once"),
    "a number for a header": (raw_header(b"7"), "must be a JSON object, got int"),
    "not a number": (raw_header(b'{"a": NaN}'), "NaN is not a number"),
    "deep header": (raw_header(b"[" * 200_000), "is damaged"),
    "not UTF-8": (raw_header(b'{"\xff": 1}'), "is damaged"),
    "absurd length": (lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()), "not a whole safetensors file"),
    "zero length": (lambda path: path.write_bytes(bytes(16)), "not a whole safetensors file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "by its header, got .* download it again"),
    "one byte more": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "by its header, got"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty; download it again"),
    "git-lfs pointer": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "git-lfs pointer",
    ),
    "web page": (lambda path: path.write_bytes(b"<!doctype html><html><body>log in</body></html>"), "it is a web page"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(case, hf):
    damage, message = SAFETENSORS[case]
    damage(hf / "model.safetensors")
    refused(hf, message)


def sharded(hf, name, files=("model.safetensors",)):
    """An index that sends every tensor to the file `name`."""
    names = [key for key in header_of(hf / "model.safetensors")[0] if key != "__metadata__"]
    index = {"weight_map": dict.fromkeys(names, name)}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    (hf / "model.safetensors").rename(hf / "part.safetensors")


@pytest.mark.parametrize(
    "name", ["../part.safetensors", "/etc/passwd", "a/part.safetensors", "..\\part.safetensors", "C:\\x", "..", ".", ""]
)
def test_names_that_lead_elsewhere(name, hf):
    sharded(hf, name)
    (hf.parent / "part.safetensors").write_bytes((hf / "part.safetensors").read_bytes())
    refused(hf, "must name plain files beside it, got|lacks")


def test_index_that_lies(hf):
    sharded(hf, "part.safetensors")
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    assert inspect(hf).num_tensors == 21
    index["weight_map"].pop(NAME)
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(hf, r"and part.safetensors disagree about 1 tensors: \['model.norm.weight'\]")
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": 7}}')
    refused(hf, "must hold a `weight_map` .*, got {'a': 7}")
    for content in ('{"weight_map": []}', "{}", '{"weight_map": {}}'):
        (hf / "model.safetensors.index.json").write_text(content)
        refused(hf, "must hold a `weight_map`")


def test_two_ways_of_weights(hf):
    weights = load_file(hf / "model.safetensors")
    sharded(hf, "part.safetensors")
    save_file(weights, hf / "model.safetensors")
    refused(hf, "holds both model.safetensors and model.safetensors.index.json; remove the one that is not meant")


def test_a_tensor_in_two_files(hf):
    sharded(hf, "part.safetensors")
    (hf / "other.safetensors").write_bytes((hf / "part.safetensors").read_bytes())
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["weight_map"][NAME] = "other.safetensors"
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(hf, "holds .* which another file holds as well|disagree about")


# Meta's directories


def test_zip_bomb(meta):
    """A storage that would unpack to a gigabyte, and a list of tensors that would."""
    path = meta / "consolidated.00.pth"
    for bomb in ("data/0", "data.pkl"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            archive.writestr("x/data.pkl", b"\x80\x02}.") if bomb != "data.pkl" else None
            with archive.open(f"x/{bomb}", "w", force_zip64=True) as member:
                for _ in range(200):
                    member.write(bytes(2**20))
        refused(meta, "must be stored uncompressed|must be at most")


def test_many_members(meta):
    with zipfile.ZipFile(meta / "consolidated.00.pth", "w") as archive:
        for index in range(3):
            archive.writestr(f"{index}/data.pkl", b"\x80\x02}.")
    refused(meta, "must hold one pickle of tensors, got 3")


def test_member_that_begins_nowhere(meta):
    content = bytearray((meta / "consolidated.00.pth").read_bytes())
    entry = content.rindex(b"consolidated.00/data/0") - 46  # in the directory at the end
    assert content[entry : entry + 4] == b"PK\x01\x02"
    content[entry + 42 : entry + 46] = struct.pack("<L", 2**31)  # where its local header is said to be
    (meta / "consolidated.00.pth").write_bytes(content)
    refused(meta, "is not a readable PyTorch checkpoint|is truncated")


def test_shards_of_two_types(tmp_path):
    """Taken for one type, the other shard's bits would become other numbers, and no comparison of bits would see it."""
    write_meta(tmp_path / "meta", params(), mp=2)
    path = tmp_path / "meta" / "consolidated.01.pth"
    torch.save({name: t.half() for name, t in torch.load(path, weights_only=True).items()}, path)
    refused(tmp_path / "meta", "must have one type in all shards, got bfloat16 and float16 in consolidated.01.pth")


def test_norms_that_differ(tmp_path):
    write_meta(tmp_path / "meta", params(), mp=2)
    path = tmp_path / "meta" / "consolidated.01.pth"
    weights = torch.load(path, weights_only=True)
    weights["norm.weight"][3] += 1
    torch.save(weights, path)
    refused(tmp_path / "meta", "model.norm.weight must be the same in all shards")


def test_shards_of_different_tensors(tmp_path):
    write_meta(tmp_path / "meta", params(), mp=2)
    path = tmp_path / "meta" / "consolidated.01.pth"
    torch.save(torch.load(path, weights_only=True) | {"extra": torch.zeros(2)}, path)
    refused(tmp_path / "meta", r"must hold the same tensors, differ in \['extra'\]")


@pytest.mark.parametrize("name", ["params.json", "tokenizer.model", "consolidated.00.pth"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "dangling"])
def test_things_that_are_no_files(kind, name, meta):
    """A pipe would be read for ever."""
    path = meta / name
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == "loop" else "nowhere")
    if kind in ("loop", "dangling") and name == "tokenizer.model":
        assert inspect(meta).tokenizer is None
    else:
        refused(meta, ".")


def test_folder_that_leads_to_itself(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "cannot be opened: Too many levels of symbolic links")


@pytest.fixture
def with_tokenizer(tmp_path):
    write_meta(tmp_path / "first", params(vocab=516), tokenizer=small_tokenizer(tmp_path))
    convert(tmp_path / "first", tmp_path / "hf")
    return tmp_path / "hf"


LINKED = ("vocab.txt", "chat_template.jinja", "additional_chat_templates/x.jinja", "tokenizer.json")
LINKED += ("generation_config.json",)


@pytest.mark.parametrize("name", LINKED)
def test_links_to_what_is_not_the_models(name, with_tokenizer):
    """It would stand in the target as a file of the model, and be published with it."""
    hf = with_tokenizer
    (hf.parent / "secret").write_bytes((hf / name).read_bytes() if (hf / name).exists() else b"{}")
    (hf / name).parent.mkdir(exist_ok=True)
    (hf / name).unlink(missing_ok=True)
    (hf / name).symlink_to(hf.parent / "secret")
    with pytest.raises(UserError, match=r"is a link to .*secret, outside of the folder; put a copy there"):
        convert(hf, hf.parent / "out", to="hf")
    assert not list(hf.parent.glob("out*"))


def test_links_of_the_hubs_cache(with_tokenizer):
    home = with_tokenizer.parent / "models--a--b"
    blobs, commit = home / "blobs", home / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    commit.mkdir(parents=True)
    (with_tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    for path in sorted(with_tokenizer.iterdir()):
        path.rename(blobs / path.name)
        (commit / path.name).symlink_to(f"../../blobs/{path.name}")
    convert(commit, home.parent / "out", to="hf")
    assert (home.parent / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not any(path.is_symlink() for path in (home.parent / "out").iterdir())


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "added_tokens.json", "vocab.txt", "merges.txt"]
)
def test_pipes_in_a_hugging_face_folder(name, hf):
    (hf / name).unlink(missing_ok=True)
    os.mkfifo(hf / name)
    refused(hf, ".")


def test_tensors_that_share_storage(tmp_path):
    """Legitimate, if odd: the output head saved as a view of the embedding."""
    tensors = write_meta(tmp_path / "meta", params(), tied=True)
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    both = torch.stack([tensors["layers.0.feed_forward.w1.weight"], tensors["layers.0.feed_forward.w3.weight"]])
    tensors["layers.0.feed_forward.w1.weight"], tensors["layers.0.feed_forward.w3.weight"] = both[0], both[1]
    tensors["layers.1.attention.wq.weight"] = tensors["layers.1.attention.wq.weight"].T.contiguous().T  # other strides
    torch.save(tensors, tmp_path / "meta" / "consolidated.00.pth")
    assert convert(tmp_path / "meta", tmp_path / "hf").verification.ok
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(written["model.layers.0.mlp.up_proj.weight"], both[1]) and "lm_head.weight" not in written


# Fuzzing: whatever is in the files, the answer is a model or a sentence.

QUIET = settings(
    max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.text(max_size=3), st.none(), st.booleans(), st.lists(st.integers(), max_size=2)
)


def answer(folder):
    try:
        inspect(folder)
    except UserError as error:
        assert str(error) and "\n" not in str(error)


@QUIET
@given(key=st.sampled_from([*params(), "use_scaled_rope", "rope_scaling_factor"]), value=NUMBERS)
def test_fuzzed_params(meta, key, value):
    (meta / "params.json").write_text(json.dumps(params() | {key: value}))
    answer(meta)


@QUIET
@given(data=st.data(), value=NUMBERS)
def test_fuzzed_config(hf, data, value):
    original = hf / "original.json"
    if not original.exists():
        original.write_bytes((hf / "config.json").read_bytes())
    config = json.loads(original.read_text())
    key = data.draw(st.sampled_from([*config, "rope_scaling", "rope_theta"]))
    (hf / "config.json").write_text(json.dumps(config | {key: value}))
    answer(hf)


def flip(path, pristine, position, value):
    content = bytearray(pristine)
    content[position % len(content)] = value
    path.write_bytes(content)


@QUIET
@given(position=st.integers(0, 4000), value=st.integers(0, 255))
def test_fuzzed_safetensors(hf, position, value):
    path = hf / "model.safetensors"
    if not (hf / "pristine").exists():
        (hf / "pristine").write_bytes(path.read_bytes())
    flip(path, (hf / "pristine").read_bytes(), position, value)
    answer(hf)


@QUIET
@given(from_end=st.booleans(), position=st.integers(0, 6000), value=st.integers(0, 255))
def test_fuzzed_pth(meta, from_end, position, value):
    """The pickle stands at the start of the file, the zip's directory at its end."""
    path = meta / "consolidated.00.pth"
    if not (meta / "pristine").exists():
        (meta / "pristine").write_bytes(path.read_bytes())
    pristine = (meta / "pristine").read_bytes()
    flip(path, pristine, len(pristine) - 1 - position if from_end else position, value)
    answer(meta)
