"""The report of a conversion, and the facts that it and other commands leave beside a model for its card."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_llama3.errors import UserError
from hf_llama3.files.facts import EVALUATIONS, TRAINING_FACTS, __version__
from hf_llama3.files.json import read_json, to_json
from hf_llama3.files.schema import OBJECT, Rule, listed, number, optional, text, whole

from .plan import Plan
from .verify import VerificationReport

PROVENANCE = "provenance.json"
MEMORY_BYTES = 700 * 10**6  # the most that any conversion needs; benchmarks/conversion.py and test_memory.py hold it
# Rules for the keys of each file
PROVENANCE_FACTS = dict.fromkeys(("source", "format", "llama_version", "hf_llama3"), text())
PROVENANCE_FACTS |= {"shards": whole(), "cast_to": optional(text()), "verified": optional(OBJECT)}
PROOF = {"tensors": whole(0), "tokenizer": text()}
TRAINING = {"text": text(), "source": optional(text()), "vocab_size": whole()}
TRAINING |= dict.fromkeys(("steps", "batch_size", "context", "seed", "best_step"), whole(0))
TRAINING |= dict.fromkeys(("first_loss", "validation_loss", "learning_rate", "seconds"), number(0))
EVALUATION = dict.fromkeys(("text", "dtype", "command", "hf_llama3"), text()) | {"quantize": optional(text())}
EVALUATION |= {"tokens": whole(0), "context": whole(0), "loss": number(0), "perplexity": number(0, math.inf)}


@dataclass
class ConversionReport:
    """What was read, written and inferred; sizes in bytes."""

    source: str
    target: str
    source_format: str
    target_format: str
    source_files: dict[str, int]  # name -> bytes
    files: dict[str, int]  # the same for written files; in a dry run, for files of tensors
    tensors: int
    bytes: int  # of all tensor files
    free_bytes: int  # free on the target's disk before the conversion
    memory_bytes: int  # the most that the run needs, besides the page cache
    seconds: float
    resumed: list[str]  # files that an interrupted run had finished
    largest_error: float | None  # of a cast to another type
    inferred: list[str]
    notes: list[str]
    dry_run: bool
    verification: VerificationReport | None

    def to_dict(self) -> dict:
        return asdict(self) | {"verification": self.verification and self.verification.to_dict()}


def make_provenance(plan: Plan, verification: VerificationReport | None) -> bytes:
    source = plan.source
    facts = {
        "source": source.name,
        "format": source.format,
        "shards": source.num_shards,
        "llama_version": source.version,
        "cast_to": plan.cast and plan.cast.to.name,
        "verified": verification and {"tensors": verification.tensors, "tokenizer": verification.tokenizer},
        "hf_llama3": __version__,
    }
    return to_json(facts)


def read_provenance(folder: Path) -> dict | None:
    """Read the provenance that a conversion left in a folder; None if there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / PROVENANCE
    if not path.exists():
        return None
    facts = check_facts(read_json(path), PROVENANCE_FACTS, path)
    if facts["verified"] is not None:
        check_facts(facts["verified"], PROOF, path)
    return facts


def read_training(folder: Path) -> dict | None:
    """Read the facts of training in a folder; None if there are none, or another tool's.

    Raises:
        UserError: they were changed.
    """
    path = folder / TRAINING_FACTS
    facts = read_json(path) if path.exists() else {}
    return check_facts(facts, TRAINING, path) if facts.keys() >= TRAINING.keys() else None


def read_evaluations(folder: Path) -> list[dict]:
    """Read the results that `evaluate --record` left in a folder.

    Raises:
        UserError: the file holds something else.
    """
    path = folder / EVALUATIONS
    if not path.exists():
        return []
    found = check_facts(read_json(path), {"evaluations": listed(OBJECT)}, path)["evaluations"]
    return [check_facts(one, EVALUATION, path) for one in found]


def check_facts(facts: dict, rules: dict[str, Rule], path: Path) -> dict:
    """Return facts, checked to have all keys and to fit their rules."""
    for key, rule in rules.items():
        if not rule.takes(facts.get(key, ...)):
            raise UserError(f"`{key}` in {path} is missing or not what this package writes; remove the file")
    return facts
