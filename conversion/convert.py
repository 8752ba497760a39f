"""The streaming engine: executes a plan tensor by tensor, so that a model never stands in memory.

A target is whole or not there: everything is written into `TARGET.partial`, every file as `NAME.partial` until it is
synced to disk, the configuration last of all, and then the folder takes its name.
"""

import os
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hf_llama3.errors import UserError

from .checkpoint import open_checkpoint
from .plan import DEFAULT_SHARD_SIZE, Plan, PlannedFile, plan_hf, plan_meta
from .storage import BLOCK_BYTES, write_all
from .verify import VerificationReport, verify_checkpoints

WORKERS = 2  # one moves bytes while the other sums or rearranges


@dataclass
class ConversionReport:
    """Say what was read, written and inferred."""

    source: str
    target: str
    source_format: str
    target_format: str
    files: dict[str, int]  # name -> bytes
    tensors: int
    bytes: int  # of all tensor files
    seconds: float
    inferred: list[str]
    notes: list[str]
    dry_run: bool
    verification: VerificationReport | None

    def to_dict(self) -> dict:
        return asdict(self) | {"verification": self.verification and self.verification.to_dict()}


def convert(
    source,
    target,
    to: str | None = None,
    mp: int | None = None,
    *,
    model_type: str = "llama",
    rope_factor: float | None = None,
    llama_version: str | None = None,
    instruct: bool | None = None,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    dry_run: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = False,
) -> ConversionReport:
    """Convert a checkpoint between Meta's format and Hugging Face's, or divide Meta's into another number of shards.

    Args:
        source: folder of either format; it is never changed.
        target: folder to make; what is there already stays unless `overwrite`.
        to: "hf" or "meta"; omitted, the format that the source is not.
        mp: model-parallel shards of a target in Meta's format, 1 if omitted.
        model_type: what a Hugging Face folder is written as: "llama" (every tool reads it) or "llama3" (with its code).
        rope_factor: for a Meta checkpoint of unreleased shape that scales RoPE; params.json does not say how much.
        llama_version: for a Meta checkpoint whose special tokens are not those of the inferred version.
        instruct: whether the model was tuned for dialogue, which decides stop tokens and chat template.
        max_shard_size: largest safetensors file, as "5GB" or "200MiB".
        dry_run: plan and check all, write nothing.
        overwrite: replace an existing target once the new one is whole.
        verify: read the result back and compare every tensor to the bit.
        progress: show bars on standard error.

    Raises:
        UserError: for whatever a user can cause; the target is then as it was.
    """
    started = time.perf_counter()
    target = Path(target)
    checkpoint = open_checkpoint(source, rope_factor, llama_version, instruct)
    plan = make_plan(checkpoint, to, mp, model_type, max_shard_size)
    check_target(plan, target, overwrite)
    verification, sizes = None, {file.name: file.layout.size for file in plan.files}
    if not dry_run:
        staging = prepare_staging(target)
        try:
            write_plan(plan, staging, progress)
        except OSError as error:
            raise UserError(f"{staging} could not be written ({error.strerror}); mend that and run it again") from error
        if verify:
            factor = checkpoint.config["rope_parameters"].get("factor")
            written = open_checkpoint(staging, factor, llama_version, instruct)
            verification = verify_checkpoints(checkpoint, written, progress)
            if not verification.ok:
                raise UserError(f"{staging} differs from {source} in {verification.differences[0]}; please report this")
        sizes = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        take_name(staging, target)
    return ConversionReport(
        source=str(source),
        target=str(target),
        source_format=checkpoint.format,
        target_format=plan.to,
        files=sizes,
        tensors=plan.num_tensors,
        bytes=plan.nbytes,
        seconds=round(time.perf_counter() - started, 3),
        inferred=checkpoint.inferred,
        notes=plan.notes,
        dry_run=dry_run,
        verification=verification,
    )


def make_plan(checkpoint, to, mp, model_type, max_shard_size) -> Plan:
    if to not in (None, "hf", "meta"):
        raise UserError(f"--to must be 'hf' or 'meta', got {to!r}")
    if model_type not in ("llama", "llama3"):
        raise UserError(f"--as must be 'llama' or 'llama3', got {model_type!r}")
    to = to or ("hf" if checkpoint.format == "meta" and mp is None else "meta")
    if to == "hf" and mp is not None:
        raise UserError(f"--mp divides a checkpoint of Meta's format, got {mp} with --to hf; use --max-shard-size")
    return (
        plan_hf(checkpoint, model_type, max_shard_size)
        if to == "hf"
        else plan_meta(checkpoint, 1 if mp is None else mp)
    )


def check_target(plan: Plan, target: Path, overwrite: bool):
    """Raise unless the target can be made: free to take, apart from the source, with room on its disk."""
    source = plan.source.path.resolve()
    if target.resolve() == source or source in target.resolve().parents or target.resolve() in source.parents:
        raise UserError(f"{target} and the source {plan.source.path} must be apart; choose another target")
    if target.exists() and not (overwrite or (target.is_dir() and not any(target.iterdir()))):
        raise UserError(f"{target} already exists; choose another target or add --overwrite")
    parent = next(parent for parent in target.resolve().parents if parent.exists())
    if (free := shutil.disk_usage(parent).free) < plan.nbytes:
        raise UserError(
            f"{target} needs {plan.nbytes} bytes, but its disk has {free} free; make room or choose another"
        )


def prepare_staging(target: Path) -> Path:
    """Make the folder into which everything is written, empty."""
    staging = target.with_name(target.name + ".partial")
    try:
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{staging} cannot be made: {error.strerror}") from error
    return staging


def write_plan(plan: Plan, folder: Path, progress: bool):
    with tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="writing", disable=not progress) as bar:
        for file in plan.files:
            write_tensors(file, folder, bar.update)
    small_files = plan.make_small_files()
    for name in sorted(small_files, key=lambda name: name in ("config.json", "params.json")):  # these two last
        path = folder / f"{name}.partial"
        path.write_bytes(small_files[name])
        finish(path)
    sync(folder)


def write_tensors(file: PlannedFile, folder: Path, progress):
    """Write one file of tensors: the tensors first, side by side, then the headers that make it readable."""
    path = folder / f"{file.name}.partial"
    with open(path, "wb", buffering=0) as out:
        out.truncate(file.layout.size)

    def write_one(entry):
        (_, assembly), offset = entry
        with open(path, "r+b", buffering=0) as out:
            assembly.write(out, offset, progress)
        return checksum(path, offset, assembly.nbytes) if file.layout.needs_checksums else 0

    with ThreadPoolExecutor(WORKERS) as pool:
        checksums = list(pool.map(write_one, zip(file.tensors, file.layout.offsets, strict=True)))
    with open(path, "r+b", buffering=0) as out:
        for offset, content in file.layout.fixed(checksums):
            write_all(out, content, offset)
    finish(path)


def checksum(path: Path, offset: int, count: int) -> int:
    """Return the CRC-32 of bytes that were just written, which the page cache still holds."""
    written = np.memmap(path, dtype=np.uint8, mode="r", offset=0)[offset : offset + count]
    value = 0
    for start in range(0, count, BLOCK_BYTES):
        value = zlib.crc32(written[start : start + BLOCK_BYTES], value)
    return value


def finish(partial: Path):
    """Sync a file to disk and give it its name."""
    sync(partial)
    partial.rename(partial.with_name(partial.name.removesuffix(".partial")))


def sync(path: Path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def take_name(staging: Path, target: Path):
    """Put the finished folder in the target's place; what was there goes when the new one stands."""
    old = None
    if target.exists():
        old = target.with_name(target.name + ".old")
        target.rename(old)
    staging.rename(target)
    sync(target.parent)
    if old is not None:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
