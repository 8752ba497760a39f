"""A text becomes windows of token ids: nothing lost, nothing leaked, the same in every process."""

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from hf_llama3.errors import UserError
from hf_llama3.training import data
from hf_llama3.training.data import (
    IGNORED,
    ConsecutiveWindows,
    ShuffledWindows,
    end_of_line,
    permute,
    read_pieces,
    read_range,
    survey,
    write_tokens,
)
from hf_llama3.training.tokenizer import PATTERN, character_tokenizer, tiktoken_tokenizer, train_bpe

TEXT = "Der Käse, 你好!\n\n  \U0001f999 indented\r\nI'll go.  \n\t\n1234567 words\n" * 40


@pytest.fixture(params=[1, 3, 7, 64, 10**6])
def text(request, tmp_path, monkeypatch):
    """A text file that is read so many bytes at a time, in the middle of characters."""
    monkeypatch.setattr(data, "READ_BYTES", request.param)
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    return survey(tmp_path / "text.txt")


def test_read_as_it_is(text):
    assert "".join(read_pieces(text.path)) == TEXT and text.length == len(TEXT)


def test_a_mark_before_the_text_is_none_of_it(tmp_path):
    (tmp_path / "text.txt").write_text("\ufeffab\ufeffc\n", "utf-8")
    assert "".join(data.read_pieces(tmp_path / "text.txt")) == "ab\ufeffc\n"


def test_parts_make_the_whole(text):
    parts = text.divide(0.2, 0.1)
    assert [len(part) / text.length for part in parts] == pytest.approx([0.7, 0.2, 0.1], abs=1e-3)
    assert "".join("".join(read_range(text, part)) for part in parts) == TEXT
    assert "".join(read_range(text, parts[0])) == TEXT[: len(parts[0])]  # the first part trains, as nanoGPT has it


def test_pieces_are_split_as_the_whole(text):
    """A tokenizer of Meta's kind gives the same ids, wherever the file was cut."""
    fast = tiktoken_tokenizer(train_bpe([TEXT], 600), context=8)
    ids = [token for piece in read_range(text, range(text.length)) for token in fast.encode(piece)]
    assert ids == fast.encode(TEXT)


def test_lines_without_end_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LONGEST_LINE", 10)
    monkeypatch.setattr(data, "READ_BYTES", 4)
    (tmp_path / "text.txt").write_text("x" * 35)
    assert list(read_range(survey(tmp_path / "text.txt"), range(35))) == ["x" * 10] * 3 + ["x" * 5]


@pytest.mark.parametrize(
    ("text", "cut"), [("a\nb", 2), ("a\n b", 0), ("a\n", 0), ("ab", 0), ("", 0), ("a\nb\n\nc", 5), ("a\nb\n c", 2)]
)
def test_end_of_line(text, cut):
    assert end_of_line(text) == cut


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\xff", "must be text in UTF-8, but byte 3 is 0xff"),
        ("ä".encode() * 5 + b"\xc3", "must be text in UTF-8, but byte 10 is 0xc3"),
        ("a".encode("utf-16"), "must be text in UTF-8, but byte 0 is 0xff"),
        (b"", "must hold text, got 0 characters"),
        (b" \n ", "must hold text, got 3 characters of white space"),
    ],
)
@pytest.mark.parametrize("at_once", [1, 4, 1000])
def test_what_is_no_text(content, message, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "READ_BYTES", at_once)
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        survey(tmp_path / "text.txt")


@pytest.mark.parametrize("vocab_size", [66, 2**16, 2**16 + 1])
def test_token_files(vocab_size, tmp_path):
    ids = [0, 65, vocab_size - 1]
    tokens = write_tokens(tmp_path / "t.bin", iter(["a", "b"]), lambda piece: ids, vocab_size)
    assert tokens.tolist() == ids * 2 and tokens.dtype == (np.uint16 if vocab_size <= 2**16 else np.uint32)
    assert write_tokens(tmp_path / "none.bin", iter([]), lambda piece: ids, vocab_size).tolist() == []


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
def test_permutations(count):
    orders = [[permute(index, count, seed) for index in range(count)] for seed in range(3)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 16 or len({tuple(order) for order in orders}) == 3
    assert count < 1000 or abs(np.corrcoef(orders[0], range(count))[0, 1]) < 0.1


def test_every_token_trains_once_a_round():
    tokens, context = np.arange(1003, dtype=np.uint16), 10
    windows = ShuffledWindows(tokens, context, length=300, seed=4)
    starts = [windows[index]["input_ids"][0].item() for index in range(len(windows))]
    first, second = sorted(starts[:99]), sorted(starts[99:198])
    assert set(np.diff(first)) == set(np.diff(second)) == {context}
    assert first != second and starts[:99] != first
    again = ShuffledWindows(tokens, context, length=300, seed=4)
    assert all(windows[i]["input_ids"].equal(again[i]["input_ids"]) for i in (0, 150, 299))
    other = ShuffledWindows(tokens, context, length=300, seed=5)
    assert starts[:20] != [other[index]["input_ids"][0].item() for index in range(20)]


def test_labels_are_the_next_tokens():
    for windows in (ShuffledWindows(np.arange(50), 8, 5, 0), ConsecutiveWindows(np.arange(50), 8)):
        item = windows[1]
        assert item["shift_labels"].tolist() == (item["input_ids"] + 1).tolist() and len(item["input_ids"]) == 8


@pytest.mark.parametrize("length", [2, 8, 9, 10, 50])
@pytest.mark.parametrize("multiple", [1, 3])
def test_every_token_validates_once(length, multiple):
    windows = ConsecutiveWindows(np.arange(length), 8, multiple)
    labels = [label for index in range(len(windows)) for label in windows[index]["shift_labels"].tolist()]
    assert [label for label in labels if label != IGNORED] == list(range(1, length))
    assert len(windows) % multiple == 0 and len(windows[len(windows) - 1]["input_ids"]) == 8


def test_characters(tmp_path):
    made = character_tokenizer(["hello\n", "wörld \U0001f999"], context=8)
    assert made.vocabulary["vocab_size"] == len(set("hello\nwörld \U0001f999")) + 1
    for text in ("hello\nwörld \U0001f999", "  ll\n\n", ""):
        assert made.decode(made.encode(text)) == text and len(made.encode(text)) == len(text)
    assert made.encode("hexh")[2] == made.vocabulary["vocab_size"] - 1  # not met in training


def test_bpe_is_the_librarys(tmp_path):
    """Our ranks give what the trained `tokenizers` BPE itself gives."""
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    ours = tiktoken_tokenizer(train_bpe([TEXT], 300 + 256), context=8)
    assert ours.encode(TEXT) == theirs.encode(TEXT).ids
