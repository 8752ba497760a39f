"""What Hugging Face's files say and Meta's have no place for, kept in a file of its own beside params.json.

Without it a conversion to Meta's format and back would forget the context window, the RoPE factor, the token ids, the
names of the special tokens and the chat template. Meta's readers do not look at the file.
"""

from pathlib import Path

from hf_llama3.errors import UserError, quoted
from hf_llama3.files.json import read_json
from hf_llama3.files.schema import check

from . import schema
from .hf import PASSED_ON, TOKEN_IDS, WRITTEN_ANEW

SIDECAR = "huggingface.json"
CONFIG_KEYS = ("max_position_embeddings", *TOKEN_IDS, *PASSED_ON)


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
    remedy = "; remove the file"
    check(sidecar, schema.SIDECAR, path, schema.SIDECAR_REQUIRED, remedy)
    check(sidecar["config"], schema.CONFIG | schema.IDS, path, remedy=remedy)
    check(sidecar["generation_config"] or {}, schema.GENERATION, path, remedy=remedy)
    if unknown := sidecar["config"].keys() - set(CONFIG_KEYS):
        raise UserError(f"`config` in {path} holds {quoted(sorted(unknown))}, which params.json decides{remedy}")
    if written := sidecar.get("more_config", {}).keys() & set(WRITTEN_ANEW):
        raise UserError(f"`more_config` in {path} holds {quoted(sorted(written))}, which stand elsewhere{remedy}")
    return sidecar
