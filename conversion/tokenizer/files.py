"""Make the files of a checkpoint's tokenizer in the format of the target.

Meta's tokenizer.model holds tokens and ranks, but no chat templates, padding or flags, and it cannot hold tokenizers of
other kinds at all. So a Hugging Face folder's own files travel beside it, in a folder of their own, and come back.
"""

import hashlib
from pathlib import Path

from hf_llama3.errors import UserError, quoted
from hf_llama3.files.json import to_json
from hf_llama3.files.reading import read_file, refuse_links

from ..checkpoint import Checkpoint
from ..config.schema import TOKENIZER_FILES, read_small
from .bpe import NUM_SPECIAL_TOKENS, all_merges, hf_tokenizer_files, meta_tokenizer_file, read_ranks
from .proof import hard_texts
from .readings import read_beside
from .templates import TEMPLATE_FOLDER

TOKENIZER_MODEL = "tokenizer.model"
CARRIED = "huggingface"  # their folder in a directory of Meta's
PORTABLE_CLASS = "PreTrainedTokenizerFast"  # the class that transformers 4 and 5 and all engines know
# What to do about a tokenizer.model that no tokenizer.json can be made of
WITHOUT = "to convert the weights alone, move it elsewhere; then put Hugging Face's files of this tokenizer beside them"
# Other names for it, known to version 5 only.
NEW_CLASSES = ("TokenizersBackend",)


def hf_tokenizer(source: Checkpoint, notes: list[str]) -> dict[str, bytes]:
    """Return the tokenizer files for a Hugging Face folder."""
    if source.hf_tokenizer is not None:
        # Version 4 must find a class that it knows; files of other tokenizers than Llama's are not touched.
        is_foreign = source.format == "meta" and source.tokenizer_kind not in ("tiktoken", "sentencepiece")
        files = copy_files(source.hf_tokenizer, portable=not is_foreign)
    elif source.tokenizer_kind == "tiktoken":
        tokens = read_ranks(source.tokenizer)
        made = hf_tokenizer_files(tokens, source.special_tokens, source.config, source.instruct, source.chat_template)
        files = {name: content.encode() for name, content in made.items()}
    elif source.tokenizer_kind == "sentencepiece":
        files = sentencepiece_files(source)
    else:
        files = {}
    if not files:
        notes.append("no tokenizer was written: the source has none")
    return files


def tokenizer_paths(folder: Path) -> dict[str, Path]:
    """Return the tokenizer files of a Hugging Face folder by their paths in it."""
    paths = [path for path in folder.iterdir() if path.name.split(".")[0].startswith(TOKENIZER_FILES)]
    paths += (folder / TEMPLATE_FOLDER).glob("*.jinja")
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths) if path.is_file()}


def copy_files(folder: Path, portable: bool = True) -> dict[str, bytes]:
    """Return the tokenizer files as they are, with the `portable` class if that is wanted."""
    refuse_links(folder, tokenizer_paths(folder).values())
    files = {name: read_file(path) for name, path in tokenizer_paths(folder).items()}
    if portable and "tokenizer_config.json" in files:
        config = read_small(folder / "tokenizer_config.json")
        if config.get("tokenizer_class") in NEW_CLASSES:
            files["tokenizer_config.json"] = to_json(config | {"tokenizer_class": PORTABLE_CLASS})
    return files


def find_carried(folder: Path, made_with: str | None, inferred: list[str]) -> Path | None:
    """Return the folder of Hugging Face files beside Meta's, if they still belong to the tokenizer.model.

    Args:
        made_with: hash of the tokenizer.model that they were written with.
    """
    carried, model = folder / CARRIED, folder / TOKENIZER_MODEL
    if not carried.is_dir() or not tokenizer_paths(carried):
        return None
    if model.is_file() and hash_of(model) != made_with:
        inferred.append(f"tokenizer: {TOKENIZER_MODEL}, since it is not the one that came with {CARRIED}/")
        return None
    inferred.append(f"tokenizer: its Hugging Face files lie in {CARRIED}/")
    return carried


def hash_of(model: Path | bytes) -> str:
    """Return the hash that identifies a tokenizer.model."""
    return hashlib.sha256(read_file(model) if isinstance(model, Path) else model).hexdigest()


def meta_tokenizer(source: Checkpoint, notes: list[str]) -> tuple[dict[str, bytes], list[str] | None]:
    """Return the tokenizer files for a directory of Meta's, and the special tokens."""
    if source.tokenizer is None:
        notes.append("no tokenizer was written: the source has none")
        return {}, None
    carried = copy_files(source.hf_tokenizer, portable=False) if source.hf_tokenizer else {}
    model, names = meta_tokenizer_model(source, notes)
    if carried:
        notes.append(
            f"{TOKENIZER_MODEL} has no place for chat templates, padding and the flags of tokens: {CARRIED}/ keeps "
            f"{', '.join(sorted(carried))}, and a conversion back gives them back"
        )
    return model | {f"{CARRIED}/{name}": content for name, content in carried.items()}, names


def meta_tokenizer_model(source: Checkpoint, notes: list[str]) -> tuple[dict[str, bytes], list[str] | None]:
    """Return tokenizer.model, if Meta's format can hold the tokenizer, and the special tokens."""
    if source.tokenizer.name == TOKENIZER_MODEL:
        return {TOKENIZER_MODEL: read_file(source.tokenizer)}, source.special_tokens
    try:
        content, names = meta_tokenizer_file(source.tokenizer, read_beside(source.tokenizer.parent)[1])
    except UserError as error:
        notes.append(f"no {TOKENIZER_MODEL} was written, so Meta's own code has no tokenizer: {error}")
        return {}, None
    total = content.count(b"\n") + len(names)
    if len(names) != NUM_SPECIAL_TOKENS or total != source.config["vocab_size"]:
        wanted = f"{NUM_SPECIAL_TOKENS} special tokens and as many in all as the embedding has rows"
        notes.append(f"Meta's own code wants {wanted}, and will not take these: {len(names)} and {total}")
    return {TOKENIZER_MODEL: content}, names


def sentencepiece_files(source: Checkpoint) -> dict[str, bytes]:
    """Return Hugging Face's files for Llama 2's tokenizer.model.

    Raises:
        UserError: the extra `llama2` is missing, the file is no sentencepiece model, or not one like Llama 2's.
    """
    model = read_sentencepiece(source.tokenizer)
    ids = {"unk_token": model.unk_id(), "bos_token": model.bos_id(), "eos_token": model.eos_id()}
    if lacking := [name for name, index in ids.items() if index < 0]:
        raise UserError(f"{source.tokenizer} must have the tokens {', '.join(ids)}, and lacks {lacking[0]}; {WITHOUT}")
    config = {
        "tokenizer_class": PORTABLE_CLASS,
        **{name: model.id_to_piece(index) for name, index in ids.items()},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": source.config["max_position_embeddings"],
    }
    tokenizer = build_sentencepiece(model)
    check_pieces(model, tokenizer, source.tokenizer)
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": to_json(config),
        TOKENIZER_MODEL: read_file(source.tokenizer),
    }


def check_pieces(model, tokenizer, path: Path):
    """Check that a sentencepiece model has no settings that the tokenizer made of it lacks: other rules for what a text
    becomes before it is split, or another way of splitting than merges.

    Raises:
        UserError: some text is encoded otherwise.
    """
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    texts = [text for text in hard_texts() if not any(name in text for name in names)]
    made = tokenizer.encode_batch(texts, add_special_tokens=False)
    for text, ids, encoding in zip(texts, model.encode(texts), made, strict=True):
        if ids != encoding.ids:
            changed = model.normalize(text)
            plain = "\u2581" + text.replace(" ", "\u2581")
            why = f", since it changes that to {quoted(changed)} first" if changed != plain else ""
            what = f"{path} encodes {quoted(text)} as {quoted(ids)}{why}"
            raise UserError(f"{what}, and no tokenizer.json that is made of it does; {WITHOUT}")


def read_sentencepiece(path: Path):
    """Open a sentencepiece model.

    Raises:
        UserError: the extra `llama2` is missing, or the file is no sentencepiece model.
    """
    try:
        import sentencepiece
    except ImportError as error:
        command = 'pip install "hf_llama3[llama2]"'
        raise UserError(f"{path} is a sentencepiece model; to convert or compare it, {command}") from error
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is not a readable sentencepiece model; download it again") from error


def build_sentencepiece(model):
    """Build the `tokenizers.Tokenizer` with a sentencepiece model's ids, and its begin token before every text.

    Pieces are made in the order of their ids, as in meta-llama/Llama-2-7b-hf, tokenizer.json.
    """
    from tokenizers import processors

    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    apart = {piece: True for index, piece in enumerate(pieces) if model.is_control(index) or model.is_unknown(index)}
    made = {piece: i for i, piece in enumerate(pieces) if piece not in apart and not model.is_byte(i)}
    tokenizer = build_pieces(pieces, made, apart, model.id_to_piece(model.unk_id()))
    begin = model.id_to_piece(model.bos_id())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, model.bos_id())]
    )
    return tokenizer


def build_pieces(pieces: list[str], made: dict, apart: dict[str, bool], unknown: str, prefix: bool = True):
    """Build the `tokenizers.Tokenizer` of a sentencepiece model's pieces: spaces in them are "\u2581", and what has no
    piece is spelled in bytes.

    Args:
        made: pieces that are merged from smaller ones, with the order of merges.
        apart: pieces that are found in a text before it is split, and whether they are special.
        prefix: whether a text gets a space before it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, all_merges(made), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces, before = normalizers.Replace(" ", "\u2581"), [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for piece, special in apart.items():  # two methods, because they overrule the token's own flag
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(piece, normalized=False)])
    return tokenizer
