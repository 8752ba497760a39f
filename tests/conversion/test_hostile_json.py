"""JSON that no honest tool wrote: refused when it is read, in one short sentence, and nothing appears."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import params, small_tokenizer, write_meta
from command_line import refuse

from hf_llama3.conversion import convert, inspect
from hf_llama3.conversion.config.hf import read_config
from hf_llama3.errors import UserError
from hf_llama3.files.json import MAX_DEPTH, MAX_ITEMS, parse_json
from hf_llama3.presets import llama3_scaling


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of either format; the one of Meta's has two shards and the file beside params.json."""
    home = tmp_path_factory.mktemp("hostile-json")
    write_meta(home / "one", params(vocab=516), tokenizer=small_tokenizer(home))
    convert(home / "one", home / "hf", instruct=True)
    convert(home / "hf", home / "meta", mp=2)
    return home


def change(folders, tmp_path, kind: str, name: str, changes):
    """Copy a folder of `kind` and put changed JSON, or raw bytes, in the place of one file."""
    made = tmp_path / kind
    shutil.copytree(folders / kind, made)
    if isinstance(changes, dict):
        there = folders / kind / name
        changes = json.dumps((json.loads(there.read_text()) if there.exists() else {}) | changes).encode()
    (made / name).write_bytes(changes)
    return made


def refused(source, message):
    for use in (inspect, lambda source: convert(source, source.parent / "out")):
        with pytest.raises(UserError, match=message) as info:
            use(source)
        assert "\n" not in str(info.value) and len(str(info.value)) < 1000
    assert not list(source.parent.glob("out*"))


SCALING = llama3_scaling(8.0)
CASES = [
    ("hf", "config.json", {"bos_token_id": "1"}, "`bos_token_id` .* must be an id, got '1'"),
    ("hf", "config.json", {"bos_token_id": -5}, "`bos_token_id` .*, got -5"),
    ("hf", "config.json", {"bos_token_id": 516}, "`bos_token_id` .* must be below the 516 rows .*, got 516"),
    (
        "hf",
        "config.json",
        {"eos_token_id": [1, 600]},
        r"`eos_token_id` .* must be below the 516 rows .* got \[1, 600\]",
    ),
    ("hf", "config.json", {"bos_token_id": 10**29}, "`bos_token_id` .* must be an id"),
    ("hf", "config.json", {"pad_token_id": [1, 2]}, r"`pad_token_id` .* must be an id, got \[1, 2\]"),
    ("hf", "config.json", {"initializer_range": []}, r"`initializer_range` .* must be a number from 0 .*, got \[\]"),
    ("hf", "config.json", {"tie_word_embeddings": "false"}, "`tie_word_embeddings` .* must be true or false"),
    (
        "hf",
        "config.json",
        {"rope_scaling": SCALING | {"factor": 0.001}},
        "`factor` of the RoPE .* from 1 .*, got 0.001",
    ),
    ("hf", "config.json", {"rope_scaling": SCALING | {"factor": 1e-300}}, "`factor` of the RoPE .*, got 1e-300"),
    ("hf", "config.json", {"rope_scaling": SCALING | {"high_freq_factor": 1}}, "must be below `high_freq_factor`"),
    ("hf", "config.json", {"num_attention_heads": 10**6, "head_dim": None}, "must be at least `num_attention_heads`"),
    (
        "hf",
        "config.json",
        {"x" * 10**6: 1, "vocab_size": "y" * 10**6},
        "`vocab_size` .* must be a positive int, got 'yyy",
    ),
    ("hf", "config.json", b'{"a": %s}' % (b"9" * 4000), "a number must have at most 40 digits, got 4000"),
    ("hf", "config.json", b'{"a": 1e999}', "'1e999' is beyond the largest number"),
    ("hf", "config.json", b'{"a": "\\ud800"}', r"holds half a character"),
    ("hf", "config.json", b'{"a": "\xed\xa0\x80"}', "byte 7 is no utf-8"),
    ("hf", "config.json", b'{"a": %s}' % (b"[" * 950 + b"]" * 950), "nested more than 32 deep"),
    ("hf", "config.json", b'{"%s": 1, "%s": 2}' % (b"k" * 10**6, b"k" * 10**6), "the key 'kkk.* more than once"),
    ("hf", "generation_config.json", {"eos_token_id": "2"}, "`eos_token_id` .*, got '2'"),
    ("hf", "generation_config.json", {"eos_token_id": 516}, "must be below the 516 rows"),
    ("hf", "generation_config.json", {"num_beams": 100000}, "`num_beams` .* from 1 to 64, got 100000"),
    ("hf", "generation_config.json", {"temperature": -1}, "`temperature` .* from 0 .*, got -1"),
    ("hf", "tokenizer_config.json", {"bos_token": 5}, "`bos_token` .* must be a text .*, got 5"),
    ("hf", "tokenizer_config.json", {"chat_template": 7}, "`chat_template` .*, got 7"),
    ("hf", "tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "`added_tokens_decoder` .*"),
    ("hf", "special_tokens_map.json", {"bos_token": [[1]]}, "special_tokens_map.json must be an object"),
    ("hf", "added_tokens.json", {"a": "b"}, "added_tokens.json must be an object"),
    ("hf", "added_tokens.json", b"[" * 100, "is not valid JSON"),
    ("meta", "params.json", {"rope_theta": 1e-300}, "`rope_theta` .* from 1 .*, got 1e-300"),
    ("meta", "params.json", {"dim": [64]}, r"`dim` .* must be a positive int, got \[64\]"),
    ("meta", "huggingface.json", {"num_key_value_heads": 16}, "must be the 4 of params.json, .* got 16"),
    ("meta", "huggingface.json", {"num_key_value_heads": 3}, "must be the 4 of params.json, .* got 3"),
    ("meta", "huggingface.json", {"num_key_value_heads": 0}, "`num_key_value_heads` .* must be a positive int, got 0"),
    ("meta", "huggingface.json", {"config": {"bos_token_id": "1"}}, "`bos_token_id` .*, got '1'; remove the file"),
    ("meta", "huggingface.json", {"config": {"bos_token_id": 516}}, "must be below the 516 rows"),
    ("meta", "huggingface.json", {"generation_config": {"top_p": 7}}, "`top_p` .* from 0 to 1, got 7"),
    ("meta", "huggingface.json", {"special_tokens": ["<a>", "<a>"]}, "name each special token once, got '<a>' twice"),
    (
        "meta",
        "huggingface.json",
        {"special_tokens": ["<a>"]},
        r"must name .* <\|begin_of_text\|>, got \['<a>'\]",
    ),
]


@pytest.mark.parametrize(("kind", "name", "changes", "message"), CASES)
def test_refused_when_read(kind, name, changes, message, folders, tmp_path):
    refused(change(folders, tmp_path, kind, name, changes), message)


def test_bounds_of_structure():
    """Real files are far within them; memory is taken only after they are looked at."""
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    for content, message in (
        (b"[" * (2 * MAX_DEPTH + 1) + b"]" * (2 * MAX_DEPTH + 1), "nested more than"),
        (b"[" + b"{}," * MAX_ITEMS + b"{}]", "must hold at most"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_json(content)
    assert parse_json(b'["' + b"[{," * MAX_ITEMS + b'"]')  # what stands in a text is no structure


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encodings_that_transformers_does_not_read(encoding, folders, tmp_path):
    """As some editors save a file: no command takes a model that `from_pretrained` then refuses."""
    shutil.copytree(folders / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(path.read_text(), encoding)
    for command in (("convert", path.parent, tmp_path / "out"), ("card", path.parent), ("generate", path.parent, "a")):
        assert refuse(*command).endswith(f"config.json is not valid JSON: it is {encoding}; save it as plain utf-8")


def test_what_real_files_hold_is_read(folders, tmp_path):
    """Keys of other tools, null where nothing is said, a limit of 31 digits."""
    there = json.loads((folders / "hf" / "config.json").read_text())
    odd = {"pretraining_tp": 1, "_name": {"a": [1, {"b": None}]}, "pad_token_id": -1, "initializer_range": None}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "attention_factor": None}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(there | odd | {"rope_scaling": yarn}))
    assert read_config(path)["pad_token_id"] == -1 and read_config(path)["initializer_range"] == 0.02
    limit = {"model_max_length": 1000000000000000019884624838656, "bos_token": None}
    assert inspect(change(folders, tmp_path, "hf", "tokenizer_config.json", limit)).format == "hf"


def test_fuzzed_files():
    """Three hundred examples of each file, in a process that may take 5 seconds and 300 MB for one."""
    script = Path(__file__).parent / "fuzz_json.py"
    result = subprocess.run([sys.executable, script, "300"], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.count(" 300\n") == 11, result.stdout + result.stderr[-2000:]
