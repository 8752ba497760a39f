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


HUB_NAME = "owner/name on the Hub, which @revision may follow"
ModelArgument = Annotated[str, typer.Argument(help=f"Folder of either format, or {HUB_NAME}.")]
DtypeOption = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.", **one_of(*DTYPES))]
QuantizeOption = Annotated[
    str | None, typer.Option(help=f"Weights of {' or '.join(QUANTIZATIONS)}.", **one_of(*QUANTIZATIONS))
]
CompileFlag = Annotated[bool, typer.Option("--compile", help="Decode by a compiled step; to compile takes a minute.")]
RopeOption = Annotated[float | None, typer.Option(help="Of a directory of Meta's, where no file says it.")]
MaxNewOption = Annotated[int, typer.Option(help="At most, for each prompt.")]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest token each time.")]
TopPOption = Annotated[float, typer.Option(help="Sample from the likeliest tokens of this share.")]
DeviceMapOption = Annotated[
    str | None, typer.Option(help=f"Layers over devices: {', '.join(DEVICE_MAPS)}.", **one_of(*DEVICE_MAPS))
]
MemoryOption = Annotated[str | None, typer.Option(help='JSON: what each device may take, as {"0": "20GiB"}.')]
SeedOption = Annotated[int, typer.Option(help="Of the sampling.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
