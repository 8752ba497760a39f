"""Proof that two checkpoints are the same model: every tensor to the bit, under the table, whatever their formats."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
from tqdm import tqdm

from hf_llama3.errors import UserError

from .cast import Cast
from .checkpoint import Checkpoint
from .hf_config import GEOMETRY
from .opening import open_checkpoint
from .params import MissingFlag
from .plan import assemble
from .tokenizer import meta_tokenizer_file
from .weights import sizes

COMPARED = (*GEOMETRY, "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class VerificationReport:
    """Say whether two checkpoints are the same model, and where they are not."""

    source: str
    target: str
    tensors: int
    bytes: int
    tokenizer: str  # "equal", "differs", "absent", "only in source", "only in target" or why it was not compared
    differences: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.differences

    def to_dict(self) -> dict:
        return {"ok": self.ok} | asdict(self)


def verify(source, target, progress: bool = False) -> VerificationReport:
    """Compare two checkpoints of any formats: tensors, configuration, tokenizer.

    Raises:
        UserError: one of them cannot be opened.
    """
    return verify_checkpoints(*open_both(source, target), progress)


def open_both(source, target) -> tuple[Checkpoint, Checkpoint]:
    """Open two checkpoints, letting each say what the other's files leave out."""
    opened = {}
    for path in (source, target):
        try:
            opened[path] = open_checkpoint(path)
        except MissingFlag:
            continue
    factors = [checkpoint.config["rope_parameters"].get("factor") for checkpoint in opened.values()]
    # Where neither file says it, the factor cannot differ between them, and tensors do not depend on it.
    factor = next(iter(factors), None) or 8.0
    return tuple(opened.get(path) or open_checkpoint(path, rope_factor=factor) for path in (source, target))


def verify_checkpoints(
    source: Checkpoint, target: Checkpoint, progress: bool = False, cast: Cast | None = None
) -> VerificationReport:
    """Compare two opened checkpoints; `cast` is what the target's types were made by, where they are others."""
    report = VerificationReport(str(source.path), str(target.path), 0, 0, compare_tokenizers(source, target))
    if report.tokenizer == "differs":
        report.differences.append("the tokenizer")
    for key in COMPARED:
        if source.config[key] != target.config[key]:
            report.differences.append(f"`{key}`: {source.config[key]} and {target.config[key]}")
    for checkpoint in (source, target):
        try:
            checkpoint.check_copies()
        except UserError as error:
            report.differences.append(str(error))
    if sizes(source.config) != sizes(target.config) or len(source.rows) != len(target.rows):
        return report  # other shapes: nothing to compare

    size = sizes(source.config)
    total = sum(tensor.nbytes for tensors in target.tensors.values() for tensor in tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=not progress) as bar:
        for ours, theirs in zip(source.rows, target.rows, strict=True):
            pair = [
                assemble(checkpoint, row, target.format, 0, row.full_shape(size)[row.split or 0], made_by)
                for checkpoint, row, made_by in ((source, ours, cast), (target, theirs, None))
            ]
            if pair[0].dtype != pair[1].dtype:
                report.differences.append(f"{ours.hf}: {pair[0].dtype.name} and {pair[1].dtype.name}")
            elif not same_streams(pair[0].blocks(), pair[1].blocks()):
                report.differences.append(f"{ours.hf}: other values")
            report.tensors += 1
            report.bytes += pair[1].nbytes
            bar.update(pair[1].nbytes)
    return report


def same_streams(ours: Iterator[np.ndarray], theirs: Iterator[np.ndarray]) -> bool:
    """Compare two sequences of blocks as one stream of elements each, wherever the blocks end."""
    left = right = np.empty(0)
    while True:
        if not left.size:
            left = next(ours, None)
        if not right.size:
            right = next(theirs, None)
        if left is None or right is None:
            return left is right
        left, right = left.reshape(-1), right.reshape(-1)
        count = min(left.size, right.size)
        if not np.array_equal(left[:count], right[:count]):
            return False
        left, right = left[count:], right[count:]


def compare_tokenizers(source: Checkpoint, target: Checkpoint) -> str:
    kinds = source.tokenizer_kind, target.tokenizer_kind
    if None in kinds:
        return {(True, True): "absent", (True, False): "only in target", (False, True): "only in source"}[
            source.tokenizer is None, target.tokenizer is None
        ]
    if kinds[0] == kinds[1]:
        return "equal" if source.tokenizer.read_bytes() == target.tokenizer.read_bytes() else "differs"
    if "sentencepiece" in kinds:
        return "differs"
    try:
        ours, theirs = tokens_and_names(source), tokens_and_names(target)
    except UserError as error:
        return f"not compared: {error}"
    return "equal" if ours == theirs else "differs"


def tokens_and_names(checkpoint: Checkpoint) -> tuple[bytes, list[str]]:
    """Return a tokenizer as the file and the special tokens that Meta's format would have of it."""
    if checkpoint.tokenizer_kind == "tiktoken":
        return checkpoint.tokenizer.read_bytes(), checkpoint.special_tokens
    return meta_tokenizer_file(checkpoint.tokenizer)
