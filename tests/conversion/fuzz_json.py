"""Valid JSON files with one thing changed, given to their readers: `python fuzz_json.py EXAMPLES [READER ...]`.

Runs in a process of its own that may take 5 seconds for a file and 300 MB more than it began with: whatever the file
holds, the answer is a value or a sentence. Prints the number of examples.
"""

import copy
import json
import resource
import signal
import sys
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from hf_llama3.conversion.config.hf import read_config
from hf_llama3.conversion.config.params import params_to_config, read_params
from hf_llama3.conversion.config.schema import INDEX_MAP, read_small
from hf_llama3.conversion.config.sidecar import SIDECAR, read_sidecar
from hf_llama3.conversion.provenance import read_evaluations, read_provenance, read_training
from hf_llama3.errors import UserError
from hf_llama3.files.json import read_json, to_json

SECONDS, BYTES = 5, 300 * 10**6

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 512, "multiple_of": 32}
PARAMS |= {"ffn_dim_multiplier": 1.1, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}
PARAMS |= {"rope_scaling_factor": 8.0}
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 8192}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64}
CONFIG |= {"intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
CONFIG |= {"head_dim": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_scaling": ROPE}
CONFIG |= {"rope_theta": 5e5, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None, "use_cache": True}
CONFIG |= {"initializer_range": 0.02, "attention_dropout": 0.0, "tie_word_embeddings": False, "dtype": "bfloat16"}
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
GENERATION |= {"num_beams": 1, "max_length": 4096, "suppress_tokens": [1], "stop_strings": ["a"]}
SIDE = {"rope_factor": 8.0, "num_key_value_heads": 4, "generation_config": GENERATION, "instruct": True}
SIDE |= {"config": {"eos_token_id": [2, 3], "initializer_range": 0.02}, "special_tokens": ["<|a|>", "<|b|>"]}
SIDE |= {"chat_template": "{{ messages }}"}
ADDED = {"content": "<s>", "lstrip": False, "normalized": False, "special": True}
TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": ADDED}
TOKENIZER |= {"model_max_length": 1000000000000000019884624838656, "added_tokens_decoder": {"1": ADDED}}
TOKENIZER |= {"chat_template": [{"name": "default", "template": "{{ messages }}"}], "add_bos_token": True}
PROVENANCE = {"source": "a", "format": "meta", "shards": 1, "llama_version": "3.1", "cast_to": None, "hf_llama3": "1"}
PROVENANCE |= {"verified": {"tensors": 1, "tokenizer": "equal"}}
EVALUATION = {"text": "a", "dtype": "float32", "command": "c", "hf_llama3": "1", "quantize": None, "tokens": 9}
EVALUATION |= {"context": 8, "loss": 1.5, "perplexity": 4.5}
TRAINING = {"text": "a", "source": None, "vocab_size": 9, "steps": 1, "batch_size": 1, "context": 8, "seed": 0}
TRAINING |= {"best_step": 1, "first_loss": 2.0, "validation_loss": 1.0, "learning_rate": 0.1, "seconds": 1.0}


def configure(path: Path):
    """Do all that is done with a params.json before the tensors."""
    params_to_config(read_params(path), path, 512)


def write_again(path: Path):
    """Read a config.json and write it, as a conversion does."""
    to_json(read_config(path))


def read_index(path: Path):
    if INDEX_MAP.takes(found := read_json(path).get("weight_map")):
        sorted(set(found.values()))


READERS = {  # file -> (what is valid, who reads it)
    "params.json": (PARAMS, configure),
    "config.json": (CONFIG, write_again),
    SIDECAR: (SIDE, lambda path: to_json(read_sidecar(path.parent))),
    "generation_config.json": (GENERATION, lambda path: to_json(read_small(path))),
    "tokenizer_config.json": (TOKENIZER, lambda path: to_json(read_small(path))),
    "special_tokens_map.json": ({"bos_token": "<s>", "eos_token": ADDED, "more": ["<a>"]}, read_small),
    "added_tokens.json": ({"<a>": 5, "<b>": 6}, read_small),
    "model.safetensors.index.json": ({"metadata": {"total_size": 9}, "weight_map": {"a": "b"}}, read_index),
    "provenance.json": (PROVENANCE, lambda path: read_provenance(path.parent)),
    "evaluations.json": ({"evaluations": [EVALUATION]}, lambda path: read_evaluations(path.parent)),
    "training.json": (TRAINING, lambda path: read_training(path.parent)),
}

# What no encoder of JSON writes stands for itself, once the text is made.
RAW = {
    "4000 digits": "9" * 4000,
    "5000 digits": "-" + "1" * 5000,
    "beyond floats": "1e999",
    "tiny": "1e-999",
    "not a number": "NaN",
    "infinity": "-Infinity",
    "half a pair": '"\\ud800"',
    "deep": "[" * 950 + "]" * 950,
    "deeper": '{"a":' * 100_000,
    "twice": '{"a": 1, "a": 2}',
    "wide": "[" + "{}," * 3_000_000 + "{}]",
    "megabyte": '"' + "x" * 10**6 + '"',
    "acting": '"\\u001b]0;title\\u0007\\u202e\\n"',
    "comment": "/* */",
    "open text": '"',
}
VALUES = st.one_of(
    st.sampled_from([{"RAW": name} for name in RAW if len(RAW[name]) < 100_000]),
    st.integers(),
    st.sampled_from([0, -1, -5, 1, 2**31, 2**63, 10**30, 1e-300, 1e300, 0.001, True, None, "", "1", [], {}, [[]], [1]]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.lists(st.integers(-2, 600), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2),
)


def places(value, path=()):
    """List the ways to every value in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, item in inner for place in places(item, (*path, key))]


def changed(document, place, how: str, value):
    """Return a document in which one value is replaced, removed, doubled, or has got another key."""
    if not place:
        return value
    document = copy.deepcopy(document)
    *way, last = place
    holder = document
    for step in way:
        holder = holder[step]
    if how == "remove":
        del holder[last]
    elif how == "rename" and isinstance(holder, dict):
        holder[str(value)[:20]] = holder.pop(last)
    elif how == "twice" and isinstance(holder, list):
        holder.append(holder[last])
    else:
        holder[last] = value
    return document


def written(document) -> bytes:
    content = json.dumps(document)
    for name, raw in RAW.items():
        content = content.replace(json.dumps({"RAW": name}), raw)
    return content.encode("utf-8", "surrogatepass")


@st.composite
def contents(draw, valid) -> bytes:
    place = draw(st.sampled_from(places(valid)))
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "twice"]))
    return written(changed(valid, place, how, draw(VALUES)))


def answer(read, path: Path):
    """Read a file; anything but a value or a sentence goes on."""
    signal.alarm(SECONDS)
    try:
        read(path)
    except UserError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 1500, str(error)[:2000]
    finally:
        signal.alarm(0)


def fuzz(name: str, examples: int) -> int:
    """Return how many files were read."""
    valid, read = READERS[name]
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(written(valid))
        read(path)  # what is valid is read

        @seed(examples)
        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(content=contents(valid))
        def one(content):
            nonlocal count
            count += 1
            path.write_bytes(content)
            answer(read, path)

        for raw in RAW:  # each of them once, wherever chance goes
            path.write_bytes(written(changed(valid, places(valid)[-1], "replace", {"RAW": raw})))
            answer(read, path)
        one()
    return count


def limit_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, lambda number, frame: sys.exit("it took too long"))
    limit_memory()
    for name in sys.argv[2:] or READERS:
        print(name, fuzz(name, int(sys.argv[1])))
