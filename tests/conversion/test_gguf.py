"""GGUF files that are read, against llama.cpp's own package and transformers' own reader."""

import json
import shutil
import sys

import gguf
import numpy as np
import pytest
import torch
from checkpoints import SMALL_VOCAB, hf_model, params, plain_folder, small_tokenizer, write_meta
from command_line import refuse, run
from gguf_files import copy_values, name_in_gguf, permuted, rope_factors, write_gguf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_llama3
from hf_llama3.conversion import convert, inspect, verify
from hf_llama3.errors import UserError

IDS = torch.arange(5, 40)[None]
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}


def same_tensors(one, other):
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs
    )


# Exact types


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_exact_types_come_to_the_bit(kind, dtype, tied, tmp_path):
    plain, model = plain_folder(tmp_path, dtype=dtype, tied=tied)
    write_gguf(tmp_path / "model.gguf", model, kind)
    info = inspect(tmp_path / "model.gguf")
    assert (info.format, info.dtypes, info.tied) == ("gguf", [str(dtype).removeprefix("torch.")], tied)
    report = convert(tmp_path / "model.gguf", tmp_path / "hf")
    assert report.target_format == "hf" and report.verification.ok
    assert same_tensors(tmp_path / "hf", plain)
    found = json.loads((tmp_path / "hf" / "config.json").read_text())
    told = json.loads((plain / "config.json").read_text())
    keys = ("rms_norm_eps", "rope_theta", "head_dim", "num_key_value_heads", "max_position_embeddings", "dtype")
    assert [found[key] for key in keys] == [told.get(key, 500000.0) for key in keys]
    convert(tmp_path / "model.gguf", tmp_path / "meta", to="meta", mp=2)
    assert verify(tmp_path / "meta", tmp_path / "model.gguf", logits=True).ok
    with torch.no_grad():
        ours, theirs = hf_llama3.load_meta(tmp_path / "model.gguf"), AutoModelForCausalLM.from_pretrained(plain)
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_transformers_own_reader_agrees(tmp_path):
    """It reorders the rows of queries and keys back, and so must we; grouped heads show it."""
    _, model = plain_folder(tmp_path, dtype=torch.float32)
    tokens = [f"t{index}" for index in range(512)]
    lists = {"ggml.model": "llama", "ggml.tokens": tokens, "ggml.scores": [0.0] * 512, "ggml.token_type": [1] * 512}
    write_gguf(tmp_path / "model.gguf", model, "F32", lists | {"ggml.bos_token_id": 1, "ggml.eos_token_id": 2})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ours = hf_llama3.load_meta(tmp_path / "model.gguf")
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_vectors_that_no_narrow_type_holds_stay_wide(tmp_path):
    _, model = plain_folder(tmp_path)
    wide = model.state_dict()["model.norm.weight"].float() + 1e-7
    model.model.norm.weight = torch.nn.Parameter(wide)
    write_gguf(tmp_path / "model.gguf", model)
    convert(tmp_path / "model.gguf", tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found["model.norm.weight"].dtype == torch.float32 and torch.equal(found["model.norm.weight"], wide)
    assert found["lm_head.weight"].dtype == torch.bfloat16


def test_a_model_that_is_divided(tmp_path):
    plain, model = plain_folder(tmp_path)
    write_gguf(tmp_path / "model.gguf", model, split=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"model-{index:05d}-of-00003.gguf" for index in (1, 2, 3)]
    for given in (*parts, tmp_path):
        assert inspect(given).files == [part.name for part in parts]
    assert convert(parts[1], tmp_path / "hf").verification.ok
    assert same_tensors(tmp_path / "hf", plain)
    parts[2].rename(tmp_path / "model-00003-of-00003.away")
    assert "lacks model-00003-of-00003.gguf, one of 3 parts; download it" in refuse("inspect", parts[0])
    shutil.copy(parts[1], parts[2])
    assert "must be part 2 of 3 by its metadata, got 1 of 3" in refuse("inspect", parts[0])


def test_a_part_under_another_name(tmp_path):
    _, model = plain_folder(tmp_path)
    write_gguf(tmp_path / "model.gguf", model, split=8)
    (tmp_path / "model-00001-of-00003.gguf").rename(tmp_path / "first.gguf")
    assert "is the first of 3 parts with 21 tensors; found 1 with 8" in refuse("inspect", tmp_path / "first.gguf")


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_factor_of_rope(factor, tmp_path):
    rope = LLAMA3 | {"factor": factor}
    plain, model = plain_folder(tmp_path, rope_parameters=rope, head_dim=64)
    write_gguf(tmp_path / "model.gguf", model, factors=rope_factors(factor, 500000.0, 64))
    info = inspect(tmp_path / "model.gguf")
    assert info.config["rope_parameters"] == rope
    assert f"RoPE factor {factor:g}: the frequencies in rope_freqs.weight are divided so" in info.inferred
    convert(tmp_path / "model.gguf", tmp_path / "hf")
    assert verify(plain, tmp_path / "model.gguf", logits=True).ok
    with pytest.raises(UserError, match=r"--rope-factor is for Meta's format: the RoPE of .* stands in it"):
        inspect(tmp_path / "model.gguf", rope_factor=8.0)


def test_factors_of_another_kind(tmp_path):
    _, model = plain_folder(tmp_path)
    write_gguf(tmp_path / "model.gguf", model, factors=[1.0, 2.0, 3.0, 4.0])
    with pytest.raises(UserError, match=r"must hold 4 factors of Llama 3.1's scaling of RoPE, got 4 from 1 to 4"):
        inspect(tmp_path / "model.gguf")


def test_linear_rope_and_another_width_of_heads_and_biases(tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    plain, model = plain_folder(
        tmp_path, rope_parameters=rope, head_dim=32, attention_bias=True, mlp_bias=True, dtype=torch.float32
    )
    more = [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)]
    write_gguf(tmp_path / "model.gguf", model, "F32", more=[*more, ("add_value_length", 32)])
    convert(tmp_path / "model.gguf", tmp_path / "hf")
    assert same_tensors(tmp_path / "hf", plain) and verify(plain, tmp_path / "model.gguf", logits=True).ok


# Quantised


@pytest.mark.parametrize(
    "kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]
)
def test_blocks_are_decoded_as_llama_cpp_decodes_them(kind, tmp_path):
    model = hf_model(dtype=torch.float32, hidden_size=256, intermediate_size=512, head_dim=32)
    write_gguf(tmp_path / "model.gguf", model, kind)
    info = inspect(tmp_path / "model.gguf")
    assert f"quantised tensors, 16 of {kind.lower()}, are given in float32" in info.inferred[0]
    assert convert(tmp_path / "model.gguf", tmp_path / "hf").verification.ok
    found, theirs = load_file(tmp_path / "hf" / "model.safetensors"), copy_values(tmp_path / "model.gguf", kind)
    for name, tensor in found.items():
        ours = permuted(name, tensor, 32).numpy()
        assert np.array_equal(ours, theirs[name_in_gguf(name)]), name
    convert(tmp_path / "model.gguf", tmp_path / "meta", to="meta", mp=2)
    assert verify(tmp_path / "meta", tmp_path / "hf", logits=True).ok
    convert(tmp_path / "model.gguf", tmp_path / "half", dtype="bfloat16")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in found.items())


def test_without_the_package(tmp_path, monkeypatch):
    write_gguf(tmp_path / "q8.gguf", hf_model(), "Q8_0")
    write_gguf(tmp_path / "bf16.gguf", hf_model(), "BF16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert convert(tmp_path / "bf16.gguf", tmp_path / "hf").verification.ok
    with pytest.raises(
        UserError, match=r'q8.gguf is quantised, which takes the package gguf; pip install "hf_llama3\['
    ):
        inspect(tmp_path / "q8.gguf")


# Tokenizers


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A folder of an instruct model with a small tokenizer of Llama 3's kind, made from Meta's files."""
    work = tmp_path_factory.mktemp("instruct")
    write_meta(work / "meta", params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(work))
    convert(work / "meta", work / "hf", instruct=True)
    return work / "hf"


def llama_bpe(folder):
    """The lists that llama.cpp's converter makes of a folder's tokenizer."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    named = sorted([*raw["model"]["vocab"].items(), *((one["content"], one["id"]) for one in raw["added_tokens"])],
                   key=lambda entry: entry[1])  # fmt: skip
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "llama-bpe",
        "ggml.tokens": [name for name, _ in named],
        "ggml.token_type": [1] * len(raw["model"]["vocab"]) + [3] * len(raw["added_tokens"]),
        "ggml.merges": [" ".join(merge) for merge in raw["model"]["merges"]],
        "ggml.bos_token_id": 260,
        "ggml.eos_token_id": 269,
        "chat_template": (folder / "chat_template.jinja").read_text(),
    }


def test_llama_3s_tokenizer(instruct, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(instruct)
    write_gguf(tmp_path / "model.gguf", model, tokenizer=llama_bpe(instruct))
    report = convert(tmp_path / "model.gguf", tmp_path / "hf")
    assert report.verification.tokenizer == "equal"
    assert "metadata that only GGUF has a place for" not in " ".join(report.inferred)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "hf", instruct))
    for text in ("abcd <|eot_id|> 1234567 I'll\n\n  x", "é", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    chat = [{"role": "user", "content": "abc"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    report = verify(instruct, tmp_path / "model.gguf", logits=True)
    assert report.ok and report.tokenizer == "equal"
    convert(tmp_path / "model.gguf", tmp_path / "meta", to="meta")
    made = (tmp_path / "meta" / "tokenizer.model").read_bytes()
    assert made == (instruct.parent / "meta" / "tokenizer.model").read_bytes()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == [261, 269]


def test_digits_one_by_one_and_special_tokens_first(tmp_path):
    """As SmolLM2 has them; a token that is not special, and rows that have no token."""
    characters = [chr(code) for code in range(33, 127)]
    tokens = ["<|start|>", "<|end|>", "<tool>", *characters, "Ġ", "ab", "Ġab", "12", "[PAD1]"]
    types = [3, 3, 4, *[1] * len(characters), 1, 1, 1, 1, 5]
    lists = {"ggml.model": "gpt2", "ggml.pre": "smollm", "ggml.tokens": tokens, "ggml.token_type": types}
    lists |= {"ggml.merges": ["a b", "Ġ ab", "1 2"], "ggml.bos_token_id": 0, "ggml.eos_token_id": 1}
    write_gguf(tmp_path / "model.gguf", hf_model(vocab_size=len(tokens)), tokenizer=lists)
    convert(tmp_path / "model.gguf", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("ab ab12<tool><|end|>")["input_ids"]
    assert [tokens[index] for index in ids] == ["ab", "Ġab", "1", "2", "<tool>", "<|end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab ab12<tool>"
    convert(tmp_path / "model.gguf", tmp_path / "other", overwrite=True)
    assert len(tokenizer) == len(tokens) - 1


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, tmp_path):
    """Scores decide what is made first, wherever a piece stands."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["▁", "a", "b", "c", "bc", "ab", "▁ab"]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *pieces, "<extra>"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4]
    scores = [0.0] * 259 + [-100.0] * 4 + [-3.0, -1.0, -2.0] + [0.0]
    lists = {"ggml.model": "llama", "ggml.tokens": tokens, "ggml.token_type": types, "ggml.scores": scores}
    lists |= {"ggml.bos_token_id": 1, "ggml.eos_token_id": 2, "ggml.unknown_token_id": 0}
    lists |= {} if prefix else {"ggml.add_space_prefix": False}
    write_gguf(tmp_path / "model.gguf", hf_model(vocab_size=len(tokens)), tokenizer=lists)
    convert(tmp_path / "model.gguf", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("abc é<extra>")["input_ids"]
    begin = ["▁ab", "c"] if prefix else ["ab", "c"]
    assert [tokens[index] for index in ids] == ["<s>", *begin, "▁", "<0xC3>", "<0xA9>", "<extra>"]
    assert tokenizer.decode(ids[1:]) == "abc é<extra>"
    assert inspect(tmp_path / "model.gguf").llama_version == "2"


@pytest.mark.parametrize(
    ("lists", "sentence"),
    [
        ({"ggml.model": "t5"}, "its kind is 't5', and only gpt2 (byte-level BPE) and llama (sentencepiece)"),
        ({"ggml.model": "gpt2", "ggml.pre": "tekken"}, "its texts are split as 'tekken', and only llama-bpe, smollm"),
        ({"ggml.model": "gpt2"}, "its texts are split as None"),
    ],
)
def test_a_tokenizer_that_cannot_come_is_said(lists, sentence, tmp_path):
    write_gguf(tmp_path / "model.gguf", hf_model(), tokenizer=lists)
    report = convert(tmp_path / "model.gguf", tmp_path / "hf")
    assert any(sentence in said and "put the original model's tokenizer files" in said for said in report.inferred)
    assert report.verification.ok and not (tmp_path / "hf" / "tokenizer.json").exists()
    assert "holds no tokenizer" in refuse("generate", tmp_path / "model.gguf", "abc")


# As users come


def test_the_way_of_a_user(instruct, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(instruct)
    write_gguf(tmp_path / "model.gguf", model, tokenizer=llama_bpe(instruct), more=[("add_license", "apache-2.0")])
    assert "general.license" in run("inspect", tmp_path / "model.gguf").stdout
    run("convert", tmp_path / "model.gguf", tmp_path / "hf", "--dry-run")
    assert not (tmp_path / "hf").exists()
    run("verify", instruct, tmp_path / "model.gguf", "--logits")
    options = ("abc", "--max-new-tokens", "3", "--temperature", "0", "--json")
    found = json.loads(run("generate", tmp_path, *options).stdout)
    assert found == json.loads(run("generate", instruct, *options).stdout)
    shutil.copy(tmp_path / "model.gguf", tmp_path / "other.gguf")
    assert "holds 2 models in GGUF: model.gguf, other.gguf; pass one of them" in refuse("inspect", tmp_path)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([("add_expert_count", 8)], "`llama.expert_count` in .* must be 0: a mixture of experts is no Llama 3, got 8"),
        ([("add_type", "adapter")], "`general.architecture` in .* must be 'llama', got a file of type 'adapter'"),
        (
            [("add_array", "llama.attention.head_count", [8, 4])],
            "`llama.attention.head_count` in .* must be a positive",
        ),
        (
            [("add_rope_scaling_type", gguf.RopeScalingType.YARN)],
            "scaling.type` in .* must be none or linear, got 'yarn'",
        ),
        ([("add_value_length", 16)], "value_length` in .* must be the heads' width 8, got 16"),
        ([("add_vocab_size", 7)], "says vocab_size 7, but the embedding has 512 rows"),
        ([("add_bos_token_id", 512)], "bos_token_id` in .* must be below the 512 rows of the embedding, got 512"),
        ([("add_block_count", 2**31)], "lacks tensors: 2147483648 layers are configured, and it holds 21 tensors"),
    ],
)
def test_facts_that_no_llama_has(more, sentence, tmp_path):
    model = hf_model()
    write_gguf(tmp_path / "model.gguf", model, more=more)
    with pytest.raises(UserError, match=sentence):
        inspect(tmp_path / "model.gguf")


def test_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "must be 'llama', got 'qwen2'; it is another model" in refuse("inspect", tmp_path / "model.gguf")
