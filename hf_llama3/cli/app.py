"""The application that commands are registered with."""

import os

import typer

app = typer.Typer(
    help="Llama 3 as a Hugging Face model package, and the bridge to Meta's checkpoint format.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def command(example: str):
    """Register a command whose `--help` ends with a worked example."""
    return app.command(epilog=f"Example: {example}")


def is_first_process() -> bool:
    """Whether this process is alone or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"
