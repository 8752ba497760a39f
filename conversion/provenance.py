"""What a folder was made from and what was measured of it, in files beside the model: its card says so."""

from pathlib import Path

from hf_llama3.errors import UserError
from hf_llama3.files.facts import EVALUATIONS, TRAINING_FACTS, __version__
from hf_llama3.files.json import read_json, to_json

from .plan import Plan
from .verify import VerificationReport

PROVENANCE = "provenance.json"
# Key -> type, of what is read from each file
PROVENANCE_FACTS = {
    "source": str,
    "format": str,
    "shards": int,
    "llama_version": str,
    "cast_to": str | None,
    "verified": dict | None,
    "hf_llama3": str,
}
PROOF = {"tensors": int, "tokenizer": str}
TRAINING = {"text": str, "source": str | None}
TRAINING |= dict.fromkeys(("steps", "batch_size", "context", "vocab_size", "seed", "best_step"), int)
TRAINING |= dict.fromkeys(("first_loss", "validation_loss", "learning_rate", "seconds"), float | int)
EVALUATION = dict.fromkeys(("text", "dtype", "command", "hf_llama3"), str) | {"quantize": str | None}
EVALUATION |= {"tokens": int, "context": int, "loss": float | int, "perplexity": float | int}


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
    facts = check_facts(read_json(path), PROVENANCE_FACTS, path)
    if facts["verified"] is not None:
        check_facts(facts["verified"], PROOF, path)
    return facts


def read_training(folder: Path) -> dict | None:
    """Read what this package's training left in a folder; None where there is nothing, or another tool's.

    Raises:
        UserError: it was changed.
    """
    path = folder / TRAINING_FACTS
    facts = read_json(path) if path.exists() else {}
    return check_facts(facts, TRAINING, path) if facts.keys() >= TRAINING.keys() else None


def read_evaluations(folder: Path) -> list[dict]:
    """Read what `evaluate --record` left in a folder.

    Raises:
        UserError: it is something else.
    """
    path = folder / EVALUATIONS
    if not path.exists():
        return []
    found = check_facts(read_json(path), {"evaluations": list}, path)["evaluations"]
    return [check_facts(one if isinstance(one, dict) else {}, EVALUATION, path) for one in found]


def check_facts(facts: dict, types: dict, path: Path) -> dict:
    """Return facts that have all the keys, each of its type."""
    for key, kind in types.items():
        if not isinstance(facts.get(key, ...), kind):
            raise UserError(
                f"`{key}` in {path} is missing or of another type than this package writes; remove the file"
            )
    return facts
