"""The command that trains."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from hf_llama3.training.settings import PRESETS, Settings, make_settings

from .app import command, is_first_process
from .options import (
    JsonFlag,
    one_of,
)
from .printing import print_json, print_list, print_table

SETTINGS = {field.name for field in fields(Settings)}


def default(name: str) -> str:
    """Say what an option of `train` is where neither it nor a preset says."""
    return f"{getattr(Settings, name)} if omitted, save by a preset."


@command("hf-llama3 train --text tinyshakespeare.txt --output runs/shakespeare --preset shakespeare-cpu")
def train(
    called: typer.Context,
    text: Annotated[Path, typer.Option(help="Text in UTF-8, of any size.")],
    output: Annotated[Path, typer.Option(help="Model folder to make.")],
    preset: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(PRESETS)}; options add to it.", **one_of(*PRESETS))
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help=f"char, bpe:N (N tokens), or a folder with one. {default('tokenizer')}")
    ] = None,
    layers: Annotated[int | None, typer.Option(help=f"Decoder layers. {default('layers')}")] = None,
    hidden_size: Annotated[int | None, typer.Option(help=f"Width. {default('hidden_size')}")] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(help="Width of the feed-forward; 8/3 of the model's if omitted.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help=f"Query heads. {default('heads')}")] = None,
    kv_heads: Annotated[int | None, typer.Option(help=f"Key/value heads. {default('kv_heads')}")] = None,
    context: Annotated[int | None, typer.Option(help=f"Tokens per window. {default('context')}")] = None,
    dropout: Annotated[float | None, typer.Option(help=f"Probability. {default('dropout')}")] = None,
    steps: Annotated[int | None, typer.Option(help=f"Optimiser steps. {default('steps')}")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Windows per step, over all processes. {default('batch_size')}")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help=f"Parts that a step is computed in. {default('accumulate')}")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"AdamW's, at its peak. {default('learning_rate')} 1e-4 with --from.")
    ] = None,
    matrix_learning_rate: Annotated[
        float | None,
        typer.Option(help=f"Muon's; 0: AdamW trains all. {default('matrix_learning_rate')} 0 with --from."),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help=f"Of matrices. {default('weight_decay')}")] = None,
    warmup: Annotated[float | None, typer.Option(help=f"Share of the steps. {default('warmup')}")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations; a tenth if omitted.")] = None,
    validation_share: Annotated[float | None, typer.Option(help=f"Of the text. {default('validation_share')}")] = None,
    test_share: Annotated[float | None, typer.Option(help=f"Of the text. {default('test_share')}")] = None,
    source: Annotated[str | None, typer.Option("--from", help="Folder of a model to go on from.")] = None,
    lora: Annotated[int | None, typer.Option(help="Rank of adapters to train in place of the weights.")] = None,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bfloat16; on a GPU that can if omitted.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="By torch.compile.")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Of activations: less memory.")] = False,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Divide the model among processes (under torchrun).")] = False,
    license: Annotated[str | None, typer.Option(help="Licence of the model, as the Hub knows it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    seed: Annotated[int | None, typer.Option(help=f"Of weights, windows, dropout. {default('seed')}")] = None,
    as_json: JsonFlag = False,
):
    """Train a Llama 3 on a text and leave a model folder; several processes: torchrun -m hf_llama3 train ..."""
    settings = make_settings(preset, **{name: value for name, value in called.params.items() if name in SETTINGS})
    from hf_llama3.model_card import build_card, check_license, write_card
    from hf_llama3.training.recipe import train

    if license is not None:
        check_license(license)  # before hours of training
    report = train(text, output, settings, resume, progress=True).to_dict()
    if not is_first_process():
        return
    if license is not None:
        write_card(output / "README.md", build_card(output, license))
    if as_json:
        print_json(report)
        return
    report.pop("curves")
    notes = report.pop("notes")
    print_table(report)
    print_list("Note", notes)
