"""Completions hold every token that was generated and no padding, whatever pads and stops there are."""

import pytest
from small import SHAPE, make_model
from transformers import AutoTokenizer

from hf_llama3.errors import UserError
from hf_llama3.text.completion import generate_text, until_stop
from hf_llama3.text.prompts import read_prompts
from hf_llama3.training.tokenizer import character_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One of single characters, which has no token that pads or stops: id 0 is as real as any."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = "".join(chr(ord("a") + index) for index in range(SHAPE["vocab_size"] - 1))
    for name, content in character_tokenizer([text], SHAPE["vocab_size"]).files.items():
        (folder / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id is None and tokenizer.eos_token_id is None
    return tokenizer


def make(chosen: list[int], **tokens):
    """A model that chooses these tokens one after another, whatever the prompt, and the last of them for ever."""
    model = make_model(**{"eos_token_id": None, "pad_token_id": None} | tokens)
    prompt = []

    def choose(ids, scores):
        prompt[:] = prompt or [ids.shape[1]]
        scores.fill_(0)
        scores[:, chosen[min(ids.shape[1] - prompt[0], len(chosen) - 1)]] = 1
        return scores

    original = model.generate
    model.generate = lambda *args, **kwargs: original(*args, **kwargs, logits_processor=[choose])
    return model


@pytest.mark.parametrize(
    ("row", "stops", "expected"),
    [
        ([5, 7, 0, 0], [], [5, 7, 0, 0]),
        ([5, 7, 0, 0], [7], [5, 7]),
        ([5, 7, 0, 9], [9, 0], [5, 7, 0]),
        ([5, 7], [0], [5, 7]),
        ([], [0], []),
    ],
)
def test_until_stop(row, stops, expected):
    assert until_stop(row, stops) == expected


def test_what_is_no_unicode(tokenizer):
    """A byte that a terminal of another encoding sent."""
    with pytest.raises(UserError, match=r"a text must be in UTF-8, got '\\udce9' at character 3; write it anew"):
        generate_text(make([5]), tokenizer, ["ab", "caf\udce9"], 4)


def test_a_mark_before_the_prompts_is_none_of_them(tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffabc\nd\n", "utf-8")
    assert list(read_prompts(tmp_path / "prompts.txt")) == ["abc", "d"]


def test_the_first_id_is_a_token(tokenizer):
    model = make([5, 7, 0, 0])
    assert [one.token_ids for one in generate_text(model, tokenizer, ["ab", "c"], 4)] == [[5, 7, 0, 0]] * 2


def test_a_pad_token_that_was_generated_is_kept(tokenizer):
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    try:
        [one] = generate_text(make([5, 7, 0, 0], eos_token_id=2), tokenizer, ["ab"], 4)
        assert one.token_ids == [5, 7, 0, 0]
    finally:
        tokenizer.pad_token = None


@pytest.mark.parametrize("stops", [None, 2], ids=["no stop token", "a stop token pads"])
def test_rows_that_end_before_the_longest(stops, tokenizer):
    """One ends at a text; what fills it up to the other's end is no part of it."""
    model = make_model(eos_token_id=stops, pad_token_id=None)
    whole = [one.token_ids for one in generate_text(model, tokenizer, ["abc", "xyz"], 12)]
    assert len(whole[0]) == len(whole[1]) == 12 and whole[0] != whole[1]
    last = next(place for place in range(3, 12) if whole[0][place] not in whole[0][:place] + whole[1])
    stop = tokenizer.decode(whole[0][last])
    both = generate_text(model, tokenizer, ["abc", "xyz"], 12, stop=[stop])
    assert [one.token_ids for one in both] == [whole[0][: last + 1], whole[1]]
    assert both[0].text.endswith(stop)
