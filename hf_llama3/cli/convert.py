"""Commands on checkpoints: inspect, convert, verify."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_llama3.errors import MOST_OF_A_SENTENCE, UserError, one_line, shown

from .app import command
from .options import (
    CHECKPOINT,
    DeviceMapOption,
    JsonFlag,
    MemoryOption,
    ModelArgument,
    OverwriteFlag,
    RopeOption,
    group,
    one_of,
)
from .printing import duration, present, print_files, print_json, print_list, print_next, print_table, size

GROUP = "Checkpoints"
FORMATS = {
    "hf": "Hugging Face's format",
    "meta": "Meta's format",
    "gguf": "GGUF",
    "dcp": "torch.distributed.checkpoint",
    "adapter, hf": "a LoRA adapter in Hugging Face's order",
    "adapter, meta": "a LoRA adapter in Meta's order",
    "adapter, gguf": "a LoRA adapter for llama.cpp",
}
SOURCE_OPTION, TARGET_OPTION, RUN_OPTION = group("What SOURCE is"), group("What TARGET is"), group("Run")


@command("hf-llama3 inspect Meta-Llama-3-8B/original", GROUP)
def inspect(
    path: ModelArgument,
    rope_factor: RopeOption = None,
    device_map: DeviceMapOption = None,
    max_memory: MemoryOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw a picture: the parameters of each part or, with --device-map, of each device."),
    ] = None,
    as_json: JsonFlag = False,
):
    """Show what a checkpoint is, what had to be inferred, and with --device-map where its layers would go."""
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
        print(f"Note: {one_line(note)}", file=sys.stderr)
    if as_json:
        print_json(info | ({"placement": placement.to_dict()} if placement else {}))
        return
    config, inferred = info.pop("config"), info.pop("inferred")
    info["format"] = FORMATS[info["format"]]
    loads_as_is = info.pop("loads_as_is")
    info["transformers"] = "loads it as it is" if loads_as_is else "loads it only when it is converted"
    if info["dtypes"] == [info["dtype"]]:
        info.pop("dtypes")
    print_table(info)
    print("\nConfiguration, in the names of config.json:")
    for key, value in ((key, value) for key, value in config.items() if value is not None):
        print(f"  {shown(key)}: {shown(present(key, value), MOST_OF_A_SENTENCE)}")
    print()
    print_list("Inferred", inferred)
    if placement:
        print("\nWhere the layers go:")
        lines = {shown(name): shown(line) for name, line in placement.table().items()}
        for name, line in lines.items():
            print(f"  {name:<{max(map(len, lines))}} {line}")
    if not loads_as_is:
        print_next("convert", path, "converted", "--to", "hf")
    elif info["head"] == "ForCausalLM":
        print_next("generate", path, "The capital of France is")


@command("hf-llama3 convert Meta-Llama-3-8B/original llama-3-8b", GROUP)
def convert(
    source: Annotated[str, typer.Argument(help=f"Checkpoint to read: {CHECKPOINT}. It is not changed.")],
    target: Annotated[Path, typer.Argument(help="Folder to make; with --to gguf a file, NAME.gguf.")],
    to: Annotated[
        str | None,
        TARGET_OPTION(
            help="Format: hf, meta, gguf or dcp (torch.distributed.checkpoint); omitted, hf, or meta for an hf SOURCE.",
            **one_of("hf", "meta", "gguf", "dcp"),
        ),
    ] = None,
    mp: Annotated[int | None, TARGET_OPTION(help="Number of model-parallel shards in Meta's format.")] = None,
    model_type: Annotated[
        str | None,
        TARGET_OPTION(
            "--as",
            help="Model type: llama, which every tool reads; llama3, with this package's code; torchtitan, for dcp.",
            show_default="llama",
            **one_of("llama", "llama3", "torchtitan"),
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        TARGET_OPTION(
            help="Type to cast to: bf16, f16, f32; for gguf q8_0 or q4_0 as well. Each tensor keeps its own if omitted."
        ),
    ] = None,
    adapter: Annotated[
        Path | None, TARGET_OPTION(help="LoRA adapter to merge into the weights on the way, as PEFT does.")
    ] = None,
    max_shard_size: Annotated[
        str | None,
        TARGET_OPTION(
            help="Size of the largest safetensors file; of a part of a gguf, which is one file if omitted.",
            show_default="5GB",
        ),
    ] = None,
    rope_factor: Annotated[
        float | None,
        SOURCE_OPTION(help="RoPE scaling factor, where a Meta directory does not say it (3.1: 8, 3.2: 32)."),
    ] = None,
    llama_version: Annotated[
        str | None, SOURCE_OPTION(help="Version (2, 3.0, 3.1, 3.2 or 3.3), where the inferred one is wrong.")
    ] = None,
    instruct: Annotated[
        bool | None,
        SOURCE_OPTION(
            "--instruct/--base",
            help="Whether a Meta checkpoint was tuned for dialogue: adds chat template and stop tokens.",
        ),
    ] = None,
    dry_run: Annotated[bool, RUN_OPTION("--dry-run", help="Check and plan everything, write nothing.")] = False,
    overwrite: OverwriteFlag = False,
    stream: Annotated[
        bool | None,
        RUN_OPTION(
            "--stream/--no-stream",
            help="Fetch a Hub model's files one by one and drop each; done where the disk has no room for all.",
        ),
    ] = None,
    verify: Annotated[
        bool, RUN_OPTION("--verify/--no-verify", help="Compare every tensor of the result to the bit.")
    ] = True,
    as_json: JsonFlag = False,
):
    """Convert Meta's format, Hugging Face's or GGUF to one of the others, re-shard Meta's, or merge a LoRA adapter."""
    from hf_llama3.conversion import convert

    report = convert(
        source,
        target,
        to,
        mp,
        model_type=model_type,
        dtype=dtype,
        adapter=adapter,
        rope_factor=rope_factor,
        llama_version=llama_version,
        instruct=instruct,
        max_shard_size=max_shard_size,
        dry_run=dry_run,
        overwrite=overwrite,
        verify=verify,
        progress=True,
        stream=stream,
    ).to_dict()
    if as_json:
        print_json(report)
        return
    if report["target_format"] == "gguf":
        target = target.with_name(Path(report["target"]).name)  # the first part, if there are several
    files, inferred, notes = report.pop("files"), report.pop("inferred"), report.pop("notes")
    verification, source_files = report.pop("verification"), report.pop("source_files")
    verified = f"{verification['tensors']} tensors equal to the bit" if verification else "no (--no-verify)"
    if report["target_format"].startswith("adapter"):
        verified = "every tensor, read back and put in order again"
    if verification and verification["quantised"]:
        verified += f", of which {verification['quantised']} after the source was quantised again"
    print_table(
        {
            "source": f"{source}, {FORMATS[report['source_format']]}",
            "target": f"{target}, {FORMATS[report['target_format']]}",
            "size": f"{size(report['bytes'])} of tensors; {size(report['free_bytes'])} free on the disk",
            "memory": f"{size(report['memory_bytes'])} at most",
            "time": None if dry_run else duration(report["seconds"]),
            "resumed": report["resumed"],
            "largest_rounding_error": report["largest_error"],
            "verified": None if dry_run else verified,
        }
    )
    print_files("\nReads", source_files)
    print_files("\nWould write, and small files beside" if dry_run else "\nWrote", files)
    print()
    print_list("Inferred", inferred)
    print_list("Note", notes)
    if dry_run:
        print("\nNothing was written: a dry run. Without --dry-run the same command converts.")
    elif report["target_format"] == "adapter, gguf":
        pass  # what comes next is llama.cpp's
    elif report["target_format"].startswith("adapter"):
        print_next("convert", "MODEL", "merged", "--adapter", target)
    else:
        print_next("generate", target, "The capital of France is")


@command("hf-llama3 verify Meta-Llama-3-8B/original llama-3-8b", GROUP)
def verify(
    source: Annotated[Path, typer.Argument(help="Folder in any format, GGUF file, or name on the Hub.")],
    target: Annotated[Path, typer.Argument(help="Folder in any format, GGUF file, or name on the Hub.")],
    logits: Annotated[
        bool, typer.Option("--logits", help="Compute the logits of both as well, layer by layer.")
    ] = False,
    as_json: JsonFlag = False,
):
    """Compare two checkpoints: every tensor to the bit, configuration, tokenizer; exit 1 if they differ."""
    from hf_llama3.conversion import verify

    report = verify(source, target, logits, progress=True).to_dict()
    if as_json:
        print_json(report)
    else:
        differences, found = report.pop("differences"), report["logits"]
        if found:
            tokens, difference, largest = found["tokens"], found["largest_difference"], found["largest_logit"]
            report["logits"] = f"of {tokens} tokens differ by {difference:.2g} at most, the largest is {largest:.2g}"
        print_table(report)
        print_list("Different", differences)
    if not report["ok"]:
        raise typer.Exit(1)
