"""Commands on checkpoints: inspect, convert, verify."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_llama3.errors import UserError

from .app import command
from .options import (
    HUB_NAME,
    DeviceMapOption,
    JsonFlag,
    MemoryOption,
    ModelArgument,
    one_of,
)
from .printing import print_json, print_list, print_table


@command("hf-llama3 inspect Meta-Llama-3-8B/original")
def inspect(
    path: ModelArgument,
    rope_factor: Annotated[float | None, typer.Option(help="RoPE factor, where no file says it.")] = None,
    device_map: DeviceMapOption = None,
    max_memory: MemoryOption = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to draw: parameters by part; with --device-map, what goes where.")
    ] = None,
    as_json: JsonFlag = False,
):
    """Say what a checkpoint is, what had to be inferred, and where its layers would go (--device-map)."""
    from hf_llama3.conversion import inspect

    info = inspect(path, rope_factor).to_dict()
    placement = note = None
    if device_map is not None:
        from hf_llama3.distributed.placement import place_checkpoint, plot_placement

        placement = place_checkpoint(path, rope_factor, device_map, max_memory)
        note = plot_placement(placement, plot) if plot else None
    elif max_memory is not None:
        raise UserError("--max-memory says more of --device-map; add --device-map auto")
    elif plot is not None:
        from hf_llama3.conversion.info import plot_parts

        note = plot_parts(path, rope_factor, plot)
    if note:
        print(f"Note: {note}", file=sys.stderr)
    if as_json:
        print_json(info | ({"placement": placement.to_dict()} if placement else {}))
        return
    config, inferred = info.pop("config"), info.pop("inferred")
    print_table(info | {f"config.{key}": value for key, value in config.items()})
    print_list("Inferred", inferred)
    if placement:
        print_table(placement.table())


@command("hf-llama3 convert Meta-Llama-3-8B/original llama-3-8b")
def convert(
    source: Annotated[str, typer.Argument(help=f"Folder of either format, which is not changed, or {HUB_NAME}.")],
    target: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[
        str | None, typer.Option(help="hf or meta; the format that SOURCE is not, if omitted.", **one_of("hf", "meta"))
    ] = None,
    mp: Annotated[int | None, typer.Option(help="Model-parallel shards of a Meta target.")] = None,
    model_type: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="llama (default): every tool reads it; llama3: our type, with its code.",
            **one_of("llama", "llama3"),
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Type to cast to; every tensor keeps its own if omitted.")] = None,
    rope_factor: Annotated[float | None, typer.Option(help="RoPE factor, where no file says it.")] = None,
    llama_version: Annotated[
        str | None, typer.Option(help="2, 3.0, 3.1, 3.2 or 3.3, where the inferred one is wrong.")
    ] = None,
    instruct: Annotated[
        bool | None, typer.Option("--instruct/--base", help="Whether a Meta checkpoint was tuned for dialogue.")
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest safetensors file, 5GB if omitted.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan all, write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TARGET once the new one is whole.")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare every tensor to the bit after.")] = True,
    as_json: JsonFlag = False,
):
    """Convert Meta's format to Hugging Face's or back, or divide Meta's into other shards (--to meta --mp N)."""
    from hf_llama3.conversion import convert

    report = convert(
        source,
        target,
        to,
        mp,
        model_type=model_type,
        dtype=dtype,
        rope_factor=rope_factor,
        llama_version=llama_version,
        instruct=instruct,
        max_shard_size=max_shard_size,
        dry_run=dry_run,
        overwrite=overwrite,
        verify=verify,
        progress=True,
    ).to_dict()
    if as_json:
        print_json(report)
        return
    files, inferred, notes = report.pop("files"), report.pop("inferred"), report.pop("notes")
    verification, source_files = report.pop("verification"), report.pop("source_files")
    report["verified"] = f"{verification['tensors']} tensors bit-equal" if verification else "no"
    listed = {f"reads {name}": size for name, size in source_files.items()}
    listed |= {f"writes {name}": size for name, size in files.items()}
    print_table(report | {name: f"{size:,} bytes" for name, size in listed.items()})
    print_list("Inferred", inferred)
    print_list("Note", notes)


@command("hf-llama3 verify Meta-Llama-3-8B/original llama-3-8b")
def verify(
    source: Annotated[Path, typer.Argument(help="Folder of either format.")],
    target: Annotated[Path, typer.Argument(help="Folder of either format.")],
    logits: Annotated[bool, typer.Option("--logits", help="Compute the logits of both as well, streamed.")] = False,
    as_json: JsonFlag = False,
):
    """Compare two checkpoints: every tensor to the bit, the configuration, the tokenizer; exit 1 if they differ."""
    from hf_llama3.conversion import verify

    report = verify(source, target, logits, progress=True).to_dict()
    if as_json:
        print_json(report)
    else:
        differences = report.pop("differences")
        print_table(report)
        print_list("Different", differences)
    if not report["ok"]:
        raise typer.Exit(1)
