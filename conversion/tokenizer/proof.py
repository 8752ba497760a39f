"""Prove that two checkpoints' tokenizers are the same to a user: what each does to texts, read independently."""

from hf_llama3.errors import UserError, library_errors, quoted
from hf_llama3.files.reading import read_file

from ..checkpoint import Checkpoint
from .bounds import read_tokenizer_file
from .readings import Reading, read_hub_files, read_ranks_as_meta, read_sentencepiece_model
from .templates import llama3_chat_template

EQUAL, ABSENT, DIFFERS, NOT_COMPARED = "equal", "absent", "differs", "not compared"
HUB, MODEL = "hub", "tokenizer.model"  # readers: of Hugging Face's files, and of Meta's
# Files that transformers 5.23 reads a tokenizer from
HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
HUB_FILES += ("vocab.txt", "merges.txt", "chat_template.jinja", MODEL)
CUT = 5  # tokens of the longest text in a batch
RUN = 20  # tokens of the vocabulary in one text
DIALOGUE = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": " 2 + 2?\n\nReally, 你好, \U0001f999? "},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
]


def compare_tokenizers(source: Checkpoint, target: Checkpoint) -> tuple[str, str | None]:
    """Compare what users of two checkpoints see of their tokenizers.

    Returns:
        "equal", "absent", "only in source", "only in target", "differs", or why they were not compared; and the first
        difference, if there is one.
    """
    if source.tokenizer is None or target.tokenizer is None:
        held = [name for name, checkpoint in (("source", source), ("target", target)) if checkpoint.tokenizer]
        if not held:
            return ABSENT, None
        return f"only in {held[0]}", f"weights only: there is a tokenizer in the {held[0]} alone"
    try:
        difference = find_difference(source, target)
    except UserError as error:
        return f"{NOT_COMPARED}: {error}", None
    return (EQUAL, None) if difference is None else (DIFFERS, f"the tokenizer: {difference}")


def find_difference(source: Checkpoint, target: Checkpoint) -> str | None:
    """Return the first difference, in a few words."""
    ours, theirs = (files_by_reader(checkpoint) for checkpoint in (source, target))
    pairs = [(kind, kind) for kind in ours if kind in theirs]
    pairs += [(kind, next(iter(theirs))) for kind in ours if kind not in theirs]
    pairs += [(next(iter(ours)), kind) for kind in theirs if kind not in ours]
    readings = {}

    def reading(checkpoint: Checkpoint, kind: str) -> Reading:
        key = (id(checkpoint), kind)
        if key not in readings:
            readings[key] = read(checkpoint, kind)
        return readings[key]

    for kind, other in dict.fromkeys(pairs):  # of one reader a side, both lists say the same
        if kind == other and ours[kind] == theirs[kind]:
            continue  # the same bytes for the same reader
        pair = reading(source, kind), reading(target, other)
        if source.format != target.format and "gguf" in (source.format, target.format):
            across = kind != other and "sentencepiece" in (source.tokenizer_kind, target.tokenizer_kind)
            difference = compare_ids(*pair, without_special=across)
        elif kind == other:
            difference = compare_alike(*pair)
        else:
            meta = source if kind == MODEL else target
            difference = compare_across(*(pair if kind == MODEL else pair[::-1]), meta)
        if difference:
            return difference
    return None


def files_by_reader(checkpoint: Checkpoint) -> dict[str, tuple]:
    """Return the contents of the files of each reader, `HUB` and `MODEL`."""
    hub, model, found = checkpoint.hf_tokenizer, checkpoint.tokenizer, {}
    if hub is not None and ((hub / "tokenizer.json").is_file() or checkpoint.tokenizer_kind != "tiktoken"):
        paths = [hub / name for name in HUB_FILES] + sorted((hub / "additional_chat_templates").glob("*.jinja"))
        found[HUB] = tuple((path.name, read_file(path)) for path in paths if path.is_file())
    if model.name == MODEL:
        found[MODEL] = (*(checkpoint.special_tokens or ()), read_file(model))
    return found


def read(checkpoint: Checkpoint, kind: str) -> Reading:
    if kind == HUB:
        if (path := checkpoint.hf_tokenizer / "tokenizer.json").is_file():
            read_tokenizer_file(path)  # what is in the way of reading it at all
        return read_hub_files(checkpoint.hf_tokenizer)
    if checkpoint.tokenizer_kind == "sentencepiece":
        return read_sentencepiece_model(checkpoint.tokenizer)
    begin = checkpoint.config["bos_token_id"]
    begin = begin[-1] if isinstance(begin, list) and begin else begin
    return read_ranks_as_meta(checkpoint.tokenizer, checkpoint.special_tokens, begin)


def compare_alike(ours: Reading, theirs: Reading) -> str | None:
    """Compare everything that one reader sees of two tokenizers."""
    return (
        compare_values("token", ours.tokens, theirs.tokens)
        or compare_values("flags of", ours.flags, theirs.flags)
        or compare_values("setting", ours.settings, theirs.settings)
        or compare_values("chat template", ours.templates, theirs.templates)
        or compare_texts(ours, theirs, hard_texts() + around(ours.special), with_special=(False, True))
        or compare_batches(ours, theirs)
    )


def compare_ids(ours: Reading, theirs: Reading, without_special: bool = False) -> str | None:
    """Compare what GGUF has a place for, which not all settings have.

    Args:
        without_special: leave out texts with names of special tokens, which sentencepiece does not find.
    """
    texts = hard_texts() + around(ours.special)
    if without_special:
        texts = [text for text in texts if not any(name in text for name in theirs.special | ours.special)]
    tokens = compare_values("token", ours.tokens, theirs.tokens)
    return tokens or compare_texts(ours, theirs, texts, with_special=(False,))


def compare_across(ours: Reading, theirs: Reading, meta: Checkpoint) -> str | None:
    """Compare Meta's tokenizer.model with Hugging Face's files.

    If such files lie beside it, they say what tokenizer.model cannot: flags, padding, the tokens around a text.
    """
    if difference := compare_values("token", ours.tokens, theirs.tokens):
        return difference
    texts = hard_texts() + runs_of_tokens(ours)
    if meta.hf_tokenizer is not None or meta.tokenizer_kind == "sentencepiece":
        texts = [text for text in texts if not any(name in text for name in theirs.special | ours.special)]
    else:
        texts += around(theirs.special)
    alone, pieces = meta.hf_tokenizer is None, meta.tokenizer_kind == "sentencepiece"
    joined = alone and not pieces  # sentencepiece's library leaves out the begin token when it decodes
    if difference := compare_texts(ours, theirs, texts, with_special=(False, True) if joined else (False,)):
        return difference
    if alone and pieces:
        return first_difference("ids of", texts, ours.encode(texts, True), theirs.encode(texts, True))
    if not alone:
        return None
    pad, wanted = theirs.tokens.get(theirs.settings["pad_token"]), meta.config["pad_token_id"]
    if pad != wanted and wanted in ours.tokens.values():
        return f"pad token {wanted} and {pad}"
    if meta.instruct and theirs.templates.get("default") == llama3_chat_template():
        return compare_dialogue(ours, theirs)
    wanted = meta.chat_template or llama3_chat_template()
    return compare_values("chat template", {"default": wanted}, theirs.templates) if meta.instruct else None


def compare_values(what: str, ours: dict, theirs: dict) -> str | None:
    for key in sorted(ours.keys() | theirs.keys()):
        one, other = (values.get(key, "none") for values in (ours, theirs))
        if one != other:
            return f"{what} {quoted(key)}: {quoted(one)} and {quoted(other)}"
    return None


def compare_texts(ours: Reading, theirs: Reading, texts: list[str], with_special: tuple[bool, ...]) -> str | None:
    """Compare the ids of texts, and the texts that the ids decode to."""
    for special in with_special:
        ids, other_ids = (reading.encode(texts, special) for reading in (ours, theirs))
        if difference := first_difference("ids of", texts, ids, other_ids):
            return difference
        shown = not special or (ours.shows_special and theirs.shows_special)
        for skip in (False, True) if shown else (True,):
            joined, other_joined = (reading.decode(ids, skip) for reading in (ours, theirs))
            if difference := first_difference("the text of", ids, joined, other_joined):
                return difference
    return None


def compare_batches(ours: Reading, theirs: Reading) -> str | None:
    """Compare how batches are padded and truncated."""
    if ours.batch is None or theirs.batch is None:
        return None
    texts = ["a", "a b c d e f g h i j", "", "b c"]
    return first_difference("padded and cut, ", texts, ours.batch(texts, CUT), theirs.batch(texts, CUT))


def first_difference(what: str, asked: list, ours: list, theirs: list) -> str | None:
    for one, our_answer, their_answer in zip(asked, ours, theirs, strict=True):
        if our_answer != their_answer:
            return f"{what} {quoted(one)}: {quoted(our_answer)} and {quoted(their_answer)}"
    return None


def compare_dialogue(ours: Reading, theirs: Reading) -> str | None:
    """Compare Meta's form of a dialogue with the text of this package's chat template, rendered as in transformers.

    (llama-models 0.3.0, models/llama3/chat_format.py, `encode_dialog_prompt`)
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(llama3_chat_template())
    begin = theirs.settings["bos_token"]
    made = template.render(messages=DIALOGUE, bos_token=begin, add_generation_prompt=True)
    wanted = "".join(
        f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n{turn['content'].strip()}<|eot_id|>"
        for turn in DIALOGUE
    )
    wanted = f"{begin}{wanted}<|start_header_id|>assistant<|end_header_id|>\n\n"
    return first_difference("a dialogue", ["of four turns"], ours.encode([wanted], False), theirs.encode([made], False))


def split_alike(ours, theirs, with_begin: bool) -> bool:
    """Tell whether two `tokenizers.Tokenizer` have the same ids, and encode and decode every hard text alike."""
    if ours.get_vocab(with_added_tokens=True) != theirs.get_vocab(with_added_tokens=True):
        return False
    texts = hard_texts() + [ours.id_to_token(index) for index in ours.get_added_tokens_decoder()]
    with library_errors("tokenizer.json fails at a text", "write it again"):
        ids, other_ids = (
            [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=with_begin)]
            for tokenizer in (ours, theirs)
        )
        joined, other_joined = (tokenizer.decode_batch(ids, skip_special_tokens=False) for tokenizer in (ours, theirs))
    return ids == other_ids and joined == other_joined


def around(names: set[str]) -> list[str]:
    """Return texts that show an added token's flags: spaces beside it, letters beside it, another case."""
    return [text for name in sorted(names) for text in (name, f"a {name} b", f"a{name}b", f"a{name.upper()} b")]


def runs_of_tokens(reading: Reading) -> list[str]:
    """Return texts of the vocabulary's tokens in a row, so that every merge is needed somewhere."""
    plain = sorted(set(reading.tokens.values()) - {reading.tokens[name] for name in reading.special})
    joined = reading.decode([plain[start : start + RUN] for start in range(0, len(plain), RUN)], False)
    return [text.replace("\ufffd", "") for text in joined]


def hard_texts() -> list[str]:
    """List texts that break tokenizers: every Unicode block, long runs, white space, contractions, special tokens."""
    starts = [start for start in range(0, 0x11000, 64) if not 0xD800 <= start < 0xE000]  # no surrogates
    blocks = ["".join(map(chr, range(start, start + 64))) for start in starts]
    emoji = ["".join(map(chr, range(start, start + 16))) for start in range(0x1F300, 0x1FA00, 16)]
    runs = [" " * 300, "\n" * 50, "x" * 500, "0123456789" * 9]
    words = ["I'll don't WE'VE they'd 'S", "a  b   c\t\td\n\n\ne \r\n f", "Hello world", "hello, World!  ", "3.14159"]
    odd = ["", " ", "é", "e\u0301", "\ufeff", "\x00", "ﷺ", "\U0001d518\U0001d52b", "👩‍👩‍👧‍👦"]
    special = ["<|begin_of_text|>", "a<|eot_id|>b", "<|start_header_id|>user<|end_header_id|>", "<|not_special|>"]
    return blocks + emoji + runs + words + odd + special
