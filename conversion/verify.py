"""Prove that two checkpoints of any formats are the same model: every tensor to the bit, by the table."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np

from hf_llama3.errors import UserError, quoted
from hf_llama3.files.progress import byte_bar

from .checkpoint import Checkpoint
from .config.params import MissingFlag
from .config.schema import GEOMETRY
from .formats.cast import Cast
from .formats.gguf import RECOMPUTED, Quantise, Recompute, Widen
from .formats.storage import BY_NAME, Assembly, Dtype, to_floats
from .opening import open_checkpoint
from .plan import assemble
from .tokenizer.proof import NOT_COMPARED, compare_tokenizers
from .weights import Row, sizes

COMPARED = (*GEOMETRY, "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
SAYS_NOTHING = {"transformers_version", "_from_model_config"}  # of how a text is generated


@dataclass
class VerificationReport:
    """Whether two checkpoints are the same model, and where they differ."""

    source: str
    target: str
    tensors: int
    bytes: int
    tokenizer: str  # "equal", "differs", "absent", "only in source", "only in target", "not compared: ..."
    differences: list[str] = field(default_factory=list)
    largest_difference: float | None = None  # largest difference of two elements
    quantised: int = 0  # tensors that are equal after the other side was quantised in the same way
    logits: dict | None = None  # number of tokens, largest difference, largest logit; only if asked for

    @property
    def ok(self) -> bool:
        return not self.differences

    def to_dict(self) -> dict:
        return {"ok": self.ok} | asdict(self)


def verify(source, target, logits: bool = False, progress: bool = False) -> VerificationReport:
    """Compare two checkpoints of any formats: tensors, configuration, tokenizer.

    Args:
        logits: also compute the logits of both, each by its own format's convention, layer by layer.
        progress: show bars on standard error.

    Raises:
        UserError: one of them cannot be opened.
    """
    pair = open_both(source, target)
    report = verify_checkpoints(*pair, progress)
    if report.tokenizer.startswith(NOT_COMPARED):
        report.differences.append(f"weights only: the tokenizers were {report.tokenizer}")
    if logits:
        compare_logits(*pair, report, progress)
    return report


def open_both(source, target) -> tuple[Checkpoint, Checkpoint]:
    """Open two checkpoints; each supplies what the other's files leave out."""
    opened = {}
    for path in (source, target):
        try:
            opened[path] = open_checkpoint(path)
        except MissingFlag:
            continue
    factors = [checkpoint.config["rope_parameters"].get("factor") for checkpoint in opened.values()]
    # If neither says the factor, it cannot differ, and no tensor depends on it.
    factor = next(iter(factors), 8.0) or 1.0
    return tuple(opened.get(path) or open_checkpoint(path, rope_factor=factor) for path in (source, target))


def verify_checkpoints(
    source: Checkpoint, target: Checkpoint, progress: bool = False, cast: Cast | None = None, compared: bool = False
) -> VerificationReport:
    """Compare two opened checkpoints.

    Args:
        cast: the casts that made the target's types, if they differ.
        compared: whether every tensor was compared already, while the source's files were there.
    """
    with ThreadPoolExecutor(1) as beside:
        tokenizer = beside.submit(compare_tokenizers, source, target)
        report = compare_weights(source, target, progress, cast, compared)
        found = tokenizer.result()
    report.tokenizer, difference = found
    if difference:
        report.differences.append(difference)
    return report


def compare_weights(
    source: Checkpoint, target: Checkpoint, progress: bool, cast: Cast | None, compared: bool
) -> VerificationReport:
    """Compare configuration and tensors."""
    report = VerificationReport(str(source.path), str(target.path), 0, 0, NOT_COMPARED)
    for key in COMPARED:
        if source.config[key] != target.config[key]:
            report.differences.append(f"`{key}`: {source.config[key]} and {target.config[key]}")
    ours, theirs = (checkpoint.generation_config for checkpoint in (source, target))
    if source.format == target.format == "hf" and ours and theirs:  # other formats have no place of their own for it
        for key in sorted((ours.keys() | theirs.keys()) - SAYS_NOTHING):
            if ours.get(key) != theirs.get(key):
                values = f"{quoted(ours.get(key))} and {quoted(theirs.get(key))}"
                report.differences.append(f"generation_config.json, {quoted(key)}: {values}")
    for checkpoint in (source, target):
        try:
            checkpoint.check_copies()
        except UserError as error:
            report.differences.append(str(error))
    names, others = ({row.hf for row in checkpoint.rows} for checkpoint in (source, target))
    if others != names:
        name = min(names ^ others)
        report.differences.append(f"{name}: only in {'source' if name in names else 'target'}")
    if sizes(source.config) != sizes(target.config) or names != others:
        return report  # other shapes: nothing to compare

    total = sum(tensor.nbytes for tensors in target.tensors.values() for tensor in tensors)
    with byte_bar("verifying", total, progress) as bar:
        for ours, theirs in zip(source.rows, target.rows, strict=True):
            difference = size = None
            for casts in ways(source, ours, target, theirs, cast):
                pair = [
                    assemble(checkpoint, row, target.order, made_by)
                    for checkpoint, row, made_by in zip((source, target), (ours, theirs), casts, strict=True)
                ]
                difference, size = None if compared else compare_pair(*pair, ours.hf), pair[1].nbytes
                if difference is None:
                    report.quantised += any(isinstance(made_by, Recompute) for made_by in casts)
                    break
            report.tensors += 1
            report.bytes += size
            bar.update(size)
            if difference is not None:
                report.differences.append(difference[0])
                if difference[1] is not None:
                    report.largest_difference = max(report.largest_difference or 0.0, difference[1])
    return report


def ways(source: Checkpoint, ours: Row, target: Checkpoint, theirs: Row, cast) -> list[tuple]:
    """List the conversions of a tensor's elements to compare by: pairs for the source's and the target's side.

    GGUF stores vectors in float32, whatever their type was. A quantised tensor is the same if the other side's elements
    quantise to it, to the bit.
    """
    one, other = source.tensors[ours.hf][0], target.tensors[theirs.hf][0]
    if len(ours.shape) == 1 and (target.format == "gguf" or (source.format == "gguf" and cast is None)):
        return [(widen(one), widen(other))]
    kinds = [getattr(tensor, "kind", None) for tensor in (one, other)]
    if isinstance(cast, Quantise):
        return [(Recompute(kinds[1]) if kinds[1] else Cast(other.dtype), None)]
    if cast is not None or not any(kinds) or all(kinds):
        return [(cast, None)]
    plain, kind = (one, kinds[1]) if kinds[1] else (other, kinds[0])
    made_by = Recompute(kind) if kind.name in RECOMPUTED else widen(plain)
    again = (made_by, None) if kinds[1] else (None, made_by)
    return [(None, None), again] if plain.dtype.name == "float32" else [again]


def widen(tensor) -> Widen | Cast | None:
    """Return the conversion of a tensor's elements to float32, or None if they are."""
    name = tensor.dtype.name
    return None if name == "float32" else Cast(BY_NAME["float32"]) if name == "float64" else Widen()


def compare_pair(ours: Assembly, theirs: Assembly, name: str) -> tuple[str, float | None] | None:
    """Return how a tensor differs, and by how much; None if every bit is the same."""
    if ours.dtype != theirs.dtype:
        return f"{name}: {ours.dtype.name} and {theirs.dtype.name}", None
    if (difference := largest_difference(ours.blocks(), theirs.blocks(), ours.dtype)) is None:
        return None
    return f"{name}: by up to {difference:.3g}", difference


def largest_difference(ours: Iterator[np.ndarray], theirs: Iterator[np.ndarray], dtype: Dtype) -> float | None:
    """Compare two streams of elements, given in blocks of any size.

    Returns:
        None if every bit is the same, else the largest difference of two numbers (infinity for NaN).
    """
    largest = None
    left = right = np.empty(0, f"<u{dtype.itemsize}")
    while True:
        left = left if left.size else next(ours, left).reshape(-1)
        right = right if right.size else next(theirs, right).reshape(-1)
        count = min(left.size, right.size)
        if not count:
            return largest
        one, other = left[:count], right[:count]
        if (other_bits := one != other).any():
            with np.errstate(invalid="ignore"):
                differences = to_floats(one[other_bits], dtype).astype("f8") - to_floats(other[other_bits], dtype)
            largest = max(largest or 0.0, float(np.nan_to_num(np.abs(differences), nan=math.inf).max()))
        left, right = left[count:], right[count:]


def compare_logits(source: Checkpoint, target: Checkpoint, report: VerificationReport, progress: bool):
    """Compute and compare the logits of two checkpoints, and add the result to `report`."""
    from .logits import NUM_TOKENS, TOLERANCE, compute_logits

    total = sum(tensor.nbytes for one in (source, target) for tensors in one.tensors.values() for tensor in tensors)
    with byte_bar("logits", total, progress) as bar:
        ours, theirs = (compute_logits(checkpoint, bar.update) for checkpoint in (source, target))
    if ours.shape != theirs.shape:
        report.differences.append(f"logits: {list(ours.shape)} and {list(theirs.shape)}")
        return
    difference, largest = (ours - theirs).abs().max().item(), ours.abs().max().item()
    report.logits = {"tokens": NUM_TOKENS, "largest_difference": difference, "largest_logit": largest}
    if not difference <= TOLERANCE * largest:
        report.differences.append(f"logits: by up to {difference:.3g}, where the largest is {largest:.3g}")
