"""Options that several commands take."""

from difflib import get_close_matches
from typing import Annotated

import typer

from hf_llama3.cpu import QUANTIZATIONS
from hf_llama3.distributed import DEVICE_MAPS
from hf_llama3.errors import UserError
from hf_llama3.text import DTYPES


def one_of(*names: str) -> dict:
    """Make an option complete to these names on Tab; what is nearly one of them is asked about."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    def check(option: typer.CallbackParam, value):
        near = get_close_matches(str(value).lower(), names, 1, cutoff=0.8)
        if near and value not in names:
            raise UserError(f"{option.opts[0]} has no {value!r}; did you mean {near[0]!r}?")
        return value

    return {"autocompletion": complete, "callback": check}


def group(name: str):
    """Return `typer.Option` for the options of one group in a long `--help`."""

    def option(*flags: str, **settings):
        return typer.Option(*flags, rich_help_panel=name, **settings)

    return option


DEVICES, SPEED = group("Devices"), group("Speed")

CHECKPOINT = (
    "a folder in any format, a GGUF file, or on the Hub OWNER/NAME or OWNER/NAME/FILE.gguf, with @REVISION or not"
)
ModelArgument = Annotated[str, typer.Argument(help=f"Model: {CHECKPOINT}.")]
DtypeOption = Annotated[str, SPEED(help=f"Type of the weights: {', '.join(DTYPES)}.", **one_of(*DTYPES))]
QuantizeOption = Annotated[
    str | None,
    SPEED(help=f"Quantise the weights to {' or '.join(QUANTIZATIONS)} (on a CPU).", **one_of(*QUANTIZATIONS)),
]
CompileFlag = Annotated[bool, SPEED("--compile", help="Compile the decode step first, which takes about a minute.")]
RopeOption = Annotated[
    float | None, typer.Option(help="RoPE scaling factor, where a Meta directory does not say it (3.1: 8, 3.2: 32).")
]
MaxNewOption = Annotated[int, typer.Option(help="Generate at most this many tokens for a prompt.")]
TemperatureOption = Annotated[float, typer.Option(help="Sampling temperature; 0 decodes greedily.")]
TopPOption = Annotated[
    float, typer.Option(help="Sample from the likeliest tokens that together have this probability.")
]
DeviceMapOption = Annotated[
    str | None,
    DEVICES(help=f"Place the layers on several devices: {', '.join(DEVICE_MAPS)}.", **one_of(*DEVICE_MAPS)),
]
MemoryOption = Annotated[str | None, DEVICES(help='Memory limit of each device, as JSON: {"0": "20GiB"}.')]
SeedOption = Annotated[int, typer.Option(help="Seed of the sampling.")]
OverwriteFlag = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing TARGET once the new one is complete.")
]
LicenseOption = Annotated[
    str | None, typer.Option(help="Licence, by the Hub's identifier; the one that the folder states if omitted.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
