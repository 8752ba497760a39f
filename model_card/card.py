"""Facts from a model folder, put into the template; a fact that no file tells is left out."""

import math
import re
from pathlib import Path

from hf_llama3.conversion import inspect
from hf_llama3.conversion.checkpoint import read_optional
from jinja2 import Environment, StrictUndefined

from hf_llama3 import __version__
from hf_llama3.errors import UserError

LICENSE_LINE = re.compile(r"^license: *(\S+) *$", re.MULTILINE)


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
    training = read_optional(folder / "training.json")
    if training is not None:
        training["uniform_loss"] = math.log(training["vocab_size"])
    template = (Path(__file__).parent / "template.md").read_text("utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(template).render(
        name=folder.resolve().name, license=license, info=info, training=training, version=__version__
    )


def read_license(readme: Path) -> str | None:
    """Find the licence in the front matter of a card."""
    if not readme.exists():
        return None
    parts = readme.read_text("utf-8").split("---\n")
    match = LICENSE_LINE.search(parts[1]) if len(parts) > 2 and not parts[0] else None
    return match[1] if match else None
