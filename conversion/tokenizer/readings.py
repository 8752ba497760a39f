"""Independent readers of tokenizers, each from its files alone, for the proof of a conversion.

They share no code with what writes those files: a mistake would be on both sides, and be found equal. Only Meta's
pattern and the checkpoint's special tokens are taken from the package.
"""

import base64
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from hf_llama3.errors import UserError, library_errors
from hf_llama3.files.json import read_json
from hf_llama3.files.reading import read_file, read_text

from .bpe import PATTERN

FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
# Keys of tokenizer_config.json that change behaviour -> the default of transformers 5.23
SETTINGS = {
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")),
    "padding_side": "right",
    "truncation_side": "right",
    "model_max_length": int(1e30),
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": False,
    "add_prefix_space": None,
    "model_input_names": None,
}
# Keys that count without tokenizer.json, whose post_processor otherwise decides.
BEGIN_AND_END = ("add_bos_token", "add_eos_token")
SAME_CLASS = {"PreTrainedTokenizer": "TokenizersBackend"}  # without the ending Fast


@dataclass(eq=False)
class Reading:
    """A tokenizer as its reader sees it; texts and ids are given in batches."""

    path: Path  # the file that it was read from
    tokens: dict[str, int]  # every token, as tokenizer.json spells it -> id
    encode: Callable[[list[str], bool], list[list[int]]]  # with the tokens around every text, or without
    decode: Callable[[list[list[int]], bool], list[str]]  # without special tokens, or with them
    flags: dict[str, tuple] = field(default_factory=dict)  # of added tokens
    special: set[str] = field(default_factory=set)  # tokens that are found in a text by their names
    settings: dict = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    batch: Callable[[list[str], int], list[list[int]]] | None = None  # truncated and padded
    shows_special: bool = True  # whether decoding spells special tokens


def read_ranks_as_meta(path: Path, names: list[str], begin: int | None) -> Reading:
    """Read a tokenizer.model of Llama 3 as Meta's code does (llama-models 0.3.0, models/llama3/tokenizer.py).

    A token's rank is its id. The special tokens follow, after as many ids as there are different tokens. A piece that
    the pattern finds is a token, or its bytes are merged, lowest rank first.

    Args:
        begin: the id before a text, if any.
    """
    with library_errors(f"{path} is no tokenizer.model of Llama 3", "download it again"):
        lines = [line.split() for line in read_file(path).split(b"\n") if line.strip()]
        ranks = {base64.b64decode(encoded): int(rank) for encoded, rank in lines}
    special = {name: len(ranks) + index for index, name in enumerate(names)}
    unsaid = set(special.values())
    content = {rank: token for token, rank in ranks.items()}
    content |= {token_id: name.encode() for name, token_id in special.items()}
    cut = pattern_cutter()
    join = functools.cache(functools.partial(join_bytes, ranks=ranks))  # pieces repeat from text to text
    around = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")

    def encode_one(text: str, with_special: bool) -> list[int]:
        ids, start = [begin] * (with_special and begin in special.values()), 0
        for found in [*around.finditer(text), None]:
            for piece in cut(text[start : found.start() if found else None]):
                ids += join(piece.encode())
            if found:
                ids.append(special[found[0]])
                start = found.end()
        return ids

    def decode_one(ids: list[int], skip: bool) -> str:
        kept = [token_id for token_id in ids if token_id not in unsaid] if skip else ids
        return b"".join(map(content.__getitem__, kept)).decode("utf-8", "replace")

    tokens = {"".join(BYTE_SPELLING[byte] for byte in token): rank for token, rank in ranks.items()}
    return Reading(
        *(path, tokens | special),
        encode=lambda texts, with_special: [encode_one(text, with_special) for text in texts],
        decode=lambda batch, skip: [decode_one(ids, skip) for ids in batch],
        special=set(special),
    )


def pattern_cutter() -> Callable[[str], list[str]]:
    """Return a function that splits a text by Meta's pattern."""
    from tokenizers import Regex, pre_tokenizers

    cutter = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    return lambda text: [piece for piece, _ in cutter.pre_tokenize_str(text)] if text else []


def join_bytes(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Return the ids of a piece, by merging its bytes."""
    if piece in ranks:
        return [ranks[piece]]
    parts, unknown = [piece[index : index + 1] for index in range(len(piece))], len(ranks)
    joined = [ranks.get(left + right, unknown) for left, right in pairwise(parts)]
    while joined and (lowest := min(joined)) < unknown:
        where = joined.index(lowest)
        parts[where : where + 2] = [parts[where] + parts[where + 1]]
        del joined[where]
        for pair in range(max(where - 1, 0), min(where + 1, len(joined))):  # its two neighbours
            joined[pair] = ranks.get(parts[pair] + parts[pair + 1], unknown)
    return [ranks[part] for part in parts]


def spell_bytes() -> dict[int, str]:
    """Return the character for each byte in tokenizer.json: its own if that is visible."""
    seen = {byte: chr(byte) for byte in range(256) if 32 < byte < 127 or (160 < byte < 256 and byte != 173)}
    unseen = [byte for byte in range(256) if byte not in seen]
    return seen | {byte: chr(256 + place) for place, byte in enumerate(unseen)}


BYTE_SPELLING = spell_bytes()


def read_sentencepiece_model(path: Path) -> Reading:
    """Read a sentencepiece model by sentencepiece's library.

    Raises:
        UserError: the library is missing, or the file is damaged.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UserError(f'{path} is a sentencepiece model; to compare it, pip install "hf_llama3[llama2]"') from error
    with library_errors(f"{path} is no readable sentencepiece model", "download it again"):
        model = SentencePieceProcessor(model_file=str(path))
    count = model.get_piece_size()
    special = {i for i in range(count) if model.is_control(i) or model.is_unknown(i)}

    def decode_one(ids: list[int], skip: bool) -> str:
        return model.decode([token_id for token_id in ids if not (skip and token_id in special)])

    return Reading(
        *(path, {model.id_to_piece(index): index for index in range(count)}),
        encode=lambda texts, with_special: [[model.bos_id()] * with_special + model.encode(text) for text in texts],
        decode=lambda batch, skip: [decode_one(ids, skip) for ids in batch],
        special={model.id_to_piece(index) for index in special},
        shows_special=False,
    )


def read_hub_files(folder: Path) -> Reading:
    """Read the files of a Hugging Face folder as transformers' AutoTokenizer does (5.23, `_from_pretrained`).

    Raises:
        UserError: one is damaged, or only transformers itself reads this kind.
    """
    config, tokens = read_beside(folder)
    fast, vocabulary, model = (folder / name for name in ("tokenizer.json", "vocab.json", "tokenizer.model"))
    if fast.is_file() or (vocabulary.is_file() and (folder / "merges.txt").is_file()):
        path = fast if fast.is_file() else vocabulary
        tokenizer = load_fast(fast) if fast.is_file() else load_vocabulary(vocabulary, config)
        settings = read_settings(config, forget_last_batch(tokenizer), has_fast=fast.is_file())
        reading = ask(tokenizer, path, tokens, settings)
    elif model.is_file() and read_file(model)[:1] == b"\n":
        reading = read_sentencepiece_model(model)
        reading.flags = {name: tuple(flags.get(flag, False) for flag in FLAGS) for name, flags in tokens.items()}
        reading.special |= set(tokens)
        reading.settings = read_settings(config, {}, has_fast=False)
    else:
        raise UserError(f"{folder} holds no tokenizer.json; let transformers write one")
    reading.templates = read_templates(folder, config)
    return reading


def read_beside(folder: Path) -> tuple[dict, dict[str, dict]]:
    """Return a tokenizer's settings, and the flags of the tokens that files beside tokenizer.json name, by id."""
    config = read_if_there(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= read_if_there(folder / "special_tokens_map.json")
    return config, named_tokens(config, read_if_there(folder / "added_tokens.json"))


def read_if_there(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def load_fast(path: Path):
    from tokenizers import Tokenizer

    with library_errors(f"{path} is no readable tokenizer", "write it again"):
        return Tokenizer.from_file(str(path))


def load_vocabulary(path: Path, config: dict):
    """Build a tokenizer from vocab.json and merges.txt, the files of GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    with library_errors(f"{path} is no readable vocabulary", "write it again"):
        tokenizer = Tokenizer(models.BPE.from_file(str(path), str(path.parent / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def forget_last_batch(tokenizer) -> dict:
    """Switch a tokenizer's truncation and padding off; return the settings that transformers takes from them."""
    padding, truncation = tokenizer.padding or {}, tokenizer.truncation or {}
    tokenizer.no_truncation()
    tokenizer.no_padding()
    asked = {"padding_side": padding.get("direction"), "truncation_side": truncation.get("direction")}
    asked = {key: value.lower() for key, value in asked.items() if value}
    return asked | ({"pad_token": padding["pad_token"]} if padding else {})


def ask(tokenizer, path: Path, tokens: dict[str, dict], settings: dict) -> Reading:
    """Return the reading of a `tokenizers.Tokenizer`, after adding the tokens that it lacks."""
    from tokenizers import AddedToken

    there = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([AddedToken(name, **flags) for name, flags in tokens.items() if name not in there])
    flags = {
        token.content: tuple(getattr(token, flag) for flag in FLAGS)
        for token in tokenizer.get_added_tokens_decoder().values()
    }

    def batch(texts: list[str], length: int) -> list[list[int]]:
        pad = settings["pad_token"]
        tokenizer.enable_truncation(length, direction=settings["truncation_side"])
        if pad is not None:
            pad_id = tokenizer.token_to_id(pad) or 0
            tokenizer.enable_padding(direction=settings["padding_side"], pad_id=pad_id, pad_token=pad)
        ids = encode(texts, True)
        forget_last_batch(tokenizer)
        return ids

    def encode(texts: list[str], with_special: bool) -> list[list[int]]:
        with library_errors(f"{path} fails at a text", "write it again"):
            return [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=with_special)]

    def decode(ids: list[list[int]], skip: bool) -> list[str]:
        with library_errors(f"{path} fails at its own tokens", "write it again"):
            return tokenizer.decode_batch(ids, skip_special_tokens=skip)

    return Reading(
        *(path, tokenizer.get_vocab(with_added_tokens=True)),
        encode=encode,
        decode=decode,
        flags=flags,
        special=set(flags),
        settings=settings,
        batch=batch,
    )


def named_tokens(config: dict, added: dict[str, int]) -> dict[str, dict]:
    """Return the flags of the tokens in tokenizer_config.json and added_tokens.json, by id."""
    listed = config.get("added_tokens_decoder") or {}
    tokens = [token for _, token in sorted(listed.items(), key=lambda entry: int(entry[0]))]
    tokens = tokens or [{"content": name} for name in sorted(added, key=added.get)]
    found = {token["content"]: {flag: token[flag] for flag in FLAGS if flag in token} for token in tokens}
    named = [config[key] for key in SETTINGS if key.endswith("_token") and config.get(key)]
    for token in [*named, *extra_tokens(config)]:
        found.setdefault(name_of(token), {"normalized": False})["special"] = True
    return found


def extra_tokens(config: dict) -> list:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return list(extra.values()) if isinstance(extra, dict) else extra


def name_of(token) -> str:
    return token["content"] if isinstance(token, dict) else token


def read_settings(config: dict, asked: dict, has_fast: bool) -> dict:
    """Return a tokenizer's settings that have an effect, by key."""
    settings = SETTINGS | asked | {key: config[key] for key in SETTINGS if config.get(key) is not None}
    settings |= {key: name_of(value) for key, value in settings.items() if key.endswith("_token") and value}
    settings["extra_special_tokens"] = [name_of(token) for token in extra_tokens(config)]
    if not has_fast:
        settings |= {key: config.get(key) for key in BEGIN_AND_END}
    kind = (config.get("tokenizer_class") or "").removesuffix("Fast")
    return settings | {"tokenizer_class": SAME_CLASS.get(kind, kind)}


def read_templates(folder: Path, config: dict) -> dict[str, str]:
    """Return every chat template by its name; files come before tokenizer_config.json."""
    found = {path.name[: -len(".jinja")]: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        found["default"] = folder / "chat_template.jinja"
    if found:
        return {name: read_text(path, "write it again") for name, path in found.items()}
    held = config.get("chat_template") or {}
    if isinstance(held, list):
        return {entry["name"]: entry["template"] for entry in held}
    return held if isinstance(held, dict) else {"default": held}
