"""There and back, bit for bit, for every layout of heads, tied or not, at any number of shards."""

import json

import pytest
import torch
from checkpoints import (
    SMALL_VOCAB,
    hf_model,
    meta_tensors,
    params,
    real_tokenizer,
    shard,
    small_tokenizer,
    write_meta,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llama3.conversion import convert, inspect, load_meta, verify
from hf_llama3.conversion.load import LazyTensor
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.presets import config_of, llama3_scaling

HEADS = {"multi-head": 8, "grouped-query": 4, "multi-query": 1}


def load_hf(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def load_shards(folder):
    return [torch.load(path, weights_only=True, mmap=True) for path in sorted(folder.glob("*.pth"))]


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("mp", [1, 2, 4, 8])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_hugging_face_to_meta_and_back(heads, tied, mp, tmp_path):
    hf_model(kv_heads=HEADS[heads], tied=tied).save_pretrained(tmp_path / "hf")
    written = convert(tmp_path / "hf", tmp_path / "meta", mp=mp)
    assert written.verification.ok and len(load_shards(tmp_path / "meta")) == mp
    assert convert(tmp_path / "meta", tmp_path / "again").verification.ok
    equal(load_hf(tmp_path / "again"), load_hf(tmp_path / "hf"))
    assert verify(tmp_path / "hf", tmp_path / "again").ok
    assert inspect(tmp_path / "again").tied is tied
    first, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again"))
    assert {key: again[key] for key in first.keys() - {"transformers_version", "pretraining_tp"}} == {
        key: value for key, value in first.items() if key not in ("transformers_version", "pretraining_tp")
    }


@pytest.mark.parametrize("mp", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", ["multi-head", "grouped-query"])
def test_meta_to_hugging_face_and_back(heads, mp, tmp_path):
    """Shards that torch cut: the way back, into as many, is what torch cut."""
    layout = params(kv_heads=8 if mp == 8 else HEADS[heads])
    tensors = write_meta(tmp_path / "meta", layout, mp=mp)
    convert(tmp_path / "meta", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "again", mp=mp)
    for ours, theirs in zip(load_shards(tmp_path / "again"), shard(tensors, mp), strict=True):
        equal(ours, theirs)


@pytest.mark.parametrize(("start", "end"), [(1, 4), (4, 1), (2, 4), (4, 2), (2, 2)])
def test_into_another_number_of_shards(start, end, tmp_path):
    tensors = write_meta(tmp_path / "meta", params(), mp=start)
    convert(tmp_path / "meta", tmp_path / "other", to="meta", mp=end)
    for ours, theirs in zip(load_shards(tmp_path / "other"), shard(tensors, end), strict=True):
        equal(ours, theirs)


def test_more_shards_than_key_value_heads(tmp_path):
    """As Meta's 405B for 16 shards: each head is stored for every shard that needs it, and folded on the way back."""
    tensors = write_meta(tmp_path / "meta", params(kv_heads=2), mp=2)
    report = convert(tmp_path / "meta", tmp_path / "wide", to="meta", mp=8)
    assert "each of the 2 key/value heads is stored 4 times, once for every shard" in report.notes
    assert json.loads((tmp_path / "wide" / "params.json").read_text())["n_kv_heads"] == 8
    key = "layers.0.attention.wk.weight"
    shards = load_shards(tmp_path / "wide")
    assert all(torch.equal(shards[rank][key], tensors[key][rank // 4 * 8 : rank // 4 * 8 + 8]) for rank in range(8))
    info = inspect(tmp_path / "wide")
    assert info.config["num_key_value_heads"] == 2
    assert "2 key/value heads: each is stored 4 times" in info.inferred
    convert(tmp_path / "wide", tmp_path / "hf")
    assert verify(tmp_path / "meta", tmp_path / "hf").ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_type_is_kept(dtype, tmp_path):
    hf_model(dtype=dtype).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", mp=2)
    convert(tmp_path / "meta", tmp_path / "again")
    equal(load_hf(tmp_path / "again"), load_hf(tmp_path / "hf"))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(dtype)[6:]


def test_several_files(tmp_path):
    hf_model().save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    convert(tmp_path / "hf", tmp_path / "meta")
    report = convert(tmp_path / "meta", tmp_path / "again", max_shard_size="50KB")
    equal(load_hf(tmp_path / "again"), load_hf(tmp_path / "hf"))
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {name for name in report.files if name.endswith(".safetensors")}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_hf(tmp_path / "hf").values())
    sizes = [size for name, size in report.files.items() if name.endswith(".safetensors")]
    assert len(sizes) > 2 and all(size < 80_000 for size in sizes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    equal(model.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict())


def test_llama_2_shards_divide_the_embeddings_channels(tmp_path):
    layout = params(vocab=32000, kv_heads=8, rope_theta=10000.0)
    tensors = write_meta(tmp_path / "meta", layout, mp=2, embedding_dim=1)
    info = inspect(tmp_path / "meta")
    assert (info.llama_version, info.num_shards) == ("2", 2)
    convert(tmp_path / "meta", tmp_path / "hf")
    assert torch.equal(load_hf(tmp_path / "hf")["model.embed_tokens.weight"], tensors["tok_embeddings.weight"])
    convert(tmp_path / "hf", tmp_path / "again", mp=2)
    for ours, theirs in zip(load_shards(tmp_path / "again"), shard(tensors, 2, embedding_dim=1), strict=True):
        equal(ours, theirs)


def test_real_tokenizer_there_and_back(tmp_path):
    """The chain of the README on 128,256 tokens: convert, convert back, verify."""
    tensors = write_meta(tmp_path / "meta", params(vocab=128256), mp=2, tokenizer=real_tokenizer())
    report = convert(tmp_path / "meta", tmp_path / "hf")
    assert report.verification.tokenizer == "equal"
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (128000, 128001)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (128000, 128001)
    convert(tmp_path / "hf", tmp_path / "again", mp=2)
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == real_tokenizer().read_bytes()
    report = verify(tmp_path / "meta", tmp_path / "again").to_dict()
    assert report["ok"] and report["tokenizer"] == "equal" and report["differences"] == []
    assert (report["tensors"], report["bytes"]) == (len(tensors), sum(tensor.nbytes for tensor in tensors.values()))


def test_instruct_gets_stop_tokens_and_template(tmp_path):
    layout = params(vocab=SMALL_VOCAB, use_scaled_rope=True)
    write_meta(tmp_path / "meta", layout, tokenizer=small_tokenizer(tmp_path))
    convert(tmp_path / "meta", tmp_path / "hf", instruct=True, rope_factor=8)
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [261, 268, 269] and generation["pad_token_id"] == 264
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token == "<|eot_id|>" and tokenizer.chat_template
    assert inspect(tmp_path / "hf").instruct
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.save_pretrained(tmp_path / "saved")
    # the way back forgets nothing of it
    convert(tmp_path / "hf", tmp_path / "again")
    info = inspect(tmp_path / "again")
    assert info.instruct and info.config["rope_parameters"] == {"rope_theta": 500000.0} | llama3_scaling(8)
    convert(tmp_path / "again", tmp_path / "hf2")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf2" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


def test_own_type_carries_its_code(tmp_path):
    write_meta(tmp_path / "meta", params())
    report = convert(tmp_path / "meta", tmp_path / "hf", model_type="llama3")
    assert {"configuration_llama3.py", "modeling_llama3.py", "rotary.py"} <= report.files.keys()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "llama3" and config["auto_map"]["AutoModel"] == "modeling_llama3.Llama3Model"
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")).__name__ == "Llama3ForCausalLM"
    assert verify(tmp_path / "meta", tmp_path / "hf").ok


def test_portable_folder_is_upstreams(tmp_path):
    write_meta(tmp_path / "meta", params())
    convert(tmp_path / "meta", tmp_path / "hf")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")).__name__ == "LlamaForCausalLM"


def test_rope_freqs_are_left_out(tmp_path):
    tensors = meta_tensors(params()) | {"rope.freqs": torch.zeros(4)}
    (tmp_path / "meta").mkdir()
    torch.save(tensors, tmp_path / "meta" / "consolidated.00.pth")
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params()))
    convert(tmp_path / "meta", tmp_path / "hf")
    assert "rope.freqs" not in load_hf(tmp_path / "hf")


def test_released_geometry_of_one_layer(tmp_path):
    """The shapes of Llama 3.2 1B, tied, with one of its layers: the head count, the width and the factor are real."""
    preset = config_of("3.2-1B") | {"vocab_size": 1024, "num_hidden_layers": 1}
    tied = preset.pop("tie_word_embeddings")
    hf_model(preset.pop("num_attention_heads"), preset.pop("num_key_value_heads"), tied, **preset).save_pretrained(
        tmp_path / "hf"
    )
    convert(tmp_path / "hf", tmp_path / "meta", mp=8)
    written = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert (written["multiple_of"], written["ffn_dim_multiplier"], written["use_scaled_rope"]) == (256, 1.5, True)
    convert(tmp_path / "meta", tmp_path / "again")
    equal(load_hf(tmp_path / "again"), load_hf(tmp_path / "hf"))


@pytest.mark.parametrize("mp", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_load_meta(mp, tied, tmp_path):
    write_meta(tmp_path / "meta", params(), mp=mp, tied=tied)
    convert(tmp_path / "meta", tmp_path / "hf")
    ours, theirs = load_meta(tmp_path / "meta"), AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(ours).__name__ == "Llama3ForCausalLM" and ours.dtype == torch.bfloat16
    equal(ours.state_dict(), theirs.state_dict())
    prompt = torch.arange(20)[None]
    assert torch.equal(ours(prompt).logits, theirs(prompt).logits)
    assert load_meta(tmp_path / "meta", dtype=torch.float32).dtype == torch.float32


def test_loaded_weights_can_be_trained_without_touching_the_files(tmp_path):
    write_meta(tmp_path / "meta", params())
    before = (tmp_path / "meta" / "consolidated.00.pth").read_bytes()
    model = load_meta(tmp_path / "meta")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert (tmp_path / "meta" / "consolidated.00.pth").read_bytes() == before


def test_a_part_of_a_tensor(tmp_path):
    """What a process asks for is that part of the whole, wherever it is cut: in a shard, across them, in a head."""
    write_meta(tmp_path / "meta", params(), mp=2)
    checkpoint = open_checkpoint(tmp_path / "meta")
    for row in checkpoint.own_rows:
        lazy = LazyTensor(checkpoint, row)
        whole = lazy[...]
        assert list(whole.shape) == lazy.get_shape()
        for start, stop in ((0, 7), (3, 29), (16, 32), (30, 33), (31, 64), (5, 5), (0, 10**6)):
            for axis in range(whole.ndim):
                index = tuple(slice(start, stop) if axis == cut else slice(None) for cut in range(whole.ndim))
                assert torch.equal(lazy[index], whole[index]), (row.hf, index)
