"""A configuration that leaves something out, or contradicts itself, means what upstream's class takes it for."""

import json

import pytest
import torch
from checkpoints import hf_model, params, write_meta
from command_line import run
from transformers import AutoConfig, LlamaForCausalLM

from hf_llama3.conversion import convert, inspect, verify
from hf_llama3.errors import UserError
from hf_llama3.presets import llama3_scaling

SCALING = llama3_scaling(8.0)
WITHOUT_ORIGINAL = {key: value for key, value in SCALING.items() if key != "original_max_position_embeddings"}


@pytest.fixture
def folder(tmp_path):
    hf_model().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def edit(folder, change, drop=()):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


# drop, change, a sentence that says what was taken
UNCLEAR = {
    "no context": (["max_position_embeddings"], {}, "`max_position_embeddings` 2048: config.json does not say it"),
    "no epsilon": (["rms_norm_eps"], {}, "`rms_norm_eps` 1e-06: config.json does not say it"),
    "no ids": (["bos_token_id", "eos_token_id"], {}, "`eos_token_id` 2: config.json does not say it"),
    "factor without a switch": (
        ["rope_parameters"],
        {"rope_scaling": {"factor": 8.0}, "rope_theta": 1e4},
        "no `rope_type` says how, so that transformers does not look at `factor`",
    ),
    "two scalings": (
        [],
        {"rope_scaling": SCALING, "rope_parameters": SCALING | {"factor": 32.0, "rope_theta": 1e4}},
        "RoPE: `rope_scaling`, which transformers takes, and not `rope_parameters`, which differs",
    ),
    "two bases": ([], {"rope_theta": 1e4}, "RoPE theta 500000.0: the inner one"),
    "no original context": (
        ["rope_parameters"],
        {"rope_scaling": WITHOUT_ORIGINAL, "rope_theta": 5e5},
        "`original_max_position_embeddings` 8192: as transformers takes it",
    ),
    "original context outside": (
        [],
        {"rope_parameters": SCALING | {"rope_theta": 5e5}, "original_max_position_embeddings": 4096},
        "`original_max_position_embeddings` 4096: as transformers takes it",
    ),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_unclear_means_what_upstream_makes_of_it(case, folder, tmp_path):
    drop, change, sentence = UNCLEAR[case]
    edit(folder, change, drop)
    assert any(sentence in line for line in inspect(folder).inferred), inspect(folder).inferred
    convert(folder, tmp_path / "again", to="hf")
    theirs, ours = (AutoConfig.from_pretrained(path).to_dict() for path in (folder, tmp_path / "again"))
    for key in ("max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id"):
        assert ours[key] == theirs[key], key
    ids = torch.arange(300)[None] % 512
    theirs, ours = (LlamaForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "again"))
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.model.rotary_emb.inv_freq.tolist() == theirs.model.rotary_emb.inv_freq.tolist()


def test_a_context_of_null_is_one_that_is_not_said(folder):
    edit(folder, {"max_position_embeddings": None})  # upstream's class refuses it
    assert inspect(folder).config["max_position_embeddings"] == 2048


def test_what_is_clear_is_not_said(folder):
    assert not [line for line in inspect(folder).inferred if "transformers" in line]


@pytest.mark.parametrize(
    ("ids", "meaning"),
    [
        ({"bos_token_id": [5]}, "`bos_token_id` 5: config.json has a list of 1"),
        ({"pad_token_id": [0]}, "`pad_token_id` 0: config.json has a list of 1"),
        ({"eos_token_id": []}, "`eos_token_id` none: config.json has a list of 0"),
    ],
)
def test_a_list_where_one_id_is_meant(ids, meaning, folder, tmp_path):
    edit(folder, ids)
    assert meaning in inspect(folder).inferred
    convert(folder, tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert all(back[key] == (value[0] if value else None) for key, value in ids.items())
    assert verify(folder, tmp_path / "back").ok


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"bos_token_id": [5, 6]}, r"`bos_token_id` in .* must be an id, got \[5, 6\]; write there which is meant"),
        ({"eos_token_id": ["</s>"]}, r"`eos_token_id` in .* must be an id or a list of them, got \['</s>'\]"),
        ({"pad_token_id": True}, "`pad_token_id` in .* must be an id, got True"),
    ],
)
def test_ids_that_are_none(ids, message, folder):
    edit(folder, ids)
    with pytest.raises(UserError, match=message):
        inspect(folder)


def test_a_factor_without_its_switch_is_asked_for(tmp_path):
    write_meta(tmp_path / "meta", params(rope_scaling_factor=8.0))
    with pytest.raises(UserError, match=r"but not `use_scaled_rope`; add --rope-factor 8 if .*, or --rope-factor 1 if"):
        inspect(tmp_path / "meta")
    plain, scaled = (inspect(tmp_path / "meta", factor).config["rope_parameters"] for factor in (1, 8))
    assert plain == {"rope_theta": 5e5, "rope_type": "default"} and scaled == {"rope_theta": 5e5} | SCALING
    for name, factor in (("plain", 1), ("scaled", 8)):
        convert(tmp_path / "meta", tmp_path / name, rope_factor=factor)
        assert verify(tmp_path / "meta", tmp_path / name).ok


def test_a_switch_that_is_off(tmp_path):
    write_meta(tmp_path / "meta", params(rope_scaling_factor=8.0, use_scaled_rope=False))
    info = inspect(tmp_path / "meta")
    assert info.config["rope_parameters"]["rope_type"] == "default"
    assert "RoPE is not scaled: says `use_scaled_rope`, in spite of `rope_scaling_factor` 8" in info.inferred


def test_a_version_without_evidence_is_said_to_be_unknown(folder, tmp_path):
    edit(folder, {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}})
    assert inspect(folder).llama_version == "unknown"
    assert "Llama unknown: neither tokenizer, vocabulary nor RoPE is a released Llama's" in inspect(folder).inferred
    convert(folder, tmp_path / "meta", mp=2)
    convert(tmp_path / "meta", tmp_path / "back")
    assert verify(folder, tmp_path / "back").ok
    card = run("card", tmp_path / "back", "--license", "mit", "--output", tmp_path / "card.md")
    assert card.returncode == 0
    assert "llama-3" not in (tmp_path / "card.md").read_text() and "a Llama, converted" in (
        (tmp_path / "card.md").read_text()
    )
