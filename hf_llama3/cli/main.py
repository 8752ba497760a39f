"""The entry point: the commands, what an error prints, and the exit code.

Exit codes: 0 done, 1 a check said no, 2 a user's error in one sentence, 130 Ctrl-C, 141 a reader of
the output that went away.
"""

import atexit
import contextlib
import gc
import os
import sys
import time
from typing import Annotated

import typer

from hf_llama3 import __version__
from hf_llama3.errors import UserError, is_panic, one_line, words_of
from hf_llama3.files.progress import Quiet

from . import begin, convert, generate, measure, publish, train  # noqa: F401  (each registers its commands)
from .app import app, is_first_process
from .printing import Output

UsageError = typer.BadParameter.__base__  # click's, which typer carries under names that change
SECONDS_TO_SPEAK = 20  # by which the first of several processes is as far as the others


def main():
    atexit.register(gc.freeze)  # or Python would search all that was imported for garbage at its end, for a second
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller; a file that is opened would take its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character shows its number
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(out), Quiet(err)
    try:
        code = app(prog_name="hf-llama3", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        sys.exit(fail(str(error)))
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(fail(f"{error.filename} cannot be used ({error.strerror}); mend that, or name another"))
    except UsageError as error:
        sys.exit(fail(describe(error)))
    except typer.Abort:
        print("Aborted!", file=sys.stderr)
        sys.exit(1)
    except BaseException as error:
        if not is_panic(error):
            raise
        sys.exit(fail(f"the tokenizers library failed ({words_of(error)}); write the model's tokenizer.json again"))
    finally:
        sys.stdout, sys.stderr = out, err
        for stream in (out, err):
            drop_what_is_refused(stream)


def drop_what_is_refused(stream):
    """Let a stream that cannot be written end in nowhere, or Python would try again at its end and exit with 120."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(message: str) -> int:
    """Print a user's error and return its exit code."""
    torch = sys.modules.get("torch")
    if os.environ.get("LOCAL_RANK", "0") != "0" and not (torch and torch.distributed.is_initialized()):
        # What is wrong before processes have joined is mostly wrong in all. The first on each machine says so, and
        # torchrun then ends the others: one that is still there has met something of its own.
        time.sleep(SECONDS_TO_SPEAK)
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
