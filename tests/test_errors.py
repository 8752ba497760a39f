"""What is said: one line of bounded length that no terminal acts on, whatever stands in a file or was typed."""

import json
import shutil
import unicodedata

import pytest
import torch
from checkpoints import hf_model, params, small_tokenizer, write_meta
from command_line import call
from safetensors.torch import load_file, save_file

from hf_llama3.conversion import inspect
from hf_llama3.errors import UserError, for_terminal, quoted, shown, words_of

TITLE, CLIPBOARD, TURNED, BROKEN = "\x1b]0;owned\x07", "\x9d52;c;cm0gLXJm\x9c", "\u202egnp.", "a\r\nerror: b\u2028c\x85"
NASTY = f"{TITLE}{CLIPBOARD}{TURNED}{BROKEN}" + "very long " * 10_000
ALLOWED = "\n"


def acts(text):
    """The characters that do more than stand on a line."""
    return {one for one in text if one not in ALLOWED and unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")}


def is_one_line(sentence):
    return len(sentence.splitlines()) == 1 and len(sentence) <= 1100 and not acts(sentence)


@pytest.mark.parametrize("name", [NASTY, NASTY * 100, "\ud800", "x" * 201, "\x1b" * 199, "\U000e0001" * 60])
def test_a_name_is_escaped_and_shortened(name):
    for text in (shown(name), quoted(name)):
        assert len(text) <= 200 and is_one_line(text)
    assert shown(name) == shown(name) and is_one_line(str(UserError(f"{name} must be mended, got {name!r}")))


def test_what_needs_nothing_stays():
    for name in ("größe 8 🦙/model-00001.safetensors", "'quotes' and \\backslashes\\", "x" * 200):
        assert shown(name) == name == str(UserError(name))
    assert quoted([1, "a"]) == "[1, 'a']" and quoted(3) == "3" and quoted("3") == "'3'"


def test_values_of_any_size():
    deep = wide = ()
    for _ in range(60):
        wide = (wide, wide)
    for _ in range(900):
        deep = [deep]
    for value in (wide, deep, [0] * 10**6, 7 ** (10**5), {"a" * 10**6: {"b": NASTY}}, [NASTY] * 5):
        assert len(quoted(value)) <= 200 and is_one_line(quoted(value))


def test_texts_keep_their_lines_and_letters():
    text = "نعم می‌خواهم 👩‍👩‍👧\n\tça\u00a0va"
    assert for_terminal(text) == text
    assert for_terminal("a\x1b[31mred\u202e\x9b2J\ud800") == r"a\x1b[31mred\u202e\x9b2J\ud800"


# Every reader


def rename_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {NASTY: torch.zeros(2)}, folder / "model.safetensors")


def type_of_tensor(folder):
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[NASTY] = {"dtype": NASTY, "shape": [1], "data_offsets": [0, 1]}
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def change_json(name, **changes):
    def change(folder):
        path = folder / name
        value = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(value | changes))

    return change


def write(name, content):
    return lambda folder: (folder / name).write_text(content, "utf-8", "surrogatepass")


def name_pth(make):
    def change(folder):
        tensors = torch.load(folder / "consolidated.00.pth", weights_only=True)
        torch.save(make(tensors), folder / "consolidated.00.pth")

    return change


class Runs:
    def __reduce__(self):
        return getattr, (1, NASTY)


HF = {
    "tensor": rename_tensor,
    "type of a tensor": type_of_tensor,
    "index": write("model.safetensors.index.json", json.dumps({"weight_map": {NASTY: NASTY}})),
    "type of a model": change_json("config.json", model_type=NASTY),
    "number": change_json("config.json", hidden_size=NASTY),
    "rope": change_json("config.json", rope_parameters={"rope_type": NASTY, "rope_theta": 1.0}),
    "key twice": write("config.json", '{"' + json.dumps(NASTY)[1:-1] + '":1,"' + json.dumps(NASTY)[1:-1] + '":2}'),
    "no JSON": write("config.json", NASTY),
    "tokenizer": change_json("tokenizer.json", model={"type": NASTY}),
    "template": change_json("tokenizer_config.json", chat_template={NASTY: NASTY}),
}
META = {
    "tensor": name_pth(lambda tensors: tensors | {NASTY: torch.zeros(2)}),
    "value": name_pth(lambda tensors: tensors | {NASTY: [1]}),
    "class": name_pth(lambda tensors: tensors | {"x": Runs()}),
    "key": change_json("params.json", **{NASTY: NASTY}),
    "number": change_json("params.json", dim=NASTY),
    "hash": write("checklist.chk", NASTY),
    "sidecar": change_json("huggingface.json", **{NASTY: NASTY}),
    "rank": write("tokenizer.model", NASTY),
    "member": lambda folder: (folder / "consolidated.00.pth").rename(folder / f"{TURNED}\x1b{'x' * 100}.safetensors"),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    hf_model().save_pretrained(folder / "hf")
    write_meta(folder / "meta", params(), tokenizer=small_tokenizer(folder))
    return folder


@pytest.mark.parametrize("case", [("hf", name) for name in HF] + [("meta", name) for name in META])
def test_every_reader(case, pristine, tmp_path):
    """A refusal is one sentence; what is accepted prints nothing that acts."""
    (kind, name), folder = case, tmp_path / "model"
    shutil.copytree(pristine / kind, folder)
    {"hf": HF, "meta": META}[kind][name](folder)
    for command in (["inspect", folder], ["inspect", folder, "--json"], ["convert", folder, tmp_path / "out"]):
        code, out, err = call(*command)
        assert code in (0, 2) and "Traceback" not in err, err
        err = err.replace("\r", "\n").replace("\x1b[A", "")  # what moves a progress bar
        assert not acts(out) and not acts(err), (out, err)
        assert code == 0 or is_one_line(err.strip().splitlines()[-1]), err
        assert code == 0 or sum(line.startswith("error: ") for line in err.splitlines()) == 1, err


def test_names_that_are_typed(tmp_path):
    for arguments in (["inspect", NASTY], ["inspect", tmp_path / TITLE], ["convert", "x", "y", f"--{NASTY}"], [NASTY]):
        code, out, err = call(*arguments)
        assert code == 2 and out == "" and is_one_line(err.strip()), err[:3000]


def test_a_name_of_a_folder_that_holds_no_checkpoint(tmp_path):
    (tmp_path / f"{TITLE}{'x' * 200}").touch()
    with pytest.raises(UserError) as info:
        inspect(tmp_path)
    assert is_one_line(str(info.value))


def test_a_library_says_why_on_its_second_line():
    error = OSError("a folder is not what it should be.\n\n  It lacks a file: add it.\nException raised from x.cpp")
    assert words_of(error) == "a folder is not what it should be. It lacks a file: add it."
    assert words_of(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_configuration_that_cannot_be_loaded_is_told_whole(tmp_path):
    hf_model().save_pretrained(tmp_path / "hf")
    shutil.copy(small_tokenizer(tmp_path), tmp_path / "hf" / "tokenizer.model")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"pretraining_tp": "much"}))
    code, _, said = call("generate", tmp_path / "hf", "hi")
    assert code == 2 and "Validation error for field 'pretraining_tp': TypeError: " in said and "'much'" in said
