"""Facts from a model folder, put into the template; a fact that no file tells is left out."""

import math
import re
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from hf_llama3 import __version__
from hf_llama3.conversion import inspect
from hf_llama3.conversion.manifest import CURVES_FILE, TRAINING_FACTS, read_json
from hf_llama3.errors import UserError

LICENSE_LINE = re.compile(r"^license: *(\S+) *$", re.MULTILINE)
LICENSE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
NEEDED_FACTS = {"text", "steps", "batch_size", "context", "first_loss", "validation_loss", "vocab_size"}


def build_card(folder, license: str | None = None) -> str:
    """Make the model card of a Hugging Face folder.

    Args:
        license: identifier as the Hub knows it; omitted, the one that the folder's README.md has.

    Raises:
        UserError: the folder holds no model, or no licence was ever given.
    """
    folder = Path(folder)
    info = inspect(folder)
    if info.format != "hf":
        raise UserError(f"{folder} is in Meta's format; convert it first, then make the card of the new folder")
    license = license or read_license(folder / "README.md")
    if license is None:
        raise UserError(f"{folder} has no licence yet; add --license with the one you choose, such as apache-2.0")
    check_license(license)
    template = (Path(__file__).parent / "template.md").read_text("utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(template).render(
        name=folder.resolve().name,
        license=license,
        info=info,
        own_type=(folder / "modeling_llama3.py").exists(),
        training=read_training(folder / TRAINING_FACTS),
        curves=CURVES_FILE if (folder / CURVES_FILE).exists() else None,
        version=__version__,
    )


def check_license(license: str):
    """Raise unless a licence is written as the Hub writes them."""
    if not LICENSE_NAME.fullmatch(license):
        raise UserError(f"--license must be an identifier as the Hub has it, such as apache-2.0, got {license!r}")


def read_training(path: Path) -> dict | None:
    """Read what this package's training left, if it is that."""
    facts = read_json(path) if path.exists() else {}
    if not facts.keys() >= NEEDED_FACTS:
        return None
    return {"source": None} | facts | {"uniform_loss": math.log(facts["vocab_size"])}


def read_license(readme: Path) -> str | None:
    """Find the licence in the front matter of a card."""
    if not readme.exists():
        return None
    try:
        lines = readme.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{readme} cannot be read as UTF-8 text; mend or remove it") from error
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return None
    front_matter = "\n".join(lines[1 : lines.index("---", 1)])
    match = LICENSE_LINE.search(front_matter)
    return match[1] if match else None
