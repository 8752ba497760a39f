"""The command line: each command parses, calls one function and prints what it returned.

Exit codes: 0 done, 1 a check said no, 2 a user's error in one sentence, 130 Ctrl-C.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .errors import UserError

app = typer.Typer(
    help="Llama 3 as a Hugging Face model package, and the bridge to Meta's checkpoint format.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


def main():
    try:
        app()
    except UserError as error:
        sys.exit(fail(str(error)))


def fail(message: str) -> int:
    """Print a user's error and return its exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def command(example: str):
    """Register a command whose `--help` ends with a worked example."""
    return app.command(epilog=f"Example: {example}")


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False):
    if version:
        print(f"hf-llama3 {__version__}")
        raise typer.Exit


@command("hf-llama3 quickstart --output quickstart")
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder to make: OUTPUT/hf, OUTPUT/meta, OUTPUT/hf-again.")] = Path(
        "quickstart"
    ),
    text: Annotated[Path | None, typer.Option(help="Text to train on; Python's own documentation if omitted.")] = None,
):
    """Train a small Llama 3, convert it to Meta's format and back, verify, generate: all in two minutes."""
    from .quickstart import quickstart

    quickstart(output, text)


@command("hf-llama3 inspect Meta-Llama-3-8B/original")
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of either format.")],
    rope_factor: Annotated[float | None, typer.Option(help="RoPE factor, where no file says it.")] = None,
    as_json: JsonFlag = False,
):
    """Say what a checkpoint is, and what had to be inferred."""
    from .conversion import inspect

    info = inspect(path, rope_factor).to_dict()
    if as_json:
        print_json(info)
        return
    config, inferred = info.pop("config"), info.pop("inferred")
    print_table(info | {f"config.{key}": value for key, value in config.items()})
    print_list("Inferred", inferred)


@command("hf-llama3 convert Meta-Llama-3-8B/original llama-3-8b")
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of either format; it is not changed.")],
    target: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[str | None, typer.Option(help="hf or meta; the format that SOURCE is not, if omitted.")] = None,
    mp: Annotated[int | None, typer.Option(help="Model-parallel shards of a Meta target.")] = None,
    model_type: Annotated[
        str, typer.Option("--as", help="llama: every tool reads it; llama3: this package's type, with its code.")
    ] = "llama",
    rope_factor: Annotated[float | None, typer.Option(help="RoPE factor, where no file says it.")] = None,
    llama_version: Annotated[
        str | None, typer.Option(help="2, 3.0, 3.1, 3.2 or 3.3, where the inferred one is wrong.")
    ] = None,
    instruct: Annotated[
        bool | None, typer.Option("--instruct/--base", help="Whether a Meta checkpoint was tuned for dialogue.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan all, write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TARGET once the new one is whole.")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare every tensor to the bit after.")] = True,
    as_json: JsonFlag = False,
):
    """Convert Meta's format to Hugging Face's or back, or divide Meta's into other shards (--to meta --mp N)."""
    from .conversion import convert

    report = convert(
        source,
        target,
        to,
        mp,
        model_type=model_type,
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
    verification = report.pop("verification")
    report["verified"] = f"{verification['tensors']} tensors bit-equal" if verification else "no"
    print_table(report | {f"file {name}": f"{size:,} bytes" for name, size in files.items()})
    print_list("Inferred", inferred)
    print_list("Note", notes)


@command("hf-llama3 verify Meta-Llama-3-8B/original llama-3-8b")
def verify(
    source: Annotated[Path, typer.Argument(help="Folder of either format.")],
    target: Annotated[Path, typer.Argument(help="Folder of either format.")],
    as_json: JsonFlag = False,
):
    """Compare two checkpoints: every tensor to the bit, the configuration, the tokenizer; exit 1 if they differ."""
    from .conversion import verify

    report = verify(source, target, progress=True).to_dict()
    if as_json:
        print_json(report)
    else:
        differences = report.pop("differences")
        print_table(report)
        print_list("Different", differences)
    if not report["ok"]:
        raise typer.Exit(1)


def print_json(value):
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(rows: dict):
    """Print names and values in two columns."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print(
            f"{name.replace('_', ' '):<{width}}  {value:,}"
            if type(value) is int
            else f"{name.replace('_', ' '):<{width}}  {value}"
        )


def print_list(title: str, sentences: list[str]):
    for sentence in sentences:
        print(f"{title}: {sentence}")
