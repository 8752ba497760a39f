"""What Hugging Face's files say and Meta's have no place for, kept in a file of its own beside params.json.

Without it a conversion to Meta's format and back would forget the context window, the RoPE factor, the token ids, the
names of the special tokens and the chat template. Meta's readers do not look at the file.
"""

from pathlib import Path

from hf_llama3.errors import UserError
from hf_llama3.files.json import read_json

from .hf import PASSED_ON, TOKEN_IDS, WRITTEN_ANEW

SIDECAR = "huggingface.json"
CONFIG_KEYS = ("max_position_embeddings", *TOKEN_IDS, *PASSED_ON)
NEW = type(...)  # a key that earlier versions did not write
TYPES = {
    "rope_factor": (float, int, type(None)),
    "num_key_value_heads": (int,),
    "config": (dict,),
    "generation_config": (dict, type(None)),
    "instruct": (bool,),
    "special_tokens": (list, type(None)),
    "chat_template": (str, type(None)),
    "more_config": (dict, NEW),
    "tokenizer_model": (str, type(None), NEW),
    "tie_word_embeddings": (bool, NEW),
}


def make_sidecar(
    config: dict, more_config: dict, generation_config, instruct: bool, special_tokens, chat_template, tokenizer_model
) -> dict:
    """Make the file's content; `tokenizer_model` is the hash of the one that is written, None without one."""
    return {
        "rope_factor": config["rope_parameters"].get("factor"),
        "num_key_value_heads": config["num_key_value_heads"],  # params.json counts the copies that shards hold
        "config": {key: config[key] for key in CONFIG_KEYS if key in config},
        "more_config": more_config,
        "generation_config": generation_config,
        "instruct": instruct,
        "special_tokens": special_tokens,
        "chat_template": chat_template,
        "tokenizer_model": tokenizer_model,
        "tie_word_embeddings": config["tie_word_embeddings"],  # a head may equal the embedding and be one of its own
    }


def read_sidecar(folder: Path) -> dict:
    """Read the file if it is there, else return an empty dictionary.

    Raises:
        UserError: it is not what `make_sidecar` makes.
    """
    path = folder / SIDECAR
    if not path.exists():
        return {}
    sidecar = read_json(path)
    for key, types in TYPES.items():
        if not isinstance(sidecar.get(key, ...), types):
            raise UserError(f"`{key}` in {path} must be {types[0].__name__}, got {sidecar.get(key)!r}; remove the file")
    if unknown := sidecar["config"].keys() - set(CONFIG_KEYS):
        raise UserError(f"`config` in {path} holds {sorted(unknown)}, which params.json decides; remove the file")
    if written := sidecar.get("more_config", {}).keys() & set(WRITTEN_ANEW):
        raise UserError(f"`more_config` in {path} holds {sorted(written)}, which stand elsewhere; remove the file")
    if not all(isinstance(name, str) for name in sidecar["special_tokens"] or []):
        raise UserError(f"`special_tokens` in {path} must be names; remove the file")
    return sidecar
