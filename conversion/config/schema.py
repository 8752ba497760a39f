"""What each JSON file of a checkpoint may hold; other keys are left as they are."""

from itertools import chain
from pathlib import Path

from hf_llama3.errors import UserError, quoted
from hf_llama3.files.json import read_json
from hf_llama3.files.reading import check_file
from hf_llama3.files.schema import (
    FLAG,
    LARGEST,
    OBJECT,
    POSITIVE,
    Rule,
    check,
    either,
    fields,
    listed,
    mapped,
    number,
    optional,
    text,
    whole,
)

MAX_STOPS = 256  # tokens that end a text, or may not stand in one; the published models have three
MAX_TEMPLATE = 2**20  # characters of a chat template; the longest published ones have twenty thousand

ID = whole(0)
MANY_IDS = listed(ID, MAX_STOPS)  # a list may stand for a single id
IDS = {
    "bos_token_id": optional(either(ID, MANY_IDS)),
    "eos_token_id": optional(either(ID, MANY_IDS)),
    "pad_token_id": optional(either(whole(-1), MANY_IDS)),  # -1 for none in the first Llamas
}

PARAMS_REQUIRED = ("dim", "n_layers", "n_heads", "norm_eps")
PARAMS = {
    "dim": whole(),
    "n_layers": whole(),
    "n_heads": whole(),
    "n_kv_heads": whole(),
    "norm_eps": POSITIVE,
    "vocab_size": either(whole(), Rule("-1", lambda value: value == -1 and type(value) is int)),
    "multiple_of": whole(),
    "ffn_dim_multiplier": POSITIVE,
    "rope_theta": number(1),
    "use_scaled_rope": FLAG,
    "rope_scaling_factor": number(1),  # a key of other tools
    "max_batch_size": whole(),  # of a run, not of the model
    "max_seq_len": whole(),
}

GEOMETRY = {
    "vocab_size": whole(),
    "hidden_size": whole(),
    "intermediate_size": whole(),
    "num_hidden_layers": whole(),
    "num_attention_heads": whole(),
    "num_key_value_heads": whole(),
    "head_dim": whole(),
    "max_position_embeddings": whole(),
    "rms_norm_eps": POSITIVE,
}
LEFT_OUT = ("num_key_value_heads", "head_dim")  # derived from others if null or absent
CONFIG_REQUIRED = tuple(key for key in GEOMETRY if key not in LEFT_OUT)  # or transformers' defaults would apply
OTHERS = {
    "hidden_act": text(64),
    "attention_bias": FLAG,
    "attention_dropout": number(0, 1),
    "mlp_bias": FLAG,
    "initializer_range": number(0),
    "use_cache": FLAG,
}
CONFIG = {
    **{key: optional(rule) if key in LEFT_OUT else rule for key, rule in GEOMETRY.items()},
    **{key: optional(rule) for key, rule in OTHERS.items()},
    "tie_word_embeddings": optional(FLAG),
    "rope_theta": optional(number(1)),
    "dtype": optional(text(64)),
    "torch_dtype": optional(text(64)),
    "architectures": optional(listed(text(), 64)),
    "auto_map": optional(OBJECT),
}
ROPE_VALUE = either(FLAG, text(64), number(-LARGEST), listed(number(-LARGEST)))
ROPE = {
    "rope_theta": number(1),
    "factor": number(1),
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "original_max_position_embeddings": number(1),
}

LISTS_OF_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
SHARE, BEAMS, COUNT = number(0, 1), whole(1, 64), whole(0)
GENERATION = IDS | {
    **dict.fromkeys(("do_sample", "use_cache", "early_stopping", "renormalize_logits"), FLAG),
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits", "output_attentions"), FLAG),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), SHARE),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), BEAMS),
    **dict.fromkeys(("top_k", "max_length", "min_length", "max_new_tokens", "min_new_tokens"), COUNT),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), COUNT),
    **dict.fromkeys(("temperature", "max_time"), number(0)),
    "repetition_penalty": POSITIVE,
    "length_penalty": number(-LARGEST),
    "early_stopping": either(FLAG, text(16)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), listed(ID, MAX_STOPS)),
    "bad_words_ids": listed(listed(ID, MAX_STOPS), MAX_STOPS),
    "stop_strings": either(text(), listed(text(), 256)),
}
GENERATION = {key: optional(rule) for key, rule in GENERATION.items()}

TOKEN = {
    "content": text(),
    **dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), FLAG),
}
ADDED = fields(TOKEN, required=("content",))
NAME = either(text(), ADDED)  # of a special token
TEMPLATE = text(MAX_TEMPLATE)
DIGITS = Rule("an id", lambda value: value.isascii() and value.isdigit() and len(value) <= 12)
TOKENIZER_CONFIG = {
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"), NAME),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), either(listed(NAME), mapped(NAME))),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces"), FLAG),
    "added_tokens_decoder": mapped(ADDED, DIGITS),
    "chat_template": either(
        TEMPLATE, listed(fields({"name": text(), "template": TEMPLATE}, ("name", "template")), 64), mapped(TEMPLATE)
    ),
    "model_max_length": number(1, 1e40),
    "tokenizer_class": text(256),
    "model_input_names": listed(text(), 64),
    "padding_side": text(16),
    "truncation_side": text(16),
    "auto_map": OBJECT,
}
TOKENIZER_CONFIG = {key: optional(rule) for key, rule in TOKENIZER_CONFIG.items()}

SIDECAR = {
    "rope_factor": optional(number(1)),
    "num_key_value_heads": whole(),
    "config": OBJECT,
    "generation_config": optional(OBJECT),
    "instruct": FLAG,
    "special_tokens": optional(listed(text(), 2**16)),
    "chat_template": optional(TEMPLATE),
    "more_config": OBJECT,
    "tokenizer_model": optional(text()),
    "tie_word_embeddings": FLAG,
}
NEWER = ("more_config", "tokenizer_model", "tie_word_embeddings")  # not written by earlier versions
SIDECAR_REQUIRED = tuple(key for key in SIDECAR if key not in NEWER)

INDEX_MAP = mapped(text(1024))  # tensor -> file

# File of a Hugging Face folder -> what it may hold
SMALL_FILES = {
    "generation_config.json": fields(GENERATION),
    "tokenizer_config.json": fields(TOKENIZER_CONFIG),
    "special_tokens_map.json": mapped(optional(either(NAME, listed(NAME)))),
    "added_tokens.json": mapped(ID),
}
TABLES = {"generation_config.json": GENERATION, "tokenizer_config.json": TOKENIZER_CONFIG}
# Prefixes of files that a conversion copies or transformers reads
TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template", "vocab", "merges")


def read_small_files(folder: Path, vocab_size: int) -> dict[str, dict]:
    """Read and check the `SMALL_FILES` of a folder, and check the size and kind of its other files.

    Raises:
        UserError: one is no regular file, too large, or holds a value that no reader can use.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith((*TOKENIZER_FILES, "adapter_config")):
            check_file(path)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        check_file(path)
    found = {name: read_small(folder / name) for name in SMALL_FILES if (folder / name).exists()}
    check_ids(found.get("generation_config.json", {}), vocab_size, folder / "generation_config.json")
    return found


def read_small(path: Path) -> dict:
    """Read one of `SMALL_FILES`.

    Raises:
        UserError: it is no JSON object, or holds a value that no reader can use.
    """
    found = check(read_json(path), TABLES.get(path.name, {}), path)
    if not (rule := SMALL_FILES[path.name]).takes(found):
        raise UserError(f"{path} must be {rule.words}; write it again")
    return found


def check_ids(values: dict, vocab_size: int, path: Path):
    """Check that every token id has a row in the embedding.

    Raises:
        UserError: one has none.
    """
    for key in (*IDS, *LISTS_OF_IDS):
        given = values.get(key)
        waiting = given if isinstance(given, list) else [given]
        for token_id in chain.from_iterable(one if isinstance(one, list) else [one] for one in waiting):
            if token_id is not None and token_id >= vocab_size:
                raise UserError(
                    f"`{key}` in {path} must be below the {vocab_size} rows of the embedding, got {quoted(given)}"
                )
