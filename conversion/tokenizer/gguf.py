"""The tokenizer in a GGUF file (tokens, their types, merges or scores): from Hugging Face's files, and to them.

Byte-level BPE ("gpt2") names its way of splitting texts; each name stands for a regular expression in llama.cpp. A
sentencepiece model ("llama") needs none. Other tokenizers are not converted.
Source: llama.cpp, src/llama-vocab.cpp (`impl::load`, `llm_tokenizer_bpe`).
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from hf_llama3.errors import UserError, library_errors, quoted
from hf_llama3.files.json import parse_json, to_json

from ..config.schema import MAX_TEMPLATE
from .bounds import check_lengths
from .bpe import PATTERN, read_tokenizer_json
from .files import PORTABLE_CLASS, build_pieces
from .proof import split_alike
from .templates import DEFAULT, TEMPLATE_FILE, TEMPLATE_FOLDER

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
BPE, SENTENCEPIECE, NONE = "gpt2", "llama", "none"  # `tokenizer.ggml.model`
MOST_TOKENS = 2**20
# Way of splitting texts -> GGUF's names for it; the first is written
SPLITS = {
    "Meta's pattern": ("llama-bpe", "llama3", "llama-v3", "falcon3"),
    "digits one by one, GPT-2's pattern": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"),
    "GPT-2's pattern": ("gpt-2", "phi-2", "mpt", "olmo", "jais"),
}
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
META, DIGITS, GPT2 = SPLITS
ROLES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
TEMPLATE = "tokenizer.chat_template"
NO_SCORE = -1e6  # score of a piece that no merge makes


class OtherTokenizer(UserError):
    """A tokenizer that is not converted, and why."""


# Out of GGUF


def read_gguf_tokenizer(metadata: dict, path: Path, context: int) -> dict[str, bytes]:
    """Return the tokenizer files of a Hugging Face folder.

    Raises:
        OtherTokenizer: this kind is not converted.
        UserError: its lists are damaged.
    """
    tokenizer = build_from_metadata(metadata, path)
    tokens, ids = metadata["tokenizer.ggml.tokens"], special_ids(metadata, path)
    config = {
        "tokenizer_class": PORTABLE_CLASS,
        **{ROLES[role]: tokens[index] for role, index in ids.items()},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
    }
    files = {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}
    for name, template in read_templates(metadata, path).items():
        if name == DEFAULT:
            config["chat_template"] = template
        files[TEMPLATE_FILE if name == DEFAULT else f"{TEMPLATE_FOLDER}/{name}.jinja"] = template.encode()
    return files | {"tokenizer_config.json": to_json(config)}


def build_from_metadata(metadata: dict, path: Path):
    """Build the `tokenizers.Tokenizer` that encodes as llama.cpp does with these lists."""
    model, split = metadata.get("tokenizer.ggml.model", NONE), metadata.get("tokenizer.ggml.pre")
    if model not in (BPE, SENTENCEPIECE):
        known = f"{BPE} (byte-level BPE) and {SENTENCEPIECE} (sentencepiece)"
        raise OtherTokenizer(f"its kind is {quoted(model)}, and only {known} become Hugging Face's files")
    if model == BPE and split not in SPLIT_OF:
        known = ", ".join(names[0] for names in SPLITS.values())
        raise OtherTokenizer(f"its texts are split as {quoted(split)}, and only {known} become Hugging Face's files")
    tokens, types = read_tokens(metadata, path)
    ids = special_ids(metadata, path)
    default = (model == SENTENCEPIECE or SPLIT_OF.get(split) == META, False)  # llama.cpp's default
    before, after = (
        metadata.get(f"tokenizer.ggml.add_{role}_token", usual) is True and role in ids
        for role, usual in zip(("bos", "eos"), default, strict=True)
    )
    around = (tokens[ids["bos"]] if before else None, tokens[ids["eos"]] if after else None)
    with library_errors(f"the tokenizer in {path} is damaged", "download it again"):
        if model == BPE:
            tokenizer = build_bpe(tokens, types, read_merges(metadata, path), SPLIT_OF[split])
        else:
            scores = metadata.get("tokenizer.ggml.scores")
            if not isinstance(scores, np.ndarray) or len(scores) != len(tokens) or not np.isfinite(scores).all():
                raise UserError(f"`tokenizer.ggml.scores` in {path} must be {len(tokens)} numbers; download it again")
            listed = list(enumerate(zip(tokens, types, scores.tolist(), strict=True)))
            made = {token: (-score, index) for index, (token, kind, score) in listed if kind == NORMAL}
            added = (UNKNOWN, CONTROL, USER_DEFINED)
            apart = {token: kind != USER_DEFINED for _, (token, kind, _) in listed if kind in added}
            prefix = metadata.get("tokenizer.ggml.add_space_prefix", True) is True
            tokenizer = build_pieces(tokens, made, apart, tokens[ids.get("unknown", 0)], prefix)
        tokenizer.post_processor = make_post_processor(tokenizer, *around)
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (CONTROL, USER_DEFINED) and tokenizer.token_to_id(token) != index:
            got = tokenizer.token_to_id(token)
            raise UserError(f"the token {quoted(token)} in {path} must have the id {index}, got {got}")
    return tokenizer


def read_tokens(metadata: dict, path: Path) -> tuple[list[str], list[int]]:
    """Return the tokens and their types.

    Raises:
        UserError: the lists differ in length, or a token is there twice.
    """
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not 0 < len(tokens) <= MOST_TOKENS:
        raise UserError(f"`tokenizer.ggml.tokens` in {path} must be 1 to {MOST_TOKENS} texts; download it again")
    types = np.full(len(tokens), NORMAL) if types is None else types
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise UserError(f"`tokenizer.ggml.token_type` in {path} must be {len(tokens)} numbers; download it again")
    if len(set(tokens)) < len(tokens):
        twice, count = Counter(tokens).most_common(1)[0]
        raise UserError(f"{path} must hold each token once, got {quoted(twice)} {count} times; download it again")
    check_lengths(tokens, path)
    return tokens, types.tolist()


def read_merges(metadata: dict, path: Path) -> list[tuple[str, str]]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise UserError(f"`tokenizer.ggml.merges` in {path} must be a list of texts; download it again")
    places = [merge.find(" ", 1) for merge in merges]
    if -1 in places:
        raise UserError(f"{path} holds the merge {quoted(merges[places.index(-1)])}, which is no pair of tokens")
    return [(merge[:place], merge[place + 1 :]) for merge, place in zip(merges, places, strict=True)]


def special_ids(metadata: dict, path: Path) -> dict[str, int]:
    """Return the ids of the begin, end and pad tokens that the file names."""
    ids = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ROLES}
    count = len(metadata.get("tokenizer.ggml.tokens") or [])
    for role, index in ids.items():
        if index is not None and (type(index) is not int or not 0 <= index < count):
            raise UserError(f"the {role} token in {path} must be one of {count} tokens, got {quoted(index)}")
    return {role: index for role, index in ids.items() if index is not None}


def build_bpe(tokens: list[str], types: list[int], merges: list[tuple[str, str]], split: str):
    """Build byte-level BPE; tokens without merges are added ones if they have the last ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    apart = (CONTROL, USER_DEFINED)
    used = max((index + 1 for index, kind in enumerate(types) if kind != UNUSED), default=0)
    first = max((index + 1 for index in range(used) if types[index] not in apart), default=0)
    vocab = {token: index for index, token in enumerate(tokens[:first])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=split == META))
    tokenizer.pre_tokenizer = make_pre_tokenizer(split)
    tokenizer.decoder = decoders.ByteLevel()
    for index in range(used):
        if types[index] in apart:
            add = tokenizer.add_special_tokens if types[index] == CONTROL else tokenizer.add_tokens
            add([AddedToken(tokens[index], normalized=False)])
    return tokenizer


def make_pre_tokenizer(split: str):
    from tokenizers import Regex, pre_tokenizers

    steps = {
        META: [pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")],
        DIGITS: [pre_tokenizers.Digits(individual_digits=True)],
        GPT2: [],
    }
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split != META)
    return pre_tokenizers.Sequence([*steps[split], to_bytes]) if steps[split] else to_bytes


def make_post_processor(tokenizer, before: str | None, after: str | None):
    """Return the post-processor that adds tokens before and after every text."""
    from tokenizers import processors

    specials = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((before, after)) if token]
    single, pair = (
        [part for part in (before and f"{before}{number}", text, after and f"{after}{number}") if part]
        for number, text in (("", "$A"), (":1", "$B:1"))
    )
    template = processors.TemplateProcessing(
        single=" ".join(single), pair=" ".join([*single, *pair]), special_tokens=specials
    )
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), template] if specials else [])


def read_templates(metadata: dict, path: Path) -> dict[str, str]:
    """Return the chat templates by their names."""
    found = {DEFAULT: metadata.get(TEMPLATE)}
    names = metadata.get("tokenizer.chat_templates")
    for name in names if isinstance(names, list) else []:
        if not name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"a chat template in {path} must have a plain name, got {quoted(name)}; download it again")
        found[name] = metadata.get(f"{TEMPLATE}.{name}")
    for name, template in found.items():
        if template is not None and not (isinstance(template, str) and len(template) <= MAX_TEMPLATE):
            raise UserError(f"the chat template {quoted(name)} in {path} must be at most {MAX_TEMPLATE} characters")
    return {name: template for name, template in found.items() if template is not None}


# Into GGUF


def tokenizer_metadata(files: dict[str, bytes], rows: int, templates: dict[str, str]) -> dict:
    """Return the metadata of a Hugging Face folder's tokenizer, for an embedding of `rows` rows.

    Raises:
        OtherTokenizer: llama.cpp has no such tokenizer.
    """
    raw = parse_json(files["tokenizer.json"])
    kind, model = kind_of(raw), raw["model"]
    tokens, types = [f"[PAD{index}]" for index in range(rows)], np.full(rows, UNUSED, "<i4")
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for token in raw.get("added_tokens") or []:
        tokens[token["id"]], types[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if kind["model"] == SENTENCEPIECE:
        kind |= sentencepiece_lists(raw, tokens, types, merges)
    else:
        kind["merges"] = [" ".join(merge) for merge in merges]
    named = names_of_roles(files, model)
    roles = {f"{role}_token_id": tokens.index(name) for role, name in named.items() if name in tokens}
    whole = read_tokenizer_json(files["tokenizer.json"], Path("tokenizer.json"))
    with library_errors("tokenizer.json fails at a text", "write it again"):
        ids, plain = (whole.encode("a", add_special_tokens=flag).ids for flag in (True, False))
    around = "".join("a" if index in plain else "b" for index in ids)
    flags = {"add_bos_token": around.startswith("b"), "add_eos_token": around.endswith("b")}
    found = kind | {"tokens": tokens, "token_type": types} | roles | flags
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    if DEFAULT in templates:
        metadata[TEMPLATE] = templates[DEFAULT]
    if named := sorted(templates.keys() - {DEFAULT}):
        metadata["tokenizer.chat_templates"] = named
        metadata |= {f"{TEMPLATE}.{name}": templates[name] for name in named}
    return metadata


def kind_of(raw: dict) -> dict[str, str]:
    """Return GGUF's names for a tokenizer.json's kind and its way of splitting texts.

    Raises:
        OtherTokenizer: llama.cpp has no such tokenizer.
    """
    model = raw["model"]
    if model.get("type", "BPE") != "BPE" or not isinstance(model["vocab"], dict):
        raise OtherTokenizer(f"llama.cpp has no tokenizer of the kind {quoted(model.get('type'))}")
    if model.get("byte_fallback"):
        return {"model": SENTENCEPIECE, "pre": "default"}
    return {"model": BPE, "pre": SPLITS[split_of(raw)][0]}


def split_of(raw: dict) -> str:
    """Return how byte-level BPE splits texts.

    Raises:
        OtherTokenizer: llama.cpp has no name for it.
    """
    outer = raw.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", []) if outer.get("type") == "Sequence" else [outer]
    described = []
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                described.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                described.append(DIGITS)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                described.append(step.get("use_regex", True))
            case _:
                described.append(None)
    known = {(PATTERN, False): META, (DIGITS, True): DIGITS, (True,): GPT2}
    if raw.get("normalizer") or tuple(described) not in known:
        how = json.dumps([raw.get("normalizer"), outer or None], ensure_ascii=False)
        raise OtherTokenizer(f"llama.cpp has no name for how its texts are split: {quoted(how)}")
    return known[tuple(described)]


def sentencepiece_lists(raw: dict, tokens: list[str], types: np.ndarray, merges: list[tuple]) -> dict:
    """Return scores in the order of the merges, and whether a space is put before a text."""
    model, order = raw["model"], {}
    for place, pair in enumerate(merges):
        order.setdefault("".join(pair), -float(place))
    for index, token in enumerate(tokens):
        if token == model.get("unk_token"):
            types[index] = UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and types[index] == NORMAL:
            types[index] = BYTE
    scores = [order.get(token, NO_SCORE) if kind == NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)]
    steps = json.dumps([raw.get("normalizer"), raw.get("pre_tokenizer")])
    prefix = '"Prepend"' in steps or '"prepend_scheme": "first"' in steps or '"prepend_scheme": "always"' in steps
    return {"scores": np.array(scores, "<f4"), "add_space_prefix": prefix}


def names_of_roles(files: dict[str, bytes], model: dict) -> dict[str, str]:
    """Return the names of the begin, end, pad and unknown tokens."""
    config = parse_json(files.get("tokenizer_config.json", b"{}"))
    named = {role: config.get(key) for role, key in ROLES.items()}
    named["unknown"] = named["unknown"] or model.get("unk_token")
    return {role: name["content"] if isinstance(name, dict) else name for role, name in named.items() if name}


def check_gguf_tokenizer(files: dict[str, bytes], metadata: dict) -> str | None:
    """Return where llama.cpp would encode texts differently from a folder's tokenizer, or None."""
    ours = read_tokenizer_json(files["tokenizer.json"], Path("tokenizer.json"))
    theirs = build_from_metadata(metadata, Path("the file"))
    try:
        if split_alike(ours, theirs, True):
            return None
    except UserError as error:
        return f"whether llama.cpp splits texts alike is not known: {error}"
    return "llama.cpp will split some texts otherwise: GGUF has no place for all that tokenizer.json says"
