"""The configuration's defaults, derived values, spellings and refusals."""

import inspect
import json

import pytest
from transformers import LlamaConfig

from hf_llama3 import Llama3Config
from hf_llama3.presets import PRESETS, config_of, llama3_scaling

TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def test_defaults_are_llama_3_8b():
    config = Llama3Config()
    assert (config.vocab_size, config.num_key_value_heads, config.max_position_embeddings) == (128256, 8, 8192)
    assert (config.rms_norm_eps, config.head_dim, config.model_type) == (1e-5, 128, "llama3")
    assert config.rope_parameters == {"rope_theta": 500000.0, "rope_type": "default"}
    preset = config_of("3-8B")
    assert {key: getattr(config, key) for key in preset} == preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_configurations(name):
    config = Llama3Config(**config_of(name))
    assert config.hidden_size % config.num_attention_heads == 0
    assert (config.rope_parameters["rope_type"] == "llama3") == (config.max_position_embeddings == 131072)
    assert config.tie_word_embeddings == name.startswith("3.2")


def test_unknown_preset():
    with pytest.raises(KeyError, match=r"must be one of .*'3.2-1B'.*, got '3.2-2B'"):
        config_of("3.2-2B")


def test_every_field_is_documented():
    """By a comment beside it or above it."""
    lines = inspect.getsource(Llama3Config).splitlines()
    for field in Llama3Config.__annotations__:
        [place] = [index for index, line in enumerate(lines) if line.startswith(f"    {field}: ")]
        assert "  # " in lines[place] or lines[place - 1].startswith("    # "), field


def test_omitted_heads():
    assert Llama3Config(num_key_value_heads=None).num_key_value_heads == 32
    assert Llama3Config(**TINY, num_key_value_heads=2).head_dim == 8
    assert Llama3Config(**TINY, num_key_value_heads=2, head_dim=64).head_dim == 64


def test_old_spellings():
    scaling = llama3_scaling(8.0)
    config = Llama3Config(rope_theta=1e6, rope_scaling=scaling, torch_dtype="bfloat16")
    assert config.rope_parameters == {"rope_theta": 1e6} | scaling
    assert str(config.dtype) == "torch.bfloat16"


def test_theta_beside_the_old_spelling():
    """The newer dictionary may hold the theta alone, and the older the scaling, whose own theta counts first."""
    scaling = llama3_scaling(8.0)
    config = Llama3Config(rope_parameters={"rope_theta": 1e6}, rope_scaling=scaling)
    assert config.rope_parameters == {"rope_theta": 1e6} | scaling
    older = {"type": "linear", "factor": 2.0}
    config = Llama3Config(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, rope_scaling=older)
    assert config.rope_parameters["rope_type"] == "linear" and config.rope_parameters["rope_theta"] == 1e6
    config = Llama3Config(rope_parameters={"rope_theta": 1e6}, rope_scaling=scaling | {"rope_theta": 1e4})
    assert config.rope_parameters["rope_theta"] == 1e4
    assert Llama3Config(rope_parameters={"rope_theta": 1e6}, rope_scaling=None).rope_parameters["rope_theta"] == 1e6


def test_key_of_older_folders():
    """Checkpoints of a run with dropout carried its rate, which the training room keeps to itself now."""
    assert Llama3Config.from_dict({"model_type": "llama3", "residual_dropout": 0.2}).residual_dropout == 0.2


def test_caller_keeps_its_dictionary():
    scaling = llama3_scaling(8.0)
    Llama3Config(rope_parameters=scaling)
    Llama3Config.from_dict({"model_type": "llama", "rope_parameters": scaling})
    assert scaling == llama3_scaling(8.0)


def test_saves_and_loads(tmp_path):
    config = Llama3Config(**TINY, num_key_value_heads=2, eos_token_id=[3, 4], rope_parameters=llama3_scaling(32.0))
    config.save_pretrained(tmp_path)
    again = Llama3Config.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.rope_parameters["rope_theta"] == 500000.0


def test_upstream_configuration_keeps_upstream_defaults(tmp_path):
    """What a llama config.json leaves out must not become Llama 3's: theta 10000 is not 500000."""
    sparse = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 32000}
    (tmp_path / "config.json").write_text(json.dumps(sparse))
    for ours in (Llama3Config.from_pretrained(tmp_path), Llama3Config.from_dict(sparse)):
        theirs = LlamaConfig.from_pretrained(tmp_path)
        for key in ("rope_parameters", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "head_dim"):
            assert getattr(ours, key) == getattr(theirs, key), key
        assert ours.model_type == "llama3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, "multiple of `num_key_value_heads`, got 32 and 5"),
        ({"hidden_size": 100, "num_attention_heads": 32}, "multiple of `num_attention_heads`, got 100 and 32"),
        ({"num_attention_heads": 0}, "multiple of `num_attention_heads`, got 4096 and 0"),
        ({"num_key_value_heads": 0}, "multiple of `num_key_value_heads`, got 32 and 0"),
        ({"head_dim": 7}, "`head_dim` must be even, since RoPE turns pairs of channels, got 7"),
        ({"vocab_size": -1}, "`vocab_size` must be positive, got -1"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, r"lacks \['low_freq_factor', 'high_freq_factor'"),
        ({"rope_parameters": llama3_scaling(8.0) | {"low_freq_factor": 4.0}}, "got 4.0 and 4.0"),
        ({"rope_parameters": llama3_scaling(0.5)}, "must be at least 1, got 0.5"),
        ({"rope_parameters": {"rope_type": "foo"}}, r"`rope_type` must be one of \('default', .*\), got 'foo'"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(Exception, match=message):
        Llama3Config(**changes)


def test_missing_original_context_is_not_guessed():
    """The library would take `max_position_embeddings` for it, in silence, and the frequencies would be others."""
    scaling = llama3_scaling(8.0)
    del scaling["original_max_position_embeddings"]
    with pytest.raises(ValueError, match="original_max_position_embeddings"):
        Llama3Config(rope_scaling=scaling)


@pytest.mark.parametrize(
    ("keyword", "nearest"),
    [("num_attention_head", "num_attention_heads"), ("rms_eps", "rms_norm_eps"), ("rope_thet", "rope_theta")],
)
def test_unknown_keyword_warns(keyword, nearest):
    with pytest.warns(UserWarning, match=f"`{keyword}` is not a field of Llama3Config.*did you mean `{nearest}`"):
        Llama3Config(**{keyword: 1})


def test_known_keywords_do_not_warn(recwarn):
    Llama3Config(
        num_labels=3, rope_theta=1e4, torch_dtype="float32", attn_implementation="eager", output_attentions=True,
        architectures=["Llama3ForCausalLM"], id2label={0: "a"}, temperature=0.7, auto_map={}, name_or_path="here",
        residual_dropout=0.1,
    )  # fmt: skip
    assert not recwarn.list
