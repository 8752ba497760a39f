"""The application that commands are registered with, and the group of `--help` that each stands in."""

import os

import typer

GROUPS = ("Begin", "Checkpoints", "Train", "Text", "Measure", "Publish")  # in the order of --help

app = typer.Typer(
    help="Llama 3 as a Hugging Face model package, and the bridge to Meta's checkpoint format.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def command(example: str, group: str):
    """Register a command in a group; its `--help` ends with a worked example."""

    def register(function):
        registered = app.command(epilog=f"Example: {example}", rich_help_panel=group)(function)
        app.registered_commands.sort(key=lambda one: GROUPS.index(one.rich_help_panel))
        return registered

    return register


def is_first_process() -> bool:
    """Tell whether this process is alone or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"
