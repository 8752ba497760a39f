"""Check that a folder can be published on the Hub: which files belong there, and which must not."""

import re
from fnmatch import fnmatch
from pathlib import Path

from hf_llama3.conversion import CheckpointInfo
from hf_llama3.conversion.formats.hf import INDEX
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.conversion.provenance import PROVENANCE, read_provenance
from hf_llama3.conversion.tokenizer.rows import require_rows
from hf_llama3.errors import UserError, words_of
from hf_llama3.files.facts import CURVES_FILE, EVALUATIONS, TRAINING_FACTS
from hf_llama3.files.hashes import CHECKSUMS, check_sums
from hf_llama3.files.json import read_json
from hf_llama3.files.reading import leads_outside, read_file
from hf_llama3.remote_code import AUTO_MAP, CODE_FILES, carries_code, code_files

from .card import CARD, version_of
from .licenses import META, MetaLicense, license_of_meta

NOTICE = "NOTICE"
VOCABULARY = ("tokenizer.json", "tokenizer.model")
FACTS = (CHECKSUMS, TRAINING_FACTS, PROVENANCE, EVALUATIONS, ".eval_results/*.yaml")
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
SETTINGS += ("added_tokens.json", "chat_template.jinja", "additional_chat_templates/*.jinja")
TEXTS = (CARD, NOTICE, "LICENSE*", "USE_POLICY*", *SETTINGS, *FACTS)
PICTURES = (CURVES_FILE, "*.png", "*.jpg", "*.svg")
SECRETS = {
    "a token of the Hub": rb"\bhf_[A-Za-z0-9]{30,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a key of AWS": rb"\bAKIA[0-9A-Z]{16}\b",
    "a token of GitHub": rb"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{50,}",
    "an API key": rb"\bsk-[A-Za-z0-9_-]{32,}",
}


def choose(folder: Path, info: CheckpointInfo) -> tuple[list[str], list[str]]:
    """Divide the files of a folder into those of the model and the rest, by their paths in it."""
    code = CODE_FILES if carries_code(folder) else ()
    named, wanted = {*info.files, INDEX, *code}, (*VOCABULARY, *TEXTS, *PICTURES)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    chosen = [
        name
        for name in names
        if name in named or any(fnmatch(name, one) and name.count("/") == one.count("/") for one in wanted)
    ]
    rest = {name.split("/")[0] + ("/" if "/" in name else "") for name in names if name not in chosen}
    return chosen, sorted(rest)


def check_repository(folder: Path, info: CheckpointInfo, chosen: list[str], progress: bool = False):
    """Check that a folder is whole, has the hashes that it lists, loads, and holds no secret.

    Raises:
        UserError: it does not; the sentence names the file.
    """
    if (folder / CHECKSUMS).exists():
        remedy = f"make the folder again, or remove {CHECKSUMS} if you changed the file"
        check_sums(folder / CHECKSUMS, progress, remedy)
    check_form(folder, info)
    check_code(folder)
    check_loads(folder)
    for name in chosen:
        if name in info.files:
            continue
        check_place(folder, folder / name)
        if not any(fnmatch(name, pattern) for pattern in (*VOCABULARY, *PICTURES)):
            check_secrets(folder / name)


def check_form(folder: Path, info: CheckpointInfo):
    """Check that other tools read the folder as this package does: names, kind of file, configuration."""
    config = read_json(folder / "config.json")
    made = f"hf-llama3 convert {folder} {folder}-whole --to hf"
    if config.get("tie_word_embeddings") and not info.tied and info.head == "ForCausalLM":
        raise UserError(
            f"`tie_word_embeddings` in {folder / 'config.json'} is true, but there is a head that differs from the "
            f"embedding, which older readers would lose; push what {made} makes, where it is false"
        )
    require_rows(open_checkpoint(folder))
    if not info.loads_as_is:
        heads = info.config["hidden_size"] % info.config["num_attention_heads"]
        if heads and config.get("model_type") == "llama3":
            return
        made += " --as llama3" if heads else ""
        raise UserError(f"{folder} is not in the form that from_pretrained reads; push what {made} makes of it")


def check_code(folder: Path):
    """Check that a folder of our own type carries this package's code, and that its configuration names it."""
    if not carries_code(folder):
        return
    again = "write the folder again with convert --as llama3"
    for name, content in code_files().items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}, which its type llama3 needs; {again}")
        if read_file(folder / name) != content:
            raise UserError(f"{folder / name} is not the one of this package; {again}")
    if read_json(folder / "config.json").get("auto_map") != AUTO_MAP:
        raise UserError(f"`auto_map` in {folder / 'config.json'} does not name all classes of its code; {again}")


def check_loads(folder: Path):
    """Check that transformers loads configuration and tokenizer; the tensors were checked before."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if (folder / "tokenizer_config.json").exists():
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each library has errors of its own
        reason = words_of(error)
        raise UserError(f"{folder} cannot be loaded by transformers ({reason}); mend that first") from error


def check_place(folder: Path, path: Path):
    """Refuse a link that leads outside of the folder (and of the Hub's cache, for a folder in it)."""
    if place := leads_outside(folder, path):
        raise UserError(
            f"{path} is a link to {place}, outside of the folder; put a copy there if it is to be published"
        )


def check_secrets(path: Path):
    """Refuse a text that holds what looks like a secret, without printing it."""
    for number, line in enumerate(read_file(path).splitlines(), start=1):
        for what, pattern in SECRETS.items():
            if re.search(pattern, line):
                raise UserError(f"{path}, line {number}, holds what looks like {what}; remove it, and make it invalid")


def notes_on(folder: Path, repo_id: str, info: CheckpointInfo, terms: list[MetaLicense]) -> list[str]:
    """Return notes on what is no error but should be known before publishing."""
    notes = [] if info.tokenizer else ["there is no tokenizer: nobody can put a text into this model"]
    metas = license_of_meta(info, version_of(info, read_provenance(folder)))
    if metas and META[metas] not in terms:
        notes.append(f"it has the shape and vocabulary of {META[metas].name}: Meta's weights are under {metas}")
    for one in terms:
        asks = f"{one.name}'s licence asks"
        if not any(folder.glob("LICENSE*")):
            notes.append(f"{asks} for a copy of its text beside the weights, as LICENSE: {one.link}")
        if (folder / NOTICE).exists() and one.notice not in read_file(folder / NOTICE).decode("utf-8", "replace"):
            notes.append(f"{asks} for this line in {NOTICE}: {one.notice}")
        name = repo_id.split("/")[-1].removeprefix("Meta-").replace("-", " ")
        if not name.lower().startswith(one.prefix.lower()):
            notes.append(f"{asks} that the name of what is derived begins with {one.prefix!r}")
    return notes
