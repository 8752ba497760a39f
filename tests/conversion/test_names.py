"""Names of tensors as other tools leave them: wrappers' prefixes, tables of RoPE, a head that the index lists."""

import json

import pytest
import torch
from checkpoints import hf_model, meta_tensors, params
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_llama3.conversion import convert, inspect, verify
from hf_llama3.conversion.load import load_checkpoint
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.errors import UserError

PREFIXES = {
    "compiled": "_orig_mod.{}",
    "data parallel": "module.{}",
    "both": "_orig_mod.module.{}",
    "adapted and merged": "base_model.model.{}",
    "compiled, adapted": "_orig_mod.base_model.model.{}",
    "somebody's own": "policy.network.{}",
}


@pytest.fixture
def plain(tmp_path):
    hf_model().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def renamed(plain, rename, extra=()):
    """The folder again, beside it, with other names and more tensors."""
    folder = plain.parent / "renamed"
    folder.mkdir()
    (folder / "config.json").write_bytes((plain / "config.json").read_bytes())
    weights = {rename(name): tensor for name, tensor in load_file(plain / "model.safetensors").items()}
    save_file(weights | dict(extra), folder / "model.safetensors")
    return folder


def ids():
    return torch.arange(5, 40)[None]


@pytest.mark.parametrize("pattern", PREFIXES.values(), ids=PREFIXES)
def test_one_prefix_before_all_names(pattern, plain, tmp_path):
    folder = renamed(plain, pattern.format)
    prefix = pattern.removesuffix("{}")
    assert f"names of tensors without the prefix {prefix!r}, which all have" in inspect(folder).inferred
    assert verify(plain, folder).ok
    assert convert(folder, tmp_path / "meta").verification.ok
    assert verify(tmp_path / "meta", plain).ok
    theirs = AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        ours = load_checkpoint(open_checkpoint(folder))(ids()).logits
        assert torch.equal(ours, theirs(ids()).logits)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.", "model.language_model."),  # the head keeps its name
        ("model.", "model._orig_mod."),
        ("model.", ""),  # a LlamaModel's own names; the head has to stand beside it
        (".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    ],
)
def test_a_part_that_is_wrapped(old, new, plain):
    folder = renamed(plain, lambda name: name.replace(old, new, 1))
    assert verify(plain, folder).ok


def test_metas_names_in_a_wrapper(tmp_path):
    tensors = meta_tensors(params())
    for name, prefix in (("plain", ""), ("wrapped", "_orig_mod.")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "params.json").write_text(json.dumps(params()))
        torch.save({prefix + key: value for key, value in tensors.items()}, tmp_path / name / "consolidated.00.pth")
    assert "names of tensors without the prefix '_orig_mod.', which all have" in inspect(tmp_path / "wrapped").inferred
    assert verify(tmp_path / "plain", tmp_path / "wrapped").ok


@pytest.mark.parametrize("order", ["hf", "meta"])
def test_names_of_the_other_format(order, plain, tmp_path):
    """Rows are reordered by whose names they have, and not by which configuration lies beside them."""
    convert(plain, tmp_path / "meta")
    weights = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    hf, meta = load_file(plain / "model.safetensors"), tmp_path / "meta" / "consolidated.00.pth"
    folder = plain if order == "meta" else tmp_path / "meta"
    if order == "meta":
        save_file(weights, plain / "model.safetensors")
    else:
        torch.save(hf, meta)
        (meta.parent / "checklist.chk").unlink()
    convert(folder, tmp_path / "hf", to="hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in hf.items())
    convert(folder, tmp_path / "again", to="meta")
    written = torch.load(tmp_path / "again" / "consolidated.00.pth", weights_only=True)
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())
    assert verify(folder, tmp_path / "hf", logits=True).ok


def test_two_models_in_one_file_are_not_guessed(plain):
    weights = load_file(plain / "model.safetensors")
    folder = renamed(plain, "policy.{}".format, {f"reference.{name}": one for name, one in weights.items()})
    with pytest.raises(UserError, match=r"lacks 21 tensors: .* and holds 42 unknown tensors: 'policy\."):
        inspect(folder)


def test_a_copy_beside_the_original(plain):
    name = "model.norm.weight"
    folder = renamed(plain, str, {f"module.{name}": torch.zeros(64)})
    with pytest.raises(UserError, match=r"holds 'model.norm.weight' twice, once as '.*'; remove the copy"):
        inspect(folder)


def test_an_adapter_that_is_not_merged(plain):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    folder = renamed(plain, "base_model.model.{}".format, {name: torch.zeros(4, 64)})
    with pytest.raises(UserError, match=r"holds an adapter that is not merged .*lora_A.*; merge it with peft's"):
        inspect(folder)


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.{}.self_attn.rotary_emb.inv_freq"],
        ["model.layers.{}.self_attn.rotary_emb.cos_cached", "model.layers.{}.self_attn.rotary_emb.sin_cached"],
        ["model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"],
    ],
)
def test_tables_of_rope(names, plain, tmp_path):
    tables = {name.format(layer): torch.rand(4) for name in names for layer in range(2)}
    folder = renamed(plain, str, tables)
    tables_said = f"{len(tables)} RoPE tables left out: the configuration says what they hold"
    report = convert(folder, tmp_path / "meta")
    assert tables_said in report.inferred and report.verification.ok
    assert verify(plain, tmp_path / "meta").ok


def test_a_tied_head_that_the_index_lists(tmp_path):
    model = hf_model(tied=True)
    model.save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = content["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(content))
    assert inspect(tmp_path / "hf").tied and convert(tmp_path / "hf", tmp_path / "meta").verification.ok

    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match=r"lacks 1 tensor: 'lm_head.weight'"):
        inspect(tmp_path / "hf")


def test_a_trained_head_beside_the_flag_that_ties_it(plain, tmp_path):
    """transformers 5 keeps such a head; so does every conversion, and it says so."""
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    info = inspect(plain)
    assert not info.tied
    assert "embeddings untied: config.json ties them, but there is a head that differs, which is kept" in info.inferred
    convert(plain, tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "hf")
    head = load_file(plain / "model.safetensors")["lm_head.weight"]
    assert torch.equal(load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"], head)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
