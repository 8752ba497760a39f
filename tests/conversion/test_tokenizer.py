"""Meta's tokenizer in Hugging Face's form, against Meta's own code, and the way back to the byte."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import real_tokenizer, small_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from hf_llama3.conversion.tokenizer import bpe as ours
from hf_llama3.conversion.tokenizer.proof import hard_texts
from hf_llama3.conversion.tokenizer.templates import llama3_chat_template
from hf_llama3.errors import UserError

CONFIG = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "pad_token_id": 128004}
CONFIG |= {"max_position_embeddings": 131072}
DIALOGS = [
    [{"role": "user", "content": "Who are you?"}],
    [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Sure?\n\nReally, 你好, \U0001f999?"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": '{"name": "weather", "parameters": {"city": "Rome"}}'},
        {"role": "tool", "content": '{"sky": "clear"}', "call_id": "0", "tool_name": "weather"},
    ],
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    names = ours.special_tokens("3.1")
    tokens = ours.read_ranks(real_tokenizer())
    for name, content in ours.hf_tokenizer_files(tokens, names, CONFIG, instruct=True).items():
        (folder / name).write_text(content, "utf-8")
    return folder


@pytest.fixture(scope="session")
def theirs():
    """What Meta's own code makes of the corpus and the dialogues."""
    script = Path(__file__).parent.parent / "reference" / "meta_tokenizer.py"
    request = json.dumps({"texts": hard_texts(), "dialogs": DIALOGS})
    result = subprocess.run([sys.executable, script], input=request, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_ids_are_metas(folder, theirs):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == theirs["n_words"] == 128256
    assert len(hard_texts()) > 1000
    for text, expected in zip(hard_texts(), theirs["special"], strict=True):
        assert tokenizer(text)["input_ids"] == expected, text
    # Meta's plain `encode` takes special tokens in a text for text, as a raw tokenizer without them does.
    plain = TikTokenConverter(str(real_tokenizer()), pattern=ours.PATTERN).converted()
    for text, expected in zip(hard_texts(), theirs["texts"], strict=True):
        assert [128000, *plain.encode(text).ids] == expected, text


def test_same_as_the_library_converter(folder):
    """`TikTokenConverter` makes the same of Meta's file, save that it puts no token before a text."""
    names = ours.special_tokens("3.1")
    theirs = TikTokenConverter(str(real_tokenizer()), pattern=ours.PATTERN, extra_special_tokens=names).converted()
    theirs, mine = json.loads(theirs.to_str()), json.loads((folder / "tokenizer.json").read_text())
    assert theirs.pop("post_processor") == mine.pop("post_processor")["processors"][0]
    assert mine == theirs


def test_decoding_gives_the_text_back(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in hard_texts():
        assert tokenizer.decode(tokenizer(text)["input_ids"][1:]) == text


def test_begin_of_text_stands_once(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("hi")["input_ids"].count(128000) == 1
    assert tokenizer("hi", "there")["input_ids"].count(128000) == 2
    assert tokenizer("hi", add_special_tokens=False)["input_ids"].count(128000) == 0
    chat = tokenizer.apply_chat_template(DIALOGS[0], return_dict=True)["input_ids"]
    assert chat.count(128000) == 1


def test_special_ids(folder, theirs):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (128000, theirs["pad_id"])
    assert tokenizer.eos_token == "<|eot_id|>" and tokenizer.eos_token_id in theirs["stop_tokens"]
    assert ours.token_ids(ours.special_tokens("3.1"), 128000, instruct=True) == {
        key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    assert sorted(CONFIG["eos_token_id"]) == sorted(theirs["stop_tokens"])


def test_chat_template_is_metas_format(folder, theirs):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for dialog, expected in zip(DIALOGS, theirs["dialogs"], strict=True):
        made = tokenizer.apply_chat_template(dialog, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert made == expected, tokenizer.decode(made)


def test_chat_template_with_functions(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    dialog = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": {"sky": "clear"}},
    ]
    text = tokenizer.apply_chat_template(dialog, tools=[tool], tokenize=False, add_generation_prompt=True)
    assert text.count("Be brief.") == 1 and text.count("<|start_header_id|>system") == 1
    assert "Environment: ipython" in text and '"name": "weather"' in text
    assert 'assistant<|end_header_id|>\n\n{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>' in text
    assert '<|start_header_id|>ipython<|end_header_id|>\n\n{"sky": "clear"}<|eot_id|>' in text
    with pytest.raises(Exception, match="one function at a time, got 2"):
        tokenizer.apply_chat_template([dialog[1], {"role": "assistant", "tool_calls": [call, call]}])


def test_chat_template_takes_content_in_parts(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who are"}, {"type": "text", "text": " you?"}]}]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == tokenizer.apply_chat_template(
        DIALOGS[0], tokenize=False
    )


def test_template_stands_where_both_versions_look(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (folder / "chat_template.jinja").read_text() == llama3_chat_template()
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_way_back_is_metas_file(folder):
    content, names = ours.meta_tokenizer_file(folder / "tokenizer.json")
    assert content == real_tokenizer().read_bytes()
    assert names == ours.special_tokens("3.1")


@pytest.mark.parametrize("version", ["3.0", "3.1", "3.2", "3.3"])
def test_special_tokens_of_each_version(version):
    names = ours.special_tokens(version)
    assert len(names) == len(set(names)) == 256
    assert (names[0], names[1], names[6], names[7], names[9]) == (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    )
    new = {"<|finetune_right_pad_id|>", "<|eom_id|>", "<|python_tag|>"}
    assert new & set(names) == (set() if version == "3.0" else new)
    assert names[-1] == f"<|reserved_special_token_{250 if version == '3.0' else 247}|>"


def test_byte_characters_are_gpt_2s():
    assert ours.byte_characters() == bytes_to_unicode()


# A small tokenizer, for what goes wrong


@pytest.fixture
def small_json(tmp_path):
    config = CONFIG | {"bos_token_id": 260, "eos_token_id": 261, "pad_token_id": None}
    shutil.copy(small_tokenizer(tmp_path), tmp_path / "tokenizer.model")
    tokens = ours.read_ranks(tmp_path / "tokenizer.model")
    files = ours.hf_tokenizer_files(tokens, ours.special_tokens("3.0"), config, instruct=False)
    (tmp_path / "tokenizer.json").write_text(files["tokenizer.json"])
    assert "chat_template.jinja" not in files and "pad_token" not in files["tokenizer_config.json"].split("added")[0]
    return tmp_path / "tokenizer.json"


def test_small_round_trip(small_json):
    content, names = ours.meta_tokenizer_file(small_json)
    assert content == (small_json.parent / "tokenizer.model").read_bytes()
    assert names == ours.special_tokens("3.0")
    assert Tokenizer.from_file(str(small_json)).encode("abcd").ids == [260, 259]


def change(path, edit):
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw["model"].update(type="Unigram"), "is not Llama 3's kind of tokenizer"),
        (lambda raw: raw.update(pre_tokenizer=None), "is not Llama 3's kind of tokenizer"),
        (lambda raw: raw.update(normalizer={"type": "NFC"}), "is not Llama 3's kind of tokenizer"),
        (lambda raw: raw["model"]["merges"].pop(), "merges .* do not follow from its ids"),
        (lambda raw: raw["model"]["vocab"].update(ab=999), "must be 0 to 515, special tokens last; they have gaps"),
        (lambda raw: raw["model"].pop("merges"), "is damaged"),
        (lambda raw: raw["model"]["vocab"].update({"\u4e2d": 3}), "each id to one token, got 3 twice"),
    ],
)
def test_other_tokenizers_are_refused(small_json, edit, message):
    change(small_json, edit)
    with pytest.raises(UserError, match=message):
        ours.meta_tokenizer_file(small_json)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nIg== 2\n", "line 2 .* must have rank 1, got 2"),
        (b"IQ== 0\n!!!! 1\n", "line 2 .* is damaged"),
        (b"IQ== 0\nIg==\n", "line 2 .* is damaged"),
        (b"IQ== zero\n", "line 1 .* is damaged"),
    ],
)
def test_damaged_files(content, message, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=message):
        ours.read_ranks(tmp_path / "tokenizer.model")


def test_kinds(tmp_path):
    assert ours.tokenizer_kind(real_tokenizer()) == "tiktoken"
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    assert ours.tokenizer_kind(tmp_path / "tokenizer.model") == "sentencepiece"
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="git-lfs pointer"):
        ours.tokenizer_kind(tmp_path / "tokenizer.model")
