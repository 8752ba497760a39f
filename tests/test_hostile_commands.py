"""Places, options and texts that no command can use: one sentence, and nothing appears."""

import os
from pathlib import Path

import pytest
from checkpoints import hf_model, params, write_meta
from command_line import refuse

from hf_llama3.training.tokenizer import tiktoken_tokenizer, train_bpe

LONG = "x" * 300
DEEP = "/".join(["d" * 200] * 30)
DIGITS = "9" * 5000
TEXT = "The quick brown fox jumps over the lazy dog. " * 400
TRAIN = ("train", "--text", "text.txt", "--layers", 1, "--hidden-size", 16, "--heads", 2, "--kv-heads", 1, "--steps", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in each format, a text, and a link that leads to itself."""
    folder = tmp_path_factory.mktemp("commands")
    write_meta(folder / "meta", params())
    made = tiktoken_tokenizer(train_bpe([TEXT], 600), context=64)
    hf_model(**made.vocabulary, max_position_embeddings=64).save_pretrained(folder / "hf")
    for name, content in made.files.items():
        (folder / "hf" / name).write_bytes(content)
    (folder / "text.txt").write_text(TEXT)
    (folder / "loop").symlink_to("loop")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    """Commands run in the folder, and leave it as it is."""
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    yield folder
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("place", ["loop", "loop/x", "/", LONG, DEEP, "x" * 250, "text.txt/x", "/dev/null/x"])
@pytest.mark.parametrize("command", [("convert", "meta"), ("convert", "meta", "--overwrite"), ("pack", "hf")])
def test_targets(command, place, here):
    name, source, *options = command
    message = refuse(name, source, place, *options)
    assert len(message) < 1100
    assert any(words in message for words in ("name another place", "is a file", "where all folders begin"))


@pytest.mark.parametrize("place", ["loop", "loop/x", LONG, DEEP, "/dev/zero", "text.txt/x"])
@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "PLACE"),
        ("convert", "PLACE", "new"),
        ("verify", "hf", "PLACE"),
        ("generate", "PLACE", "a"),
        ("generate", "hf", "--prompts", "PLACE"),
        ("evaluate", "hf", "--text", "PLACE"),
        ("card", "PLACE"),
        ("card", "hf", "--license", "mit", "--output", "PLACE/x"),
        ("generate", "hf", "a", "--output", "PLACE/x"),
        ("train", "--text", "PLACE", "--output", "new"),
        ("train", "--text", "text.txt", "--output", "new", "--tokenizer", "PLACE"),
        ("quickstart", "--text", "PLACE", "--output", "new"),
    ],
    ids=" ".join,
)
def test_places(command, place, here):
    refuse(*(part.replace("PLACE", place) for part in command))


@pytest.mark.parametrize("size", [f"{DIGITS}GB", "\u00b2GB", DIGITS, "1e9GB", "-1GB", "0GB", "5GB" * 1000])
def test_sizes(size, here):
    message = refuse("convert", "meta", "new", "--max-shard-size", size)
    assert "--max-shard-size must be a number with one of" in message and len(message) < 500


MEMORY = {
    "nested": "[" * 100_000,
    "nested objects": '{"a":' * 5000,
    "many digits": f'{{"0": {DIGITS}}}',
    "many digits as text": f'{{"cpu": "{DIGITS}GB"}}',
    "a device of many digits": f'{{"{DIGITS}": "1GB"}}',
    "superscript": '{"\u00b2": "1GB"}',
    "infinite": '{"cpu": 1e999}',
    "not a number": '{"cpu": NaN}',
    "twice": '{"cpu": 1, "cpu": 2}',
    "half a character": '"\\ud800"',
    "a list": "[]",
    "empty": "{}",
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory(case, here):
    message = refuse("inspect", "hf", "--device-map", "auto", "--max-memory", MEMORY[case])
    assert "--max-memory must be sizes by device, as" in message and len(message) < 500


@pytest.mark.parametrize("kind", [f"bpe:{DIGITS}", "bpe:\u00b2", "bpe:1000000000000", "bpe:0", "bpe:", LONG])
def test_tokenizers(kind, here):
    message = refuse(*TRAIN, "--output", "new", "--tokenizer", kind)
    assert "--tokenizer must be char, bpe:N" in message or "bpe:N must have at" in message


def test_long_texts(folder, monkeypatch):
    monkeypatch.chdir(folder)
    prompts, generate = Path("prompts"), ("generate", "hf", "--prompts", "prompts", "--max-new-tokens", 1)
    prompts.write_text("a\n" + "b" * (2**20 + 1))
    assert "line 2 of prompts must be at most 1048576 characters, got more" in refuse(*generate)
    prompts.write_text("a\n" + "b" * 2**20 + "\n")
    assert "must fit the model's context of 64" in refuse(*generate)
    prompts.write_text("a\n")
    os.truncate(prompts, 2**31)
    assert "line 2 of prompts must be at most" in refuse(*generate)
    assert "prompts must be at most 67108864 bytes, got 2147483648" in refuse("evaluate", "hf", "--text", "prompts")
    assert "--stop must be at most 256 characters" in refuse(
        *generate[:2], "a", "--max-new-tokens", 1, "--stop", "b" * 999
    )
    prompts.unlink()
