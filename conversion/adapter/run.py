"""Convert an adapter alone: plan, write, prove and report it."""

import time
from pathlib import Path

from hf_llama3.errors import UserError
from hf_llama3.files.atomic import check_target, clear, put_file, staging, write_files

from ..formats.gguf import is_gguf
from ..provenance import MEMORY_BYTES, ConversionReport
from .crossing import check_crossed, cross_adapter
from .files import is_adapter


def convert_adapter(source: Path, target: Path, to, given: dict, dry_run: bool, overwrite: bool) -> ConversionReport:
    """Put a LoRA adapter into the other format's names and order of rows, as `convert` does; it is small.

    Raises:
        UserError: it is not plain LoRA, an option has no meaning for it, or the target is not free.
    """
    started = time.perf_counter()
    for option, value in given.items():
        if value is not None:
            raise UserError(f"{option} is for a model, got {value!r} with an adapter; leave it out")
    crossed = cross_adapter(source, target, to)
    nbytes = sum(map(len, crossed.files.values()))
    one_file = crossed.to == "gguf"
    may_go, kind = (is_gguf, "GGUF file") if one_file else (is_adapter, "adapter")
    free = check_target(source.resolve(), target, nbytes, overwrite, may_go, kind)
    if not dry_run:
        with staging(target, overwrite, put_file if one_file else None) as folder:
            clear(folder)  # what another run left here
            write_files(folder, crossed.files)
            check_crossed(crossed, folder)
    stored = {pair.b.file.path for pair in crossed.adapter.pairs.values()}
    return ConversionReport(
        *(str(source), str(target), f"adapter, {crossed.adapter.order}", f"adapter, {crossed.to}"),
        source_files={path.name: path.stat().st_size for path in stored},
        files={name: len(content) for name, content in crossed.files.items()},
        tensors=crossed.tensors,
        bytes=nbytes,
        free_bytes=free,
        memory_bytes=MEMORY_BYTES,
        seconds=round(time.perf_counter() - started, 3),
        resumed=[],
        largest_error=None,
        inferred=[f"heads of {crossed.head_dim} channels"] if crossed.head_dim else [],
        notes=crossed.notes,
        dry_run=dry_run,
        verification=None,
    )
