"""Templates and settings from a model's folder: bounded, followed where they can be, and told in a sentence."""

import json
import resource
import shutil

import pytest
import torch
from checkpoints import hf_model
from command_line import call, refuse, run

from hf_llama3.text.template import TooLong, limited_memory, limited_time
from hf_llama3.training.tokenizer import tiktoken_tokenizer, train_bpe

TEXT = "The quick brown fox jumps over the lazy dog. " * 400


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "hf"
    tokenizer = tiktoken_tokenizer(train_bpe([TEXT], 600), context=64)
    hf_model(**tokenizer.vocabulary, max_position_embeddings=64, dtype=torch.float32).save_pretrained(folder)
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def hf(made, tmp_path):
    return shutil.copytree(made, tmp_path / "hf")


def generate(folder):
    return "generate", folder, "fox", "--max-new-tokens", 3


TEMPLATES = {
    "raises": "{{ raise_exception('no') }}",
    "damaged": "{% for",
    "undefined": "{{ foo.bar.baz }}",
    "escapes": "{{ ''.__class__.__mro__ }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops and prints": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "long": "{{ 'x' * 3000000000 }}",
    "doubles": "{% set n = namespace(a='xxx') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}{{ n.a }}",
    "squares": "{% set n = namespace(a=7) %}{% for i in range(60) %}{% set n.a = n.a * n.a %}{% endfor %}{{ n.a }}",
    "wide": "{{ 'a'.center(2000000000) }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "includes": "{% include '/etc/passwd' %}",
    "too many characters": "{{ 'x' * 5000000 }}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates(case, hf):
    (hf / "chat_template.jinja").write_text(TEMPLATES[case])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    message = refuse(*generate(hf))
    assert "the chat template of" in message and "cannot be applied (" in message and "mend it, or remove it" in message
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_a_template_that_is_none(hf):
    (hf / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert "fox" in run(*generate(hf)).stdout


def test_limits():
    with pytest.raises(TooLong), limited_time(0.2):
        while True:
            pass
    with pytest.raises(MemoryError), limited_memory(10**8):
        bytearray(2 * 10**8)
    assert len(bytearray(2 * 10**8)) == 2 * 10**8


SETTINGS = {
    "num_return_sequences": 4,
    "num_beams": 4,
    "return_dict_in_generate": True,
    "output_scores": True,
    "stop_strings": ["a"],
    "penalty_alpha": 0.6,
    "custom_generate": "nobody/code",
    "prompt_lookup_num_tokens": 5,
    "watermarking_config": {"greenlist_ratio": 0.5},
    "forced_eos_token_id": 10**6,
    "sequence_bias": {"a": 1},
    "cache_implementation": "offloaded",
    "exponential_decay_length_penalty": "x",
    "token_healing": True,
}


def settle(folder, **settings):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_that_are_not_followed(setting, hf):
    plain = run(*generate(hf)).stdout
    settle(hf, **{setting: SETTINGS[setting]})
    code, out, err = call(*generate(hf))
    if code == 2:  # the library does not take it
        assert "cannot be loaded: " in err and "Traceback" not in err
        return
    assert code == 0 and out == plain
    noted = f"Note: the settings {setting} in {hf}/generation_config.json are not followed" in err
    unsaid = ("cache_implementation", "custom_generate", "output_scores", "return_dict_in_generate")  # no other text
    assert noted or setting in unsaid


def test_settings_that_are_followed(hf):
    first = json.loads(run(*generate(hf), "--json").stdout)[0]["token_ids"][0]
    settle(hf, suppress_tokens=[first])
    assert json.loads(run(*generate(hf), "--json").stdout)[0]["token_ids"][0] != first


BEYOND = {
    "num_beams": 100_000,
    "num_return_sequences": 1000,
    "eos_token_id": "x",
    "suppress_tokens": [10**6],
    "begin_suppress_tokens": [600],
    "bad_words_ids": [[1, 10**6]],
    "repetition_penalty": 0,
    "pad_token_id": 10**6,
}


@pytest.mark.parametrize("setting", BEYOND)
def test_settings_that_nobody_can_follow(setting, hf):
    settle(hf, **{setting: BEYOND[setting]})
    assert f"`{setting}` in {hf}/generation_config.json must be" in refuse(*generate(hf))
