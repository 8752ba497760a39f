"""Meta's tokenizer.model and Hugging Face's tokenizer.json: the same byte-level BPE, both ways, without a network.

A tokenizer.model of Llama 3 is tiktoken's: a line for each token, its bytes in base64 and its rank, which is its id and
the order of the merges at once. The special tokens follow; their names stand in no file of Meta's but in its code,
and changed between versions. (Llama 2's file under the same name is a sentencepiece model.)
"""

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hf_llama3.errors import UserError, library_errors, quoted, shown
from hf_llama3.files.reading import read_file, require_file, what_became_of
from hf_llama3.presets import VOCAB_SIZE

from .bounds import check_lengths, read_tokenizer_file
from .templates import llama3_chat_template

# llama-models 0.3.0, models/llama3/tokenizer.py, `pat_str`
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_SPECIAL_TOKENS = 256
BEGIN_OF_TEXT, END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
PADDING = "<|finetune_right_pad_id|>"

# The first special tokens of each version; None and all later ones are reserved. As published in
# meta-llama/Meta-Llama-3-8B and meta-llama/Llama-3.1-8B, tokenizer.json. 3.2 and 3.3 kept 3.1's.
NAMED = {
    "3.0": (
        *(BEGIN_OF_TEXT, END_OF_TEXT, None, None, None, None),
        *("<|start_header_id|>", "<|end_header_id|>", None, END_OF_TURN),
    ),
    "3.1": (
        *(BEGIN_OF_TEXT, END_OF_TEXT, None, None, PADDING, None),
        *("<|start_header_id|>", "<|end_header_id|>", END_OF_MESSAGE, END_OF_TURN, "<|python_tag|>"),
    ),
}
NAMED |= {"3.2": NAMED["3.1"], "3.3": NAMED["3.1"]}
VERSIONS = ("2", *NAMED)
TOKEN_NAMES = ("bos_token", "eos_token", "pad_token")
SPECIAL = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def special_tokens(version: str) -> list[str]:
    """List the 256 special tokens of a Llama 3 version, in the order of their ids."""
    names, reserved = [], 0
    for name in (*NAMED[version], *[None] * (NUM_SPECIAL_TOKENS - len(NAMED[version]))):
        names.append(name or f"<|reserved_special_token_{reserved}|>")
        reserved += name is None
    return names


def check_special_tokens(names: list[str], path: Path):
    """Check that special tokens have different names, and that there are tokens to begin and end a text.

    Raises:
        UserError: a name repeats or is missing.
    """
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"{path} must name each special token once, got {quoted(twice)} twice; write it again")
    for name in (BEGIN_OF_TEXT, END_OF_TEXT):
        if name not in names:
            raise UserError(f"{path} must name the special token {name}, got {quoted(names)}; write it again")


def token_ids(names: list[str], first: int, instruct: bool) -> dict:
    """Return the begin, end and pad ids for a configuration, from the special tokens and the id of the first."""
    ids = {name: first + index for index, name in enumerate(names)}
    stops = [ids[name] for name in (END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN) if name in ids]
    return {
        "bos_token_id": ids[BEGIN_OF_TEXT],
        "eos_token_id": stops if instruct else ids[END_OF_TEXT],
        "pad_token_id": ids.get(PADDING),
    }


def token_ids_without_tokenizer(version: str, vocab_size: int, instruct: bool) -> dict:
    """Return the ids for a configuration without a tokenizer.model of Llama 3."""
    if version != "2" and vocab_size == VOCAB_SIZE:
        names = special_tokens(version)
        return token_ids(names, vocab_size - len(names), instruct)
    begin, end = (1, 2) if version == "2" else (None, None)
    return {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": None}


def find_hf_tokenizer(folder: Path) -> tuple[Path | None, str | None, str | None]:
    """Return the tokenizer of a Hugging Face folder, its kind, and its family: Llama "2", "3" or "other"."""
    model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    kind = tokenizer_kind(model) if model.is_file() else None
    if kind == "sentencepiece":
        return model, kind, "2"
    if fast.is_file():
        content = read_file(fast)  # recognised without parsing 17 MB
        is_llama3 = any(json.dumps(sign)[1:-1].encode() in content for sign in (BEGIN_OF_TEXT, PATTERN))
        is_sentencepiece = re.search(rb'"byte_fallback":\s*true', content)
        return fast, "tokenizer.json", "2" if is_sentencepiece else "3" if is_llama3 else "other"
    if kind:
        return model, kind, "3"
    slow = folder / "vocab.json"  # with merges.txt, the files before tokenizer.json
    return (slow, slow.name, "other") if slow.is_file() else (None, None, None)


def tokenizer_kind(path: Path) -> str:
    """Tell "tiktoken" from "sentencepiece" by the first byte: base64 is text, a sentencepiece model is not."""
    require_file(path)
    if reason := what_became_of(path):
        raise UserError(f"{path} is no tokenizer{reason}")
    with open(path, "rb") as file:
        return "sentencepiece" if file.read(1) == b"\n" else "tiktoken"


def read_ranks(path: Path) -> list[bytes]:
    """Read the tokens of a tiktoken file in the order of their ranks.

    Raises:
        UserError: a line is damaged, the ranks are not 0, 1, 2, ..., or a token stands twice.
    """
    tokens = []
    for number, line in enumerate(read_file(path).splitlines(), 1):
        encoded, _, rank = line.strip().partition(b" ")
        try:
            tokens.append(base64.b64decode(encoded, validate=True))
        except (binascii.Error, ValueError) as error:
            raise UserError(f"line {number} of {path} is damaged: {quoted(line)}; download it again") from error
        if not tokens[-1] or not rank.isdigit():
            raise UserError(f"line {number} of {path} is damaged: {quoted(line)}; download it again")
        if rank != b"%d" % (number - 1):
            got = shown(rank.decode())
            raise UserError(f"line {number} of {path} must have rank {number - 1}, got {got}; download it again")
    if len(set(tokens)) < len(tokens):
        twice, count = Counter(tokens).most_common(1)[0]
        raise UserError(f"{path} must hold each token once, got {quoted(twice)} {count} times; download it again")
    check_lengths(tokens, path)
    return tokens


def tiktoken_file(tokens: list[bytes]) -> bytes:
    """Write the tokens in the order of their ranks as Meta's tokenizer.model."""
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))


def hf_tokenizer_files(
    tokens: list[bytes], names: list[str], config: dict, instruct: bool, chat_template: str | None = None
) -> dict[str, str]:
    """Return the files from which `AutoTokenizer` loads Meta's tokenizer: {file name: content}.

    Args:
        tokens: in the order of their ranks.
        names: the special tokens in the order of their ids, which follow the ranks.
        config: the model's configuration, for the token ids and the context window.
        instruct: add Llama 3's chat template if no other is given.
        chat_template: a template to use in place of Llama 3's.
    """
    name_of = {len(tokens) + index: name for index, name in enumerate(names)}
    begin, end, padding = (special_name(config[f"{key}_id"], len(tokens), names) for key in TOKEN_NAMES)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the class that transformers 4 and 5 and all engines know
        **{key: name for key, name in zip(TOKEN_NAMES, (begin, end, padding), strict=True) if name is not None},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config["max_position_embeddings"],
        "added_tokens_decoder": {str(token_id): SPECIAL | {"content": name} for token_id, name in name_of.items()},
    }
    files = {"tokenizer.json": build_tokenizer(tokens, names, begin).to_str(pretty=True)}
    if instruct or chat_template:
        tokenizer_config["chat_template"] = files["chat_template.jinja"] = chat_template or llama3_chat_template()
    return files | {"tokenizer_config.json": json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n"}


def build_tokenizer(tokens: list[bytes], names: list[str], begin: str | None):
    """Build the `tokenizers.Tokenizer` with Meta's ids, and the token `begin` before every text, if any."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    characters = byte_characters()
    vocab = {spell(token, characters): rank for rank, token in enumerate(tokens)}
    merges = [(spell(left, characters), spell(right, characters)) for left, right in all_merges(rank(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, **SPECIAL) for name in names])
    steps = [processors.ByteLevel(trim_offsets=False)]
    if begin is not None:
        before = {"special_tokens": [(begin, tokenizer.token_to_id(begin))]}
        pair = f"{begin} $A {begin}:1 $B:1"
        steps.append(processors.TemplateProcessing(single=f"{begin} $A", pair=pair, **before))
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


def special_name(ids: int | list[int] | None, first: int, names: list[str]) -> str | None:
    """Return the special token of an id, or of the last of several (it ends a turn); `first` is the smallest id."""
    token_id = ids[-1] if isinstance(ids, list) else ids
    return None if token_id is None else dict(enumerate(names, first)).get(token_id)


def read_tokenizer_json(content: bytes, path: Path):
    """Build the `tokenizers.Tokenizer` of a tokenizer.json, without its truncation and padding.

    Raises:
        UserError: it is damaged.
    """
    from tokenizers import Tokenizer

    with library_errors(f"{path} is no readable tokenizer", "write it again"):
        tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def meta_tokenizer_file(tokenizer_json: Path, elsewhere: Iterable[str] = ()) -> tuple[bytes, list[str]]:
    """Return Meta's tokenizer.model, byte for byte, and the names of special tokens, from a tokenizer.json.

    Args:
        elsewhere: tokens that other files name; those that this one lacks have the ids after its own.

    Raises:
        UserError: the tokenizer is of another kind; Meta's code would encode texts differently.
    """
    raw = read_tokenizer_file(tokenizer_json)
    model, added = raw["model"], raw.get("added_tokens") or []
    if model.get("type") != "BPE" or PATTERN not in json_strings(raw.get("pre_tokenizer")) or raw.get("normalizer"):
        raise UserError(f"{tokenizer_json} is not Llama 3's kind of tokenizer (byte-level BPE with Meta's pattern)")
    to_byte = {character: byte for byte, character in byte_characters().items()}
    try:
        ranked = sorted(model["vocab"].items(), key=lambda entry: entry[1])
        tokens = [bytes(to_byte[character] for character in token) for token, _ in ranked]
        names = [entry["content"] for entry in sorted(added, key=lambda entry: entry["id"])]
        ids = [rank for _, rank in ranked] + sorted(entry["id"] for entry in added)
        names += [name for name in elsewhere if name not in names and name not in model["vocab"]]
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{tokenizer_json} is damaged ({error!r}); download it again") from error
    check_special_tokens(names, tokenizer_json)
    if ids != list(range(len(ids))):
        raise UserError(f"the ids in {tokenizer_json} must be 0 to {len(ids) - 1}, special tokens last; they have gaps")
    characters = byte_characters()
    expected = [(spell(left, characters), spell(right, characters)) for left, right in all_merges(rank(tokens))]
    if merges != expected:
        raise UserError(f"the merges in {tokenizer_json} do not follow from its ids, as they do in a tiktoken file")
    return tiktoken_file(tokens), names


def rank(tokens: list[bytes]) -> dict[bytes, int]:
    return {token: index for index, token in enumerate(tokens)}


def all_merges(ranks: dict) -> list[tuple]:
    """Return the merges that ranks imply: every way to make a token of two, ordered by rank, then by the parts' ranks.

    Args:
        ranks: rank of each token; tokens are all bytes or all text.
    """
    merges = []
    for token in sorted(ranks, key=ranks.get):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(ranks[left], ranks[right], left, right) for left, right in splits if left in ranks and right in ranks]
        merges += [(left, right) for _, _, left, right in sorted(pairs)]
    return merges


def byte_characters() -> dict[int, str]:
    """Return byte-level BPE's printable character for each byte (OpenAI's GPT-2, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def spell(token: bytes, characters: dict[int, str]) -> str:
    return "".join(characters[byte] for byte in token)


def json_strings(value) -> list[str]:
    """List every string in a JSON value."""
    if isinstance(value, dict):
        return [found for item in value.values() for found in json_strings(item)]
    if isinstance(value, list):
        return [found for item in value for found in json_strings(item)]
    return [value] if isinstance(value, str) else []
