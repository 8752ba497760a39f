"""Convert a checkpoint: make a plan and execute it tensor by tensor, so that a model is never in memory."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hf_llama3.errors import UserError, shown
from hf_llama3.files.atomic import (
    check_target,
    clear,
    files_in,
    foreign,
    is_checkpoint,
    place_of,
    put_file,
    staging,
    sync,
    write_files,
)
from hf_llama3.files.hashes import CHECKLIST, CHECKSUMS, check_sums, format_sums, hash_file, read_sums
from hf_llama3.files.progress import byte_bar
from hf_llama3.files.reading import refuse_links
from hf_llama3.files.several import put_files, take_back

from .adapter.files import is_adapter
from .adapter.merging import merge_adapter
from .adapter.run import convert_adapter
from .checkpoint import Checkpoint
from .formats.cast import Cast
from .formats.dcp import SUFFIX
from .formats.gguf import EXACT, FILE_TYPES, is_gguf
from .formats.gguf import SUFFIX as GGUF_SUFFIX
from .formats.storage import BY_NAME, Identity, identity
from .formats.writing import is_whole, write_tensors
from .opening import open_checkpoint
from .plan import DEFAULT_SHARD_SIZE, TORCHTITAN, Plan, plan_dcp, plan_hf, plan_meta
from .plan_gguf import find_old_parts, make_gguf_plan
from .provenance import MEMORY_BYTES, PROVENANCE, ConversionReport, make_provenance
from .streaming import JOURNAL, Stream, check_streamed, kept_files, stream_of, write_streamed
from .tokenizer.files import read_sentencepiece, sentencepiece_files, tokenizer_paths
from .tokenizer.rows import require_rows, resize, tokens_without_rows
from .verify import VerificationReport, verify_checkpoints

TARGETS = ("hf", "meta", "dcp", "gguf")
SHORT = {kind.name: kind.exact for kind in EXACT.values()}  # "bf16" -> "bfloat16"
SMALL = (".json", ".model", ".jinja", ".txt", ".chk", ".jsonl")  # small files that are read besides the weights


def convert(
    source,
    target,
    to: str | None = None,
    mp: int | None = None,
    *,
    model_type: str | None = None,
    dtype: str | None = None,
    adapter=None,
    rope_factor: float | None = None,
    llama_version: str | None = None,
    instruct: bool | None = None,
    max_shard_size: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = False,
    stream: bool | None = None,
) -> ConversionReport:
    """Convert a checkpoint from any format to any other, or re-shard Meta's.

    Args:
        source: folder or GGUF file; or the folder of a LoRA adapter, which is put into the other format's order. It is
            never changed.
        target: folder or GGUF file to make. An existing one is refused without `overwrite`, and otherwise replaced
            when the new one is whole.
        to: "hf", "meta", "dcp" (torch.distributed.checkpoint) or "gguf". If omitted: "gguf" for a target named
            so, "meta" if `mp` is given or the source is a Hugging Face folder, else "hf".
        mp: model-parallel shards of a target in Meta's format, 1 if omitted.
        model_type: type of a Hugging Face folder: "llama" (the default), which every tool reads, or "llama3" with its
            code; for "dcp" also "torchtitan", whose tensors have Meta's names.
        dtype: type to cast to, such as "float16" or "f16"; for "gguf" also "q8_0" and "q4_0". If omitted, every tensor
            keeps its type.
        adapter: folder of a LoRA adapter to merge into the weights, bit-equal to PEFT's merge.
        rope_factor: RoPE's factor for a Meta checkpoint of unreleased shape, whose params.json does not say it.
        llama_version: version of a Meta checkpoint, if the inferred one has other special tokens.
        instruct: whether the model was tuned for dialogue, which decides stop tokens and chat template.
        max_shard_size: size of the largest safetensors file, such as "200MiB"; "5GB" if omitted. For "gguf" the size of
            the largest part of `NAME-00001-of-00002.gguf` and so on; one file if omitted.
        dry_run: plan and check everything, write nothing.
        overwrite: replace an existing checkpoint.
        verify: check the source's list of hashes, if it has one; compare every tensor of the result to the bit; write
            the hashes of all files.
        progress: show bars on standard error.
        stream: fetch a Hub repository's files one after another and drop each when it is converted. If omitted, this is
            done where the disk has no room for twice the weights.

    Raises:
        UserError: for anything that a user can cause; the target is left as it was.
    """
    started = time.perf_counter()
    target = place_of(target)
    if adapter is None and is_adapter(Path(source)):
        given = {"--mp": mp, "--as": model_type, "--dtype": dtype, "--max-shard-size": max_shard_size}
        return convert_adapter(Path(source), target, to, given, dry_run, overwrite)
    to = to or ("gguf" if target.suffix == GGUF_SUFFIX else None)

    def plan_from(folder) -> Plan:
        checkpoint = open_checkpoint(folder, rope_factor, llama_version, instruct)
        if adapter is not None:
            checkpoint = merge_adapter(checkpoint, Path(adapter))
        return make_plan(checkpoint, target, to, mp, model_type, dtype, max_shard_size)

    with stream_of(source, target, stream, adapter and Path(adapter)) as (streamed, note, folder):
        plan = plan_from(folder)
        plan.notes += [note] if note else []
        return carry_out(plan, source, target, dry_run, overwrite, verify, progress, started, streamed, plan_from)


def carry_out(
    plan, source, target, dry_run, overwrite, verify, progress, started, streamed: Stream | None, plan_from
) -> ConversionReport:
    """Execute a plan, and report."""
    checkpoint = plan.source
    if checkpoint.hf_tokenizer is not None:
        refuse_links(checkpoint.hf_tokenizer, tokenizer_paths(checkpoint.hf_tokenizer).values())
    beside = [] if checkpoint.format == "gguf" else sorted(checkpoint.path.iterdir())
    refuse_links(checkpoint.folder, [path for path in beside if path.suffix == ".json"])
    seen = {path: identity(path) for path in beside}
    check_small_files(plan, verify)
    if others := [name for name in foreign(checkpoint.path) if not name.startswith(".")]:
        more = f" and {len(others) - 5} more" if others[5:] else ""
        plan.notes.append(f"left out, since it is no part of a model: {', '.join(map(shown, others[:5]))}{more}")
    may_go = is_gguf if plan.to == "gguf" else is_checkpoint
    needed = plan.needed_bytes
    if streamed:
        check_streamed(plan)
        plan.notes.append(streamed.say(needed))
        needed += streamed.room
    free = check_target(checkpoint.path.resolve(), target, needed, overwrite, may_go)
    find_old_parts(plan, target, overwrite)
    divided = plan.to == "gguf" and len(plan.files) > 1
    report = ConversionReport(
        source=str(source),
        target=str(target.with_name(plan.files[0].name) if divided else target),
        source_format=checkpoint.format,
        target_format=plan.to,
        source_files={str(path.relative_to(checkpoint.folder)): path.stat().st_size for path in checkpoint.files},
        files={file.name: file.layout.size for file in plan.files},
        tensors=plan.num_tensors,
        bytes=plan.nbytes,
        free_bytes=free,
        memory_bytes=MEMORY_BYTES,
        seconds=0.0,
        resumed=[],
        largest_error=None,
        inferred=checkpoint.inferred,
        notes=plan.notes,
        dry_run=dry_run,
        verification=None,
    )
    if dry_run:
        plan.make_small_files()  # its notes are reported
    else:

        def put(folder: Path, target: Path):
            put_files(folder, target, [file.name for file in plan.files], find_old_parts(plan, target, overwrite))

        with staging(target, overwrite, put if divided else put_file if plan.to == "gguf" else None) as folder:
            take_back(folder, target)
            try:
                execute(plan, folder, report, verify, progress, streamed, plan_from)
            finally:  # the cause is reported, not what it led to
                check_unchanged(checkpoint, seen)
    report.seconds = round(time.perf_counter() - started, 3)
    return report


def check_unchanged(source: Checkpoint, seen: dict[Path, Identity | None]):
    """Check that the source's files are still those of the plan.

    Raises:
        UserError: one has changed.
    """
    stored = [tensor for tensors in source.tensors.values() for tensor in tensors]
    for file in {piece.file for tensor in stored for piece in getattr(tensor, "pieces", [tensor])}:
        file.check_unchanged()
    for path, before in seen.items():
        if before and path.suffix in SMALL and identity(path) != before:
            raise UserError(f"{path} changed while it was converted; run the same again when nothing writes it")


def make_plan(checkpoint: Checkpoint, target: Path, to, mp, model_type, dtype, max_shard_size) -> Plan:
    """Turn the options into a plan.

    Raises:
        UserError: an option does not exist, or has no meaning for this conversion.
    """
    if to not in (None, *TARGETS):
        raise UserError(f"--to must be one of {TARGETS}, got {to!r}")
    if model_type not in (None, "llama", "llama3", TORCHTITAN) or (model_type == TORCHTITAN and to != "dcp"):
        raise UserError(f"--as must be 'llama' or 'llama3', or 'torchtitan' with --to dcp, got {model_type!r}")
    kinds = FILE_TYPES if to == "gguf" else ()
    dtype = dtype if dtype in kinds else SHORT.get(dtype, dtype)
    if dtype is not None and dtype not in (*BY_NAME, *kinds):
        remedy = f"; add --to gguf and let TARGET end with {GGUF_SUFFIX}" if dtype in FILE_TYPES else ""
        raise UserError(f"--dtype must be one of {sorted([*BY_NAME, *kinds])}, got {dtype!r}{remedy}")
    other = "hf" if checkpoint.format != "hf" or checkpoint.files[0].suffix == SUFFIX else "meta"
    to = to or (other if mp is None else "meta")
    if to == "gguf":
        return make_gguf_plan(checkpoint, target, dtype, max_shard_size, mp=mp, **{"as": model_type})
    cast = Cast(BY_NAME[dtype]) if dtype is not None else None
    if to != "meta":
        if mp not in (None, 1):
            raise UserError(
                f"--mp divides a checkpoint of Meta's format, got {mp} with --to {to}; use --max-shard-size"
            )
        make = plan_hf if to == "hf" else plan_dcp
        plan = make(checkpoint, model_type or "llama", max_shard_size or DEFAULT_SHARD_SIZE, cast)
        if reason := tokens_without_rows(checkpoint):
            plan.notes.append(f"{reason}, as in the source; for rows, {resize(checkpoint)}")
        return plan
    for option, value in (("--as", model_type), ("--max-shard-size", max_shard_size)):
        if value is not None:
            raise UserError(f"{option} is for a Hugging Face target, got {value!r} with --to meta; leave it out")
    require_rows(checkpoint)
    return plan_meta(checkpoint, 1 if mp is None else mp, cast)


def check_small_files(plan: Plan, verify: bool):
    """Check the small files that are read while tensors are written, before the first one is.

    Raises:
        UserError: a list of hashes, or a sentencepiece model, is damaged, or the latter holds what the target cannot.
    """
    source = plan.source
    checklist = source.path / CHECKLIST
    if verify and checklist.exists():
        read_sums(checklist)
    if source.tokenizer_kind == "sentencepiece" and source.hf_tokenizer is None:
        if plan.to == "meta":
            read_sentencepiece(source.tokenizer)
        else:
            sentencepiece_files(source)


def execute(plan: Plan, folder: Path, report: ConversionReport, verify, progress, streamed, plan_from):
    """Write everything that is planned into `folder`, and prove it; files that an earlier run finished are kept."""
    source = plan.source
    kept = kept_files(plan, folder) if streamed else [file.name for file in plan.files]
    clear(folder, keep=kept)  # left by an earlier run, and not continued
    with ThreadPoolExecutor(2) as beside:
        small_files = beside.submit(plan.make_small_files)
        checklist, unread = source.path / CHECKLIST, streamed.files if streamed else ()
        same_copies = None if streamed else beside.submit(source.check_copies)  # a stream compares what it fetches
        checked = beside.submit(check_sums, checklist, progress, but=unread) if verify and checklist.is_file() else None
        with byte_bar("writing", plan.nbytes, progress) as bar:
            if streamed:
                report.resumed, report.largest_error = write_streamed(
                    plan, folder, streamed, lambda: plan_from(streamed.folder), bar.update, verify
                )
            else:
                report.resumed = write_planned(plan, folder, bar.update)
        if checked is not None:
            checked.result()
            report.notes.append(f"the source's files have the hashes of its {CHECKLIST}")
        if same_copies is not None:
            same_copies.result()
        small_files = small_files.result()
    write_files(folder, small_files)
    sync(folder)
    if plan.cast is not None and not streamed:
        report.largest_error = plan.cast.largest_error
    if verify:
        one_file = folder / plan.files[0].name if plan.to == "gguf" else folder
        written = open_checkpoint(one_file, unfinished=True)
        report.verification = prove(plan, written, folder, progress, compared=bool(streamed))
        report.verification.target = report.target
    elif plan.to not in ("meta", "gguf"):
        write_files(folder, {PROVENANCE: make_provenance(plan, None)})
    (folder / JOURNAL).unlink(missing_ok=True)
    report.files = {name: path.stat().st_size for name, path in files_in(folder).items()}


def write_planned(plan: Plan, folder: Path, progress) -> list[str]:
    """Write all files of tensors of a plan; return those that an earlier run had finished."""
    resumed = []
    for file in plan.files:
        if is_whole(folder / file.name, file):
            resumed.append(file.name)
            progress(file.layout.size)
        else:
            write_tensors(file, folder, progress)
    return resumed


def prove(plan: Plan, written: Checkpoint, folder: Path, progress: bool, compared: bool) -> VerificationReport:
    """Compare what was written with the source, and write the hashes of all files.

    Args:
        compared: whether each tensor was compared as it was written.
    """
    if plan.to == "gguf":  # it stands in somebody's folder, without lists of hashes
        return require_same(verify_checkpoints(plan.source, written, progress, plan.cast, compared), folder)
    paths = files_in(folder)
    kinds = {CHECKSUMS: "sha256"} | ({CHECKLIST: "md5"} if plan.to == "meta" else {})
    total = len(kinds) * sum(path.stat().st_size for path in paths.values())
    with ThreadPoolExecutor(len(kinds)) as pool, byte_bar("hashing", total, progress) as bar:
        futures = {
            list_name: {name: pool.submit(hash_file, path, kind, bar.update) for name, path in paths.items()}
            for list_name, kind in kinds.items()
        }
        verification = verify_checkpoints(plan.source, written, progress, plan.cast, compared)
        require_same(verification, folder)
        if plan.to != "meta":
            write_files(folder, {PROVENANCE: make_provenance(plan, verification)})
            futures[CHECKSUMS][PROVENANCE] = pool.submit(hash_file, folder / PROVENANCE, "sha256", bar.update)
        for list_name, sums in futures.items():
            content = format_sums({name: future.result() for name, future in sums.items()})
            write_files(folder, {list_name: content})
    return verification


def require_same(verification: VerificationReport, folder: Path) -> VerificationReport:
    if not verification.ok:
        raise UserError(f"{folder} differs from its source in {verification.differences[0]}; please report this")
    return verification
