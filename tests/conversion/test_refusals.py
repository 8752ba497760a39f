"""Refusals that no other test meets: each its sentence, with both values and what to do."""

import json
import os
import shutil
import sys

import gguf
import numpy as np
import pytest
import torch
from checkpoints import SMALL_VOCAB, hf_model, params, shard, small_tokenizer, write_meta
from command_line import refuse
from gguf_files import rope_factors, write_gguf
from safetensors.torch import load_file, save_file
from test_adapter import make
from test_dcp import NAME, plain_folder, saved, weights
from transformers import AutoModelForSequenceClassification

from hf_llama3.conversion import convert, inspect, load_meta
from hf_llama3.conversion import plan_gguf as plans
from hf_llama3.conversion.adapter import crossing
from hf_llama3.conversion.formats.dcp.metadata import MAX_METADATA_BYTES
from hf_llama3.conversion.formats.gguf import carried
from hf_llama3.conversion.load import load_meta_tokenizer
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.conversion.provenance import read_evaluations
from hf_llama3.conversion.tokenizer.bounds import read_tokenizer_file
from hf_llama3.conversion.tokenizer.readings import read_hub_files, read_sentencepiece_model
from hf_llama3.errors import UserError


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def hf(tmp_path):
    hf_model().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": None},
            "`hidden_size` must be at least `num_attention_heads`, got 64 and 128",
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5, "low_freq_factor": 4.0, "high_freq_factor": 1.0} | LLAMA3},
            "`low_freq_factor` of the RoPE in .* must be below `high_freq_factor`, got 4.0 and 1.0",
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5, "low_freq_factor": "1", "high_freq_factor": 4.0} | LLAMA3},
            "`low_freq_factor` of the RoPE in .* must be a positive float, got '1'",
        ),
    ],
)
def test_configurations(change, words, hf):
    edit(hf / "config.json", **change)
    with pytest.raises(UserError, match=words):
        inspect(hf)


def test_added_tokens_that_are_none(hf):
    (hf / "added_tokens.json").write_text('{"<call>": "512"}')
    with pytest.raises(UserError, match=r"added_tokens.json must be an object, each value a whole .*; write it again"):
        inspect(hf)


def test_shards_that_do_not_divide_evenly(tmp_path):
    """A feed-forward of 171 channels, which nobody can halve."""
    layout = params(multiple_of=1, ffn_dim_multiplier=1.01)
    tensors = write_meta(tmp_path / "meta", layout, ffn=172)
    for rank, piece in enumerate(shard(tensors, 2)):
        torch.save(piece, tmp_path / "meta" / f"consolidated.{rank:02d}.pth")
    with pytest.raises(UserError, match=r"2 shards cannot divide .*gate_proj.weight \[171, 64\] evenly"):
        inspect(tmp_path / "meta")


def test_a_shard_without_parts(tmp_path):
    write_meta(tmp_path / "meta", params())
    (tmp_path / "meta" / "consolidated.00.pth").rename(tmp_path / "elsewhere.pth")
    (tmp_path / "meta" / "consolidated.00").mkdir()
    with pytest.raises(UserError, match=r"consolidated.00 holds no .pth file; download the parts of this shard"):
        inspect(tmp_path / "meta")


def change_names(adapter, rename, keep=False):
    path = adapter / "adapter_model.safetensors"
    matrices = load_file(path)
    save_file((matrices if keep else {}) | {rename(name): one.clone() for name, one in matrices.items()}, path)


def test_two_matrices_for_one_weight(tmp_path):
    """Under a name with the model's prefix and one without."""
    base, adapter = make(tmp_path)
    change_names(adapter, lambda name: name.replace("model.layers", "layers"), keep=True)
    with pytest.raises(UserError, match=r"holds two matrices A for model.layers.0.mlp.down_proj.weight; merge it by"):
        convert(base, tmp_path / "merged", to="hf", adapter=adapter)


def test_names_of_both_formats_in_an_adapter(tmp_path):
    base, adapter = make(tmp_path)
    ours, theirs = "model.layers.0.self_attn.q_proj", "layers.0.attention.wq"
    change_names(adapter, lambda name: name.replace(ours, theirs))
    with pytest.raises(UserError, match=r"weights as Meta or as Hugging Face does, got \['hf', 'meta'\]; merge it by"):
        convert(base, tmp_path / "merged", to="hf", adapter=adapter)


def test_a_tokenizer_that_only_transformers_reads(hf):
    (hf / "tokenizer_config.json").write_text("{}")
    assert open_checkpoint(hf).tokenizer is None
    with pytest.raises(UserError, match=r"holds no tokenizer.json; let transformers write one"):
        read_hub_files(hf)


# Hugging Face's and Meta's folders


def test_weights_that_are_missing(hf):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (hf / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"has a config.json but no model.safetensors and no .*index.json; download the"
    ):
        inspect(hf)
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match=r"hf lacks model-00001-of-00001.safetensors, which its index names; download it"
    ):
        inspect(hf)


def test_a_tensor_in_two_files_of_an_index(hf):
    tensors = load_file(hf / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:9]}, hf / "a.safetensors")
    save_file({name: tensors[name] for name in names[8:]}, hf / "b.safetensors")
    files = dict.fromkeys(names[:9], "a.safetensors") | dict.fromkeys(names[9:], "b.safetensors")
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(UserError, match=rf"b.safetensors holds '{names[8]}', which another file holds as well"):
        inspect(hf)


def test_a_model_that_writes_no_text(hf):
    AutoModelForSequenceClassification.from_pretrained(hf).save_pretrained(hf)
    said = "is a LlamaForSequenceClassification, which scores a whole text and writes no text; load it by AutoModelFor"
    assert f"{said}SequenceClassification.from_pretrained('{hf}')" in refuse("generate", hf, "a")


def test_an_embedding_of_another_width(tmp_path):
    write_meta(tmp_path / "meta", params())
    edit(tmp_path / "meta" / "params.json", dim=128)
    with pytest.raises(UserError, match=r"tok_embeddings.weight in .* must have 128 columns over its 1 shards, got "):
        inspect(tmp_path / "meta")


def test_shards_that_divide_no_heads(tmp_path):
    shape = {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96, "head_dim": 8}
    hf_model(**shape).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=r"--mp must divide the 6 key/value heads of .*hf or be a multiple, got 4"):
        convert(tmp_path / "hf", tmp_path / "meta", mp=4)


def test_a_tokenizer_that_is_a_web_page(tmp_path):
    write_meta(tmp_path / "meta", params())
    (tmp_path / "meta" / "tokenizer.model").write_text("<!DOCTYPE html><html>")
    with pytest.raises(UserError, match=r"tokenizer.model is no tokenizer: it is a web page, such as a login or an"):
        inspect(tmp_path / "meta")


def test_a_sentencepiece_model_that_is_none(tmp_path, monkeypatch):
    write_meta(tmp_path / "meta", params(kv_heads=8))
    path = tmp_path / "meta" / "tokenizer.model"
    path.write_bytes(b"\n\xff\xff")
    with pytest.raises(UserError, match=r"tokenizer.model is not a readable sentencepiece model; download it again"):
        convert(tmp_path / "meta", tmp_path / "hf")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # importing it raises
    with pytest.raises(UserError, match=r'is a sentencepiece model; to compare it, pip install "hf_llama3\[llama2\]"'):
        read_sentencepiece_model(path)


def test_loading_what_is_not_metas(hf, tmp_path):
    with pytest.raises(UserError, match=r"hf is a Hugging Face folder; load it with from_pretrained"):
        load_meta(hf)
    write_meta(tmp_path / "meta", params())
    for given in ({"config": 1}, {"state_dict": {}}):
        with pytest.raises(
            UserError, match=r"load_meta reads configuration and weights .*; leave out config and state"
        ):
            load_meta(tmp_path / "meta", **given)
    with pytest.raises(UserError, match=r"meta must hold a tokenizer.model to turn text into tokens; put Meta's there"):
        load_meta_tokenizer(tmp_path / "meta")
    write_gguf(tmp_path / "model.gguf", hf_model(), tokenizer={"ggml.model": "bert"})
    said = (
        r"holds no tokenizer: its kind is 'bert', and only gpt2 \(byte-level BPE\) and llama \(sentencepiece\) become"
    )
    with pytest.raises(UserError, match=said):
        load_meta_tokenizer(tmp_path / "model.gguf")


@pytest.mark.parametrize("content", [{}, {"evaluations": 7}, {"evaluations": [{"loss": "low"}]}])
def test_evaluations_that_are_none(content, hf):
    (hf / "evaluations.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"`\w+` in .*evaluations.json is missing or not what this .*; remove the file"):
        read_evaluations(hf)


# Distributed checkpoints


def test_a_list_of_tensors_that_is_too_large(tmp_path):
    folder = saved(tmp_path, {"model": weights()}, plain_folder(tmp_path))
    os.truncate(folder / ".metadata", MAX_METADATA_BYTES + 1)
    with pytest.raises(UserError, match=rf"metadata must be at most {MAX_METADATA_BYTES} bytes, got"):
        inspect(folder)


def test_a_type_that_no_model_has(tmp_path):
    name = NAME.removeprefix("model.")
    state = weights() | {name: torch.zeros(64, 64, dtype=torch.int8)}
    folder = saved(tmp_path, {"model": state}, plain_folder(tmp_path))
    with pytest.raises(
        UserError, match=r"q_proj.weight' in .* has the type int8; only \['bfloat16', .* can be converted"
    ):
        inspect(folder)


# GGUF


def rename(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new))


def test_heads_that_no_llama_has(tmp_path):
    write_gguf(tmp_path / "model.gguf", hf_model(kv_heads=3))
    with pytest.raises(
        UserError, match=r"heads must be a multiple of key/value heads, and their width .*, got 8, 3 and 8"
    ):
        inspect(tmp_path / "model.gguf")


def test_rope_that_is_scaled_twice(tmp_path):
    linear = ("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 2.0)
    write_gguf(tmp_path / "model.gguf", hf_model(), factors=rope_factors(8.0, 500000.0, 8), more=linear)
    said = r"scales RoPE twice, by rope_freqs.weight and `llama.rope.scaling.type` 'linear'"
    with pytest.raises(UserError, match=said):
        inspect(tmp_path / "model.gguf")


def test_factors_that_are_no_vector(tmp_path):
    write_gguf(tmp_path / "model.gguf", hf_model(), factors=np.ones((2, 4)))
    with pytest.raises(UserError, match=r"rope_freqs.weight in .* must be a vector of f32, got float32 \(2, 4\)"):
        inspect(tmp_path / "model.gguf")


def test_a_model_without_an_embedding(tmp_path):
    write_gguf(tmp_path / "model.gguf", hf_model())
    rename(tmp_path / "model.gguf", b"token_embd.weight", b"token_embx.weight")
    with pytest.raises(UserError, match=r"model.gguf lacks a matrix 'token_embd.weight'; it is no whole model"):
        inspect(tmp_path / "model.gguf")


def test_a_tensor_in_two_parts(tmp_path):
    write_gguf(tmp_path / "model.gguf", hf_model(), split=10)
    rename(tmp_path / "model-00002-of-00003.gguf", b"blk.1.attn_norm", b"blk.0.attn_norm")
    with pytest.raises(UserError, match=r"00003.gguf holds 'blk.0.attn_norm.weight', which another part holds as well"):
        inspect(tmp_path / "model-00001-of-00003.gguf")


LISTS = {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.merges": ["a b"]}


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ({"ggml.tokens": [1, 2]}, "`tokenizer.ggml.tokens` in .* must be 1 to 1048576 texts; download it again"),
        (
            {"ggml.tokens": ["a", "b", "ab", ""], "ggml.token_type": [1, 1, 1, 3]},
            "the token '' in .* must have the id 3, got None",
        ),
    ],
)
def test_lists_of_tokens(lists, words, tmp_path):
    write_gguf(tmp_path / "model.gguf", hf_model(), tokenizer=LISTS | lists)
    with pytest.raises(UserError, match=words):
        inspect(tmp_path / "model.gguf")


def test_texts_that_llama_cpp_splits_otherwise(tmp_path):
    """Said in a note, since the weights can be written all the same."""
    write_meta(tmp_path / "meta", params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(tmp_path))
    convert(tmp_path / "meta", tmp_path / "hf")
    edit(tmp_path / "hf" / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    (tmp_path / "hf" / "SHA256SUMS").unlink()
    notes = convert(tmp_path / "hf", tmp_path / "model.gguf").notes
    said = "llama.cpp will know token ids alone: llama.cpp has no name for how its texts are split: "
    assert any(note.startswith(said) and "Whitespace" in note for note in notes), notes


def test_weights_that_are_no_numbers(hf, tmp_path):
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = torch.inf
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(UserError, match=r"--dtype q8_0 cannot hold inf; choose f32"):
        convert(hf, tmp_path / "model.gguf", dtype="q8_0")
    assert not (tmp_path / "model.gguf").exists()


def test_a_configuration_that_is_not_the_metadatas(hf, tmp_path, monkeypatch):
    other = plans.portable_config
    monkeypatch.setattr(plans, "portable_config", lambda *facts: other(*facts) | {"intermediate_size": 193})
    convert(hf, tmp_path / "model.gguf", verify=False)
    said = (
        r"model.gguf/config.json and the metadata say 193 and 192 of `intermediate_size`; convert the model it was made"
    )
    with pytest.raises(UserError, match=said):
        inspect(tmp_path / "model.gguf")


def test_files_in_a_gguf_that_are_damaged(hf, tmp_path, monkeypatch):
    carry = plans.carry
    monkeypatch.setattr(plans, "carry", lambda *facts: carry(*facts) | {carried.FILES: "{"})
    convert(hf, tmp_path / "model.gguf", verify=False)
    with pytest.raises(UserError, match=r"`huggingface.files` in .*model.gguf is damaged \(.*\); download it again"):
        inspect(tmp_path / "model.gguf")
    large = json.dumps({"texts": {"config.json": "x" * (4 * 2**20 + 1)}, "bytes": {}})
    monkeypatch.setattr(plans, "carry", lambda *facts: carry(*facts) | {carried.FILES: large})
    convert(hf, tmp_path / "model.gguf", verify=False, overwrite=True)
    with pytest.raises(UserError, match=r"'config.json' in .*model.gguf must be at most 4194304 bytes, got 4194305"):
        inspect(tmp_path / "model.gguf")


# Adapters


def test_heads_that_no_rows_fill(tmp_path):
    base, adapter = make(tmp_path)
    shutil.copy(base / "config.json", adapter)
    edit(adapter / "config.json", head_dim=48)
    said = (
        r"adapter_model.safetensors: model.layers.0.self_attn.\w_proj.weight must have a multiple of 48 rows, the width"
    )
    with pytest.raises(UserError, match=said):
        convert(adapter, tmp_path / "meta")


@pytest.mark.parametrize("name", ["crossed", "crossed.gguf"])
def test_a_mistake_in_crossing_is_seen(name, tmp_path, monkeypatch):
    _, adapter = make(tmp_path)
    monkeypatch.setattr(crossing, "reorder", lambda b, *_: b)
    with pytest.raises(UserError, match=r"differs from its source in model.layers.\d.self_attn.\w_proj.weight; please"):
        convert(adapter, tmp_path / name)
    assert not (tmp_path / name).exists()


# A tokenizer.json


def template(single, special=None):
    return {
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special or {}}
    }


def twice(times):
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"normalizer": {"type": "Sequence", "normalizers": [step] * times}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "A" * 2**20}},
            r"the steps in .* must be at most 1048576 characters, got \d+; write it again",
        ),
        (
            twice(11),
            "the normalizer in .* must make at most 1024 characters of one, got 1025; do not trust this folder",
        ),
        (template("$A " * 65), "`single` of the post_processor in .* must be at most 64 pieces; download it again"),
        (template([], {"x": {"id": "x"}}), "the special tokens of the post_processor in .* must be ids; download it"),
    ],
)
def test_steps_of_a_tokenizer(change, words, tmp_path):
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | twice(10)))
    assert read_tokenizer_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | change))
    with pytest.raises(UserError, match=words):
        read_tokenizer_file(tmp_path / "tokenizer.json")
