"""The YAML at the head of a model card: read, checked as the Hub checks it, and written.

The rules of the Hub: https://github.com/huggingface/hub-docs/blob/main/modelcard.md. The Hub also looks up names,
such as those of datasets; that is not done here.
"""

import re
from pathlib import Path

import yaml

from hf_llama3.errors import UserError, words_of
from hf_llama3.files.json import MAX_DIGITS

from .licenses import IDENTIFIERS

REPOSITORY = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"
MOST_CHARACTERS = 2**17  # of front matter, which takes Python's reader two seconds
RELATIONS = ("adapter", "finetune", "merge", "quantized")
LISTED = "|".join(map(re.escape, IDENTIFIERS))
# Key -> (pattern of each value, whether several are allowed, description for an error)
RULES = {
    "license": (LISTED, True, "an identifier of the Hub's list, such as apache-2.0, mit, llama3.1 or other"),
    "license_name": (r"[a-z0-9][a-z0-9.-]*", False, "a short name in small letters, such as my-terms-1.0"),
    "license_link": (r"LICENSE|LICENSE\.(md|txt)|https?://\S+", False, "LICENSE or an address"),
    "library_name": (r"[a-z0-9_.-]+", False, "a library's name, such as transformers"),
    "pipeline_tag": (r"[a-z0-9]+(-[a-z0-9]+)*", False, "a task, such as text-generation"),
    "language": (r"[a-z]{2,3}(-[A-Za-z0-9]+)?|multilingual|code", True, "a code such as en"),
    "base_model": (REPOSITORY, True, "a repository, such as meta-llama/Llama-3.1-8B"),
    "base_model_relation": ("|".join(RELATIONS), False, f"one of {', '.join(RELATIONS)}"),
    "datasets": (REPOSITORY, True, "a repository, such as owner/name"),
    "tags": (r"\S.*", True, "a text"),
}


class Loader(yaml.SafeLoader):
    """Read YAML in which nothing refers to anything: sixty lines of references can mean 2^60 values."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "a value must stand where it is meant, got a reference", mark)
        return super().compose_node(parent, index)

    def construct_number(self, node):
        if len(node.value) > MAX_DIGITS:
            rule = f"a number must have at most {MAX_DIGITS} digits, got {len(node.value)}"
            raise yaml.constructor.ConstructorError(None, None, rule, node.start_mark)
        return self.construct_yaml_int(node)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_number)


def split_card(content: str) -> tuple[str | None, str]:
    """Split a card into its front matter (without the lines of dashes; None if it has none) and the rest."""
    match = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", content, re.DOTALL | re.MULTILINE)
    return (match[1], content[match.end() :]) if match else (None, content)


def read_front_matter(content: str, path: Path) -> dict:
    """Return the front matter of a card, checked; an empty dictionary if it has none.

    Raises:
        UserError: the Hub would refuse it; the sentence names the line.
    """
    text, _ = split_card(content)
    if text is None:
        return {}
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{path} must have front matter of at most {MOST_CHARACTERS} characters, got {len(text)}")
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        value = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or words_of(error)
        raise UserError(f"{path}, line {mark.line + 2 if mark else 1}: {problem}; mend the YAML there") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}, line 2: front matter must be keys with values, got {type(value).__name__}")
    lines = {}
    for key, _ in node.value:
        line = key.start_mark.line + 2  # in the file, from 1, after the dashes
        if key.value in lines:
            raise UserError(f"{path}, line {line}: `{key.value}` stands in line {lines[key.value]} already; keep one")
        lines[key.value] = line
    for key, (pattern, several, rule) in RULES.items():
        if key in value:
            check_value(value[key], pattern, several, f"{path}, line {lines.get(key)}: `{key}` must be {rule}")
    if value.get("license") == "other" and "license_name" not in value:
        line = lines["license"]
        raise UserError(f"{path}, line {line}: `license: other` needs `license_name`, and `license_link` to its text")
    return value


def check_value(given, pattern: str, several: bool, message: str):
    for entry in given if several and isinstance(given, list) else [given]:
        if not isinstance(entry, str) or not re.fullmatch(pattern, entry):
            got = repr(entry) if isinstance(entry, str | int | float | None) else type(entry).__name__
            raise UserError(f"{message}, got {got[:80]}")


def check_card(content: str, path: Path) -> dict:
    """Return the front matter of a card that can be uploaded as it is.

    Raises:
        UserError: a key is missing, or the Hub would refuse a line; the sentence names it.
    """
    value = read_front_matter(content, path)
    if "license" not in value:
        raise UserError(f"{path} has no `license` in its front matter; add one, or make the card with --license")
    return value


def write_front_matter(value: dict) -> str:
    return f"---\n{yaml.safe_dump(value, sort_keys=False, allow_unicode=True)}---\n"
