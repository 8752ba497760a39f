"""Fill the template of a model card with facts from a folder; a fact that no file states is left out."""

import math
import re
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from hf_llama3.conversion import CheckpointInfo, inspect
from hf_llama3.conversion.config.gguf import config_to_metadata
from hf_llama3.conversion.config.params import UNKNOWN_VERSION
from hf_llama3.conversion.provenance import read_evaluations, read_provenance, read_training
from hf_llama3.conversion.tokenizer.bounds import read_tokenizer_file
from hf_llama3.conversion.tokenizer.gguf import kind_of
from hf_llama3.errors import UserError
from hf_llama3.files.atomic import system_errors, write_file
from hf_llama3.files.facts import CURVES_FILE, __version__
from hf_llama3.files.hashes import CHECKSUMS, HEX_DIGITS, hash_file, read_sums
from hf_llama3.files.progress import byte_bar
from hf_llama3.files.reading import check_file, read_text
from hf_llama3.remote_code import CODE_FILES, carries_code

from .front_matter import REPOSITORY, check_card, read_front_matter, split_card, write_front_matter
from .licenses import META, check_license, license_of_meta

CARD = "README.md"
MARKS = ("<!-- Yours: what stands from here -->", "<!-- to here is kept when the card is made again. -->")
TASKS = {  # the Hub's task, by the end of the class's name
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "Model": "feature-extraction",
}
FORMATS = {"meta": "Meta's format", "gguf": "GGUF"}  # of what a folder was converted from
BITS = {"int8": 8.25, "int4": 5}  # of a quantised weight, its share of the scales included
HASHED = ("config.json", "tokenizer.json", *CODE_FILES)  # files whose hashes the card lists, besides the weights


def build_card(
    folder, license: str | None = None, repo_id: str | None = None, *, card: Path | None = None, progress: bool = False
) -> str:
    """Make the model card of a Hugging Face folder; text that a person wrote in an existing card is kept.

    Args:
        license: identifier of the Hub; if omitted, that of the folder's README.md, or that of Meta's weights if the
            model has their shape.
        repo_id: repository that the card's commands name; the folder's name if omitted.
        card: existing card whose text is kept; the folder's README.md if omitted.
        progress: show a bar while files are hashed.

    Raises:
        UserError: the folder holds no model, its card is damaged, or no licence is known.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; pass the one of a model, as train and convert make it")
    place = card if card is not None and card.exists() else folder / CARD
    info, existing = inspect(folder), read_card(place)
    if info.format != "hf":
        form = "in Meta's format" if info.format == "meta" else "a model in GGUF"
        raise UserError(f"{folder} is {form}; convert it first, then make the card of the new folder")
    written, provenance = read_front_matter(existing, place), read_provenance(folder)
    version = version_of(info, provenance)
    license = license or written.get("license") or license_of_meta(info, version)
    if license is None:
        raise UserError(f"{folder} has no licence yet; add --license with the one you choose, such as apache-2.0")
    for identifier in as_list(license):
        check_license(identifier, written)
    training, tokenizer = read_training(folder), read_tokenizer(folder)
    front_matter = {"license": license, "library_name": "transformers", "pipeline_tag": TASKS[info.head]}
    front_matter |= base_model_of(provenance, training)
    tags = ["llama", *(["llama-3"] if version.startswith("3") or training else [])]
    front_matter |= {key: value for key, value in written.items() if key != "license"}
    front_matter["tags"] = [*tags, *(tag for tag in as_list(written.get("tags")) if tag not in tags)]
    template = (Path(__file__).parent / "template.md").read_text("utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    environment.filters |= {"size": format_size, "number": lambda value: f"{value:,}", "cell": cell, "code": code}
    made = write_front_matter(front_matter) + environment.from_string(template).render(
        name=repo_id or folder.resolve().name,
        terms=[META[one] for one in as_list(license) if one in META],
        yours="\n".join((MARKS[0], written_by_user(existing, place) or "", MARKS[1])),
        info=info,
        llama="Llama" if version == UNKNOWN_VERSION else f"Llama {version.removesuffix('.0')}",
        non_embedding=info.num_parameters - embeddings_of(info),
        own_type=carries_code(folder),
        tokenizer=tokenizer and describe_tokenizer(tokenizer, info.config),
        llama_cpp_takes_it=is_for_llama_cpp(tokenizer, info.config, folder),
        memory=memory_of(info),
        provenance=provenance,
        source_format=provenance and FORMATS.get(provenance["format"], "the Hugging Face format"),
        training=training and training | {"uniform_loss": math.log(training["vocab_size"])},
        curves=CURVES_FILE if (folder / CURVES_FILE).is_file() else None,
        evaluations=read_evaluations(folder),
        files=files_of(folder, info, progress),
        package=__version__,
    )
    check_card(made, folder / CARD)
    return made


def read_card(path: Path) -> str:
    """Return the existing card, or an empty text."""
    if not path.exists():
        return ""
    if not path.is_file():
        raise UserError(f"{path} must be a file for a card, and is a folder or a device; name another")
    return read_text(path, "mend or remove it")


def written_by_user(content: str, path: Path) -> str | None:
    """Return the text that a person wrote between the marks of a card; None if it has no marks.

    Raises:
        UserError: a mark is missing or appears twice.
    """
    counts = [content.count(mark) for mark in MARKS]
    if counts == [0, 0]:
        return None
    if counts != [1, 1] or content.index(MARKS[0]) > content.index(MARKS[1]):
        raise UserError(f"{path} must hold the lines {MARKS[0]} and {MARKS[1]} once each, in this order; mend them")
    return content.split(MARKS[0])[1].split(MARKS[1])[0].strip("\n")


def is_made_here(content: str) -> bool:
    """Tell whether a card can be made again without losing a person's text: it has marks, or no text at all."""
    return MARKS[0] in content or not split_card(content)[1].strip()


def as_list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def version_of(info: CheckpointInfo, provenance: dict | None) -> str:
    """Return the version of Llama, as a conversion recorded it or as the files show it."""
    return provenance["llama_version"] if provenance else info.llama_version


def base_model_of(provenance: dict | None, training: dict | None) -> dict:
    """Return the front matter's keys for the base model, if it has a name on the Hub."""
    if training and training["source"]:
        source, relation = training["source"], {"base_model_relation": "finetune"}
    else:
        source, relation = provenance["source"] if provenance else "", {}
    return {"base_model": source} | relation if re.fullmatch(REPOSITORY, source) and "/" in source else {}


def embeddings_of(info: CheckpointInfo) -> int:
    """Count the parameters of the embedding, and of the head if it is untied."""
    return info.config["vocab_size"] * info.config["hidden_size"] * (2 if has_own_head(info) else 1)


def has_own_head(info: CheckpointInfo) -> bool:
    """Tell whether the model has an output head of its own."""
    return info.head == "ForCausalLM" and not info.tied


def memory_of(info: CheckpointInfo) -> dict[str, float]:
    """Return the bytes of the weights in bf16, of `optimize`'s int8 and int4, and of a token's cache in bf16.

    The embedding stays in bf16. A head is int8 in both; one that is tied becomes a copy.
    """
    embedding = info.config["vocab_size"] * info.config["hidden_size"]
    head = embedding if info.head == "ForCausalLM" else 0
    layers = info.num_parameters - embedding - (head if has_own_head(info) else 0)
    head_dim = info.config.get("head_dim") or info.config["hidden_size"] // info.config["num_attention_heads"]
    return {
        "bf16": 2 * info.num_parameters,
        "int8": 2 * embedding + (head + layers) * BITS["int8"] / 8,
        "int4": 2 * embedding + (head * BITS["int8"] + layers * BITS["int4"]) / 8,
        "token": 2 * 2 * info.config["num_hidden_layers"] * info.config["num_key_value_heads"] * head_dim,
    }


def cell(text: str) -> str:
    """Escape a text for a cell of a table; a bar would end it even inside of a code span."""
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    """Write a text that others chose as a code span, whatever it contains."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def format_size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def read_tokenizer(folder: Path) -> dict | None:
    path = folder / "tokenizer.json"
    return read_tokenizer_file(path) if path.exists() else None


def is_for_llama_cpp(tokenizer: dict | None, config: dict, folder: Path) -> bool:
    """Tell whether llama.cpp has a place for all of a model: its layers, its RoPE and its tokenizer."""
    try:
        return bool(tokenizer and config_to_metadata(config, folder) and kind_of(tokenizer))
    except UserError:
        return False


def describe_tokenizer(tokenizer: dict, config: dict) -> str | None:
    """Describe a tokenizer: its kind, and the tokens that begin and end texts."""
    names = {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or []}
    facts = [tokenizer["model"]["type"]] if "type" in tokenizer["model"] else []
    for title, key in (("begins with", "bos_token_id"), ("ends with", "eos_token_id")):
        if found := [f"`{names[token]}`" for token in as_list(config.get(key)) if token in names]:
            facts.append(f"{title} {' or '.join(found)}")
    return "; ".join(facts) or None


def files_of(folder: Path, info: CheckpointInfo, progress: bool) -> list[tuple[str, int, str]]:
    """List (name, bytes, SHA-256) of the model's files; a file newer than the list of hashes is hashed again."""
    paths = [path for path in (folder / name for name in sorted({*info.files, *HASHED})) if path.is_file()]
    for path in paths:
        if path.name in HASHED:
            check_file(path)
    sums, listed = {}, folder / CHECKSUMS
    if listed.exists():
        known, made = read_sums(listed), listed.stat().st_mtime
        unchanged = [path.name for path in paths if path.name in known and path.stat().st_mtime <= made]
        sums = {name: known[name] for name in unchanged if HEX_DIGITS[len(known[name])] == "sha256"}
    unknown = [path for path in paths if path.name not in sums]
    with byte_bar("hashing", sum(path.stat().st_size for path in unknown), progress and bool(unknown)) as bar:
        sums |= {path.name: hash_file(path, "sha256", bar.update) for path in unknown}
    return [(path.name, path.stat().st_size, sums[path.name]) for path in paths]


def write_card(path: Path, content: str):
    """Write a card, but never over one that a person wrote.

    Raises:
        UserError: there is such a card, or the system refuses.
    """
    if not is_made_here(read_card(path)):
        raise UserError(
            f"{path} was not made by this command, and making it again would lose it; move it away, or put your text "
            f"between the lines {MARKS[0]} and {MARKS[1]}"
        )
    with system_errors(path, "choose another file"):
        write_file(path, content.encode())
