"""What a tokenizer.json may hold: the types of all of it, and bounds on what it can make of a text.

A file names the steps that a text goes through. A step that doubles a text, forty times in a row, would fill any
memory; so would a token of megabytes, which is split in every way to find its merges.
"""

import base64
import json
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from hf_llama3.errors import UserError, quoted
from hf_llama3.files.json import read_json
from hf_llama3.files.schema import (
    FLAG,
    LARGEST,
    OBJECT,
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

from ..checkpoint import Checkpoint
from ..config.schema import ID, TOKEN

# Bytes to look at for every way to make a token of two; 7.4 million in Llama 3's.
MOST_MERGING = 2**26
MOST_GROWTH = 1024  # the most characters that all steps may make of one
MOST_PIECES = 64  # of a post-processor's template
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MOST_OF_STEPS = 2**20  # characters of JSON; a normaliser's compiled table has 0.3 million


def are_ids(value) -> bool:
    """Tell whether a vocabulary maps tokens to ids; all at once, since there are hundreds of thousands."""
    numbers = value.values() if isinstance(value, dict) and value else [None]
    return set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) < LARGEST


def are_pairs(value) -> bool:
    """Tell whether merges are texts or pairs of texts."""
    if not isinstance(value, list) or not set(map(type, value)) <= {str, list}:
        return False
    pairs = [merge for merge in value if type(merge) is list]
    return set(map(len, pairs)) <= {2} and set(map(type, chain.from_iterable(pairs))) <= {str}


def is_charsmap(value) -> bool:
    """Tell whether a text is sentencepiece's table of characters: the bytes of a trie, that trie, and texts."""
    try:
        content = base64.b64decode(value, validate=True)
    except (TypeError, ValueError):
        return False
    size = int.from_bytes(content[:4], "little")
    return size % 4 == 0 and 0 < size <= len(content) - 4


EMPTY_PATTERNS = ({"String": ""}, {"Regex": ""}, {})
NOT_EMPTY = Rule("a text that is not empty", lambda value: isinstance(value, str) and value != "")
MOST_PADDED = 2**20  # tokens that padding may make of a text
SCORED = listed(listed(either(text(2**16), number(-1e9, 1e9)), 2))  # [piece, score]
MODEL = {
    "type": text(32),
    "vocab": either(Rule("ids by token", are_ids), SCORED),
    "merges": Rule("a list of pairs of tokens", are_pairs),
    "unk_token": optional(text()),
    "continuing_subword_prefix": optional(text(64)),
    "byte_fallback": optional(FLAG),
    "ignore_merges": optional(FLAG),
}
TOKENIZER = {
    "model": fields(MODEL, required=("vocab",)),
    "added_tokens": optional(listed(fields(TOKEN | {"id": ID}, required=("id", "content")))),
    **dict.fromkeys(STEPS, optional(OBJECT)),
    "truncation": optional(fields({"max_length": whole(0, 2**64 - 1), "stride": whole(0, 2**64 - 1)})),
    "padding": optional(fields({"strategy": either(text(64), fields({"Fixed": whole(0, MOST_PADDED)}))})),
}
# What the library panics at in a step, where it prints lines of its own (tokenizers 0.23) -> what must be there
PANICS = {
    ("FixedLength", "length"): whole(),
    ("Prepend", "prepend"): NOT_EMPTY,
    ("Strip", "stop"): whole(0, 1),  # at what is shorter
    ("Replace", "pattern"): Rule("an object without an empty text", lambda value: value not in EMPTY_PATTERNS),
    ("Precompiled", "precompiled_charsmap"): Rule("a table of sentencepiece's in base64", is_charsmap),
}
PIECE = mapped(fields({"id": text(), "type_id": optional(whole(0))}))  # {"SpecialToken": {...}} or {"Sequence": {...}}
SPECIALS = mapped(fields({"id": text(), "ids": listed(ID, 64), "tokens": listed(text(), 64)}, required=("ids",)))


def read_tokenizer_file(path: Path) -> dict:
    """Read a tokenizer.json.

    Raises:
        UserError: a part has the wrong type, a token is there twice, or the growth of a text is not bounded.
    """
    raw = check(read_json(path), TOKENIZER, path, ("model",))
    check(raw["model"], MODEL, path, ("vocab",))
    vocabulary = raw["model"]["vocab"]
    tokens = vocabulary if isinstance(vocabulary, dict) else [str(entry[0]) for entry in vocabulary if entry]
    check_lengths(tokens, path)
    check_merges(raw["model"], path)
    if isinstance(vocabulary, dict):
        check_once(list(vocabulary.values()), "id", path)
    for key in ("content", "id"):
        check_once([token[key] for token in raw.get("added_tokens") or []], key, path)
    if (size := len(json.dumps([raw.get(step) for step in STEPS]))) > MOST_OF_STEPS:
        raise UserError(f"the steps in {path} must be at most {MOST_OF_STEPS} characters, got {size}; write it again")
    check_steps(raw, path)
    for step in STEPS:
        if (growth := growth_of(raw.get(step), path)) > MOST_GROWTH:
            made = f"make at most {MOST_GROWTH} characters of one, got {growth}"
            raise UserError(f"the {step} in {path} must {made}; do not trust this folder")
    return raw


def check_tokenizer(checkpoint: Checkpoint):
    """Check the tokenizer.json of a checkpoint, if there is one, before a library builds it."""
    folder = checkpoint.hf_tokenizer
    if folder is not None and (folder / "tokenizer.json").exists():
        with named_after(checkpoint):
            read_tokenizer_file(folder / "tokenizer.json")


@contextmanager
def named_after(checkpoint: Checkpoint):
    """Let errors name a GGUF file, and not the temporary folder in which the files of its tokenizer lie."""
    try:
        yield
    except UserError as error:
        if checkpoint.format != "gguf":
            raise
        raise UserError(str(error).replace(str(checkpoint.hf_tokenizer), str(checkpoint.path))) from error


def check_once(values: list, what: str, path: Path):
    if len(set(values)) < len(values):
        seen = set()
        twice = next(value for value in values if value in seen or seen.add(value))
        raise UserError(f"{path} must give each {what} to one token, got {quoted(twice)} twice; download it again")


def check_steps(raw: dict, path: Path):
    """Refuse what the library panics at, where a file shows it before a text does."""
    waiting = [raw.get(step) for step in STEPS]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            for (kind, key), rule in PANICS.items():
                if item.get("type") == kind and key in item and not rule.takes(item[key]):
                    what = f"`{key}` of the step {kind} in {path}"
                    raise UserError(f"{what} must be {rule.words}, got {quoted(item[key])}; write it again")
        waiting += item if isinstance(item, list) else item.values() if isinstance(item, dict) else ()
    truncation = raw.get("truncation") or {}
    length, stride = truncation.get("max_length", 0), truncation.get("stride", 0)
    if stride and stride > length - MOST_PIECES:
        rule = f"`stride` of the truncation in {path} must be 0, or at least {MOST_PIECES} below `max_length`"
        raise UserError(f"{rule}, got {stride} and {length}; write it again")


def check_merges(model: dict, path: Path):
    """Refuse merges at which the library panics: to a token that is not there, or of a second one without its prefix.

    (tokenizers 0.23, models/bpe/model.rs, `BpeBuilder::build`)
    """
    prefix, vocabulary = model.get("continuing_subword_prefix") or "", model["vocab"]
    if not prefix.isascii():
        raise UserError(f"`continuing_subword_prefix` in {path} must be ASCII, got {quoted(prefix)}; download it again")
    for merge in model.get("merges") or [] if isinstance(vocabulary, dict) else []:
        parts = merge if isinstance(merge, list) else merge.split(" ")
        if len(parts) != 2:
            continue  # which the library answers with an error
        if not parts[1].startswith(prefix):
            rule = f"the second token of each merge in {path} must begin with {quoted(prefix)}"
            raise UserError(f"{rule}, its `continuing_subword_prefix`, got {quoted(merge)}; download it again")
        if parts[0] + parts[1][len(prefix) :] not in vocabulary:
            raise UserError(f"{path} holds the merge {quoted(merge)} to a token that it lacks; download it again")


def check_lengths(tokens, path: Path):
    """Refuse tokens so long that finding their merges would take for ever."""
    if (work := sum(len(token) ** 2 for token in tokens)) > MOST_MERGING:
        longest = max(map(len, tokens))
        rule = f"the squares of their lengths must sum to at most {MOST_MERGING}"
        raise UserError(f"{path} holds tokens that are too long: {rule}, got {work}, the longest of {longest}")


def growth_of(step, path: Path) -> int:
    """Return the most characters that a step, with its own steps, makes of one; at most `MOST_GROWTH` + 1."""
    growth, waiting = 1, [step]
    while waiting and growth <= MOST_GROWTH:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            if item.get("type") == "TemplateProcessing":
                growth *= growth_of_template(item, path)
            elif item.get("type") in ("Replace", "Prepend"):
                content = item.get("content", item.get("prepend"))
                growth *= max(len(content), 1) if isinstance(content, str) else MOST_GROWTH + 1
            else:
                waiting += item.values()
    return min(growth, MOST_GROWTH + 1)


def growth_of_template(template: dict, path: Path) -> int:
    """Return how often a template repeats its text."""
    if not SPECIALS.takes(template.get("special_tokens", {})):
        raise UserError(f"the special tokens of the post_processor in {path} must be ids; download it again")
    often = 1
    for key in ("single", "pair"):
        pieces = template.get(key, [])
        if isinstance(pieces, str):  # "<s> $A $B:1", which the library accepts, too
            kinds = [("Sequence" if piece.startswith("$") else "Special", piece[:2]) for piece in pieces.split()]
            pieces = [{kind: {"id": name}} for kind, name in kinds]
        if not isinstance(pieces, list) or len(pieces) > MOST_PIECES or not all(map(PIECE.takes, pieces)):
            raise UserError(
                f"`{key}` of the post_processor in {path} must be at most {MOST_PIECES} pieces; download it again"
            )
        texts = [piece["Sequence"].get("id") for piece in pieces if "Sequence" in piece]
        often = max([often, *(texts.count(one) for one in texts)])
    return often
