"""The proof of tokenizers: each side is read in its own way, and what users see of it is compared."""

import base64
import json
import shutil

import pytest
from checkpoints import SMALL_VOCAB, params, real_tokenizer, small_tokenizer, write_meta
from test_llama2 import VOCAB, sentencepiece_model  # noqa: F401 (a fixture)
from test_nothing_lost import CHANGES, TEMPLATE, add_tokens, edit, settings, templates_in_files
from test_tokenizer import theirs  # noqa: F401 (a fixture)
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from hf_llama3.conversion import convert, verify
from hf_llama3.conversion.formats import meta
from hf_llama3.conversion.tokenizer import bpe, files, proof
from hf_llama3.conversion.tokenizer.proof import around, hard_texts
from hf_llama3.conversion.tokenizer.readings import read_hub_files, read_ranks_as_meta
from hf_llama3.errors import UserError

TEXTS = ["abcd <call>abc</call>", "a <pad> b<|eot_id|>", "", "  abc  ", "é<|begin_of_text|>"]


@pytest.fixture
def made(tmp_path):
    """A directory of Meta's of a dialogue model, with rows for two more tokens."""
    write_meta(tmp_path / "made", params(vocab=SMALL_VOCAB + 2), tokenizer=small_tokenizer(tmp_path))
    return tmp_path / "made"


@pytest.fixture
def folder(made, tmp_path):
    convert(made, tmp_path / "hf", instruct=True)
    return tmp_path / "hf"


def test_ranks_are_read_as_meta_reads_them(theirs):  # noqa: F811
    reading = read_ranks_as_meta(real_tokenizer(), bpe.special_tokens("3.1"), 128000)
    assert reading.encode(hard_texts(), True) == theirs["special"]
    assert len(reading.tokens) == theirs["n_words"]
    assert [text for text in hard_texts() if reading.decode(reading.encode([text], False), False) != [text]] == []


@pytest.mark.parametrize("change", [lambda folder: None, *CHANGES])
def test_a_folder_is_read_as_transformers_reads_it(change, folder):
    change(folder)
    ours, tokenizer = read_hub_files(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = TEXTS + around(ours.special)[:40]
    for special in (False, True):
        ids = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
        assert ours.encode(texts, special) == ids
        for skip in (False, True):
            assert ours.decode(ids, skip) == [tokenizer.decode(one, skip_special_tokens=skip) for one in ids]
    assert ours.tokens == tokenizer.get_vocab()
    for key in ("pad_token", "eos_token", "padding_side", "truncation_side", "model_max_length"):
        assert ours.settings[key] == getattr(tokenizer, key), key
    named = tokenizer.chat_template
    assert ours.templates == (named if isinstance(named, dict) else {"default": named})
    if tokenizer.pad_token is not None:
        batch = tokenizer(["a", "a b c d", ""], padding=True, truncation=True, max_length=3)["input_ids"]
        assert ours.batch(["a", "a b c d", ""], 3) == batch


def test_each_pair_of_readers_is_compared_once(made, monkeypatch):
    asked, compare_across = [], proof.compare_across
    monkeypatch.setattr(proof, "compare_across", lambda *given: asked.append(given) or compare_across(*given))
    assert convert(made, made.with_name("once"), instruct=True).verification.tokenizer == "equal"
    assert len(asked) == 1


def no_begin(folder):
    edit(folder / "tokenizer.json", lambda content: content.update(post_processor=None))


def another_flag(folder):
    edit(folder / "tokenizer.json", lambda content: content["added_tokens"][3].update(special=False))


def strip_left(folder):
    edit(folder / "tokenizer.json", lambda content: content["added_tokens"][3].update(lstrip=True))


def decode_otherwise(folder):
    edit(folder / "tokenizer.json", lambda content: content.update(decoder={"type": "Fuse"}))


def set_to(**values):
    return lambda folder: settings(folder, **values)


def added_elsewhere(folder):
    edit(folder / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))
    (folder / "added_tokens.json").write_text(json.dumps({"<call>": SMALL_VOCAB}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_begin, "ids of '"),
        (another_flag, "flags of '<|reserved_special_token_1|>'"),
        (strip_left, "flags of '<|reserved_special_token_1|>'"),
        (decode_otherwise, "the text of ["),
        (
            set_to(pad_token="<|reserved_special_token_1|>"),
            "setting 'pad_token': None and '<|reserved_special_token_1|>'",
        ),
        (set_to(padding_side="left"), "setting 'padding_side': 'right' and 'left'"),
        (set_to(truncation_side="left"), "setting 'truncation_side': 'right' and 'left'"),
        (set_to(model_max_length=7), "setting 'model_max_length': 8192 and 7"),
        (set_to(clean_up_tokenization_spaces=True), "setting 'clean_up_tokenization_spaces': False and True"),
        (set_to(eos_token="<|begin_of_text|>"), "setting 'eos_token': '<|eot_id|>' and '<|begin_of_text|>'"),
        (set_to(extra_special_tokens=["<call>"]), "token '<call>': 'none' and 516"),
        (added_elsewhere, "token '<call>': 'none' and 516"),
        (add_tokens, "token '<call>': 'none' and 516"),
        (templates_in_files, "chat template 'default'"),
        (lambda folder: (folder / "chat_template.jinja").write_text(TEMPLATE), "chat template 'default'"),
    ],
)
def test_what_a_user_would_see_is_seen(change, words, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "changed")
    change(tmp_path / "changed")
    report = verify(folder, tmp_path / "changed")
    assert report.tokenizer == "differs" and not report.ok
    assert report.differences[0].startswith(f"the tokenizer: {words}"), report.differences


def other_merges(monkeypatch):
    complete = bpe.all_merges
    monkeypatch.setattr(
        bpe, "all_merges", lambda ranks: complete(ranks)[:-1]
    )  # "abcd" stays a token, but not in a word


def other_specials(monkeypatch):
    build = bpe.build_tokenizer
    monkeypatch.setattr(bpe, "build_tokenizer", lambda tokens, names, begin: build(tokens, names[::-1], begin))


def no_begin_at_all(monkeypatch):
    build = bpe.build_tokenizer
    monkeypatch.setattr(bpe, "build_tokenizer", lambda tokens, names, begin: build(tokens, names, None))


def other_spelling(monkeypatch):
    spelled = bpe.byte_characters() | {0x80: "Œ", 0x81: "Ā"}
    monkeypatch.setattr(bpe, "byte_characters", lambda: spelled)


def added_space(monkeypatch):
    original = pre_tokenizers.ByteLevel
    monkeypatch.setattr(pre_tokenizers, "ByteLevel", lambda **options: original(**options | {"add_prefix_space": True}))


def another_dialogue(monkeypatch):
    changed = bpe.llama3_chat_template().replace("\\n\\n", "\\n")
    for module in ("bpe", "proof"):
        monkeypatch.setattr(f"hf_llama3.conversion.tokenizer.{module}.llama3_chat_template", lambda: changed)


@pytest.mark.parametrize(
    "sabotage", [other_merges, other_specials, no_begin_at_all, other_spelling, added_space, another_dialogue]
)
def test_a_mistake_of_the_conversion_is_seen(sabotage, made, tmp_path, monkeypatch):
    """The code that makes the files is broken on purpose; the proof does not share it."""
    sabotage(monkeypatch)
    monkeypatch.setattr(files, "check_pieces", lambda *_: None)  # which would see it before anything is written
    with pytest.raises(UserError, match="differs from its source in the tokenizer: "):
        convert(made, tmp_path / "hf", instruct=True)


@pytest.mark.parametrize("lost", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_file_that_is_not_carried_is_seen(lost, folder, tmp_path, monkeypatch):
    settings(folder, padding_side="left")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    complete = files.tokenizer_paths
    monkeypatch.setattr(
        files, "tokenizer_paths", lambda path: {name: one for name, one in complete(path).items() if name != lost}
    )
    with pytest.raises(UserError, match="differs from its source in the tokenizer: "):
        convert(folder, tmp_path / "meta")


def test_a_token_at_two_ranks_is_seen(made, tmp_path, monkeypatch):
    """It is refused when it is read; the proof would see it as well, since Meta's code counts it once."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b"abc", b"ab"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (made / "tokenizer.model").write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"must hold each token once, got b'ab' 2 times"):
        convert(made, tmp_path / "hf")
    for module in (bpe, files, meta):
        monkeypatch.setattr(module, "read_ranks", lambda path: tokens)
    with pytest.raises(UserError, match="differs from its source in the tokenizer: ids of "):
        convert(made, tmp_path / "hf")


def no_space_before(monkeypatch):
    build = files.build_sentencepiece

    def without(model):
        tokenizer = build(model)
        tokenizer.normalizer = None
        return tokenizer

    monkeypatch.setattr(files, "build_sentencepiece", without)


def fewer_merges(monkeypatch):
    monkeypatch.setattr(files, "all_merges", lambda ranks: bpe.all_merges(ranks)[:-9])


@pytest.mark.parametrize("sabotage", [no_space_before, fewer_merges])
def test_a_mistake_with_sentencepiece_is_seen(sabotage, sentencepiece_model, tmp_path, monkeypatch):  # noqa: F811
    write_meta(tmp_path / "meta", params(kv_heads=8, vocab=VOCAB), tokenizer=sentencepiece_model)
    sabotage(monkeypatch)
    monkeypatch.setattr(files, "check_pieces", lambda *_: None)  # which would see it before anything is written
    with pytest.raises(UserError, match="differs from its source in the tokenizer: ids of "):
        convert(tmp_path / "meta", tmp_path / "hf")
