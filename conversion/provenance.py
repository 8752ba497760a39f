"""What a converted folder was made from and what was proven, in a file beside it: its model card says so."""

from pathlib import Path

from hf_llama3 import __version__
from hf_llama3.errors import UserError

from .manifest import read_json, to_json
from .plan import Plan
from .verify import VerificationReport

PROVENANCE = "provenance.json"
FACTS = {
    "source": str,
    "format": str,
    "shards": int,
    "llama_version": str,
    "cast_to": str | None,
    "verified": dict | None,
    "hf_llama3": str,
}


def make_provenance(plan: Plan, verification: VerificationReport | None) -> bytes:
    source = plan.source
    facts = {
        "source": name_of(source.path),
        "format": source.format,
        "shards": source.num_shards,
        "llama_version": source.version,
        "cast_to": plan.cast and plan.cast.to.name,
        "verified": verification and {"tensors": verification.tensors, "tokenizer": verification.tokenizer},
        "hf_llama3": __version__,
    }
    return to_json(facts)


def name_of(path: Path) -> str:
    """Name a source as its owner would: one from the Hub by owner and name, another by its folder."""
    path = path.resolve()
    path = path.parent if path.name == "original" else path
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return path.name


def read_provenance(folder: Path) -> dict | None:
    """Read what a conversion left in a folder; None where there is nothing.

    Raises:
        UserError: it is not what `make_provenance` makes.
    """
    path = folder / PROVENANCE
    if not path.exists():
        return None
    facts = read_json(path)
    for key, kind in FACTS.items():
        if not isinstance(facts.get(key, ...), kind):
            raise UserError(f"`{key}` in {path} is {facts.get(key)!r}; remove the file, or convert again")
    return facts
