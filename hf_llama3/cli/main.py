"""The entry point: the commands, what an error prints, and the exit code.

Exit codes: 0 done, 1 a check said no, 2 a user's error in one sentence, 130 Ctrl-C.
"""

import atexit
import gc
import os
import sys
import time
from typing import Annotated

import typer

from hf_llama3 import __version__
from hf_llama3.errors import UserError, one_line

from . import begin, convert, generate, measure, publish, train  # noqa: F401  (each registers its commands)
from .app import app, is_first_process

UsageError = typer.BadParameter.__base__  # click's, which typer carries under names that change
SECONDS_TO_SPEAK = 20  # by which the first of several processes is as far as the others


def main():
    atexit.register(gc.freeze)  # or Python would search all that was imported for garbage at its end, for a second
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character shows its number
    try:
        sys.exit(app(prog_name="hf-llama3", standalone_mode=False))
    except UserError as error:
        sys.exit(fail(str(error)))
    except UsageError as error:
        sys.exit(fail(describe(error)))
    except typer.Abort:
        sys.exit("Aborted!")


def fail(message: str) -> int:
    """Print a user's error and return its exit code."""
    torch = sys.modules.get("torch")
    if os.environ.get("LOCAL_RANK", "0") != "0" and not (torch and torch.distributed.is_initialized()):
        # What is wrong before processes have joined is wrong in all of them: one on each machine says so. torchrun ends
        # all at the first that ends, which must not be one of the others.
        time.sleep(SECONDS_TO_SPEAK)
        return 2
    process = "" if is_first_process() else f" (process {os.environ['RANK']})"
    print(f"error{process}: {one_line(message)}", file=sys.stderr)
    return 2


def describe(error: UsageError) -> str:
    """Return what is wrong with a command as it was typed, and what to type instead."""
    message = error.format_message()
    example = error.ctx and error.ctx.command.epilog
    return f"{message}{'' if message.endswith(('.', '?')) else '.'} {example or 'Try: hf-llama3 --help'}"


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
):
    if version:
        print(f"hf-llama3 {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
