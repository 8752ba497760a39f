"""Llama 2 and Code Llama: sentencepiece tokenizer, multi-head attention, an embedding divided by its channels."""

import json
import sys

import pytest
import sentencepiece
import torch
from checkpoints import params, shard, write_meta
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llama3.conversion import convert, inspect, load_meta, verify
from hf_llama3.conversion.formats.gguf import opening
from hf_llama3.conversion.load import load_meta_tokenizer
from hf_llama3.errors import UserError
from hf_llama3.quickstart import python_documentation

TEXTS = [
    *("Hello world", "  two  spaces", " leading", "trailing ", "a\nb\n\nc\t", "", "ÄÖÜ 你好 🦙", "<s> </s>", "\u2581 "),
    python_documentation()[:5000],
]
VOCAB = 512


def train_sentencepiece(folder, **other):
    """Train a small model as Llama 2's was: BPE, bytes as a fallback, digits apart, no normalisation."""
    (folder / "text.txt").write_text(python_documentation()[:200_000])
    settings = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False} | other
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=VOCAB, byte_fallback=True,
        split_digits=True, allow_whitespace_only_pieces=True, minloglevel=2, **settings,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


# Settings of sentencepiece's trainer that no tokenizer.json of ours carries -> what is said
OTHER_SETTINGS = {
    "a table of characters": ({"normalization_rule_name": "nmt_nfkc"}, r"since it changes that to '.*' first"),
    "no space before a text": ({"add_dummy_prefix": False}, "since it changes that to '.*' first"),
    "fewer spaces": ({"remove_extra_whitespaces": True}, "since it changes that to '.*' first"),
    "spaces after words": ({"treat_whitespace_as_suffix": True}, "since it changes that to '.*' first"),
    "another kind": ({"model_type": "unigram"}, "as .*, and no tokenizer.json"),
    "no begin token": ({"bos_id": -1}, "must have the tokens unk_token, bos_token, eos_token, and lacks bos_token"),
}


@pytest.mark.parametrize("case", OTHER_SETTINGS)
def test_other_settings_are_found_in_the_plan(case, tmp_path):
    settings, words = OTHER_SETTINGS[case]
    train_sentencepiece(tmp_path, **settings)
    write_meta(tmp_path / "meta", params(kv_heads=8, vocab=VOCAB), tokenizer=tmp_path / "tokenizer.model")
    for target, options in (("out", {"dry_run": True}), ("out", {"verify": False}), ("out.gguf", {})):
        with pytest.raises(UserError, match=rf"tokenizer.model .*{words}.*; to convert the weights alone, move it"):
            convert(tmp_path / "meta", tmp_path / target, **options)
    assert not list(tmp_path.glob("out*"))
    assert convert(tmp_path / "meta", tmp_path / "two", mp=2).verification.ok  # its bytes cross as they are
    (tmp_path / "meta" / "tokenizer.model").rename(tmp_path / "elsewhere.model")
    assert convert(tmp_path / "meta", tmp_path / "out").verification.ok


@pytest.fixture
def llama2(tmp_path, sentencepiece_model):
    layout = params(kv_heads=8, vocab=VOCAB, rope_theta=10000.0, vocab_size=-1)
    tensors = write_meta(
        tmp_path / "meta", layout | {"vocab_size": VOCAB}, mp=2, embedding_dim=1, tokenizer=sentencepiece_model
    )
    (tmp_path / "meta" / "params.json").write_text(json.dumps(layout))
    return tmp_path / "meta", tensors


def test_ids_are_sentencepieces(llama2, sentencepiece_model, tmp_path):
    convert(llama2[0], tmp_path / "hf")
    ours = AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    for text in TEXTS:
        plain = ours(text)["input_ids"]
        if "<s>" not in text:  # Hugging Face's takes the names of special tokens for these
            assert plain == [1, *theirs.encode(text)], text
            assert ours.decode(plain[1:]) == theirs.decode(theirs.encode(text)), text
    loaded = load_meta_tokenizer(llama2[0])
    assert all(loaded(text)["input_ids"] == ours(text)["input_ids"] for text in TEXTS)


def test_there_and_back(llama2, tmp_path):
    source, tensors = llama2
    info = inspect(source)
    assert (info.llama_version, info.tokenizer, info.config["vocab_size"]) == ("2", "sentencepiece", VOCAB)
    assert (info.config["bos_token_id"], info.config["eos_token_id"]) == (1, 2)
    report = convert(source, tmp_path / "hf")
    assert report.verification.tokenizer == "equal"
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(torch.arange(20)[None]).logits,
        load_meta(source)(torch.arange(20)[None]).logits,
    )
    convert(tmp_path / "hf", tmp_path / "again", mp=2)
    again = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "again").glob("*.pth"))]
    for ours, theirs in zip(again, shard(tensors, 2, embedding_dim=1), strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert verify(source, tmp_path / "again").ok
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("start", ["meta", "hf", "hf without tokenizer.json"])
def test_into_gguf_and_back(start, llama2, tmp_path, monkeypatch):
    """The carried files give tokenizer.model back; pieces and scores alone, as llama.cpp reads them, split alike."""
    convert(llama2[0], tmp_path / "hf")
    source = llama2[0] if start == "meta" else tmp_path / "hf"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    if "without" in start:
        (source / "tokenizer.json").unlink()
    report = convert(source, tmp_path / "model.gguf")
    assert not any("llama.cpp" in note for note in report.notes), report.notes
    convert(tmp_path / "model.gguf", tmp_path / "meta-again", to="meta")
    assert (tmp_path / "meta-again" / "tokenizer.model").read_bytes() == (llama2[0] / "tokenizer.model").read_bytes()
    assert verify(llama2[0], tmp_path / "meta-again").tokenizer == "equal"
    monkeypatch.setattr(opening, "unpack", lambda *_: None)
    convert(tmp_path / "model.gguf", tmp_path / "lists")
    ours = AutoTokenizer.from_pretrained(tmp_path / "lists")
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids and ours.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize("start", ["meta", "hf", "hf without tokenizer.model"])
def test_one_shard_into_two_divides_channels(start, sentencepiece_model, tmp_path):
    """A single shard does not show how shards divide the embedding: the version tells."""
    tensors = write_meta(tmp_path / "meta", params(kv_heads=8, vocab=VOCAB), tokenizer=sentencepiece_model)
    source = tmp_path / "meta"
    if start != "meta":
        convert(source, tmp_path / "hf")
        source = tmp_path / "hf"
    if start == "hf without tokenizer.model":
        (source / "tokenizer.model").unlink()
    assert inspect(source).llama_version == "2"
    convert(source, tmp_path / "two", to="meta", mp=2)
    for rank, expected in enumerate(shard(tensors, 2, embedding_dim=1)):
        written = torch.load(tmp_path / "two" / f"consolidated.{rank:02d}.pth", weights_only=True)
        assert torch.equal(written["tok_embeddings.weight"], expected["tok_embeddings.weight"])


def test_rewriting_keeps_every_tokenizer_file(llama2, tmp_path):
    convert(llama2[0], tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "again", to="hf")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_missing_extra_is_one_sentence(llama2, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # importing it raises
    with pytest.raises(
        UserError, match=r'is a sentencepiece model; to convert or compare it, pip install "hf_llama3\[llama2\]"'
    ):
        convert(llama2[0], tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_code_llama_without_tokenizer(tmp_path):
    """Its infilling tokens make 32016, and its RoPE has a theta of 1e6."""
    write_meta(tmp_path / "meta", params(kv_heads=8, vocab=32016, rope_theta=1e6), mp=2, embedding_dim=1)
    info = inspect(tmp_path / "meta")
    assert info.llama_version == "2" and info.config["max_position_embeddings"] == 16384
    assert info.config["rope_parameters"] == {"rope_theta": 1e6, "rope_type": "default"}
    assert convert(tmp_path / "meta", tmp_path / "hf").verification.ok


@pytest.mark.parametrize(("version", "kind"), [("2", "tiktoken"), ("3.1", "sentencepiece")])
def test_version_against_the_tokenizer(version, kind, llama2, tmp_path):
    if kind == "tiktoken":
        (llama2[0] / "tokenizer.model").write_bytes(b"IQ== 0\n")
    with pytest.raises(UserError, match=f"leave out --llama-version {version}"):
        convert(llama2[0], tmp_path / "hf", llama_version=version)
