"""huggingface.json: what Hugging Face's files say and Meta's format has no place for, in a file beside params.json.

Without it a conversion to Meta's format and back would lose the context window, the RoPE factor, the token ids, the
names of the special tokens and the chat template. Meta's readers ignore the file.
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
    """Return the file's content; `tokenizer_model` is the hash of the written tokenizer.model, None without one."""
    return {
        "rope_factor": config["rope_parameters"].get("factor"),
        "num_key_value_heads": config["num_key_value_heads"],  # params.json counts copies in shards
        "config": {key: config[key] for key in CONFIG_KEYS if key in config},
        "more_config": more_config,
        "generation_config": generation_config,
        "instruct": instruct,
        "special_tokens": special_tokens,
        "chat_template": chat_template,
        "tokenizer_model": tokenizer_model,
        "tie_word_embeddings": config["tie_word_embeddings"],  # an untied head may equal the embedding
    }


def read_sidecar(folder: Path) -> dict:
    """Read the file; return an empty dictionary if there is none.

    Raises:
        UserError: it is damaged.
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
