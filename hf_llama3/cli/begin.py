"""Commands to begin with: quickstart, doctor."""

from pathlib import Path
from typing import Annotated

import typer

from .app import command
from .options import JsonFlag
from .printing import print_json, print_list, print_next, print_table

GROUP = "Begin"


@command("hf-llama3 quickstart --output quickstart", GROUP)
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder to make, with the models hf, meta and hf-again in it.")] = Path(
        "quickstart"
    ),
    text: Annotated[
        Path | None, typer.Option(help="Text file to train on; Python's own documentation if omitted.")
    ] = None,
):
    """Train a small Llama 3, convert it to Meta's format and back, verify it, generate with it: in about a minute."""
    from hf_llama3.quickstart import quickstart

    quickstart(output, text)


@command("hf-llama3 doctor", GROUP)
def doctor(as_json: JsonFlag = False):
    """Show what is installed and what this machine has; exit 1 if something that is needed is missing."""
    from hf_llama3.doctor import examine

    report = examine()
    if as_json:
        print_json(report.to_dict())
    else:
        print_table(report.table())
        print_list("Optional", report.advice)
        print_list("Problem", report.problems)
        if report.ok:
            print_next("quickstart")
    if not report.ok:
        raise typer.Exit(1)
