"""Refusals that no other test meets: each its sentence, with both values and what to do."""

import json

import pytest
import torch
from checkpoints import hf_model, params, shard, write_meta
from safetensors.torch import load_file, save_file
from test_adapter import make

from hf_llama3.conversion import convert, inspect
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.conversion.tokenizer.readings import read_hub_files
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
