"""Chat templates: Llama 3's own, and every named one of a folder, in all the places that transformers knows."""

from pathlib import Path

from hf_llama3.files.json import read_json
from hf_llama3.files.reading import read_text

DEFAULT = "default"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"


def read_chat_templates(folder: Path) -> dict[str, str]:
    """Read every chat template by its name; files come before tokenizer_config.json, as in transformers 5.23.

    Raises:
        UserError: one is not a text.
    """
    files = {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        files[DEFAULT] = folder / TEMPLATE_FILE
    if files:
        return {name: read_text(path, "write it again") for name, path in files.items()}
    config = folder / "tokenizer_config.json"
    found = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(found, list):  # of {"name": ..., "template": ...}
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    found = found if isinstance(found, dict) else {DEFAULT: found}
    return {name: template for name, template in found.items() if isinstance(name, str) and isinstance(template, str)}


def llama3_chat_template() -> str:
    """Return the Jinja template whose prompts equal those of Meta's `ChatFormat`, token by token."""
    return (Path(__file__).parent / "llama3.jinja").read_text("utf-8")
