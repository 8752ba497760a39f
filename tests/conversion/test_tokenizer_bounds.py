"""What a tokenizer.json may hold: what the tokenizers library would panic at is refused before it sees it.

A panic prints lines of the library's own on the process's standard error, before the one sentence.
"""

import base64
import json
import shutil

import pytest
from checkpoints import SMALL_VOCAB, params, small_tokenizer, write_meta
from command_line import refuse, run

from hf_llama3.conversion import convert


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_meta(folder / "meta", params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(folder))
    convert(folder / "meta", folder / "hf")
    return folder / "hf"


def charsmap(content):
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": content}}


def replace(pattern):
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": pattern, "content": "x"}]}
    }


TRUNCATION = {"direction": "Right", "max_length": 70, "strategy": "LongestFirst", "stride": 7}
PADDING = {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
PADDING["pad_to_multiple_of"] = None
TABLE = "must be a table of sentencepiece's in base64, got "
CASES = {  # changes of the file, and of its model -> what is said
    "a merge without the prefix": (
        {"model": {"continuing_subword_prefix": "##"}},
        "the second token of each merge in ",
        " must begin with '##', its `continuing_subword_prefix`, got ['a', 'b']; download it again",
    ),
    "a merge to no token": (
        {"model": {"merges": [["abcd", "abcd"]]}},
        "tokenizer.json holds the merge ",
        "['abcd', 'abcd'] to a token that it lacks; download it again",
    ),
    "a prefix of wide letters": (
        {"model": {"continuing_subword_prefix": "é"}},
        "`continuing_subword_prefix` in ",
        " must be ASCII, got 'é'; download it again",
    ),
    "pieces of no length": (
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        "`length` of the step FixedLength in ",
        " must be a positive int, got 0; write it again",
    ),
    "nothing put before": (
        {"normalizer": {"type": "Prepend", "prepend": ""}},
        "`prepend` of the step Prepend in ",
        " must be a text that is not empty, got ''; write it again",
    ),
    "nothing replaced": (replace({"String": ""}), "`pattern` of the step Replace in ", " must be an object without an"),
    "an empty expression replaced": (
        replace({"Regex": ""}),
        "`pattern` of the step Replace in ",
        " must be an object without an empty text, got {'Regex': ''}; write it again",
    ),
    "no table": (charsmap(None), "`precompiled_charsmap` of the step Precompiled in ", f" {TABLE}None; write it again"),
    "an empty table": (
        charsmap(""),
        "`precompiled_charsmap` of the step Precompiled in ",
        f" {TABLE}''; write it again",
    ),
    "a table that ends early": (
        charsmap(base64.b64encode(b"\xff\0\0\0abc").decode()),
        "`precompiled_charsmap` of the step Precompiled in ",
        f" {TABLE}'/wAAAGFiYw=='; write it again",
    ),
    "steps back longer than a text": (
        {"truncation": TRUNCATION},
        "`stride` of the truncation in ",
        " must be 0, or at least 64 below `max_length`, got 7 and 70; write it again",
    ),
    "padding without end": ({"padding": PADDING}, "`padding` in ", "must be an object"),
}


COMMANDS = [("convert", "HF", "OUT", "--to", "hf"), ("generate", "HF", "a"), ("verify", "HF", "MADE")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_nothing_of_the_librarys(case, command, made, tmp_path, capfd):
    changes, before, after = CASES[case]
    folder = shutil.copytree(made, tmp_path / "hf")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    model = content["model"] | changes.get("model", {})
    path.write_text(json.dumps(content | changes | {"model": model}))
    (folder / "SHA256SUMS").unlink()
    places = {"HF": folder, "OUT": tmp_path / "out", "MADE": made}
    words = [places.get(word, word) for word in command]
    said = run(*words).stdout if command[0] == "verify" else refuse(*words)  # which compares the weights all the same
    assert before in said and after in said
    assert capfd.readouterr().err == "" and not (tmp_path / "out").exists()
