"""What the tokenizer's files of a Hugging Face folder tell of its model: the version of Llama, and whether it chats."""

from pathlib import Path
from typing import NamedTuple

from ..config.params import infer_version
from .bpe import find_hf_tokenizer
from .templates import read_chat_templates


class TokenizerFacts(NamedTuple):
    """The tokenizer, and what it tells."""

    tokenizer: Path | None
    kind: str | None
    family: str | None
    version: str  # of Llama
    instruct: bool
    templates: dict[str, str]


def read_tokenizer_facts(
    folder: Path, config: dict, source: Path, llama_version: str | None, instruct: bool | None, inferred: list[str]
) -> TokenizerFacts:
    """Read the facts, and infer what the user has not given; errors name `source`."""
    tokenizer, kind, family = find_hf_tokenizer(folder)
    version, why = infer_version(config, family, llama_version, source)
    inferred.append(f"Llama {version}: {why}")
    templates = read_chat_templates(folder)
    if instruct is None:
        instruct = bool(templates)
        inferred.append("instruct: there is a chat template" if instruct else "base: there is no chat template")
    return TokenizerFacts(tokenizer, kind, family, version, instruct, templates)
