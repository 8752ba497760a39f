"""Load a model and its tokenizer from any format that this package reads, on one device or several."""

import contextlib
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.utils import logging

from hf_llama3.conversion.config.hf import add_unsaid, is_packed
from hf_llama3.conversion.config.schema import CONFIG, CONFIG_REQUIRED, read_small_files
from hf_llama3.conversion.load import load_checkpoint, load_meta_tokenizer
from hf_llama3.conversion.opening import open_checkpoint, refuse_rope_factor
from hf_llama3.conversion.tokenizer.bounds import read_tokenizer_file
from hf_llama3.cpu import QUANTIZATIONS
from hf_llama3.cpu.optimization import optimize
from hf_llama3.distributed.parallel import Group, number_own_layers
from hf_llama3.distributed.placement import check_here, config_and_dtype, place
from hf_llama3.errors import UserError, library_errors, one_line, words_of
from hf_llama3.files.atomic import is_unfinished
from hf_llama3.files.json import read_json
from hf_llama3.files.schema import check

from . import DTYPES

# Settings of a generation_config.json that commands follow, and those that their own options or caches replace
FOLLOWED = ("bos_token_id", "eos_token_id", "pad_token_id", "repetition_penalty", "no_repeat_ngram_size")
FOLLOWED += ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
NEUTRAL = ("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "max_length", "max_new_tokens")
NEUTRAL += ("use_cache", "cache_implementation", "transformers_version", "output_attentions", "output_hidden_states")


def load_model(
    name: str,
    dtype: str = "auto",
    rope_factor: float | None = None,
    fast: bool = False,
    quantize: str | None = None,
    compile: bool = False,
    progress: bool = False,
    device_map: str | None = None,
    max_memory: dict | str | None = None,
    offload_folder: Path | None = None,
    group: Group = Group(),  # noqa: B008
):
    """Load a model and its tokenizer from a local folder of any format, a GGUF file, or by its name on the Hub.

    Args:
        fast: optimise the model; `quantize` ("int8", "int4") and `compile` imply it.
        device_map: divide the layers among devices; for it, `max_memory` and `offload_folder` see `placement.place`.
        group: the processes that generate together; this one loads its part.

    Raises:
        UserError: the folder holds no whole checkpoint or no tokenizer, the name is unknown, or the model cannot be
            divided as asked.
    """
    if quantize not in (None, *QUANTIZATIONS):
        raise UserError(f"--quantize must be one of {QUANTIZATIONS}, got {quantize!r}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {DTYPES}, got {dtype!r}")
    if device_map is None and not (max_memory is None and offload_folder is None):
        raise UserError("--max-memory and --offload-folder say how layers are divided; add --device-map auto")
    if device_map is not None and group.mode is not None:
        raise UserError(f"--device-map is for one process, got it with --parallel {group.mode}; leave one out")
    fast, packed = fast or quantize is not None or compile, is_packed_folder(name)
    if (fast or packed) and group.mode in ("tensor", "pipeline"):
        remedy = "name the plain folder" if packed else "leave out --optimize, --quantize and --compile"
        raise UserError(f"--parallel {group.mode} divides plain weights; {remedy}")
    if packed:
        refuse_rope_factor(rope_factor, name)
    if not group.is_first:
        logging.disable_progress_bar()
    if packed:
        where = {} if device_map is None else {"device_map": device_map}
        model, tokenizer = read_folder(name, dtype, where)
    else:
        model, tokenizer = read_model(name, dtype, rope_factor, device_map, max_memory, offload_folder, group)
    if group.mode == "pipeline":
        number_own_layers(model)
    settle_generation(model, name, progress and group.is_first)
    if fast:
        model = optimize(model, quantize, compile, progress and group.is_first)
    return model, tokenizer


def settle_generation(model, name: str, progress: bool):
    """Leave of a folder's settings for generation what `generate` does; a note names what else it asks for."""
    given = model.generation_config.to_diff_dict()
    model.generation_config = GenerationConfig(**{key: given[key] for key in FOLLOWED if key in given})
    others = sorted(key for key in given.keys() - {*FOLLOWED, *NEUTRAL} if not key.startswith("_"))
    if others and progress:
        note = f"the settings {', '.join(others)} in {name}/generation_config.json are not followed"
        print(f"Note: {one_line(note)}", file=sys.stderr)


def read_model(name: str, dtype: str, rope_factor: float | None, device_map, max_memory, offload_folder, group: Group):
    """Read the files for `load_model`: first all that can be refused, then the weights."""
    checkpoint = open_checkpoint(name, rope_factor)  # opening reads no tensor, and its errors are sentences
    checkpoint.require_language_model()
    if checkpoint.tokenizer is None:
        raise UserError(f"{checkpoint.path} holds no tokenizer, without which there is no text; add its files")
    name, as_is = str(checkpoint.path), checkpoint.loads_as_is
    config, stored = config_and_dtype(checkpoint)
    group.check(config)
    where = group.loading_options()
    if device_map is not None:
        kind = stored if dtype == "auto" else getattr(torch, dtype)
        placement = place(config, kind, device_map, max_memory, offload_folder)
        check_here(placement, None if as_is else offload_folder)  # safetensors are read where they lie
        where = {"device_map": placement.device_map, "offload_folder": offload_folder}
    if as_is:
        return read_folder(name, dtype, where)
    is_hf = checkpoint.format == "hf"
    tokenizer = read_tokenizer(name, config) if is_hf else load_meta_tokenizer(name, rope_factor=rope_factor)
    with loading(name):
        return load_checkpoint(checkpoint, dtype=dtype, **where).eval(), tokenizer


def is_packed_folder(name: str) -> bool:
    """Tell whether `hf-llama3 pack` made a folder, without a check that it is whole."""
    path = Path(name) / "config.json"
    return path.is_file() and not is_unfinished(Path(name)) and is_packed(read_json(path))


def read_folder(name: str, dtype: str, where: dict):
    """Load a Hugging Face folder."""
    folder, path = Path(name), Path(name) / "config.json"
    config = read_json(path)
    add_unsaid(config, path, [])
    check(config, CONFIG, path, CONFIG_REQUIRED)
    read_small_files(folder, config["vocab_size"])
    tokenizer = read_tokenizer(name)
    with loading(name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False, **where)
    return model.eval(), tokenizer


def read_tokenizer(name: str, config: PretrainedConfig | None = None):
    """Load a folder's tokenizer; `config` replaces a configuration that the library does not take."""
    if (path := Path(name) / "tokenizer.json").is_file():
        read_tokenizer_file(path)
    with library_errors(f"the tokenizer of {name} cannot be loaded", "write it again"):
        return AutoTokenizer.from_pretrained(name, config=config, trust_remote_code=False)


@contextlib.contextmanager
def loading(name: str):
    """Turn the library's errors about a name or a folder into a sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library raises what it likes
        raise UserError(f"{name} cannot be loaded: {words_of(error)}") from error
