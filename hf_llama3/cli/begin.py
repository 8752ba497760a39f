"""Commands to begin with: quickstart, doctor."""

from pathlib import Path
from typing import Annotated

import typer

from .app import command
from .options import (
    JsonFlag,
)
from .printing import print_json, print_list, print_table


@command("hf-llama3 quickstart --output quickstart")
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder to make: OUTPUT/hf, OUTPUT/meta, OUTPUT/hf-again.")] = Path(
        "quickstart"
    ),
    text: Annotated[Path | None, typer.Option(help="Text to train on; Python's own documentation if omitted.")] = None,
):
    """Train a small Llama 3, convert it to Meta's format and back, verify, generate: all in two minutes."""
    from hf_llama3.quickstart import quickstart

    quickstart(output, text)


@command("hf-llama3 doctor")
def doctor(as_json: JsonFlag = False):
    """Say what is installed, what this machine has, and what to type where something is missing; exit 1 if it is."""
    from hf_llama3.doctor import examine

    report = examine()
    if as_json:
        print_json(report.to_dict())
    else:
        print_table(report.table())
        print_list("Optional", report.advice)
        print_list("Problem", report.problems)
    if not report.ok:
        raise typer.Exit(1)
