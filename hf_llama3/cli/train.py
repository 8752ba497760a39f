"""The command that trains."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from hf_llama3.training.settings import PRESETS, Settings, make_settings

from .app import command, is_first_process
from .options import JsonFlag, group, one_of
from .printing import print_json, print_list, print_next, print_table

GROUP = "Train"
SETTINGS = {field.name for field in fields(Settings)}
DATA, MODEL, OPTIMISATION, RUN = group("Data"), group("Model"), group("Optimisation"), group("Run")


def usual(name: str, or_else: str = "") -> dict:
    """Show an option's default, which a preset may replace, where typer shows defaults."""
    return {"show_default": f"{getattr(Settings, name)}{or_else}"}


@command("hf-llama3 train --text tinyshakespeare.txt --output runs/shakespeare --preset shakespeare-cpu", GROUP)
def train(
    called: typer.Context,
    text: Annotated[Path, DATA(help="Text file in UTF-8, of any size.")],
    output: Annotated[Path, RUN(help="Model folder to make.")],
    preset: Annotated[
        str | None,
        RUN(help=f"Named settings: {', '.join(PRESETS)}; other options override them.", **one_of(*PRESETS)),
    ] = None,
    tokenizer: Annotated[
        str | None,
        DATA(help="char, bpe:N for N tokens, or a folder with a tokenizer.", **usual("tokenizer")),
    ] = None,
    validation_share: Annotated[
        float | None, DATA(help="Share of the text that validates, held out of training.", **usual("validation_share"))
    ] = None,
    test_share: Annotated[
        float | None, DATA(help="Share of the text that tests, once, after training.", **usual("test_share"))
    ] = None,
    source: Annotated[str | None, MODEL("--from", help="Folder of a model to continue from.")] = None,
    lora: Annotated[int | None, MODEL(help="Train LoRA adapters of this rank instead of the weights.")] = None,
    layers: Annotated[int | None, MODEL(help="Number of decoder layers.", **usual("layers"))] = None,
    hidden_size: Annotated[int | None, MODEL(help="Width of the hidden states.", **usual("hidden_size"))] = None,
    intermediate_size: Annotated[
        int | None, MODEL(help="Width of the feed-forward.", show_default="8/3 of the hidden size")
    ] = None,
    heads: Annotated[int | None, MODEL(help="Number of query heads.", **usual("heads"))] = None,
    kv_heads: Annotated[int | None, MODEL(help="Number of key/value heads.", **usual("kv_heads"))] = None,
    context: Annotated[int | None, MODEL(help="Number of tokens in a window.", **usual("context"))] = None,
    dropout: Annotated[float | None, MODEL(help="Dropout probability.", **usual("dropout"))] = None,
    steps: Annotated[int | None, OPTIMISATION(help="Number of optimiser steps.", **usual("steps"))] = None,
    batch_size: Annotated[
        int | None, OPTIMISATION(help="Windows in a step, over all processes.", **usual("batch_size"))
    ] = None,
    accumulate: Annotated[
        int | None, OPTIMISATION(help="Parts in which a step is computed, to save memory.", **usual("accumulate"))
    ] = None,
    learning_rate: Annotated[
        float | None,
        OPTIMISATION(help="Peak learning rate of AdamW.", **usual("learning_rate", "; 1e-4 with --from")),
    ] = None,
    matrix_learning_rate: Annotated[
        float | None,
        OPTIMISATION(
            help="Peak learning rate of Muon, which trains the matrices of the layers; 0 leaves them to AdamW.",
            **usual("matrix_learning_rate", "; 0 with --from"),
        ),
    ] = None,
    weight_decay: Annotated[
        float | None, OPTIMISATION(help="Weight decay of the matrices.", **usual("weight_decay"))
    ] = None,
    warmup: Annotated[
        float | None, OPTIMISATION(help="Share of the steps in which the learning rate rises.", **usual("warmup"))
    ] = None,
    seed: Annotated[int | None, OPTIMISATION(help="Seed of weights, windows and dropout.", **usual("seed"))] = None,
    bf16: Annotated[
        bool | None,
        RUN("--bf16/--no-bf16", help="Compute in bfloat16.", show_default="on a GPU that supports it"),
    ] = None,
    compile: Annotated[bool, RUN("--compile", help="Compile the model with torch.compile.")] = False,
    checkpointing: Annotated[
        bool, RUN("--checkpointing", help="Recompute activations in the backward pass, to save memory.")
    ] = False,
    fsdp: Annotated[bool, RUN("--fsdp", help="Shard the model among torchrun's processes (FSDP2).")] = False,
    eval_every: Annotated[
        int | None, RUN(help="Number of steps between evaluations.", show_default="a tenth of the steps")
    ] = None,
    resume: Annotated[bool, RUN("--resume", help="Continue an interrupted run.")] = False,
    license: Annotated[str | None, RUN(help="Write a model card with this licence, by the Hub's identifier.")] = None,
    as_json: JsonFlag = False,
):
    """Train a Llama 3 on a text and write a model folder; for several processes: torchrun -m hf_llama3 train ..."""
    settings = make_settings(preset, **{name: value for name, value in called.params.items() if name in SETTINGS})
    from hf_llama3.model_card import build_card, check_license, write_card
    from hf_llama3.training.recipe import train

    if license is not None:
        check_license(license)  # before hours of training
    report = train(text, output, settings, resume, progress=True)
    if not is_first_process():
        return
    if license is not None:
        write_card(output / "README.md", build_card(output, license))
    if as_json:
        print_json(report.to_dict())
        return
    before, after = f"{report.first_loss:.3f} before", f"{report.validation_loss:.3f} at step {report.best_step}"
    print_table(
        {
            "output": report.output,
            "continued from": report.source,
            "text": f"{report.text}, of which {report.tokens:,} tokens train",
            "model": f"{report.num_parameters:,} parameters; {report.vocab_size:,} tokens in the vocabulary, "
            f"{report.context:,} in the context",
            "steps": f"{report.steps:,}, of {report.batch_size} windows; learning rate {report.learning_rate}, seed "
            f"{report.seed}",
            "validation loss": f"{after}, {before}, in nats per token",
            "test loss": report.test_loss,
            "speed": f"{report.tokens_per_second:,.0f} tokens/s",
            "seconds": report.seconds,
        }
    )
    print_list("Note", report.notes)
    print_next("generate", output, "Once upon a time", "--temperature", "0.8")
