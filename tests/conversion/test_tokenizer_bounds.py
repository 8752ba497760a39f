"""What a tokenizer.json may hold: what the tokenizers library would panic at is refused before it sees it.

A panic prints lines of the library's own on the process's standard error, before the one sentence.
"""

import base64
import json
import shutil

import pytest
from checkpoints import folder_with_tokenizer
from command_line import call, refuse, run

from hf_llama3.cli import main
from hf_llama3.conversion import convert, plan_gguf, verify
from hf_llama3.conversion.formats.gguf.carried import TOKENIZER


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return folder_with_tokenizer(tmp_path_factory.mktemp("made"))


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
    "ends longer than a token": (
        {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 9}},
        "`stop` of the step Strip in ",
        " must be a whole number from 0 to 1, got 9; write it again",
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
PAIRS = [  # all, of which the plain run gives each case to one command, and one to all
    pytest.param(case, command, marks=() if number == 0 or number % 3 == place else pytest.mark.long)
    for number, case in enumerate(CASES)
    for place, command in enumerate(COMMANDS)
]


@pytest.mark.parametrize(("case", "command"), PAIRS, ids=lambda one: one if isinstance(one, str) else one[0])
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
    said = run(*words, code=1).stdout if command[0] == "verify" else refuse(*words)
    assert before in said and after in said
    assert capfd.readouterr().err == "" and not (tmp_path / "out").exists()


MERGES = "tokenizer.json must begin with '##', its `continuing_subword_prefix`"


def spoil(path):
    content = json.loads(path.read_text())
    content["model"]["continuing_subword_prefix"] = "##"
    path.write_text(json.dumps(content))


@pytest.fixture
def spoilt(made, tmp_path, monkeypatch):
    """Such a tokenizer.json in a Hugging Face folder, beside Meta's files, and in a GGUF file."""
    convert(made, tmp_path / "meta")
    spoil(tmp_path / "meta" / "huggingface" / "tokenizer.json")
    shutil.copytree(made, tmp_path / "hf", ignore=shutil.ignore_patterns("SHA256SUMS"))
    spoil(tmp_path / "hf" / "tokenizer.json")
    carry, content = plan_gguf.carry, (tmp_path / "hf" / "tokenizer.json").read_text()
    monkeypatch.setattr(plan_gguf, "carry", lambda *facts: carry(*facts) | {TOKENIZER: content})
    convert(made, tmp_path / "model.gguf", verify=False)
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 400)
    return tmp_path


@pytest.mark.parametrize("source", ["hf", "meta", "model.gguf"])
def test_every_way_into_the_library(source, spoilt, capfd):
    place = spoilt / source / "huggingface" if source == "meta" else spoilt / source
    train = ("train", "--text", spoilt / "text.txt", "--output", spoilt / "run", "--context", "8")
    commands = [("generate", spoilt / source, "a"), (*train, "--from", spoilt / source)]
    commands += [("convert", spoilt / source, spoilt / "out", "--to", "hf")]
    commands += [(*train, "--tokenizer", place)] if source != "model.gguf" else []
    for command in commands:
        assert f"{place}/{MERGES}" in refuse(*command), command
        assert capfd.readouterr().err == "" and not (spoilt / "run").exists() and not (spoilt / "out").exists()


# What only a text brings about

VOCAB = {"a": 0, "b": 1}
FAILING = {  # changes of the file -> what the library says
    "no unknown word": (
        {"model": {"type": "WordLevel", "unk_token": "[X]", "vocab": VOCAB}},
        "WordLevel error: Missing [UNK] token from the vocabulary",
    ),
    "no unknown piece": (
        {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]], "byte_fallback": False}},
        "Encountered an unknown token but `unk_id` is missing",
    ),
    "an unknown token that is none": (
        {"model": {"type": "BPE", "unk_token": "nope", "vocab": VOCAB, "merges": []}},
        "Unk token `nope` not found in the vocabulary",
    ),
    "a table that leads beyond its end": (
        charsmap(base64.b64encode(b"\x08\0\0\0" + b"\xff" * 8 + b"abc").decode()),
        "index out of bounds: the len is 2 but the index is",
    ),
}


@pytest.fixture(params=FAILING)
def failing(request, made, tmp_path):
    """A folder whose tokenizer is built, and fails at most texts; and the library's words."""
    changes, words = FAILING[request.param]
    folder = shutil.copytree(made, tmp_path / "hf", ignore=shutil.ignore_patterns("SHA256SUMS"))
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": None} | changes))
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 400)
    return folder, words


def test_a_tokenizer_that_fails_at_a_text(failing, tmp_path):
    folder, words = failing
    fails = f"the model's tokenizer fails at a text ({words}"
    assert fails in refuse("generate", folder, "xyz")
    assert fails in refuse("evaluate", folder, "--text", tmp_path / "text.txt")
    train = ("train", "--from", folder, "--text", tmp_path / "text.txt", "--output", tmp_path / "run", "--context", "8")
    assert f"the tokenizer fails at the text ({words}" in refuse(*train)
    assert not (tmp_path / "run").exists()


def test_weights_beside_such_a_tokenizer(failing, made, tmp_path):
    """Converted and compared all the same; what is not known of the tokenizer is said."""
    folder, words = failing
    assert convert(folder, tmp_path / "meta").verification.ok
    assert convert(folder, tmp_path / "model.gguf").verification.ok
    report = verify(made, folder)
    assert not report.ok and (report.tokenizer == "differs" or words in report.tokenizer)
    if report.tokenizer != "differs":
        assert report.differences == [f"weights only: the tokenizers were {report.tokenizer}"]


def test_a_panic_that_nothing_foresaw(monkeypatch):
    class PanicException(BaseException):
        """As pyo3's, which is no Exception and stands in no module."""

    def panic(*arguments, **options):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(main, "app", panic)
    said = "error: the tokenizers library failed (index out of bounds); write the model's tokenizer.json again\n"
    assert call("inspect", "x") == (2, "", said)
