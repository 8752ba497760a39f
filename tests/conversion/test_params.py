"""params.json, config.json and what each leaves out."""

import json

import pytest
from checkpoints import FFN, params
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig

from hf_llama3 import Llama3Config
from hf_llama3.conversion.config.hf import portable_config, read_config
from hf_llama3.conversion.config.params import (
    MissingFlag,
    config_to_params,
    feed_forward_size,
    find_multiplier,
    infer_version,
    params_to_config,
    read_params,
)
from hf_llama3.conversion.config.sidecar import CONFIG_KEYS, SIDECAR, make_sidecar, read_sidecar
from hf_llama3.errors import UserError
from hf_llama3.presets import PRESETS, config_of, llama3_scaling

# multiple_of and ffn_dim_multiplier as llama-models 0.3.0, models/sku_list.py, has them
PUBLISHED = {
    "3-8B": (1024, 1.3),
    "3-70B": (4096, 1.3),
    "3.1-8B": (1024, 1.3),
    "3.1-70B": (4096, 1.3),
    "3.1-405B": (4096, 1.2),
    "3.2-1B": (256, 1.5),
    "3.2-3B": (256, 1.0),
    "3.3-70B": (4096, 1.3),
}


def complete(**changes):
    """A configuration as `read_config` returns it."""
    config = config_of("3.1-8B") | {"rms_norm_eps": 1e-5, "head_dim": 128} | dict.fromkeys(CONFIG_KEYS[1:4]) | changes
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_published_feed_forwards(name):
    preset = PRESETS[name]
    assert feed_forward_size(preset.hidden_size, *PUBLISHED[name]) == preset.intermediate_size
    assert feed_forward_size(preset.hidden_size, *find_multiplier(preset.hidden_size, preset.intermediate_size)) == (
        preset.intermediate_size
    )


@pytest.mark.parametrize("name", ["3-8B", "3-70B", "3.1-405B", "3.2-1B"])
def test_published_multipliers_are_found_as_published(name):
    assert find_multiplier(PRESETS[name].hidden_size, PRESETS[name].intermediate_size) == PUBLISHED[name]


def test_llama_2_7b_has_no_multiplier():
    assert find_multiplier(4096, 11008) == (256, None)


@given(st.integers(1, 2**15), st.integers(1, 2**17))
def test_every_feed_forward_has_a_multiplier(dim, size):
    assert feed_forward_size(dim, *find_multiplier(dim, size)) == size


@pytest.mark.parametrize("name", PRESETS)
def test_to_params_and_back(name, tmp_path):
    config = complete(**config_of(name))
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    written = config_to_params(config, tmp_path, config["num_key_value_heads"])
    (tmp_path / "params.json").write_text(json.dumps(written))
    again, inferred = params_to_config(read_params(tmp_path / "params.json"), tmp_path, config["vocab_size"])
    assert again == {key: config[key] for key in again}
    assert any("RoPE factor" in sentence for sentence in inferred) == (PRESETS[name].rope_factor is not None)
    assert ("use_scaled_rope" in written) == (PRESETS[name].rope_factor is not None)  # 3.0's readers do not know it


def test_unreleased_shape_asks_for_the_factor(tmp_path):
    scaled = params(use_scaled_rope=True)
    with pytest.raises(MissingFlag, match=r"2 layers of 64 are no released model; add --rope-factor"):
        params_to_config(scaled, tmp_path, 512)
    config, _ = params_to_config(scaled, tmp_path, 512, given_factor=32)
    assert config["rope_parameters"] == {"rope_theta": 500000.0} | llama3_scaling(32)


def test_factor_is_taken_from_the_first_that_says_it(tmp_path):
    scaled = params(use_scaled_rope=True, rope_scaling_factor=16.0)
    for user, kept, factor in ((4.0, 8.0, 4.0), (None, 8.0, 8.0), (None, None, 16.0)):
        assert params_to_config(scaled, tmp_path, 512, user, kept)[0]["rope_parameters"]["factor"] == factor
    with pytest.raises(UserError, match=r"does not scale RoPE .* leave out --rope-factor 4"):
        params_to_config(params(), tmp_path, 512, given_factor=4.0)


def test_released_shapes_have_their_factor(tmp_path):
    for name, factor in (("3.1-8B", 8), ("3.2-1B", 32), ("3.2-3B", 32), ("3.3-70B", 8)):
        preset = PRESETS[name]
        shape = params(preset.hidden_size, preset.num_hidden_layers, preset.num_attention_heads, 8, 128256)
        config, _ = params_to_config(shape | {"use_scaled_rope": True}, tmp_path, 128256)
        assert config["rope_parameters"]["factor"] == factor
        assert config["max_position_embeddings"] == 131072


@pytest.mark.parametrize(
    ("vocab", "scaled", "theta"),
    [(32000, False, 10000.0), (512, False, 10000.0), (128256, False, 5e5), (512, True, 5e5)],
)
def test_a_file_without_theta(vocab, scaled, theta, tmp_path):
    """Meta's readers of Llama 2 and of Llama 3 have defaults of their own."""
    layout = params(vocab=vocab, use_scaled_rope=scaled)
    del layout["rope_theta"]
    config, inferred = params_to_config(layout, tmp_path / "params.json", vocab, given_factor=8.0 if scaled else None)
    assert config["rope_parameters"]["rope_theta"] == theta
    said = "RoPE theta 500,000: params.json does not say it, and Llama 3's reader takes that"
    assert (said in inferred) == (theta == 5e5)


def test_llama_2_says_minus_one(tmp_path):
    llama2 = {"dim": 64, "multiple_of": 32, "n_heads": 8, "n_layers": 2, "norm_eps": 1e-6, "vocab_size": -1}
    (tmp_path / "params.json").write_text(json.dumps(llama2))
    config, _ = params_to_config(read_params(tmp_path / "params.json"), tmp_path, 32000)
    assert (config["vocab_size"], config["num_key_value_heads"]) == (32000, 8)
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert config["max_position_embeddings"] == 4096


BAD_PARAMS = [
    ({"quantization_args": {"scheme": "int4"}}, r"describes quantised weights \(.*; take the same model in bfloat16"),
    ({"lora_args": {"rank": 16, "scale": 2.0}}, "describes weights with LoRA adapters"),
    ({"vision_chunk_size": 448}, "describes a vision model"),
    ({"vision_model": {"layers": 2}}, "describes a vision model"),
    ({"moe_args": {"num_experts": 16}}, "describes a mixture of experts"),
    ({"dim": "64"}, "`dim` .* must be a positive int, got '64'"),
    ({"dim": -64}, "`dim` .* must be a positive int, got -64"),
    ({"n_layers": 2.5}, "`n_layers` .* must be a positive int, got 2.5"),
    ({"n_layers": True}, "`n_layers` .* must be a positive int, got True"),
    ({"norm_eps": "1e-5"}, "`norm_eps` .* must be a positive float, got '1e-5'"),
    ({"use_scaled_rope": 1}, "`use_scaled_rope` .* must be true or false, got 1"),
    ({"dim": None}, "lacks `dim`; it is not the params.json of a Llama"),
    ({"rope_mystery": 3}, r"holds \['rope_mystery'\], which no Llama of Meta's has"),
]


@pytest.mark.parametrize(("change", "message"), BAD_PARAMS)
def test_bad_params(change, message, tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(params() | change))
    with pytest.raises(UserError, match=message):
        read_params(tmp_path / "params.json")


def test_contradictory_params(tmp_path):
    with pytest.raises(UserError, match="says vocab_size 512, but the embedding has 640 rows"):
        params_to_config(params(), tmp_path, 640)
    with pytest.raises(UserError, match="got 64, 8 and 3"):
        params_to_config(params(kv_heads=3), tmp_path, 512)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>", "is not valid JSON: it is a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is not valid JSON: it is a git-lfs pointer; run `git lfs pull`",
        ),
        (b"", "is not valid JSON: it is empty"),
        (b"{", "is not valid JSON"),
        (b"[1]", "must hold a JSON object, got list"),
        (b'{"dim": NaN}', "NaN is not a number"),
        (b'{"dim": Infinity}', "Infinity is not a number"),
        (b'{"dim": 1, "dim": 2}', "the key 'dim' stands more than once"),
        (b"[" * 100000, "is not valid JSON"),
    ],
)
def test_broken_downloads(content, message, tmp_path):
    (tmp_path / "params.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_params(tmp_path / "params.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 64}, "got 64 x 32 and 4096"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "Meta's format knows plain RoPE .*; --to hf keeps it",
        ),
        ({"rope_parameters": {"rope_theta": 5e5} | llama3_scaling(8) | {"low_freq_factor": 2.0}}, "plain RoPE and"),
    ],
)
def test_what_metas_format_cannot_say(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        config_to_params(complete(**changes), tmp_path, 8)


# config.json


def save(path, **changes):
    config = complete(**changes)
    (path / "config.json").write_text(json.dumps(portable_config(config, "bfloat16", "llama")))
    return path / "config.json"


def test_portable_config_holds_both_spellings(tmp_path):
    save(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    scaling = llama3_scaling(8.0)
    assert raw["rope_theta"] == 500000.0 and raw["rope_scaling"] == scaling
    assert raw["rope_parameters"] == {"rope_theta": 500000.0} | scaling
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is LlamaConfig and theirs.rope_parameters == {"rope_theta": 500000.0} | scaling
    assert Llama3Config.from_pretrained(tmp_path).rope_parameters == theirs.rope_parameters


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, llama3_scaling(8.0)], ids=["plain", "scaled"])
def test_every_spelling_is_read_alike(rope, tmp_path):
    path = save(tmp_path, rope_parameters={"rope_theta": 500000.0} | rope)
    both = read_config(path)
    raw = json.loads(path.read_text())
    old = {key: value for key, value in raw.items() if key != "rope_parameters"}
    new = {key: value for key, value in raw.items() if key not in ("rope_theta", "rope_scaling")}
    oldest = json.loads(json.dumps(old).replace("rope_type", "type"))
    for spelling in (old, new, oldest):
        path.write_text(json.dumps(spelling))
        assert read_config(path) == both


def test_sparse_llama_config_means_upstreams_defaults(tmp_path):
    sparse = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sparse))
    ours, theirs = read_config(tmp_path / "config.json"), LlamaConfig.from_pretrained(tmp_path)
    for key, value in ours.items():
        if key not in ("bos_token_id", "eos_token_id"):
            assert getattr(theirs, key) == value, key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mllama"}, r"must be one of \['llama', 'llama3'\], got 'mllama' \(a vision model\)"),
        ({"model_type": "llama4"}, r"got 'llama4' \(Llama 4\)"),
        ({"model_type": "bert"}, "got 'bert'"),
        ({"quantization_config": {"bits": 4}}, "describes quantised weights"),
        ({"hidden_act": "gelu"}, "must be 'silu' as in every Llama, got 'gelu'"),
        ({"hidden_size": "4096"}, "`hidden_size` .* must be a positive int, got '4096'"),
        ({"vocab_size": 0}, "`vocab_size` .* must be a positive int, got 0"),
        ({"rms_norm_eps": None}, "`rms_norm_eps` .* must be a positive float, got None"),
        ({"num_key_value_heads": 5}, "multiple of `num_key_value_heads`, got 32 and 5"),
        ({"head_dim": 7}, "`head_dim` .* must be even"),
        ({"num_attention_heads": "8"}, "`num_attention_heads` .* must be a positive int, got '8'"),
        ({"model_type": []}, r"must be one of .*, got \[\]"),
        ({"rope_scaling": [1]}, r"must be a JSON object, got \[1\]"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "`low_freq_factor` of the RoPE .* got None"),
        ({"rope_scaling": llama3_scaling("8")}, "`factor` of the RoPE .* must be a number from 1 to .*, got '8'"),
        (
            {"rope_scaling": None, "rope_parameters": None, "rope_theta": -1},
            "`rope_theta` in .* must be a number from 1 to .*, got -1",
        ),
    ],
)
def test_bad_config(changes, message, tmp_path):
    path = save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        read_config(path)


# The file beside params.json


def test_sidecar_keeps_what_params_cannot_say(tmp_path):
    config = complete(max_position_embeddings=1234, eos_token_id=[1, 2])
    made = make_sidecar(config, {"pretraining_tp": 1}, {"do_sample": True}, True, ["<|a|>"], "template", "hash")
    (tmp_path / SIDECAR).write_text(json.dumps(made))
    read = read_sidecar(tmp_path)
    assert read == json.loads(json.dumps(made))
    assert read["config"]["max_position_embeddings"] == 1234 and read["rope_factor"] == 8.0
    assert read_sidecar(tmp_path / "elsewhere") == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruct": "yes"}, "`instruct` .* must be true or false, got 'yes'"),
        ({"config": {"hidden_size": 1}}, r"holds \['hidden_size'\], which params.json decides"),
        ({"special_tokens": [1]}, "`special_tokens` .* must be a list of at most"),
        ({"more_config": {"rope_theta": 1.0}}, r"`more_config` .* holds \['rope_theta'\], which stand elsewhere"),
    ],
)
def test_bad_sidecar(change, message, tmp_path):
    made = make_sidecar(complete(), {}, None, False, None, None, None)
    (tmp_path / SIDECAR).write_text(json.dumps(made | change))
    with pytest.raises(UserError, match=message):
        read_sidecar(tmp_path)


@pytest.mark.parametrize(
    ("family", "vocab", "rope", "version"),
    [
        ("3", 128256, {"rope_type": "default"}, "3.0"),
        ("3", 128256, llama3_scaling(8.0), "3.1"),
        ("3", 32000, {"rope_type": "default"}, "3.0"),
        (None, 128256, llama3_scaling(32.0), "3.2"),
        ("2", 1000, {"rope_type": "default"}, "2"),
        (None, 32016, {"rope_type": "default"}, "2"),
        (None, 512, {"rope_type": "default"}, "3.0"),
        ("other", 512, {"rope_type": "default"}, "unknown"),
        ("other", 32000, {"rope_type": "default"}, "unknown"),
        ("other", 128256, {"rope_type": "default"}, "3.0"),
        ("other", 512, llama3_scaling(8.0), "3.1"),
        (None, 512, {"rope_type": "default", "rope_theta": 1e5}, "unknown"),
    ],
)
def test_version(family, vocab, rope, version, tmp_path):
    rope = {"rope_theta": 500000.0} | rope
    assert infer_version(complete(vocab_size=vocab, rope_parameters=rope), family, None, tmp_path)[0] == version


def test_version_is_not_what_the_user_says_where_the_tokenizer_says_otherwise(tmp_path):
    assert infer_version(complete(), "3", "3.3", tmp_path) == ("3.3", "given by --llama-version")
    with pytest.raises(UserError, match=r"the tokenizer of .* is Llama 3's; leave out --llama-version 2"):
        infer_version(complete(), "3", "2", tmp_path)


def test_feed_forward_of_the_test_checkpoints():
    assert feed_forward_size(64, 32, 1.1) == FFN
